"""What every causal model must do, for the systems that visit positions in an order of their own."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioFrameClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)

from modeling_rtransformer.library_versions import CACHE_NAMES
from tests.scheduled_models import (
    CLOSE,
    LENGTH,
    VARIANTS,
    causal_lm,
    padded_batch,
    random_ids,
    tiny_config,
)


GREEDY = {"do_sample": False, "max_new_tokens": 9}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def test_future_tokens_do_not_change_past_outputs(variant):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, 9:] = 3 + (ids[:, 9:] - 2) % 34
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before - after)[:, 9:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize(("side", "attention"), [("left", "sdpa"), ("right", "eager")])
def test_a_padded_batch_equals_each_row_alone(variant, side, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    rows = [random_ids(9), random_ids(LENGTH), random_ids(1)]
    ids, mask = padded_batch(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("described_by", ["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_equal_each_alone_with_gradients(variant, described_by):
    model = causal_lm(variant).double()
    rows = [random_ids(n) for n in (7, 1, 5, 3)]
    packed = torch.cat(rows)[None]
    description = {
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "cu_seq_lens_q": torch.tensor([0, 7, 8, 13, 16], dtype=torch.int32),
    }
    together = model(packed, **{described_by: description[described_by]}).logits[0]
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)
    weights, parameters = torch.randn_like(alone), list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((together * weights).sum(), parameters),
        torch.autograd.grad((alone * weights).sum(), parameters),
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_cached_decoding_equals_the_full_forward_at_every_step(variant):
    model = causal_lm(variant)
    ids = random_ids(2, LENGTH)
    full = model(ids).logits
    for chunks in ([1] * LENGTH, [2, 7, 1, 7]):
        cache, logits = DynamicCache(config=model.config), []
        for chunk in ids.split(chunks, dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), full, **CLOSE)


@pytest.mark.parametrize("room", [0, 8])
def test_a_static_cache_gives_the_same(variant, room):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    cache, logits = StaticCache(config=model.config, max_cache_len=LENGTH + room), []
    with torch.no_grad():
        for chunk in ids.split([6, 1, 1, 3, 6], dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_is_filled_and_read_under_both_names(variant, name):
    model, ids = causal_lm(variant), random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :5], **{name: cache})
    last = model(ids[:, 5:], **{name: cache})
    torch.testing.assert_close(last.logits[:, -1], model(ids, use_cache=False).logits[:, -1], **CLOSE)
    for output in (first, last):
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"] is cache


class TestGenerate:
    def test_greedy_is_the_likeliest_token_each_time(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        expected = ids
        for _ in range(9):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert model.generate(ids, **GREEDY).tolist() == expected.tolist()

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_prompts_of_unequal_length_padded_left(self, variant, cache):
        model = causal_lm(variant)
        rows = [random_ids(n) for n in (2, 9, 7)]
        ids, mask = padded_batch(rows, "left")
        options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
        together = model.generate(ids, attention_mask=mask, **options)
        for row, output in zip(rows, together):
            alone = model.generate(row[None], use_cache=False, **GREEDY)[0, len(row) :]
            assert output[9:].tolist() == alone.tolist()

    def test_beam_search_reorders_the_memories(self, variant):
        model, ids = causal_lm(variant), random_ids(3, 6)
        options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
        assert model.generate(ids, **options).tolist() == model.generate(ids, **options, use_cache=False).tolist()

    def test_sampling_is_decided_by_the_seed(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}
            runs.append(model.generate(ids, use_cache=use_cache, **options).tolist())
        assert runs[0] == runs[1] and len({tuple(row) for row in runs[0]}) > 2

    def test_an_assistant_or_a_look_up_changes_nothing_but_the_speed(self, variant):
        model, ids = causal_lm(variant), random_ids(1, 6).repeat(1, 2)
        expected = model.generate(ids, **GREEDY).tolist()
        torch.manual_seed(1)
        other = causal_lm(variant)
        for assistant in (other, model):
            assert model.generate(ids, assistant_model=assistant, **GREEDY).tolist() == expected
        assert model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected
        assert model.generate(ids, assistant_early_exit=1, **GREEDY).tolist() == expected

    def test_embeddings_can_be_the_prompt(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        embedded = model.get_input_embeddings()(ids)
        assert (
            model.generate(inputs_embeds=embedded, **GREEDY).tolist() == model.generate(ids, **GREEDY)[:, 6:].tolist()
        )


@pytest.mark.parametrize("removed", [1, 4, 9])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(variant, removed):
    model, ids = causal_lm(variant), random_ids(2, 23)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :7], cache=cache)
    model(ids[:, 7:17], cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 17 - removed
    cropped = torch.cat([ids[:, : 17 - removed], random_ids(2, 5)], dim=1)
    continued = model(cropped[:, 17 - removed :], cache=cache).logits
    torch.testing.assert_close(continued, model(cropped).logits[:, 17 - removed :], **CLOSE)


def test_gradient_checkpointing_gives_the_same_gradients(variant, monkeypatch):
    monkeypatch.setattr("modeling_rtransformer.modeling_feedback.CHECKPOINTED_STEPS", 5)
    for reentrant in (False, True):
        model = causal_lm(variant).train()
        ids, mask = padded_batch([random_ids(9), random_ids(13)], "left")
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(ids, attention_mask=mask, labels=ids).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for plain, checkpointed in zip(*gradients):
            torch.testing.assert_close(plain, checkpointed)


def test_every_parameter_learns(variant):
    model = causal_lm(variant).train()
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_hidden_states_are_the_embedding_and_each_layer(variant):
    model = causal_lm(variant)
    output = model(random_ids(2, 9), output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 20)] * (model.config.num_hidden_layers + 1)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


class TestHeads:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_change_a_prediction(self, variant, side):
        model = AutoModelForSequenceClassification.from_config(tiny_config(variant, num_labels=4)).eval()
        rows = [random_ids(9), random_ids(LENGTH)]
        ids, mask = padded_batch(rows, side)
        logits = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index], model(row[None]).logits[0], **CLOSE)

    def test_values_go_through_a_linear_layer_in_base_and_heads(self, variant):
        config = tiny_config(variant, num_input_features=3, num_labels=4)
        values = torch.randn(2, 9, 3)
        for auto_class, shape in (
            (AutoModel, (2, 9, 20)),
            (AutoModelForCausalLM, (2, 9, 37)),
            (AutoModelForSequenceClassification, (2, 4)),
            (AutoModelForTokenClassification, (2, 9, 4)),
            (AutoModelForAudioFrameClassification, (2, 9, 4)),
        ):
            model = auto_class.from_config(config).eval()
            assert model.main_input_name == "input_values" and model(input_values=values)[0].shape == shape

    @pytest.mark.parametrize("variant", ["feedback-shared", "bottleneck-chunks"])
    def test_frames_may_have_several_labels(self, variant):
        config = tiny_config(variant, num_input_features=3, num_labels=4, problem_type="multi_label_classification")
        model = AutoModelForAudioFrameClassification.from_config(config).eval()
        labels = torch.randint(0, 2, (2, 9, 4)).float()
        output = model(input_values=torch.randn(2, 9, 3), labels=labels)
        torch.testing.assert_close(output.loss, nn.functional.binary_cross_entropy_with_logits(output.logits, labels))


def test_loaded_weights_are_those_saved(variant, tmp_path):
    model = causal_lm(variant)
    with torch.no_grad():  # away from every initial value, so that a second initialisation would show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    for name, value in model.model.state_dict().items():
        assert torch.equal(head.model.state_dict()[name], value), name


@pytest.mark.parametrize("variant", ["feedback-shared", "bottleneck-chunks"])
class TestBadInput:
    @pytest.mark.parametrize(
        ("mask", "shape"),
        [(torch.ones(2, 5), r"\(2, 5\)"), (torch.ones(2, 1, 6, 6), r"\(2, 1, 6, 6\)"), ({}, "dict")],
    )
    def test_a_mask_of_another_shape_is_refused(self, variant, mask, shape):
        with pytest.raises(ValueError, match=rf"`attention_mask` must have the shape .* = \(2, 6\), .* got .*{shape}"):
            causal_lm(variant)(random_ids(2, 6), attention_mask=mask)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "exactly one of .* got neither"),
            ({"input_ids": torch.tensor([[3, 37]])}, r"`input_ids` must lie in \[0, 36\] .* got 37"),
            ({"inputs_embeds": torch.randn(1, 3, 19)}, r"`hidden_size` = 20\), got \(1, 3, 19\)"),
        ],
    )
    def test_input_that_does_not_fit_is_refused(self, variant, inputs, message):
        with pytest.raises(ValueError, match=message):
            causal_lm(variant)(**inputs)

    def test_packed_sequences_are_not_put_into_a_cache(self, variant):
        model = causal_lm(variant)
        with pytest.raises(ValueError, match="`seq_idx` describes packed sequences, and a `cache` holds one"):
            ids = random_ids(1, 6)
            model(ids, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]), cache=DynamicCache(config=model.config))

    def test_an_argument_that_no_model_has_is_refused(self, variant):
        with pytest.raises(TypeError, match="`atention_mask` is not an argument .* did you mean `attention_mask`"):
            causal_lm(variant)(random_ids(1, 3), atention_mask=None)

    def test_a_field_of_another_system_is_refused(self, variant):
        with pytest.raises(ValueError, match="`position_embedding` must be .*, got .*rotary"):
            tiny_config(variant, position_embedding="rotary")

    def test_engines_that_keep_keys_and_values_themselves_are_refused(self, variant):
        model = causal_lm(variant)
        assert not model.is_backend_compatible() and not type(model).is_backend_compatible()
        with pytest.raises(
            NotImplementedError, match="continuous batching .* use `generate` on a batch that is padded"
        ):
            model.generate_batch([[3, 4, 5]])
        model.config._attn_implementation_internal = "of_an_engine"
        with pytest.raises(
            NotImplementedError, match="`attn_implementation` must be one of eager, sdpa .* 'of_an_engine'"
        ):
            model(random_ids(1, 3))

    def test_a_quantized_cache_is_refused(self, variant):
        """It has the last keys alone as they are."""
        model = causal_lm(variant)
        cache = DynamicCache(config=model.config)
        model(random_ids(2, 9), cache=cache)
        layer = cache.layers[0]
        layer.keys, layer.values, layer.get_seq_length = layer.keys[:, :, :0], layer.values[:, :, :0], lambda: 9
        with pytest.raises(ValueError, match="`cache` must hold the keys and values of the last . positions, got 0"):
            model(random_ids(2, 1), cache=cache)
