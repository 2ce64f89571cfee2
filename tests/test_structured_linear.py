"""Structured linear layers equal the reference code's, fold to the weight that they apply, and serve in every part."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM, RTransformerModel, local_rnn
from modeling_rtransformer.structured_linear import (
    ButterflyLinear,
    MonarchLinear,
    StructuredLinear,
    folded_linears,
    make_linear,
)
from scripts.training.trainer import RecipeTrainer
from tests.conftest import tiny_config


GOLDEN = Path(__file__).parent / "golden" / "structured"  # made by the authors' code on the CPU, every parameter moved
FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if not path.stem.startswith("sfox"))
STRUCTURES = {"monarch": {"linear_structure": "monarch"}, "butterfly": {"linear_structure": "butterfly"}}
# n, m and nb: nb divides q, does not divide q, divides neither n nor m; and the butterfly of several stacks, cut
SIZES = [
    *[
        (MonarchLinear, n, m, {"blocks": nb})
        for n, m, nb in [(32, 96, 4), (20, 60, 4), (80, 20, 4), (30, 50, 4), (7, 5, 1)]
    ],
    *[(ButterflyLinear, n, m, {"blocks": nb}) for n, m, nb in [(20, 60, 2), (64, 20, 3), (16, 16, 1), (1, 3, 2)]],
]
BY_SIZE = pytest.mark.parametrize(
    ("layer", "n", "m", "options"), SIZES, ids=[f"{c.__name__}-{n}-{m}-{o['blocks']}" for c, n, m, o in SIZES]
)


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def reference_layer(name):
    """The layer with the reference's parameters, and the file's tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        options = json.loads(file.metadata()["kwargs"])
    golden = load_file(GOLDEN / f"{name}.safetensors")
    if name.startswith("monarch"):
        sizes = options["in_features"], options["out_features"]
        layer = MonarchLinear(*sizes, options["bias"], blocks=options["nblocks"])
    else:
        orders = {"blocks": options["nblocks"], "increasing_stride": options["increasing_stride"]}
        layer = ButterflyLinear(options["in_size"], options["out_size"], options["bias"], **orders)
    prefix = "state_dict."
    layer.load_state_dict({key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)})
    return layer, golden


def by_factors(layer, inputs):
    outputs = layer.multiply(inputs.reshape(-1, layer.in_features))
    outputs = outputs if layer.bias is None else outputs + layer.bias
    return outputs.view(*inputs.shape[:-1], -1)


