"""The authors' models, converted, give the authors' outputs and gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scripts.conversion.original_checkpoint import convert, convert_names, read_state_dict
from scripts.convert import main


GOLDEN = Path(__file__).parent / "golden"  # made by the authors' code on the CPU, dropout 0, every parameter moved
TASKS = {
    "char_gru": "causal-lm",
    "word_lstm": "causal-lm",
    "image_gru": "sequence-classification",
    "audio_rnn": "token-classification",
}


def load(name):
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
    model, _ = convert(path, TASKS[name], num_attention_heads=kwargs["h"], local_window=kwargs["ksize"])
    return model, load_file(path)


def authors_output(name, model, inputs):
    """What the authors' forward pass returns, from our model's logits."""
    if TASKS[name] == "causal-lm":
        return model(input_ids=inputs).logits
    if name == "image_gru":
        return model(input_values=inputs.transpose(1, 2)).logits.log_softmax(-1)
    return model(input_values=inputs).logits.sigmoid()


def relative_error(ours, theirs, scale=None):
    return ((ours - theirs).abs().max() / (theirs if scale is None else scale).abs().max()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TASKS)
def test_outputs_and_gradients_equal_the_authors(name, attention):
    model, golden = load(name)
    model.set_attn_implementation(attention)
    output = authors_output(name, model, golden["input"])
    assert relative_error(output, golden["output"]) <= 1e-5

    (output.float() ** 2).mean().backward()
    gradients = {"grad." + key: value for key, value in original_gradients(name, model).items()}
    expected = {key: value for key, value in golden.items() if key.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        # The softmax does not see the key's bias: its gradient is rounding, small beside that of the key's weight.
        scale = expected[key.replace("bias", "weight")] if key.endswith("pooling.linears.1.bias") else None
        assert relative_error(gradient, expected[key], scale) <= 1e-4, key


def original_gradients(name, model):
    """Our gradients under the authors' names."""
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    renamed = {}
    for key, value in read_state_dict(GOLDEN / f"{name}.safetensors").items():
        for our_name in convert_names({key: value}, TASKS[name])[0]:
            if our_name in gradients:  # once for tied weights, never for the unused ones
                renamed[key] = gradients[our_name]
    return renamed


def arguments(path, output_dir, heads=4, window=7, *more):
    settings = ["--num-attention-heads", str(heads), "--local-window", str(window), *more]
    return ["original-checkpoint", str(path), str(output_dir), *settings]


def test_a_pytorch_file_is_converted_saved_and_loaded_again(tmp_path, capsys):
    golden = load_file(GOLDEN / "char_gru.safetensors")
    state = {key.removeprefix("state_dict."): value for key, value in golden.items() if key.startswith("state_dict.")}
    torch.save(state, tmp_path / "model.pt")
    main(arguments(tmp_path / "model.pt", tmp_path / "converted"))
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["class"] == "RTransformerForCausalLM"
    unused = {
        *(f"rt.feed_forward.w_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"rt.norm.{kind}_2" for kind in "ab"),
        *(f"rt.forward_net.{i}.layers.0.local_rnn.output.0.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    }
    assert set(result["unused"]) == unused and all(name in printed.err for name in unused)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert model.config.tie_word_embeddings
    assert relative_error(model(golden["input"]).logits, golden["output"]) <= 1e-5


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "model.pt", tmp_path / "converted"))
    assert "model.state_dict()" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.weight"), "encoder.weight"),
        (lambda state: state.pop("decoder.bias"), 'Missing key(s) in state_dict: "lm_head.bias"'),
        (lambda state: state.update({"decoder.bias": torch.zeros(3)}), "size mismatch for lm_head.bias"),
        (lambda state: state.update({"rt.extra": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "rt.extra"'),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_what_is_wrong(change, message, tmp_path, capsys):
    state = read_state_dict(GOLDEN / "char_gru.safetensors")
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "model.pt", tmp_path / "converted"))
    assert message in capsys.readouterr().err


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(arguments(GOLDEN / "char_gru.safetensors", tmp_path))
    assert "new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(GOLDEN / "char_gru.safetensors", tmp_path / "converted", heads=5))
    assert "`hidden_size` must be divisible by `num_attention_heads` (5), got 24" in capsys.readouterr().err
