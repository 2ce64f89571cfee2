"""
The LocalRNN's Triton kernels equal torch's own RNNs run over unfolded windows, gradients included.

Every check runs on a CUDA device where there is one. One test runs all of them in Triton's interpreter on the CPU, in a
process of its own, since the interpreter is chosen in the environment before Triton is imported.
"""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer import RTransformerForCausalLM, local_rnn_steps
from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.local_rnn_steps import best_implementation, local_rnn_reference
from tests.conftest import tiny_config
from tests.test_local_rnn import TORCH_RNNS, gradients, torch_rnn


pytest.importorskip("triton", reason="Triton is not installed")
from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from modeling_rtransformer import (  # noqa: E402 (they need Triton)
    local_rnn_triton,
    local_rnn_triton_large,
    local_rnn_triton_small,
)


INTERPRETED = local_rnn_triton.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
on_the_device = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu
# B, L, D, K: several blocks and columns; a window longer than the sequence, and longer than a block of rows; one input;
# a window of one.
SHAPES = [(2, 19, 20, 5), (1, 5, 3, 9), (1, 19, 5, 20), (3, 1, 4, 2), (2, 10, 6, 1)]
BY_TYPE = pytest.mark.parametrize("rnn_type", TORCH_RNNS)


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_all_checks_pass_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(params=["small", "large"])
def path(request, monkeypatch):
    """Each of the two ways, with blocks so small that small sizes have several and uneven ones."""
    monkeypatch.setattr(local_rnn_triton, "fits_small", lambda inputs: request.param == "small")
    monkeypatch.setattr(local_rnn_triton_small, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(local_rnn_triton_small, "TENSOR_CORE_ROWS", 16)
    monkeypatch.setattr(local_rnn_triton_large, "TILE_ELEMENTS", 512)
    monkeypatch.setattr(local_rnn_triton_large, "TILE_COLUMNS", 16)
    monkeypatch.setattr(local_rnn_triton_large, "BACKWARD_ELEMENTS", 800)
    return request.param


def make(rnn_type, hidden, window, dtype=torch.float32):
    made = LocalRNN(hidden, window, rnn_type).to(DEVICE, dtype)
    made.implementation = "triton"
    return made


def segments(batch, length, size=4):
    return torch.arange(length, device=DEVICE).div(size, rounding_mode="floor").expand(batch, -1)


def results(rnn, inputs, segment_ids=None):
    """The output and all gradients."""
    output = rnn(inputs, segment_ids)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), (inputs, *rnn.parameters()))


@on_the_device
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-D{}-K{}".format(*s))
@BY_TYPE
def test_it_equals_the_unfolded_reference(rnn_type, shape, packed, path):
    batch, length, hidden, window = shape
    rnn = make(rnn_type, hidden, window)
    padded = F.pad(torch.randn(batch, length, hidden, device=DEVICE), (0, 0, window - 1, 0)).requires_grad_()
    segment_ids = segments(batch, length) if packed else None
    ours = results(rnn, padded, segment_ids)
    rnn, padded = rnn.cpu().double(), padded.detach().cpu().double().requires_grad_()
    segment_ids = None if segment_ids is None else segment_ids.cpu()
    output = local_rnn_reference(padded, torch_rnn(rnn), window, segment_ids)
    theirs = output, *gradients(output, padded, *rnn.parameters())
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.cpu().double(), their, rtol=1e-4, atol=1e-5)