WAYS = {
    "forward": lambda layer, inputs: layer(inputs),
    "factors": by_factors,
    "folded": lambda layer, inputs: F.linear(inputs, layer.weight, layer.bias),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients_equal_the_references(name, way):
    layer, golden = reference_layer(name)
    inputs = golden["input"].requires_grad_()
    output = WAYS[way](layer, inputs)
    assert relative_error(output, golden["output"]) <= 1e-5
    assert relative_error(layer.weight, golden["dense_weight"]) <= 1e-5
    (output**2).mean().backward()
    gradients = {"input": inputs.grad, **{key: parameter.grad for key, parameter in layer.named_parameters()}}
    for key, gradient in gradients.items():
        assert relative_error(gradient, golden[f"grad.{key}"]) <= 1e-4, key


def monarch_by_loops(layer, row):
    """The equations of `MonarchLinear`, number by number."""
    (nb, q, p), o = layer.blkdiag1.shape, layer.blkdiag2.shape[1]
    x = F.pad(row, (0, nb * p - len(row)))
    h = torch.cat([layer.blkdiag1[k] @ x[k * p : (k + 1) * p] for k in range(nb)])
    y = row.new_zeros(o * nb)
    for s in range(o):
        for block in range(nb):
            y[s * nb + block] = sum(layer.blkdiag2[block, s, r] * h[r * nb + block] for r in range(q))
    return y[: layer.out_features]


def butterfly_by_loops(layer, row):
    """The equations of `ButterflyLinear`, pair by pair."""
    stacks, blocks, depth, half = layer.twiddle.shape[:4]
    outputs = []
    for stack in range(stacks):
        x = F.pad(row, (0, layer.size - len(row)))
        for block in range(blocks):
            strides = [2**i for i in range(depth)]
            for i, s in enumerate(strides if layer.increasing_stride == (block % 2 == 0) else strides[::-1]):
                y = x.clone()
                for j in range(half):
                    p = 2 * (j - j % s) + j % s
                    y[[p, p + s]] = layer.twiddle[stack, block, i, j] @ x[[p, p + s]]
                x = y
        outputs.append(x)
    return torch.cat(outputs)[: layer.out_features]


@BY_SIZE
@torch.no_grad()
def test_factors_and_fold_are_the_definition(layer, n, m, options):
    layer = layer(n, m, **options).double()
    inputs = torch.randn(3, n, dtype=torch.float64)
    loops = monarch_by_loops if isinstance(layer, MonarchLinear) else butterfly_by_loops
    expected = torch.stack([loops(layer, row) for row in inputs]) + layer.bias
    for way in WAYS.values():
        torch.testing.assert_close(way(layer, inputs), expected)


@pytest.mark.parametrize("std", [None, 0.02])
@pytest.mark.parametrize(
    "layer", [lambda *a, **o: MonarchLinear(*a, blocks=8, **o), ButterflyLinear], ids=["monarch", "butterfly"]
)
@pytest.mark.parametrize(("n", "m"), [(256, 256), (128, 512), (512, 128), (160, 480)])
def test_initial_weights_have_the_standard_deviation_of_the_dense_layer(layer, n, m, std):
    made, dense = layer(n, m, std=std), nn.Linear(n, m)
    wanted = dense.weight.std() if std is None else torch.tensor(std)
    assert 0.9 < made.weight.std() / wanted < 1.1
    assert made.bias.abs().max() <= n**-0.5 and made.bias.abs().max() > 0.9 * n**-0.5
    assert made.weight.mean().abs() < 0.05 * wanted


@pytest.mark.parametrize(
    ("n", "m", "nb"), [(32, 32, 4), (32, 96, 4), (96, 32, 4), (20, 60, 4), (30, 50, 4), (18, 7, 2)]
)
def test_a_monarch_matrix_is_its_own_projection_and_no_other_is_nearer(n, m, nb):
    source, layer = (MonarchLinear(n, m, blocks=nb).double() for _ in range(2))
    assert layer.project(source.weight.detach()) < 1e-9
    weight = torch.randn(m, n, dtype=torch.float64)
    error = layer.project(weight)
    assert 0 < error < 1
    distance = (layer.weight - weight).square().sum()
    distance.backward()  # the distance is stationary in the factors
    assert all(parameter.grad.abs().max() < 1e-9 for parameter in (layer.blkdiag1, layer.blkdiag2))
    # the best approximation of each block alone, by its singular values
    q, p = layer.blkdiag1.shape[1:]
    o = layer.blkdiag2.shape[1]
    if q % nb == 0:
        blocks = F.pad(weight, (0, nb * p - n, 0, nb * o - m)).view(o, nb, nb, p).permute(1, 2, 0, 3)
        left = torch.linalg.svdvals(blocks)[..., q // nb :].square().sum()
        torch.testing.assert_close(error**2, (left / weight.square().sum()).item())


def structured(variant="gru", structure="monarch", **fields):
    return tiny_config(variant, linear_structure=structure, **fields)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("part", ["local_rnn", "attention", "feed_forward"])
def test_only_the_parts_that_the_config_names_have_the_structure(part, structure):
    model = RTransformerForCausalLM(structured(structure=structure, linear_structure_in=[part]))
    found = {name for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    names = {"local_rnn": ".rnn.", "attention": ".self_attn.", "feed_forward": ".mlp."}
    assert len(found) == {"local_rnn": 4, "attention": 8, "feed_forward": 4}[part]
    assert all(names[part] in name for name in found)


def dense_twin(model):
    """The same model with the folded weights."""
    config = type(model.config).from_dict({**model.config.to_dict(), "linear_structure": "dense"})
    twin = type(model)(config).eval()
    state = twin.state_dict()
    state.update({name: value for name, value in model.state_dict().items() if name in state})
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            state[f"{name}.weight"] = module.fold().detach()
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_equals_the_dense_model_of_its_folded_weights(variant, structure, is_causal):
    model = RTransformerModel(structured(variant, structure, is_causal=is_causal)).eval()
    dense = dense_twin(model)
    ids = torch.randint(3, 37, (3, 23))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outputs = [each(ids, attention_mask=mask).last_hidden_state for each in (model, dense)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    theirs = dict(dense.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            factors = [parameter for key, parameter in module.named_parameters() if key != "bias"]
            expected = torch.autograd.grad(module.fold(), factors, theirs[f"{name}.weight"].grad)
            for parameter, gradient in zip(factors, expected):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("implementation", ["plain", "c", "auto"])
@pytest.mark.parametrize("rnn_type", ["gru", "lstm", "rnn"])
def test_every_local_rnn_implementation_applies_the_folded_weight(rnn_type, implementation, structure):
    if implementation == "c":
        from modeling_rtransformer.local_rnn_steps import reason_without_c

        if reason_without_c():
            pytest.skip(f"no C kernels: {reason_without_c()}")
    config = structured("gru", structure, local_rnn_type=rnn_type)
    rnn = RTransformerModel(config).layers[0].local_rnns[0].rnn
    torch_rnn = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[rnn_type](20, 20, batch_first=True)
    with torch.no_grad():
        for name, projection in (("ih", rnn.input_proj), ("hh", rnn.recurrent_proj)):
            getattr(torch_rnn, f"weight_{name}_l0").copy_(projection.weight)
            getattr(torch_rnn, f"bias_{name}_l0").copy_(projection.bias)
    rnn.implementation = implementation
    inputs = torch.randn(2, 4 + 9, 20)
    outputs = rnn(inputs)
    for position in range(9):
        expected = torch_rnn(inputs[:, position : position + 5])[0][:, -1]
        torch.testing.assert_close(outputs[:, position], expected, rtol=1e-4, atol=1e-5)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in rnn.parameters())


@pytest.mark.parametrize("rnn_type", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("before", ["zeros", "other segments", "nothing"])
def test_steps_by_the_factors_of_w_h_equal_steps_by_the_folded_weight(rnn_type, before, monkeypatch):
    for name, value in (("SIZE", 1), ("POSITIONS", 1)):
        monkeypatch.setattr(local_rnn, f"FACTORS_FROM_{name}", value)
    monkeypatch.setattr(local_rnn, "FACTORS_UP_TO_SHARE", 1)
    rnn = RTransformerModel(structured("gru", local_rnn_type=rnn_type)).double().layers[0].local_rnns[0].rnn
    inputs = torch.randn(2, 4 + 9, 20, dtype=torch.float64)
    masks = {}
    if before == "other segments":
        masks["segment_ids"] = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    elif before == "nothing":
        masks["in_sequence"] = torch.arange(13).expand(2, -1) >= torch.tensor([[4], [6]])
    products, found = [], []
    multiply = MonarchLinear.multiply
    monkeypatch.setattr(MonarchLinear, "multiply", lambda *args: products.append(args) or multiply(*args))
    for implementation in ("auto", "plain"):
        rnn.zero_grad()
        rnn.implementation = implementation
        products.clear()
        outputs = rnn(inputs, **masks)
        is_in_steps = [layer for layer, _ in products].count(rnn.recurrent_proj)
        assert is_in_steps == (rnn.window - 1 if implementation == "auto" else 0)
        outputs.square().sum().backward()
        found.append([outputs, *(parameter.grad for parameter in rnn.parameters())])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("n", "m"), [(20, 60), (64, 64), (200, 100)])
def test_the_number_of_rows_changes_the_way_and_not_the_result(n, m):
    layer = MonarchLinear(n, m, blocks=4).double()
    inputs = torch.randn(3, 200, n, dtype=torch.float64)  # folded for, or multiplied by parts
    expected = by_factors(layer, inputs)
    assert layer.folds_for(600) == (n * m <= 64 * 64) and not layer.folds_for(10) and not layer.folds_for(None)
    torch.testing.assert_close(layer(inputs), expected)
    torch.testing.assert_close(layer(inputs[:, :2]), expected[:, :2])
    assert layer(inputs[:0]).shape == (0, 200, m)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_folded_layers_are_folded_once_and_only_without_gradients(structure, monkeypatch):
    model = RTransformerForCausalLM(structured(structure=structure)).eval()
    ids = torch.randint(3, 37, (1, 5))
    expected = model(ids).logits
    folds = []
    for layer in (MonarchLinear, ButterflyLinear):
        fold = layer.fold
        monkeypatch.setattr(layer, "fold", lambda self, fold=fold: folds.append(self) or fold(self))
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    with folded_linears(model):
        assert len(folds) == len(layers) == len(set(folds))
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            with folded_linears(model):  # as in a `generate` within a `generate`
                model(ids)
            assert len(folds) == len(layers)
        model(ids).logits.sum().backward()
        assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
        assert not any("folded" in name for name in model.state_dict())
    assert all(layer.folded is None for layer in layers)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_generation_folds_and_equals_the_dense_model(structure, monkeypatch):
    model = RTransformerForCausalLM(structured("gru-and-rsa", structure)).eval()
    ids = torch.randint(3, 37, (2, 7))
    expected = dense_twin(model).generate(ids, max_new_tokens=12, do_sample=False)
    monkeypatch.setattr(MonarchLinear, "multiply", lambda *arguments: pytest.fail("a product by the factors"))
    assert model.generate(ids, max_new_tokens=12, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structured_model_is_saved_and_loaded_with_its_code(structure, tmp_path):
    model = RTransformerForCausalLM(structured("gru-and-rsa", structure)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "structured_linear.py").is_file()
    loaded, report = RTransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, 37, (2, 9))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_gives_half_precision_as_a_dense_layer_does(structure):
    layer = make_linear(structured(structure=structure), "attention", 20, 20)
    inputs = torch.randn(70, 20)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (inputs, inputs[:2]):
            output = layer(rows)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), WAYS["folded"](layer, rows).float(), rtol=0.05, atol=0.05)


def test_the_default_is_dense_with_the_parameters_and_values_of_before():
    model = RTransformerForCausalLM(tiny_config())
    assert model.config.linear_structure == "dense" and model.config.structured_parts == ()
    assert not any(isinstance(module, StructuredLinear) for module in model.modules())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"linear_structure": "monarc"},
            "`linear_structure` must be one of dense, monarch, butterfly, got 'monarc'; did",
        ),
        ({"linear_structure": "monarch", "linear_blocks": 0}, "`linear_blocks` must be at least 1, got 0"),
        (
            {"linear_structure": "monarch", "linear_blocks": 6},
            r"`linear_blocks` must be a divisor of `hidden_size` \(512\) with `linear_structure` 'monarch', got 6",
        ),
        (
            {"linear_structure": "monarch", "linear_blocks": 32},
            r"`linear_blocks` must be at most the square root of `hidden_size` \(512\) .*, got 32",
        ),
        (
            {"linear_structure": "monarch", "linear_blocks": 8, "intermediate_size": 63},
            r"`linear_blocks` must be at most the square root of `intermediate_size` \(63\) .*, got 8",
        ),
        (
            {"linear_structure_in": ["attn"]},
            r"`linear_structure_in\[0\]` must be one of local_rnn, attention, .* 'attn'",
        ),
        (
            {"linear_structure_in": []},
            r"`linear_structure_in` must be None for all parts, or name at least one, got \[\]",
        ),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RTransformerConfig(**fields)


