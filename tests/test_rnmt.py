"""RNMT+ against its authors' code (tensorflow/lingvo), and the memory of its additive attention."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from scripts.baselines.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_step
from scripts.baselines.rnmt import RNMTPlusConfig, additive_attention, additive_attention_in_chunks, additive_energies


GOLDEN = Path(__file__).parent / "golden"  # made by the authors' code on the CPU, without dropout
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


class Reference:
    """A file of reference values; its parameters and float inputs are leaves that gather gradients."""

    def __init__(self, path):
        with safe_open(path, framework="pt") as file:
            self.kwargs = json.loads(file.metadata()["kwargs"])
        self.tensors = load_file(path)
        gradients = [name for name in self.tensors if name.startswith("grad.")]
        self.leaves = {name.removeprefix("grad."): None for name in gradients}
        for name in self.leaves:
            tensor = self.tensors.get(f"state_dict.{name}", self.tensors.get(name))
            self.leaves[name] = tensor.clone().requires_grad_()

    def __getitem__(self, name):
        return self.leaves[name] if name in self.leaves else self.tensors[name]

    def check(self, output):
        """Forward within 1e-5 of the largest value, gradients within 1e-4 of the largest of each leaf."""
        assert relative_error(output, self.tensors["output"]) <= 1e-5
        (output**2).mean().backward()
        for name, leaf in self.leaves.items():
            assert relative_error(leaf.grad, self.tensors[f"grad.{name}"]) <= 1e-4, name


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def references(pattern):
    return pytest.mark.parametrize("path", sorted(GOLDEN.glob(f"{pattern}.safetensors")), ids=lambda path: path.stem)


def step(reference, name, inputs, hidden, cell, cell_clip=10.0):
    """One step of the cell `name` of a reference: `(hidden, cell)`; inputs `(B, I)`."""
    sums = torch.cat([inputs, hidden], dim=-1) @ reference[f"{name}.wm"]
    return layer_norm_lstm_step(sums, cell, reference[f"{name}.ln_scale"], reference[f"{name}.b"], cell_clip)


def run(reference, name, inputs, padding=None, cell_clip=10.0):
    """All steps, time first: `(T, B, D)` and the last cell. A padded step, `padding` `(T, B)` 1, keeps the state."""
    size = len(reference[f"{name}.b"]) // 4
    hidden = cell = inputs.new_zeros(inputs.shape[1], size)
    outputs = []
    for position, each in enumerate(inputs):
        new = step(reference, name, each, hidden, cell, cell_clip)
        if padding is not None:
            is_padded = padding[position, :, None] > 0
            new = [torch.where(is_padded, old, after) for old, after in zip((hidden, cell), new)]
        hidden, cell = new
        outputs.append(hidden)
    return torch.stack(outputs), cell


def attention_to_source(reference, prefix, heads):
    """`query (B, D)` -> the context `(B, D)` and the weights `(B, H, S)`, by the additive attention of a reference."""

    def project(states, name):
        states = states @ reference[f"{prefix}{name}_proj"] + reference[f"{prefix}{name}_proj_b"]
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, ., d)

    value = project(reference["source"].transpose(0, 1), "source")
    key = value @ reference[f"{prefix}atten.source_var"]
    padding = reference["source_padding"].T[:, None, None] > 0

    def attend(query):
        query = project(query[:, None], "query") @ reference[f"{prefix}atten.query_var"]
        energies = additive_energies(query, key, reference[f"{prefix}atten.hidden_var"])
        weights = energies.masked_fill(padding, float("-inf")).softmax(-1)
        return (weights @ value).flatten(1), weights[:, :, 0]

    return attend


@pytest.mark.parametrize("implementation", ["plain", pytest.param("c", marks=needs_gcc)])
@references("rnmt_lstm_*")
def test_the_layer_normalised_lstm(path, implementation):
    reference = Reference(path)
    inputs, weight = reference["input"].transpose(0, 1), reference["cell.wm"]
    output = layer_norm_lstm(
        inputs @ weight[: inputs.shape[-1]],
        weight[inputs.shape[-1] :].T,
        reference["cell.ln_scale"],
        reference["cell.b"],
        cell_clip=reference.kwargs["cell_value_cap"],
        implementation=implementation,
    )
    reference.check(output.transpose(0, 1))


@references("rnmt_lstm_*")
def test_its_last_cell(path):
    reference = Reference(path)
    _, cell = run(reference, "cell", reference["input"], cell_clip=reference.kwargs["cell_value_cap"])
    assert relative_error(cell, reference["last_cell"]) <= 1e-5


@references("rnmt_additive_attention_*")
def test_the_additive_attention(path):
    reference = Reference(path)
    context, weights = attention_to_source(reference, "", reference.kwargs["heads"])(reference["query"])
    assert relative_error(weights.mean(1), reference["mean_probabilities"]) <= 1e-5
    reference.check(context)


@references("rnmt_encoder_*")
def test_the_encoder_of_these_layers(path):
    reference = Reference(path)
    states = reference["emb.wm[0]"][reference["input_ids"].long()].transpose(0, 1)  # (S, B, D)
    padding = reference["padding"].T
    for layer in range(reference.kwargs["layers"]):
        ahead, _ = run(reference, f"rnn[{layer}].fwd_rnn.cell", states, padding)
        back, _ = run(reference, f"rnn[{layer}].bak_rnn.cell", states.flip(0), padding.flip(0))
        both = torch.cat([ahead, back.flip(0)], dim=-1)
        states = states + both if layer >= reference.kwargs["residual_start"] else both
    output = states @ reference["final_proj.w"] + reference["final_proj.b"]
    reference.check(output * (1 - padding[..., None]))


@references("rnmt_decoder_*")
def test_the_decoder_of_these_layers(path):
    """As the authors have it: the first layer reads the previous context too."""
    reference = Reference(path)
    attend = attention_to_source(reference, "frnn_with_atten.atten.", reference.kwargs["heads"])
    embedded = reference["emb.wm[0]"][reference["target_ids"].long()].transpose(0, 1)  # (T, B, D)
    hidden = cell = torch.zeros_like(embedded[0])
    context, states, contexts = attend(hidden)[0], [], []
    for each in embedded:
        inputs = torch.cat([each, context], dim=-1)
        hidden, cell = step(reference, "frnn_with_atten.cell", inputs, hidden, cell)
        context = attend(hidden)[0]
        states.append(hidden), contexts.append(context)
    states, contexts = torch.stack(states), torch.stack(contexts)
    for layer in range(1, reference.kwargs["rnn_layers"]):
        outputs, _ = run(reference, f"frnn[{layer - 1}].cell", torch.cat([states, contexts], dim=-1))
        states = states + outputs if layer >= reference.kwargs["residual_start"] else outputs
    softmax_input = torch.cat([states, contexts], dim=-1)
    assert relative_error(softmax_input, reference["softmax_input"]) <= 1e-5
    reference.check(softmax_input @ reference["softmax.weight_0"] + reference["softmax.bias_0"])


def model_of(**fields):
    config = RNMTPlusConfig(vocab_size=11, hidden_size=12, num_hidden_layers=4, initializer_range=0.5, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("residual_from", [1, 2, 9])
def test_the_model_is_the_equations_of_its_file(residual_from):
    model = model_of(residual_from=residual_from).model
    ids = torch.randint(11, (2, 7))
    layers = model.layers
    first = layers.lstms[0](model.embed_tokens(ids))
    query, value = (proj(first).view(2, 7, 4, 3) for proj in (layers.attention.q_proj, layers.attention.v_proj))
    contexts = torch.zeros(2, 7, 4, 3)
    for t in range(7):
        past = value[:, : t + 1]
        mixed = torch.tanh(past @ layers.attention.key_weight + query[:, t, None] @ layers.attention.query_weight)
        weights = (mixed @ layers.attention.hidden).softmax(1)  # (B, t + 1, H)
        contexts[:, t] = (weights[..., None] * past).sum(1)
    contexts, hidden = contexts.flatten(2), first
    for index in (1, 2, 3):
        output = layers.lstms[index](torch.cat([hidden, contexts], dim=-1))
        hidden = hidden + output if index >= residual_from else output
    expected = layers.output_proj(torch.cat([hidden, contexts], dim=-1))
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


def test_without_gate_norm_the_layers_are_torchs_lstm():
    layers = model_of(gate_norm=False, attention="dot").model.layers
    inputs = torch.randn(2, 7, 12)
    expected, _ = layers.lstms[0].lstm(F.layer_norm(inputs, (12,)))
    torch.testing.assert_close(layers.lstms[0](inputs), expected)


@pytest.mark.parametrize("numbers", [1, 300, 10**9], ids=["one-query", "some", "all"])
def test_the_attention_is_the_same_in_chunks(numbers):
    torch.manual_seed(0)
    shapes = (2, 3, 13, 5), (2, 3, 13, 5), (2, 3, 13, 5), (5,)
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected, found = additive_attention(*arguments), additive_attention_in_chunks(*arguments, numbers=numbers)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(each, arguments, grad) for each in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_the_tanh_of_all_pairs_is_never_kept():
    """What the graph keeps for the backward pass, in numbers: less than a quarter of B T S D."""
    query = torch.randn(2, 2, 64, 8, requires_grad=True)
    kept = {}  # memory by its address: chunks keep views of the same keys

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        additive_attention_in_chunks(query, query, query, torch.randn(8), numbers=4096)
    assert 0 < sum(kept.values()) < 2 * 2 * 64 * 64 * 8 / 4