@on_the_device
@pytest.mark.parametrize("elements", [1000, 300], ids=["sequences", "positions"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@BY_TYPE
def test_a_long_window_keeps_only_its_inputs_and_its_backward_pass_runs_in_parts(
    rnn_type, packed, elements, path, monkeypatch
):
    monkeypatch.setattr(local_rnn_triton, "KEPT_STEPS", 4)
    monkeypatch.setattr(local_rnn_triton, "KEPT_ELEMENTS", elements)
    rnn = make(rnn_type, 6, 5)
    gates = rnn.recurrent_proj.out_features
    padded = F.pad(torch.randn(2, 7, 6, device=DEVICE), (0, 0, 4, 0)).requires_grad_()
    segment_ids = segments(2, 7, 3) if packed else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        found = results(rnn, padded, segment_ids)
    if elements < 5 * 14 * gates:  # then: the inputs, their projections, the parameters and the outputs, but no step
        assert sum(kept) <= padded.numel() + 2 * 11 * gates + 20 * gates + 14 * 6
    rnn.implementation = "plain"
    torch.testing.assert_close(found, results(rnn, padded, segment_ids), rtol=1e-4, atol=1e-5)


@on_the_device
@BY_TYPE
def test_windows_begin_with_the_sequence_where_nothing_is_before(rnn_type, path):
    rnn = make(rnn_type, 6, 5)
    padded = torch.randn(2, 4 + 19, 6, device=DEVICE)
    in_sequence = torch.arange(4 + 19, device=DEVICE) >= torch.tensor([[4], [7]], device=DEVICE)
    ours = rnn(padded, segments(2, 19), in_sequence)
    theirs = local_rnn_reference(padded, torch_rnn(rnn), 5, segments(2, 19), in_sequence)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not ours[1, :3].any()


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BY_TYPE
def test_it_is_as_exact_as_plain_operations(rnn_type, dtype, path):
    """
    Outputs and gradients: the error, measured against float64, is at most twice that of plain operations. The
    interpreter cuts bfloat16 off where it should round, which is twice as far off, and always in one direction.
    """
    allowed = 8 if INTERPRETED and dtype == torch.bfloat16 else 2
    rnn = make(rnn_type, 20, 5, dtype)
    padded = F.pad(torch.randn(2, 33, 20, device=DEVICE, dtype=dtype), (0, 0, 4, 0)).requires_grad_()
    fast = results(rnn, padded)
    rnn.implementation = "plain"
    plain = results(rnn, padded)
    exact = results(rnn.double(), padded.detach().double().requires_grad_())
    assert (fast[0] - exact[0]).abs().max() <= allowed * (plain[0] - exact[0]).abs().max() + 1e-7
    for fast_one, plain_one, exact_one in zip(fast, plain, exact, strict=True):
        assert (fast_one - exact_one).norm() <= allowed * (plain_one - exact_one).norm() + 1e-7 * exact_one.norm()


@on_the_device
@BY_TYPE
def test_no_buffer_is_read_before_it_is_written_and_runs_give_the_same_bits(rnn_type, path, monkeypatch):
    """With every new buffer full of NaN, outputs and gradients are what they were, bit by bit."""
    rnn = make(rnn_type, 5, 3)
    padded = torch.randn(2, 23, 5, device=DEVICE, requires_grad=True)
    expected = results(rnn, padded, segments(2, 21, 8))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # products on a GPU may only warn
    try:
        poisoned = results(rnn, padded, segments(2, 21, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


@on_the_device
@BY_TYPE
def test_without_gradients_the_output_is_as_exact(rnn_type, path):
    """
    The error, measured against float64, is at most twice that of a forward pass that keeps what a backward pass needs.
    The bits may differ: products round differently where they read other buffers.
    """
    rnn = make(rnn_type, 5, 3)
    padded = torch.randn(2, 23, 5, device=DEVICE)
    kept = rnn(padded)
    with torch.no_grad():
        output = rnn(padded)
        exact = local_rnn_reference(padded.double(), torch_rnn(rnn.double()).to(DEVICE), 3)
    assert not output.requires_grad
    assert (output - exact).abs().max() <= 2 * (kept - exact).abs().max() + 1e-7


@on_the_device
@BY_TYPE
def test_strided_inputs_and_gradients(rnn_type, path):
    """Projections that are a slice, and the gradient of a sum, which is one number expanded."""
    rnn = make(rnn_type, 5, 3)
    width = rnn.recurrent_proj.out_features
    wide = torch.randn(2, 11, 2 * width, device=DEVICE, requires_grad=True)
    found = []
    rnn.input_proj = nn.Identity()
    for rnn.implementation in ("triton", "plain"):
        output = rnn(wide[..., ::2])
        found.append((output, *torch.autograd.grad(output.sum(), (wide, *rnn.recurrent_proj.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@on_the_device
@BY_TYPE
def test_it_keeps_at_most_the_gates_of_each_step(rnn_type, path):
    """Beside the input, which is there anyway: G D values a step and position."""
    rnn = make(rnn_type, 8, 5)
    projected = rnn.input_proj(torch.randn(2, 54, 8, device=DEVICE)).detach().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        rnn.input_proj = nn.Identity()
        rnn(projected)
    gates = rnn.recurrent_proj.out_features
    parameters = sum(parameter.numel() for parameter in rnn.recurrent_proj.parameters())
    assert sum(kept) <= projected.numel() + 2 * parameters + 2 * 50 * 5 * gates


@on_the_device
def test_double_precision_is_refused():
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not torch.float64"):
        make("gru", 4, 3, torch.float64)(torch.randn(1, 5, 4, device=DEVICE, dtype=torch.float64))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes them")
def test_tensors_that_are_not_on_a_gpu_are_refused():
    rnn = LocalRNN(4, 3, "gru")
    rnn.implementation = "triton"
    with pytest.raises(ValueError, match="CUDA device, not on cpu; take 'auto' or 'plain'"):
        rnn(torch.randn(1, 5, 4))


@on_the_device
@pytest.mark.parametrize("error", ["OutOfResources", "CompilationError"])
def test_kernels_that_do_not_run_are_a_reason_for_plain_operations_that_is_found_once(error, path, monkeypatch):
    raised = {
        "OutOfResources": OutOfResources(151552, 101376, "shared memory"),
        "CompilationError": CompilationError("def kernel(): pass", ast.parse("def kernel(): pass").body[0], "no"),
    }[error]
    tried = []

    def fail(*arguments):
        tried.append(arguments)
        raise raised

    arguments = torch.device(DEVICE), torch.float32, 3, 20, False
    local_rnn_triton.reason_against.cache_clear()
    assert local_rnn_triton.reason_against(*arguments) is None
    local_rnn_triton.reason_against.cache_clear()
    monkeypatch.setattr(local_rnn_triton, f"backward_{path}", fail)
    for _ in range(2):
        assert f"do not run on {DEVICE}: {error}" in local_rnn_triton.reason_against(*arguments)
    assert len(tried) == 1
    local_rnn_triton.reason_against.cache_clear()


def test_a_gpu_whose_kernels_do_not_run_takes_plain_operations_with_a_warning(monkeypatch):
    monkeypatch.setattr(local_rnn_triton, "reason_against", lambda *arguments: "they do not fit")
    monkeypatch.setattr(local_rnn_steps, "reason_for_plain", lambda *tensors: None)
    projected = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert best_implementation(projected, torch.empty(12, 4), 3) == ("plain", "they do not fit", True)


@pytest.mark.gpu
def test_it_is_chosen_on_a_gpu_where_triton_is_installed(monkeypatch):
    projected, weight = torch.randn(1, 8, 12, device="cuda"), nn.Parameter(torch.randn(12, 4, device="cuda"))
    assert best_implementation(projected, weight, 3) == ("triton", None, False)
    assert best_implementation(projected.bfloat16(), weight, 3).name == "triton"
    assert best_implementation(projected.double(), weight, 3).name == "plain"
    monkeypatch.setattr(local_rnn_steps, "triton_is_installed", lambda: False)
    assert best_implementation(projected, weight, 3) == ("plain", "Triton is not installed", False)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [20, 100])
def test_a_compiled_model_gives_what_the_kernels_give(hidden_size):
    """Compilers take the plain operations."""
    model = RTransformerForCausalLM(tiny_config("gru-and-rsa", hidden_size=hidden_size)).cuda()
    ids = torch.randint(3, 37, (2, 70), device="cuda")
    found = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [20, 100])
def test_a_model_trains_under_autocast(hidden_size):
    model = RTransformerForCausalLM(tiny_config("two-lstm", hidden_size=hidden_size)).cuda()
    ids = torch.randint(3, 37, (2, 70), device="cuda")
    exact = model(ids, labels=ids, use_cache=False).loss
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BY_TYPE
def test_over_a_sequence_in_its_window_it_is_one_run_of_cudnn(rnn_type, dtype):
    rnn = LocalRNN(20, 40, rnn_type).cuda().to(dtype)
    inputs = torch.randn(3, 37, 20, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.arange(37, device="cuda") >= torch.tensor([[0], [5], [11]], device="cuda")
    assert rnn.can_run_over(inputs)
    fast = rnn.eval().over_sequence(inputs, mask)
    windows = rnn(F.pad(inputs, (0, 0, 39, 0)), None, F.pad(mask, (39, 0)))
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(fast, windows, **tolerance)
    wanted = (inputs, *rnn.parameters())
    torch.testing.assert_close(gradients(fast, *wanted), gradients(windows, *wanted), rtol=0.05, atol=0.05)
