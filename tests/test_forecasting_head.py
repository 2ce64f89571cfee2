"""The head that forecasts: shapes, the reversible norm, padding, channels one by one, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoModelForTimeSeriesPrediction

from modeling_rtransformer import RTransformerConfig, RTransformerForTimeSeriesPrediction
from tests.conftest import tiny_config


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CHANNELS, STEPS = 3, 4


def forecaster(variant="gru-and-rsa", **fields):
    fields = {"num_input_features": CHANNELS, "prediction_length": STEPS, "instance_norm": "reversible", **fields}
    return RTransformerForTimeSeriesPrediction(tiny_config(variant, **fields)).eval()


@pytest.mark.parametrize("instance_norm", ["none", "reversible"])
def test_the_loss_is_the_mean_squared_error(variant, instance_norm):
    model = forecaster(variant, instance_norm=instance_norm)
    past, future = torch.randn(2, 17, CHANNELS), torch.randn(2, STEPS, CHANNELS)
    output = model(past_values=past, future_values=future)
    assert output.prediction_outputs.shape == future.shape
    torch.testing.assert_close(output.loss, (output.prediction_outputs - future).square().mean())
    assert model(past_values=past).loss is None


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("independent", [False, True], ids=["together", "independent"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_forecast(variant, side, independent, is_causal):
    features = 1 if independent else CHANNELS
    model = forecaster(
        variant, channel_independent=independent, num_input_features=features, is_causal=is_causal
    ).double()
    rows = [torch.randn(n, CHANNELS, dtype=torch.float64) for n in (9, 17)]
    past, mask = 5 * torch.randn(2, 17, CHANNELS, dtype=torch.float64), torch.ones(2, 17, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(17 - len(row), None) if side == "left" else slice(0, len(row))
        mask[index] = 0
        past[index, place], mask[index, place] = row, 1
    together = model(past_values=past, attention_mask=mask).prediction_outputs
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index], model(past_values=row[None]).prediction_outputs[0], **CLOSE)


def test_the_reversible_norm_follows_level_and_scale_of_each_channel():
    model = forecaster().double()
    past = torch.randn(2, 17, CHANNELS, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 0.5, 30.0]).double(), torch.tensor([-7.0, 0.0, 400.0]).double()
    before, after = (model(past_values=x) for x in (past, past * scale + shift))
    torch.testing.assert_close(
        after.prediction_outputs, before.prediction_outputs * scale + shift, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(before.loc, past.mean(1, keepdim=True))
    torch.testing.assert_close(before.scale, (past.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt())
    plain = forecaster(instance_norm="none").double()
    assert not torch.allclose(
        plain(past_values=past + 5).prediction_outputs, plain(past_values=past).prediction_outputs + 5
    )


def test_a_past_that_does_not_change_has_a_finite_forecast_and_gradient():
    model = forecaster().train()
    model(past_values=torch.full((1, 9, CHANNELS), 3.0), future_values=torch.ones(1, STEPS, CHANNELS)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_independent_channels_do_not_see_each_other_and_share_their_weights(variant):
    model = forecaster(variant, channel_independent=True, num_input_features=1).double()
    past = torch.randn(2, 17, 5, dtype=torch.float64)
    together = model(past_values=past).prediction_outputs
    for channel in range(5):
        alone = model(past_values=past[..., channel : channel + 1]).prediction_outputs
        torch.testing.assert_close(together[..., channel : channel + 1], alone, **CLOSE)
    mixed = forecaster(variant).double()
    changed = past[..., :3].clone()
    changed[..., 1] = changed[..., 1].flip(1)
    first = [mixed(past_values=x).prediction_outputs[..., 0] for x in (past[..., :3], changed)]
    assert not torch.allclose(*first)


FIXED = {"context_length": 17, "forecast_head": "flattened", "linear_shortcut": True, "patch_length": 4}


@pytest.mark.parametrize("independent", [False, True], ids=["together", "independent"])
def test_patches_are_consecutive_steps_and_the_first_that_fill_none_are_left_out(variant, independent):
    features = 1 if independent else CHANNELS
    model = forecaster(
        variant, patch_length=4, channel_independent=independent, num_input_features=features, instance_norm="none"
    )
    past = torch.randn(2, 18, CHANNELS)
    forecast = model(past_values=past).prediction_outputs
    torch.testing.assert_close(forecast, model(past_values=past[:, 2:]).prediction_outputs, **CLOSE)
    rows = [past[:, 2:]] if not independent else [past[:, 2:, channel, None] for channel in range(CHANNELS)]
    by_hand = [torch.cat([row[:, step : step + 4].flatten(1)[:, None] for step in (0, 4, 8, 12)], 1) for row in rows]
    states = [model.model(input_values=values).last_hidden_state[:, -1] for values in by_hand]
    steps = torch.cat([model.head(state).view(2, STEPS, features) for state in states], -1)
    torch.testing.assert_close(forecast, steps, **CLOSE)


def test_a_flattened_head_sees_every_position(variant):
    model = forecaster(variant, context_length=8, forecast_head="flattened").double()
    past = torch.randn(1, 8, CHANNELS, dtype=torch.float64)
    states = model.model(input_values=(past - past.mean(1)) / (past.var(1, unbiased=False) + 1e-5).sqrt())
    steps = model.head(states.last_hidden_state.flatten(1)).view(1, STEPS, CHANNELS)
    output = model(past_values=past)
    torch.testing.assert_close(output.prediction_outputs, steps * output.scale + output.loc, **CLOSE)


@pytest.mark.parametrize("instance_norm", ["none", "reversible", "last"])
def test_a_model_with_a_shortcut_begins_with_the_mean_of_the_past_and_adds_to_a_linear_map(instance_norm):
    model = forecaster(instance_norm=instance_norm, **FIXED).double()
    past = torch.randn(2, 17, CHANNELS, dtype=torch.float64)
    mean = past.mean(1, keepdim=True).expand(-1, STEPS, -1)
    torch.testing.assert_close(model(past_values=past).prediction_outputs, mean, rtol=1e-4, atol=1e-4)
    torch.nn.init.normal_(model.shortcut.weight)
    output = model(past_values=past)
    steps = torch.einsum("pl,blc->bpc", model.shortcut.weight, (past - output.loc) / output.scale)
    torch.testing.assert_close(output.prediction_outputs, steps * output.scale + output.loc, **CLOSE)
    torch.nn.init.normal_(model.head.weight)
    assert not torch.allclose(model(past_values=past).prediction_outputs, output.prediction_outputs)


def test_the_last_value_can_be_what_a_forecast_starts_from():
    model = forecaster(instance_norm="last").double()
    past, level = torch.randn(1, 9, CHANNELS, dtype=torch.float64), torch.tensor([5.0, -1.0, 0.5]).double()
    before, after = (model(past_values=values) for values in (past, past + level))
    torch.testing.assert_close(after.prediction_outputs, before.prediction_outputs + level, **CLOSE)
    torch.testing.assert_close(before.loc, past[:, -1:])
    padded = torch.cat([past, torch.full((1, 2, CHANNELS), 9.0).double()], 1)
    mask = torch.tensor([[1] * 9 + [0] * 2])
    together = model(past_values=padded, attention_mask=mask)
    torch.testing.assert_close(together.prediction_outputs, before.prediction_outputs, **CLOSE)


def test_the_huber_loss_is_torchs():
    model = forecaster(forecast_loss="huber")
    past, future = torch.randn(2, 9, CHANNELS), 5 * torch.randn(2, STEPS, CHANNELS)
    output = model(past_values=past, future_values=future)
    torch.testing.assert_close(output.loss, torch.nn.functional.huber_loss(output.prediction_outputs, future))


def test_every_parameter_learns_with_a_shortcut_once_the_head_has_begun(variant):
    model = forecaster(variant, is_causal=False, **FIXED).train()
    torch.nn.init.normal_(model.head.weight)
    model(past_values=torch.randn(2, 17, CHANNELS), future_values=torch.randn(2, STEPS, CHANNELS)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.head.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_every_parameter_learns(variant):
    model = forecaster(variant, is_causal=False).train()
    model(past_values=torch.randn(2, 9, CHANNELS), future_values=torch.randn(2, STEPS, CHANNELS)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_saved_model_is_loaded_by_its_auto_class(variant, tmp_path):
    model = forecaster(variant)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    assert type(loaded) is RTransformerForTimeSeriesPrediction and loaded.main_input_name == "past_values"
    past = torch.randn(2, 9, CHANNELS)
    assert torch.equal(loaded(past_values=past).prediction_outputs, model(past_values=past).prediction_outputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_length": 0}, "`prediction_length` must be at least 1, got 0"),
        ({"num_input_features": 0}, "`num_input_features` must be at least 1.*, got 0"),
        ({"instance_norm": "revin"}, "`instance_norm` must be one of none, reversible, last, got 'revin'"),
        ({"channel_independent": True}, "`num_input_features` must be 1 with `channel_independent`, got 3"),
        ({"forecast_head": "flattened"}, "`context_length` must be the steps of every past with .* got None"),
        ({"linear_shortcut": True}, "`context_length` must be the steps of every past with .* got None"),
        ({"context_length": 3, "patch_length": 4}, r"`context_length` must be at least `patch_length` \(4\).* got 3"),
        ({"patch_length": 0}, "`patch_length` must be at least 1, got 0"),
        ({"forecast_head": "flat"}, "`forecast_head` must be one of pooled, flattened, got 'flat'"),
        ({"forecast_loss": "hubert"}, "`forecast_loss` must be one of mse, huber, got 'hubert'; did you mean `huber`"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        forecaster(**fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_values": torch.ones(2, 9, 4)}, r"\(batch, length, `num_input_features` = 3\), got \(2, 9, 4\)"),
        ({"past_values": torch.ones(2, 9)}, r"`past_values` must have the shape .* got \(2, 9\)"),
        ({"past_values": torch.ones(2, 0, 3)}, r"`past_values` must have the shape .* got \(2, 0, 3\)"),
        (
            {"past_values": torch.ones(2, 9, 3), "attention_mask": torch.ones(2, 8)},
            r"`attention_mask` must have the shape \(batch, length\) = \(2, 9\), got \(2, 8\)",
        ),
        (
            {"past_values": torch.ones(2, 9, 3), "future_values": torch.ones(2, 5, 3)},
            r"`future_values` must have .* `prediction_length`, channels\) = \(2, 4, 3\), got \(2, 5, 3\)",
        ),
    ],
)
def test_input_of_another_shape_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        forecaster()(**inputs)


@pytest.mark.parametrize(
    ("fields", "steps", "mask", "message"),
    [
        ({"context_length": 9}, 8, None, "`past_values` must have `context_length` = 9 steps, got 8"),
        ({"patch_length": 9}, 8, None, "`past_values` must have `patch_length` = 9 or more steps, got 8"),
        ({"patch_length": 4}, 8, torch.tensor([[0] + [1] * 7] * 2), "`attention_mask` must be all ones with"),
        ({"context_length": 8}, 8, torch.tensor([[0] + [1] * 7] * 2), "`attention_mask` must be all ones with"),
    ],
)
def test_pasts_of_fixed_length_are_not_padded(fields, steps, mask, message):
    with pytest.raises(ValueError, match=message):
        forecaster(**fields)(past_values=torch.ones(2, steps, CHANNELS), attention_mask=mask)


@pytest.mark.parametrize("name", ["prediction_length", "num_input_features"])
def test_a_forecaster_needs_a_horizon_and_channels(name):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Field '{name}' expected int, got NoneType"):
        forecaster(**{name: None})


def test_a_forecaster_from_before_it_had_a_config_of_its_own_says_how_to_convert_it(tmp_path):
    model = forecaster(patch_length=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"rtransformer_forecaster"', '"rtransformer"'))
    with pytest.raises(ValueError, match="change `model_type` to 'rtransformer_forecaster'"):
        AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    path.write_text(text)  # what the message says
    past = torch.randn(2, 9, CHANNELS)
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    assert torch.equal(loaded(past_values=past).prediction_outputs, model(past_values=past).prediction_outputs)


def test_the_other_models_have_no_fields_of_forecasters_but_load_a_config_that_has_them_unused():
    saved_before = {"prediction_length": None, "context_length": None, "patch_length": 1, "instance_norm": "none"}
    config = RTransformerConfig.from_dict({"model_type": "rtransformer", "hidden_size": 64, **saved_before})
    assert not saved_before.keys() & config.to_dict().keys()
