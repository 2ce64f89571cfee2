"""Baselines: what each computes, that padding and the future change nothing, and their place in the recipes."""

import importlib.util
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioFrameClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import scripts.baselines  # noqa: F401  registers them
from modeling_rtransformer import RTransformerForCausalLM
from scripts import evaluate, train
from scripts.results.parameter_matching import (
    baseline_overrides,
    count_parameters,
    match,
    nearest_width,
    read_baselines,
)
from scripts.training.recipe import CONFIGURATION, read_recipe
from tests.conftest import tiny_config
from tests.tiny_recipe import CLASSIFICATION, LANGUAGE_MODELING, write_recipe, write_table, write_text


needs_tcn = pytest.mark.skipif(importlib.util.find_spec("pytorch_tcn") is None, reason="pytorch-tcn is not installed")
MODELS = {
    "rnn": {"model_type": "recurrent", "kind": "rnn"},
    "gru": {"model_type": "recurrent", "kind": "gru"},
    "lstm": {"model_type": "recurrent", "kind": "lstm"},
    "tcn": {"model_type": "tcn"},
    "rnmt": {"model_type": "rnmt_plus", "num_attention_heads": 2},
    "rnmt-dot": {
        "model_type": "rnmt_plus", "num_attention_heads": 3, "num_hidden_layers": 3, "attention": "dot",
        "gate_norm": False,
    },
    "toeplitz": {
        "model_type": "toeplitz", "num_attention_heads": 2, "rem_kinds": ["none", "regular"], "num_local_rnns": 0,
        "max_length": 40,
    },
}  # fmt: skip
HEADS = [AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForAudioFrameClassification]
NAMES = [pytest.param(name, marks=needs_tcn) if name == "tcn" else name for name in MODELS]


def make(name, auto_class=AutoModelForCausalLM, **fields):
    """A model with weights large enough for differences to show."""
    fields = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_labels": 3, **MODELS[name], **fields}
    config = AutoConfig.for_model(**fields, initializer_range=0.5)
    return auto_class.from_config(config).eval()


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__.removeprefix("AutoModelFor"))
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_changes_nothing(name, auto_class):
    model = make(name, auto_class)
    ids = torch.randint(11, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, 6:] = 0, 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    for row in range(3):
        alone = model(input_ids=ids[row : row + 1, mask[row].bool()]).logits[0]
        found = padded[row] if padded.dim() == 2 else padded[row, mask[row].bool()]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_future_does_not_leak(name):
    model = make(name, AutoModelForAudioFrameClassification)
    ids = torch.randint(11, (2, 9))
    changed = ids.clone()
    changed[:, 6:] = (ids[:, 6:] + 1) % 11
    torch.testing.assert_close(model(input_ids=ids).logits[:, :6], model(input_ids=changed).logits[:, :6])
    assert not torch.allclose(model(input_ids=ids).logits[:, 6:], model(input_ids=changed).logits[:, 6:])


