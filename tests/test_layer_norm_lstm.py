"""The layer-normalised LSTM in C: as near to float64 as its definition, gradients included."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from modeling_rtransformer import compiled_c
from scripts.baselines import layer_norm_lstm as layer_norm_lstm_module
from scripts.baselines import layer_norm_lstm_c
from scripts.baselines.layer_norm_lstm import LayerNormLSTM, layer_norm_lstm


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
SHAPES = {"B3-L63-D20": (3, 63, 20), "B17-L9-D65": (17, 9, 65), "B1-L1-D2": (1, 1, 2), "B6-L40-D128": (6, 40, 128)}


def arguments_of(batch, length, size, scale=1.0):
    """W_x x, W_h, scale and bias in float64, as float32 has them."""
    shapes = (batch, length, 4 * size), (4 * size, size), (4 * size,), (4 * size,)
    return [(torch.randn(shape) * scale).double() for shape in shapes]


def results(arguments, dtype, implementation, cell_clip=10.0):
    """The output and the gradients of all arguments, in float64."""
    arguments = [each.to(dtype).requires_grad_() for each in arguments]
    output = layer_norm_lstm(*arguments, cell_clip=cell_clip, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(dtype)
    return [each.double() for each in (output, *torch.autograd.grad(output, arguments, grad))]


@needs_gcc
@pytest.mark.parametrize("cell_clip", [10.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_its_error_is_at_most_twice_that_of_the_definition(shape, cell_clip):
    arguments = arguments_of(*shape)
    exact = results(arguments, torch.float64, "plain", cell_clip)
    fast, plain = (results(arguments, torch.float32, name, cell_clip) for name in ("c", "plain"))
    for true, ours, theirs in zip(exact, fast, plain, strict=True):
        allowed = 2 * (theirs - true).abs().max() + 1e-6 * true.abs().max()
        assert (ours - true).abs().max() <= allowed


@needs_gcc
@pytest.mark.parametrize("cell_clip", [10.0, 0.3])
def test_in_float64_it_is_the_definition(cell_clip):
    arguments = arguments_of(5, 21, 13)
    for ours, theirs in zip(*(results(arguments, torch.float64, name, cell_clip) for name in ("c", "plain"))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@needs_gcc
def test_the_number_of_threads_changes_nothing():
    arguments, threads, found = arguments_of(14, 11, 20), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(arguments, torch.float32, "c"))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@needs_gcc
def test_without_gradients_the_outputs_are_the_same_to_the_last_bit():
    made, inputs = LayerNormLSTM(7, 20), torch.randn(3, 30, 7)
    made.implementation = "c"
    kept = made(inputs)
    with torch.no_grad():
        assert torch.equal(made(inputs), kept)


@needs_gcc
def test_what_is_not_a_number_reaches_its_own_row_from_there_on():
    made, inputs = LayerNormLSTM(7, 20), torch.randn(3, 9, 7)
    made.implementation = "c"
    inputs[1, 4, 2] = torch.nan
    assert made(inputs).isnan().all(-1).nonzero().tolist() == [[1, position] for position in range(4, 9)]


@needs_gcc
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)], ids=["no-rows", "no-positions"])
@pytest.mark.parametrize("implementation", ["plain", "c"])
def test_an_empty_batch_or_row_gives_nothing(implementation, shape):
    made, inputs = LayerNormLSTM(3, 8), torch.randn(*shape, requires_grad=True)
    made.implementation = implementation
    output = made(inputs)
    output.sum().backward()
    assert output.shape == (*shape[:2], 8) and inputs.grad.shape == shape


def test_what_it_does_not_take_is_refused():
    made = LayerNormLSTM(3, 8)
    made.implementation = "cc"
    with pytest.raises(ValueError, match="`implementation` must be one of auto, plain, c, got 'cc'"):
        made(torch.randn(1, 2, 3))
    made.implementation = "c"
    with pytest.raises(ValueError, match="takes float32 and float64 on a CPU, not torch.bfloat16 on cpu"):
        made.bfloat16()(torch.randn(1, 2, 3, dtype=torch.bfloat16))
    made.implementation = "auto"
    assert made(torch.randn(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_without_a_compiler_the_definition_runs(tmp_path, monkeypatch):
    caches = compiled_c.load, layer_norm_lstm_c.functions, layer_norm_lstm_module.reason_without_c
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in caches:
        function.cache_clear()
    try:
        made, inputs = LayerNormLSTM(3, 8), torch.randn(2, 5, 3)
        output = made(inputs)
        made.implementation = "plain"
        assert torch.equal(output, made(inputs))
        made.implementation = "c"
        with pytest.raises(ImportError, match="no C compiler"):
            made(inputs)
    finally:
        for function in caches:
            function.cache_clear()


def test_the_gates_are_normalised_so_that_the_size_of_their_sums_does_not_matter():
    made, inputs = LayerNormLSTM(6, 8).double(), torch.randn(2, 9, 6).double()
    expected = made(inputs)
    with torch.no_grad():
        made.input_weight.mul_(64), made.recurrent_weight.mul_(64)
    torch.testing.assert_close(made(inputs), expected, rtol=1e-3, atol=1e-4)
    assert F.linear(inputs, made.input_weight).abs().max() > 1
