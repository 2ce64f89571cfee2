"""The estimate's counts on the meta device against a real model; test_parallel.py has what several processes hold."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_rtransformer import RTransformerForCausalLM
from scripts.training import estimate
from tests.conftest import tiny_config


WIDE = {"hidden_size": 60, "vocab_size": 301}


def make_model(variant, device="cpu", **options):
    with torch.device(device):
        model = RTransformerForCausalLM._from_config(tiny_config(variant, **WIDE), **options).train()
    for module in model.modules():
        if hasattr(module, "implementation"):
            module.implementation = "plain"
    return model


def counted(variant, rows, length):
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    return estimate.count_forward(
        make_model(variant, "meta", attn_implementation="fused_on_meta"), input_ids=ids, labels=ids
    )


def kept_bytes(model, *inputs, **others):
    """Bytes that the forward pass keeps for the backward pass, each storage once, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # a freed storage's address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs, **others)
    return sum(size for size, _ in kept.values())


def test_parameters_are_counted_by_part_and_tied_ones_once(variant):
    model = RTransformerForCausalLM(tiny_config(variant))
    parts = estimate.parameters_by_part(model)
    assert parts.total() == model.num_parameters()
    assert parts[estimate.OTHER] == 37 * 20 + 37
    assert (parts["LocalRNN"] > 0) == (model.config.num_local_rnns > 0)
    assert (parts["REM"] > 0) == (model.config.rem_kinds is not None)
    assert parts["attention"] == 2 * 4 * (20 * 20 + 20)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_bytes_on_the_meta_device_are_those_of_a_real_model(variant, checkpointing):
    kept, _ = counted(variant, 3, 130)
    model = make_model(variant)
    ids = torch.randint(1, 301, (3, 130))
    if not checkpointing:
        estimated = sum(counts.total() for counts in kept.values())
    else:  # the block that is computed again in the backward pass is not there yet
        model.gradient_checkpointing_enable()
        estimated = estimate.with_checkpointing(kept, 3 * 130 * 60 * 4).total()
        estimated -= max(kept["0"].total(), kept["1"].total())
    assert kept_bytes(model, ids, labels=ids) == pytest.approx(estimated, rel=0.03)


def test_operations_on_the_meta_device_are_those_of_a_real_model(variant):
    _, operations = counted(variant, 2, 90)
    model = make_model(variant)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(1, 301, (2, 90)))
    attention = 2 * 2 * 2 * 90 * 90 * 2 * 60  # two products of two layers and rows: a CPU's kernel is not counted
    assert operations.total() == counter.get_total_flops() + attention


def test_operations_of_each_part_are_those_of_the_documents():
    _, operations = counted("gru-and-rsa", 2, 90)
    positions, size, window = 2 * 90, 60, 5
    inputs = 2 * (90 + window - 1)  # with the zeros before each row
    assert operations["LocalRNN"] == 2 * 2 * 3 * size**2 * (inputs + (window - 1) * positions)
    assert operations["attention"] == 2 * positions * (8 * size**2 + 4 * 90 * size)
    assert operations["feed-forward"] == 2 * positions * 4 * size * 4 * size
    assert operations[estimate.OTHER] == 2 * positions * size * 301


def test_the_command_prints_a_table_and_one_line_of_json(capsys):
    found = estimate.main(["stdlib-code", "--gpus", "8"])
    assert found["first_that_fits"]["strategy"] == "ddp" and "| fsdp2 | yes |" in capsys.readouterr().out
    assert json.loads(json.dumps(found)) == found


def test_a_larger_model_is_sharded_and_a_longer_row_computed_again():
    large = ["--set", "model.hidden_size=4096", "--set", "model.num_hidden_layers=48", "--batch", "1"]
    large += ["--set", "model.local_window=7", "--set", "model.num_local_rnns=1"]  # every step of a window is counted
    assert estimate.main(["stdlib-code", "--gpus", "1", *large])["first_that_fits"] is None
    assert estimate.main(["stdlib-code", "--gpus", "64", *large])["first_that_fits"]["strategy"] == "hsdp"
    long = estimate.main(["stdlib-code", "--gpus", "64", *large, "--sequence-length", "16384"])
    assert long["first_that_fits"]["checkpointing"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--gpus", "8"], "must be a language model of type 'rtransformer', got the task"),
        (["stdlib-code", "--gpus", "0"], "`--gpus` must be at least 1, got 0"),
        (["stdlib-code", "--gpus", "8", "--batch", "0"], "`--batch` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        estimate.main(arguments)
