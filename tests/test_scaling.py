"""The formulae of training/scaling.py against what a model on one process really does; test_parallel.py has several."""

import json
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from modeling_rtransformer import RTransformerForCausalLM
from scripts import estimate
from scripts.training import scaling
from scripts.training.scaling import Layout
from tests.conftest import tiny_config


WIDE = {"hidden_size": 60, "vocab_size": 301}


def kept_bytes(model, *inputs, **others):
    """Bytes that the forward pass keeps for the backward pass, each storage once, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor too, or its place would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs, **others)
    return sum(size for size, _ in kept.values())


def test_parameters_are_counted_by_part_and_tied_ones_once(variant):
    model = RTransformerForCausalLM(tiny_config(variant))
    parts = scaling.by_part({name: tensor.numel() for name, tensor in model.named_parameters()})
    assert sum(parts.values()) == model.num_parameters()
    assert parts["embedding"] == 37 * 20 and parts["head"] == 37
    assert (parts["LocalRNN"] > 0) == (model.config.num_local_rnns > 0)
    assert (parts["REM"] > 0) == (model.config.rem_kinds is not None)
    assert parts["attention"] == 2 * 4 * (20 * 20 + 20)


def cells_kept_in_c(config, positions):
    """Bytes of the LSTM's cells, which the formulae leave out: the Triton kernels compute them again."""
    if config.local_rnn_type != "lstm":
        return 0
    layers = config.num_hidden_layers * config.num_local_rnns
    return 4 * layers * (config.local_window - 1) * positions * config.hidden_size


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_for_the_backward_pass_is_what_was_computed(variant, checkpointing):
    if variant == "original-norm":
        pytest.skip("its norm keeps more; it is for converted checkpoints")
    config = tiny_config(variant, **WIDE)
    model = RTransformerForCausalLM(config).train()
    for module in model.modules():
        if hasattr(module, "implementation"):
            module.implementation = "c"
    if checkpointing:
        model.gradient_checkpointing_enable()
    computed = scaling.activations(config, 3, 130, Layout.of("ddp", 1, checkpointing=checkpointing))
    ids = torch.randint(1, 301, (3, 130))
    measured = kept_bytes(model, ids, labels=ids)
    if checkpointing:  # the block that is computed again is not there yet
        one = scaling.kept_by_block(config, 1, 3, 130, Layout.of("ddp", 1))
        assert measured == pytest.approx(sum(computed.values()) - sum(one.values()), rel=0.02)
    else:
        cells = cells_kept_in_c(config, 3 * 130)
        assert measured == pytest.approx(sum(computed.values()) + cells, rel=0.05)


def test_operations_are_what_torch_counts(variant):
    config = tiny_config(variant, **WIDE)
    model = RTransformerForCausalLM(config)
    model.set_attn_implementation("eager")  # torch does not know the operations of the fused one on a CPU
    for module in model.modules():
        if hasattr(module, "implementation"):
            module.implementation = "plain"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(1, 301, (2, 90)))
    computed = scaling.arithmetic(config, 90, causal_half=False)
    # Eager attention multiplies the values by the softmax, then by the matrix that has the REM in it.
    mixed = [layer for layer in range(2) if config.layer_rem_heads(layer)]
    computed["REM"] = len(mixed) * 2 * 90 * 90 * 60
    assert counter.get_total_flops() == pytest.approx(2 * sum(computed.values()), rel=1e-3)


@pytest.mark.parametrize("rnn_type", ["gru", "lstm", "rnn"])
def test_a_window_that_holds_the_row_is_one_run(rnn_type):
    config = tiny_config("lstm-unpadded-over-the-sequence", local_rnn_type=rnn_type, local_window=130, **WIDE)
    local_rnn = RTransformerForCausalLM(config).model.layers[0].local_rnns[0]
    kept = scaling.kept_by_block(config, 0, 3, 130, Layout.of("ddp", 1))["LocalRNN"]
    assert kept_bytes(local_rnn, torch.zeros(3, 130, 60)) == pytest.approx(kept, rel=0.05)
    if rnn_type == "lstm":  # one operation, in which torch counts nothing
        return
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        local_rnn(torch.zeros(1, 130, 60))
    assert counter.get_total_flops() == scaling.arithmetic(config, 130)["LocalRNN"] / config.num_hidden_layers


def test_operations_of_rems_are_what_torch_counts():
    config = tiny_config("gru-and-rsa", **WIDE)
    recurrence = RTransformerForCausalLM(config).model.layers[0].self_attn.recurrence
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        recurrence.product(torch.randn(2, 5, 300, 12))
    assert counter.get_total_flops() == scaling.arithmetic(config, 300)["REM"]  # two rows of one layer, one of two


def test_the_command_prints_a_table_and_one_line_of_json(capsys):
    found = estimate.main(["stdlib-code", "--gpus", "8"])
    printed = capsys.readouterr().out
    assert found["strategy"] == "ddp" and found["fits"] and "| gradients | 6." in printed
    model = AutoModelForCausalLM.from_config(estimate.read_recipe("stdlib-code").config())
    assert found["parameters"] == model.num_parameters()
    assert json.loads(json.dumps(found)) == found
    assert estimate.main(["stdlib-code", "--gpus", "8", "--json"]) == found and capsys.readouterr().out == ""


def test_a_larger_model_is_sharded_and_a_longer_row_computed_again():
    large = ["--set", "model.hidden_size=4096", "--set", "model.num_hidden_layers=48", "--batch", "1"]
    assert estimate.main(["stdlib-code", "--json", "--gpus", "1", *large])["fits"] is False
    assert estimate.main(["stdlib-code", "--json", "--gpus", "64", *large])["strategy"] == "hsdp"
    long = [*large, "--sequence-length", "16384"]
    assert estimate.main(["stdlib-code", "--json", "--gpus", "64", *long])["checkpointing"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--gpus", "8"], "must be a language model of type 'rtransformer', got the task"),
        (["stdlib-code", "--gpus", "0"], "`--gpus` must be at least 1, got 0"),
        (["stdlib-code", "--gpus", "12", "--strategy", "hsdp"], "`gpus` must be several times 8, .* got 12"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        estimate.main(arguments)