@pytest.mark.parametrize("auto_class", HEADS[1:], ids=["sequence", "frames"])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_read_and_every_parameter_learns(name, auto_class):
    model = make(name, auto_class, num_input_features=4, problem_type="multi_label_classification").train()
    shape = (2, 3) if auto_class is HEADS[1] else (2, 9, 3)
    loss = model(input_values=torch.randn(2, 9, 4), labels=torch.rand(shape)).loss
    loss.backward()
    assert model.main_input_name == "input_values"
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []
    with pytest.raises(ValueError, match="`num_input_features` = 4"):
        model(input_values=torch.randn(2, 9, 5))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_with_the_same_outputs_and_without_code(name, tmp_path):
    model = make(name, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(11, (2, 9))
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert list(tmp_path.glob("*.py")) == []


@pytest.mark.parametrize("name", ["lstm", pytest.param("tcn", marks=needs_tcn)])
def test_embeddings_are_tied_or_not(name):
    tied, untied = make(name), make(name, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() == tied.num_parameters() + 11 * 12


def test_the_language_models_loss_is_that_of_ours():
    model = make("gru")
    ids = torch.randint(11, (2, 9))
    output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@needs_tcn
def test_a_tcn_sees_exactly_its_receptive_field():
    model = make("tcn", AutoModelForAudioFrameClassification, num_hidden_layers=3, hidden_size=16).double()
    values = torch.randint(11, (1, 40))
    embedded = model.model.embed_tokens(values).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1].sum().backward()
    seen = embedded.grad[0].abs().sum(-1).nonzero().flatten()
    assert seen.min() == 40 - (1 + 2 * (3 - 1) * (2**3 - 1)) and seen.max() == 39


def test_a_tcn_without_its_library_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the library pytorch-tcn, .* pip install pytorch-tcn"):
        AutoConfig.for_model("tcn")


class TestToeplitz:
    RSA = {"num_local_rnns": 0, "num_attention_heads": 5, "rem_gate": "head", "position_embedding": "none"}
    KINDS = ["regular", "none", "first_cyclical", "second_cyclical", "none"]

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_with_the_weights_of_a_rem_it_is_the_rsa_head(self, attention):
        fields = {**self.RSA, "rem_kinds": self.KINDS, "rem_dilations": [1, 1, 2, 1, 1]}
        rsa = RTransformerForCausalLM(tiny_config(**fields)).eval()
        model = make("toeplitz", vocab_size=37, hidden_size=20, **fields, pad_token_id=0).eval()
        model.load_state_dict(rsa.state_dict(), strict=False)
        for ours, theirs in zip(model.model.layers, rsa.model.layers, strict=True):
            toeplitz, rem = ours.self_attn.recurrence, theirs.self_attn.recurrence
            matrix = rem.matrix(torch.arange(40), 40)[0, toeplitz.head_indices]
            order = [rem.head_indices.index(head) for head in toeplitz.head_indices]
            toeplitz.weight.data.copy_(matrix[:, 1:, 0])
            toeplitz.mu.data.copy_(rem.mu[order])
        model.set_attn_implementation(attention)
        ids = torch.randint(1, 37, (2, 23))
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        expected = rsa(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1, 5:], expected[1, 5:], rtol=1e-4, atol=1e-4)

    def test_a_longer_sequence_is_refused(self):
        with pytest.raises(ValueError, match="at most `max_length` = 40 positions, got 41"):
            make("toeplitz")(input_ids=torch.ones(1, 41, dtype=torch.long))

    def test_it_has_a_weight_for_each_distance_and_head(self):
        rem = make("toeplitz")
        longer = make("toeplitz", max_length=50)
        assert longer.num_parameters() == rem.num_parameters() + 2 * 10  # two layers with one head each

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rem_kinds": ["none"] * 2}, "`rem_kinds` must name at least one head that is not none, got"),
            ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
            ({"is_causal": False}, "`is_causal` must be True"),
        ],
    )
    def test_a_wrong_config_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            make("toeplitz", **fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lstm", {"kind": "lsmt"}, "`kind` must be one of rnn, gru, lstm, got 'lsmt'; did you mean `lstm`"),
        ("lstm", {"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ("lstm", {"output_dropout": 1.0}, r"`output_dropout` must be in \[0, 1\), got 1.0"),
        (
            "rnmt",
            {"num_attention_heads": 3},
            r"`num_attention_heads` must be a divisor of `hidden_size` \(128\), got 3",
        ),
        ("rnmt", {"attention": "additve"}, "`attention` must be one of additive, dot, got 'additve'; did you mean"),
        ("rnmt", {"residual_from": 0}, "`residual_from` must be at least 1, since layer 0 reads another width, got 0"),
        ("rnmt", {"cell_clip": 0}, "`cell_clip` must be positive, got 0"),
        ("rnmt-dot", {"num_attention_heads": 4, "cell_clip": 1.0}, "`cell_clip` needs `gate_norm`, .* got 1.0"),
        ("rnmt", {"attention_dropout": 1.0}, r"`attention_dropout` must be in \[0, 1\), got 1.0"),
        pytest.param("tcn", {"kernel_size": 1}, "`kernel_size` must be at least 2, got 1", marks=needs_tcn),
    ],
)
def test_a_wrong_config_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model(**{**MODELS[name], **fields})


@pytest.mark.parametrize("name", ["lstm", pytest.param("tcn", marks=needs_tcn), "rnmt", "toeplitz"])
@pytest.mark.parametrize("task", [LANGUAGE_MODELING, CLASSIFICATION], ids=["language_modeling", "classification"])
def test_a_recipe_trains_a_baseline_in_place_of_its_model(tmp_path, name, task):
    data = write_text(tmp_path) if task is LANGUAGE_MODELING else write_table(tmp_path)
    recipe = write_recipe(tmp_path, task, data)
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in {**MODELS[name], "hidden_size": 8}.items())
    settings = [f"model={{{table}}}", "training.max_steps=2"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = train.main([str(recipe), "--output-dir", str(tmp_path / "run"), *arguments])
    assert result["overrides"] == settings
    again = evaluate.main([str(tmp_path / "run" / "final")])
    assert again["metrics"] == pytest.approx(result["metrics"]["test"], rel=1e-4)


def test_settings_of_another_model_type_are_refused_with_the_way_to_drop_them(tmp_path):
    recipe = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))
    with pytest.raises(ValueError, match="`model.num_attention_heads` is not .* --set 'model={model_type = ...}'"):
        read_recipe(recipe, ["model.model_type=recurrent"])
    with pytest.raises(ValueError, match="--set 'model=recurrent' must be a table"):
        read_recipe(recipe, ["model=recurrent"])
    replaced = read_recipe(recipe, ['model={model_type = "recurrent"}', "model.hidden_size=7"])
    assert dict(replaced.model) == {"model_type": "recurrent", "hidden_size": 7}