def test_a_small_inner_width_is_no_matter_where_the_feed_forward_layer_is_dense():
    fields = {"linear_structure": "monarch", "linear_blocks": 8, "intermediate_size": 63}
    assert RTransformerConfig(**fields, linear_structure_in=["attention"]).structured_parts == ("attention",)


def test_tensor_parallelism_and_quantization_are_refused_with_the_remedy():
    config = structured()
    config.distributed_config = type("Distributed", (), {"tp_size": 5})()
    with pytest.raises(
        ValueError, match=r"`linear_structure` must be 'dense' with `tp_size` \(5\) .* got 'monarch'.*fold"
    ):
        RTransformerForCausalLM(config)
    config = structured()
    config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="`linear_structure` must be 'dense' with a `quantization_config`.*fold"):
        RTransformerForCausalLM(config)


def test_an_adapter_is_refused_by_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = RTransformerForCausalLM(structured())
    with pytest.raises(ValueError, match="MonarchLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def test_butterfly_factors_have_no_weight_decay_and_monarch_factors_have(tmp_path):
    from transformers import TrainingArguments

    decayed = {}
    for structure in STRUCTURES:
        model = RTransformerForCausalLM(structured(structure=structure))
        trainer = RecipeTrainer(model=model, args=TrainingArguments(tmp_path, report_to=[]))
        decayed[structure] = trainer.get_decay_parameter_names(model)
    assert any("blkdiag1" in name for name in decayed["monarch"])
    assert not any("twiddle" in name for name in decayed["butterfly"])
    assert "model.embed_tokens.weight" in decayed["butterfly"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_compiles_without_graph_breaks_and_exports_with_any_length(structure):
    torch._dynamo.reset()
    model = RTransformerForCausalLM(structured("gru-and-rsa", structure, num_hidden_layers=1)).eval()
    ids = torch.randint(3, 37, (2, 11))
    explanation = torch._dynamo.explain(model)(ids, use_cache=False)
    assert explanation.graph_break_count == 0, explanation.break_reasons
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes).module()
    for length in (11, 70):
        ids = torch.randint(3, 37, (3, length))
        expected = model(ids, use_cache=False).logits
        found = exported(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
