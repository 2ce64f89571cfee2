"""Conversion of the Butterfly R-Transformer's checkpoints, of dense models to Monarch maps, and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_rtransformer import RTransformerForCausalLM, RTransformerForSequenceClassification
from modeling_rtransformer.structured_linear import ButterflyLinear
from scripts.conversion.butterfly_checkpoint import convert
from scripts.conversion.original_checkpoint import convert_names
from scripts.convert import main
from tests.conftest import tiny_config


GOLDEN = Path(__file__).parent / "golden" / "structured"  # made by the authors' code on the CPU, dropout 0
FILES = sorted(GOLDEN.glob("sfox*.safetensors"))
GATES = "forward_net.0.layers.0.local_rnn.rnn.lstm.Gates.twiddle"


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def load(path):
    with safe_open(path, framework="pt") as file:
        options = json.loads(file.metadata()["kwargs"])
    model, found = convert(path, num_attention_heads=options["h"], local_window=options["ksize"])
    return model, found, load_file(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_outputs_and_gradients_equal_the_authors(path):
    model, found, golden = load(path)
    assert found["class"] == "RTransformerModel"
    inputs = golden["input"].requires_grad_()
    output = model(inputs_embeds=inputs).last_hidden_state
    assert relative_error(output, golden["output"]) <= 1e-5
    (output**2).mean().backward()
    assert relative_error(inputs.grad, golden["grad.input"]) <= 1e-4
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key in golden:
        name = key.removeprefix("grad.")
        if not key.startswith("grad.") or name in ("input", GATES):
            continue
        [our_name] = convert_names({f"rt.{name}": golden[key]}, "stack")[0]
        gradient = ours[our_name.removeprefix("model.")]
        # The softmax does not see the key's bias: its gradient is rounding, small beside that of the key's factors.
        scale = golden[key.replace("bias", "twiddle")] if key.endswith("pooling.linears.1.bias") else golden[key]
        assert (gradient - golden[key]).abs().max() <= 1e-4 * scale.abs().max(), key


def test_the_gradient_of_the_gates_reaches_their_butterfly():
    """Our two weights are slices of its fold, gates in another order."""
    model, _, golden = load(GOLDEN / "sfox_rt_custom_butterfly_D16.safetensors")
    (model(inputs_embeds=golden["input"]).last_hidden_state ** 2).mean().backward()
    rnn = model.layers[0].local_rnns[0].rnn
    gradient = torch.cat([rnn.input_proj.weight.grad, rnn.recurrent_proj.weight.grad], dim=1)
    gradient = gradient.view(4, 16, 32)[[0, 1, 3, 2]].flatten(0, 1)
    butterfly = ButterflyLinear(32, 64, bias=False)
    butterfly.load_state_dict({"twiddle": golden[f"state_dict.{GATES}"]})
    butterfly.fold().backward(gradient)
    assert relative_error(butterfly.twiddle.grad, golden[f"grad.{GATES}"]) <= 1e-4


def checkpoint_of(kind, path):
    """A language model's or classifier's checkpoint in the authors' names, around the golden stack."""
    golden = load_file(GOLDEN / "sfox_rt_gru_butterfly_D24.safetensors")
    state = {f"rt.{key[11:]}": value for key, value in golden.items() if key.startswith("state_dict.")}
    encoder, head = ((37, 24), "decoder") if kind == "language-model" else ((24, 3), "linear")
    state["encoder.weight"] = torch.randn(encoder)
    state[f"{head}.weight"], state[f"{head}.bias"] = torch.randn(37, 24), torch.randn(37)
    if kind == "classifier":
        state["encoder.bias"] = torch.randn(24)
    save_file(state, path)


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [("language-model", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)],
)
def test_a_whole_checkpoint_is_converted_and_loads_again(kind, auto_class, tmp_path, capsys):
    checkpoint_of(kind, tmp_path / "model.safetensors")
    sizes = ["--num-attention-heads", "4", "--local-window", "3"]
    main(["butterfly-checkpoint", str(tmp_path / "model.safetensors"), str(tmp_path / "converted"), *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = auto_class.from_pretrained(tmp_path / "converted")
    assert result["class"] == type(model).__name__ and result["parameters"] == model.num_parameters()
    assert all(".output." in name or name.startswith("rt.norm.") for name in result["unused"])
    assert model.config.linear_structure_in == ["attention", "feed_forward"]
    golden = load_file(GOLDEN / "sfox_rt_gru_butterfly_D24.safetensors")
    output = model.model(inputs_embeds=golden["input"]).last_hidden_state
    assert relative_error(output, golden["output"]) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rt.forward_net.0.feed_forward.w_1.twiddle"), "original-checkpoint"),
        (lambda state: state.pop("rt.forward_net.0.layers.0.local_rnn.rnn.weight_hh_l0"), "got neither"),
        (lambda state: state.pop("rt.forward_net.0.pooling.linears.0.twiddle"), "Missing key"),
        (lambda state: state.update({"rt.extra": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "rt.extra"'),
        (lambda state: state.pop("decoder.weight"), "`linear.weight` is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_what_is_wrong(change, message, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    checkpoint_of("language-model", path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    sizes = ["--num-attention-heads", "4", "--local-window", "3"]
    with pytest.raises(SystemExit):
        main(["butterfly-checkpoint", str(path), str(tmp_path / "converted"), *sizes])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model_class", [RTransformerForCausalLM, RTransformerForSequenceClassification])
def test_a_dense_model_becomes_monarch_and_dense_again(model_class, tmp_path, capsys):
    model = model_class(tiny_config("gru-and-rsa")).eval()
    model.save_pretrained(tmp_path / "dense")
    main(["monarch", str(tmp_path / "dense"), str(tmp_path / "monarch"), "--linear-blocks", "4"])
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["parameters"] < result["parameters_before"] == model.num_parameters()
    assert 0 < result["error"] <= result["largest_error"] < 1
    # the errors of the two feed-forward maps, which are not square, are printed too
    assert "layers.1.mlp.up_proj (80, 20): relative error 0." in printed.err and "down_proj (20, 80)" in printed.err
    main(["fold", str(tmp_path / "monarch"), str(tmp_path / "folded")])
    monarch, folded = (model_class.from_pretrained(tmp_path / name).eval() for name in ("monarch", "folded"))
    assert monarch.config.linear_structure == "monarch" and folded.config.linear_structure == "dense"
    ids = torch.randint(3, 37, (2, 11))
    torch.testing.assert_close(folded(ids).logits, monarch(ids).logits, rtol=1e-4, atol=1e-5)
    # what is a Monarch matrix already loses nothing
    main(["monarch", str(tmp_path / "folded"), str(tmp_path / "again"), "--linear-blocks", "4"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] < 1e-6


def test_some_parts_alone_are_projected(tmp_path):
    RTransformerForCausalLM(tiny_config()).save_pretrained(tmp_path / "dense")
    options = ["--linear-blocks", "2", "--linear-structure-in", "attention", "feed_forward"]
    main(["monarch", str(tmp_path / "dense"), str(tmp_path / "monarch"), *options])
    model = RTransformerForCausalLM.from_pretrained(tmp_path / "monarch")
    assert model.config.structured_parts == ("attention", "feed_forward")


def test_a_projected_model_learns_back_what_it_lost(tmp_path):
    """Fine-tuning from the projection: the distance to the dense model's outputs falls."""
    dense = RTransformerForCausalLM(tiny_config("gru", num_hidden_layers=1)).eval()
    dense.save_pretrained(tmp_path / "dense")
    main(["monarch", str(tmp_path / "dense"), str(tmp_path / "monarch"), "--linear-blocks", "4"])
    model = RTransformerForCausalLM.from_pretrained(tmp_path / "monarch")
    ids = torch.randint(3, 37, (8, 20))
    wanted = dense(ids).logits.detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    distances = []
    for _ in range(30):
        optimizer.zero_grad()
        distance = (model(ids).logits - wanted).square().mean()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    ("command", "structure", "options", "message"),
    [
        ("fold", "dense", [], "there is nothing to fold"),
        (
            "monarch",
            "monarch",
            ["--linear-blocks", "4"],
            "`linear_structure` of the checkpoint must be 'dense', got 'mon",
        ),
        ("monarch", "dense", ["--linear-blocks", "3"], "`linear_blocks` must be a divisor of `hidden_size` (20)"),
        (
            "monarch",
            "dense",
            ["--linear-blocks", "5"],
            "`linear_blocks` must be at most the square root of `hidden_size`",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(command, structure, options, message, tmp_path, capsys):
    RTransformerForCausalLM(tiny_config("gru", linear_structure=structure)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main([command, str(tmp_path / "model"), str(tmp_path / "converted"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


def test_what_is_no_saved_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fold", str(tmp_path / "absent"), str(tmp_path / "converted")])
    assert "must be a folder with a config.json" in capsys.readouterr().err