class TestEqualParameters:
    def test_the_nearest_width_is_found(self):
        assert nearest_width(lambda width: width**2, 50) == 7
        assert nearest_width(lambda width: width**2, 57) == 8
        assert nearest_width(lambda width: width**2, 50, step=4) == 8
        assert nearest_width(lambda width: width + 10, 3) == 1

    @pytest.fixture
    def recipe(self, tmp_path):
        folder = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path), hidden_size=40)
        (folder / "baselines.toml").write_text(
            '[transformer]\nset = ["model.num_local_rnns=0", "model.position_embedding=sinusoidal"]\n'
            '[gru]\nset = [\'model={model_type = "recurrent", kind = "gru"}\']\n'
        )
        return folder

    @pytest.mark.parametrize("name", ["transformer", "gru"])
    def test_each_baseline_gets_the_parameters_of_the_recipe(self, recipe, name, tmp_path):
        def train_once(overrides):
            arguments = [part for override in (*overrides, "training.max_steps=1") for part in ("--set", override)]
            return train.main([str(recipe), *arguments, "--output-dir", str(tmp_path / f"run-{len(overrides)}")])

        shared = ("model.hidden_size=60", "task.window=25")
        own, found = train_once(shared), train_once(baseline_overrides(recipe, name, shared))
        assert found["parameters"] == pytest.approx(own["parameters"], rel=0.02)
        assert "task.window=25" in found["overrides"]

    def test_a_small_model_may_miss_by_half_a_unit_of_its_width(self, recipe):
        prepared = read_recipe(recipe).prepare(None, ("train",))
        overrides = read_baselines(recipe)["gru"]
        counts = [count_parameters(read_recipe(recipe, overrides), prepared, hidden_size=width) for width in (4, 5)]
        target = counts[0] + (counts[1] - counts[0]) // 3
        assert (target - counts[0]) / target > 0.02
        assert match(recipe, overrides, target, prepared) == [*overrides, "model.hidden_size=4"]

    def test_parameters_that_no_width_gives_are_refused(self, recipe):
        prepared = read_recipe(recipe).prepare(None, ("train",))
        with pytest.raises(ValueError, match="no `hidden_size` gives the baseline 10 parameters within 2%"):
            match(recipe, read_baselines(recipe)["gru"], 10, prepared)

    @pytest.mark.parametrize("text", ["gru = 3", "[gru]\nset = 3", "[gru]\nset = []\nwidth = 3", "[gru]\nset = [3]"])
    def test_a_file_of_another_form_is_refused(self, recipe, text):
        (recipe / "baselines.toml").write_text(text)
        with pytest.raises(ValueError, match=r"\[gru\] of .* must have one key, `set`"):
            read_baselines(recipe)

    def test_a_recipe_without_baselines_says_so(self, recipe):
        (recipe / "baselines.toml").unlink()
        with pytest.raises(FileNotFoundError, match="has no baselines.toml"):
            read_baselines(recipe)

    def test_a_baseline_that_a_recipe_does_not_have_is_refused(self, recipe):
        with pytest.raises(ValueError, match="has no baseline 'gro'; did you mean `gru`"):
            baseline_overrides(recipe, "gro")


@pytest.mark.parametrize("path", sorted(CONFIGURATION.glob("*/baselines.toml")), ids=lambda path: path.parent.name)
def test_the_baselines_of_the_repository_are_valid(path):
    for name, overrides in read_baselines(path.parent.name).items():
        if name != "tcn" or importlib.util.find_spec("pytorch_tcn"):
            read_recipe(path.parent.name, overrides)
