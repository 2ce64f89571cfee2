"""The formulae of docs/SCALING.md against a real model; test_parallel.py has what several processes hold and send."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


ROWS, LENGTH, SIZE, WINDOW, VOCABULARY = 2, 90, 60, 5, 301
PARTS = {  # paths of the modules of each part
    "LocalRNN": r"\.local_rnns\.\d+$",
    "REM": r"\.self_attn\.recurrence$",
    "attention": r"\.self_attn$",  # with the REM
    "feed-forward": r"\.mlp$",
    "head": r"\.lm_head$",
}


@pytest.fixture
def model():
    config = tiny_config("gru-and-rsa", hidden_size=SIZE, vocab_size=VOCABULARY)
    model = RTransformerForCausalLM(config)
    for layer in model.model.layers:
        layer.local_rnns[0].rnn.implementation = "plain"  # the products of the C form are not counted
    return model


def test_the_parameters_of_each_part_are_those_of_the_document(model):
    def count(name):
        modules = [module for path, module in model.named_modules() if re.search(PARTS[name], f".{path}")]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    inner = 4 * SIZE
    assert count("LocalRNN") == 2 * 2 * 3 * (SIZE**2 + SIZE)
    assert count("attention") - count("REM") == 2 * 4 * (SIZE**2 + SIZE)
    assert count("feed-forward") == 2 * (2 * SIZE * inner + inner + SIZE)


def test_the_operations_of_each_part_are_those_of_the_document(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(1, VOCABULARY, (ROWS, LENGTH)))
    operations = dict.fromkeys(PARTS, 0)
    for path, by_operator in counter.get_flop_counts().items():
        for name, pattern in PARTS.items():
            if re.search(pattern, path):
                operations[name] += sum(by_operator.values())
    positions, inputs = ROWS * LENGTH, ROWS * (LENGTH + WINDOW - 1)  # with the zeros before each row
    assert operations["LocalRNN"] == 2 * 2 * 3 * SIZE**2 * (inputs + (WINDOW - 1) * positions)
    # the 4 L D of softmax attention are in a kernel of the CPU, which is not counted
    assert operations["attention"] - operations["REM"] == 2 * positions * 8 * SIZE**2
    assert operations["REM"] > 0
    assert operations["feed-forward"] == 2 * positions * 4 * SIZE * 4 * SIZE
    assert operations["head"] == 2 * positions * SIZE * VOCABULARY
