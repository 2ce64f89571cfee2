"""The LocalRNN equals torch's own RNNs run over unfolded windows, gradients included."""

import logging
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer import local_rnn_c, local_rnn_steps
from modeling_rtransformer.local_rnn import ONE_RUN_FROM, LocalRNN
from modeling_rtransformer.local_rnn_steps import best_implementation, local_rnn_reference


TORCH_RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
SHAPES = [(2, 63, 20, 7), (1, 5, 3, 9), (3, 1, 4, 2), (2, 10, 6, 1), (5, 9, 2, 3)]


@pytest.fixture(params=["plain", pytest.param("c", marks=needs_gcc)])
def implementation(request, monkeypatch):
    """Each implementation by name; blocks of a few rows, so that small sizes have several and uneven ones."""
    monkeypatch.setattr(local_rnn_c, "BLOCK_ROWS", 20)
    monkeypatch.setattr(local_rnn_c, "THREAD_ROWS", 5)
    return request.param


def torch_rnn(local_rnn):
    """The `torch.nn` RNN with the same parameters (shared, so gradients arrive in ours)."""
    rnn = TORCH_RNNS[local_rnn.rnn_type](local_rnn.hidden_size, local_rnn.hidden_size, batch_first=True)
    rnn.to(local_rnn.input_proj.weight.dtype)
    for ours, theirs in ((local_rnn.input_proj, "ih_l0"), (local_rnn.recurrent_proj, "hh_l0")):
        setattr(rnn, f"weight_{theirs}", ours.weight)
        setattr(rnn, f"bias_{theirs}", ours.bias)
    return rnn


def gradients(output, *tensors):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), tensors)


def first_inputs(batch, length, window):
    """`(B, K - 1 + L)`: a row that begins with its first input, one with its second and so on."""
    begins = window - 1 + torch.arange(batch) % length
    return torch.arange(window - 1 + length) >= begins[:, None]


@pytest.mark.parametrize("unpadded", [False, True], ids=["zeros", "unpadded"])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-D{}-K{}".format(*s))
@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_it_equals_the_unfolded_reference(rnn_type, shape, packed, unpadded, implementation):
    batch, length, hidden, window = shape
    torch.manual_seed(0)
    local_rnn = LocalRNN(hidden, window, rnn_type).double()
    local_rnn.implementation = implementation
    inputs = torch.randn(batch, length, hidden, dtype=torch.float64, requires_grad=True)
    padded = F.pad(inputs, (0, 0, window - 1, 0))
    segment_ids = torch.arange(length).div(4, rounding_mode="floor").expand(batch, -1) if packed else None
    in_sequence = first_inputs(batch, length, window) if unpadded else None
    ours = local_rnn(padded, segment_ids, in_sequence)
    theirs = local_rnn_reference(padded, torch_rnn(local_rnn), window, segment_ids, in_sequence)
    torch.testing.assert_close(ours, theirs)
    wanted = (inputs, *local_rnn.parameters())
    torch.testing.assert_close(gradients(ours, *wanted), gradients(theirs, *wanted))


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded-left"])
@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_over_a_sequence_in_its_window_it_is_one_run_of_the_rnn(rnn_type, padded):
    torch.manual_seed(0)
    local_rnn = LocalRNN(6, 14, rnn_type).double()
    inputs = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True)
    in_sequence = first_inputs(3, 11, 14) if padded else (torch.arange(24) >= 13).expand(3, -1)
    assert local_rnn.can_run_over(inputs) and not local_rnn.can_run_over(F.pad(inputs, (0, 0, 4, 0)))
    real = in_sequence[:, 13:, None]
    fast = local_rnn.over_sequence(inputs, in_sequence[:, 13:].long() if padded else None) * real
    windows = local_rnn(F.pad(inputs, (0, 0, 13, 0)), None, in_sequence) * real
    whole = torch_rnn(local_rnn)(inputs[:1])[0]  # its first row begins at once in both cases
    torch.testing.assert_close(fast, windows)
    torch.testing.assert_close(fast[:1], whole)
    wanted = (inputs, *local_rnn.parameters())
    torch.testing.assert_close(gradients(fast, *wanted), gradients(windows, *wanted))


@pytest.mark.parametrize("unpadded", [False, True], ids=["zeros", "unpadded"])
@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_one_long_window_is_one_run_of_the_rnn(rnn_type, unpadded, monkeypatch):
    """A decoding step: all inputs make up one window."""
    torch.manual_seed(0)
    local_rnn = LocalRNN(6, ONE_RUN_FROM, rnn_type).double()
    inputs = torch.randn(4, ONE_RUN_FROM, 6, dtype=torch.float64, requires_grad=True)
    begins = torch.tensor([0, 9, ONE_RUN_FROM - 1, ONE_RUN_FROM])  # the last row has not begun
    in_sequence = torch.arange(ONE_RUN_FROM) >= begins[:, None] if unpadded else None
    runs = []
    over_sequence = LocalRNN.over_sequence
    monkeypatch.setattr(LocalRNN, "over_sequence", lambda *args: runs.append(1) or over_sequence(*args))
    one_run = local_rnn(inputs, None, in_sequence)
    local_rnn.implementation = "plain"
    steps = local_rnn(inputs, None, in_sequence)
    assert len(runs) == 1
    torch.testing.assert_close(one_run, steps)
    wanted = (inputs, *local_rnn.parameters())
    torch.testing.assert_close(gradients(one_run, *wanted), gradients(steps, *wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_before_its_first_input_an_unpadded_state_is_zero_to_the_last_bit(rnn_type, dtype):
    local_rnn = LocalRNN(8, 5, rnn_type).to(dtype)
    in_sequence = torch.arange(4 + 6)[None] >= 4 + 3
    assert not local_rnn(torch.randn(1, 10, 8, dtype=dtype), None, in_sequence)[:, :3].any()


@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_float32_is_as_exact_as_the_reference(rnn_type, implementation):
    """Outputs and gradients: the error, measured against float64, is at most twice the reference's."""
    torch.manual_seed(0)
    local_rnn = LocalRNN(20, 7, rnn_type)
    local_rnn.implementation = implementation
    padded = F.pad(torch.randn(2, 63, 20), (0, 0, 6, 0)).requires_grad_()

    def results(function, inputs):
        output = function(inputs)
        return output, *gradients(output, inputs, *local_rnn.parameters())

    fast = results(local_rnn, padded)
    plain = results(lambda inputs: local_rnn_reference(inputs, torch_rnn(local_rnn), 7), padded)
    exact = results(local_rnn.double(), padded.double().detach().requires_grad_())
    assert (fast[0] - exact[0]).abs().max() <= 2 * (plain[0] - exact[0]).abs().max() + 1e-7
    for fast_one, plain_one, exact_one in zip(fast, plain, exact, strict=True):
        assert (fast_one - exact_one).norm() <= 2 * (plain_one - exact_one).norm() + 1e-7 * exact_one.norm()


@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_no_buffer_is_read_before_it_is_written(rnn_type, implementation, monkeypatch):
    """With every new buffer full of NaN, outputs and gradients are what they were."""
    torch.manual_seed(0)
    local_rnn = LocalRNN(4, 3, rnn_type)
    local_rnn.implementation = implementation
    padded = torch.randn(3, 31, 4, requires_grad=True)
    segment_ids = torch.arange(29).div(10, rounding_mode="floor").expand(3, -1)

    def results():
        output = local_rnn(padded, segment_ids)
        return output, *gradients(output, padded, *local_rnn.parameters())

    expected = results()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = results()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_gradcheck(rnn_type, implementation):
    torch.manual_seed(0)
    local_rnn = LocalRNN(3, 4, rnn_type).double()
    local_rnn.implementation = implementation
    inputs = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    segment_ids = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    assert torch.autograd.gradcheck(local_rnn, (inputs, segment_ids))
    assert torch.autograd.gradcheck(local_rnn, (inputs, segment_ids, first_inputs(2, 5, 4)))


def test_inputs_before_the_sequence_are_zeros_that_the_biases_act_on():
    local_rnn = LocalRNN(4, 3, "rnn").double()
    one = torch.randn(1, 1, 4, dtype=torch.float64)
    output = local_rnn(F.pad(one, (0, 0, 2, 0)))[0, 0]
    hidden = torch.zeros(4, dtype=torch.float64)
    for value in (torch.zeros_like(one[0, 0]), torch.zeros_like(one[0, 0]), one[0, 0]):
        hidden = torch.tanh(local_rnn.input_proj(value) + local_rnn.recurrent_proj(hidden))
    torch.testing.assert_close(output, hidden)


def test_a_window_of_one_sees_the_current_input_only():
    local_rnn = LocalRNN(5, 1, "gru")
    inputs = torch.randn(1, 6, 5)
    torch.testing.assert_close(local_rnn(inputs)[:, 3:4], local_rnn(inputs[:, 3:4]))


@pytest.mark.parametrize(
    ("name", "rnn_type", "values_a_step"),
    [
        *(pytest.param("c", *kept, marks=needs_gcc) for kept in (("gru", 3), ("lstm", 5), ("rnn", 1))),
        *(("plain", *kept) for kept in (("gru", 5), ("lstm", 7), ("rnn", 1))),
    ],
)
def test_what_is_kept_for_the_backward_pass(name, rnn_type, values_a_step):
    """Beside the input, which is there anyway, at most so many D values a step and position."""
    local_rnn = LocalRNN(8, 5, rnn_type)
    local_rnn.implementation = name
    projected = local_rnn.input_proj(torch.randn(2, 104, 8)).detach().requires_grad_()
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        local_rnn.input_proj = nn.Identity()
        output = local_rnn(projected)
    parameters = sum(parameter.numel() for parameter in local_rnn.recurrent_proj.parameters())
    assert sum(kept.values()) <= projected.numel() + parameters + 5 * values_a_step * output.numel()


def test_a_cpu_runs_c_where_it_pays_and_plain_operations_elsewhere(monkeypatch):
    large, small = torch.randn(4, 720, 96), torch.randn(4, 20, 96)
    weight = nn.Parameter(torch.randn(96, 32))
    step, many_steps, wide = torch.randn(1, 7, 1536), torch.randn(16, 7, 1536), torch.randn(1536, 512)
    monkeypatch.setattr(local_rnn_steps, "reason_without_c", lambda: None)
    for inputs in (large, small):
        assert best_implementation(inputs, weight, 7) == ("c", None, False)
    assert best_implementation(many_steps, wide, 7).name == "c"
    assert best_implementation(step, wide, 7).name == "plain"
    for dtype in (torch.float64, torch.bfloat16):  # C is slower than PyTorch in float64
        name, reason, warn = best_implementation(large.to(dtype), weight.to(dtype), 7)
        assert name == "plain" and str(dtype) in reason and not warn
    monkeypatch.setattr(local_rnn_steps, "reason_without_c", lambda: "there is no C compiler")
    assert best_implementation(large, weight, 7) == ("plain", "there is no C compiler", True)
    chosen = []
    torch.vmap(lambda inputs: chosen.append(best_implementation(inputs[None], weight, 7)) or inputs)(large)
    assert chosen == [("plain", "torch.func transforms it", False)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cpu_runs_float64_and_bfloat16_in_plain_operations(dtype):
    local_rnn = LocalRNN(8, 3, "gru").to(dtype)
    inputs = torch.randn(2, 40, 8, dtype=dtype)
    chosen = local_rnn(inputs)
    local_rnn.implementation = "plain"
    torch.testing.assert_close(chosen, local_rnn(inputs))


@pytest.fixture
def logged(monkeypatch):
    """The lines that are logged from here on, with their level, as in a new process."""
    logger, lines = local_rnn_steps.logger, []
    for once in (logging.Logger.info_once, logging.Logger.warning_once):
        once.cache_clear()
    monkeypatch.setattr(logger, "info", lambda line: lines.append(("info", line)))
    monkeypatch.setattr(logger, "warning", lambda line: lines.append(("warning", line)))
    return lines


def test_one_line_says_which_implementation_runs_and_why(logged, monkeypatch):
    monkeypatch.setattr(local_rnn_steps, "reason_without_c", lambda: "there is no C compiler `gcc`: install gcc")
    local_rnn = LocalRNN(8, 3, "lstm")
    for _ in range(2):
        local_rnn(torch.randn(2, 20, 8))
        LocalRNN(16, 5, "gru")(torch.randn(1, 30, 16))
    assert logged == [("warning", "LocalRNN: plain, because there is no C compiler `gcc`: install gcc")]
    local_rnn.over_sequence(torch.randn(2, 3, 8))
    assert logged[1:] == [("info", "LocalRNN: torch's LSTM in one run, because the window holds the whole sequence")]
    local_rnn.implementation = "plain"
    local_rnn(torch.randn(2, 20, 8))
    assert logged[2:] == [("info", "LocalRNN: plain, because `implementation` names it")]


@needs_gcc
def test_the_line_of_the_fused_form_in_c(logged):
    for _ in range(2):
        LocalRNN(8, 3, "lstm")(torch.randn(2, 20, 8))
    assert logged == [("info", "LocalRNN: fused C")]


def test_what_a_compiler_or_an_exporter_traces_is_logged_and_not_in_the_graph(logged):
    local_rnn = LocalRNN(8, 3, "gru")
    inputs = torch.randn(2, 20, 8)
    compiled = torch.compile(local_rnn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), local_rnn(inputs))
    line = ("info", "LocalRNN: plain, because a compiler or exporter traces it")
    assert logged[0] == line
    logging.Logger.info_once.cache_clear()
    torch.export.export(local_rnn, (inputs,))
    assert logged[-1] == line


def test_gradients_of_single_sequences_through_torch_func():
    """vmap over grad, which autograd functions with a backward of their own do not take."""
    torch.manual_seed(0)
    local_rnn = LocalRNN(32, 3, "gru")
    inputs = torch.randn(2, 210, 32)
    parameters = dict(local_rnn.named_parameters())

    def loss(parameters, one):
        return torch.func.functional_call(local_rnn, parameters, one[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    whole = torch.autograd.grad(local_rnn(inputs).square().sum(), list(parameters.values()))
    torch.testing.assert_close([gradient.sum(0) for gradient in each.values()], list(whole))


def test_an_unknown_implementation_is_named_with_the_known_ones():
    local_rnn = LocalRNN(4, 3, "gru")
    local_rnn.implementation = "cudnn"
    with pytest.raises(ValueError, match="'cudnn'.*plain, c, triton"):
        local_rnn(torch.randn(1, 5, 4))


def test_asking_for_triton_without_having_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("modeling_rtransformer.local_rnn_triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    local_rnn = LocalRNN(4, 3, "gru")
    local_rnn.implementation = "triton"
    with pytest.raises(ImportError, match="'triton' needs Triton: `pip install triton`"):
        local_rnn(torch.randn(1, 5, 4))


class Adapter(nn.Module):
    """Stands in for a layer that a LoRA adapter has wrapped."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.randn(base.out_features, base.in_features) * 0.1)

    @property
    def weight(self):  # what reading `.weight` would see: the layer without the adapter
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, inputs):
        return self.base(inputs) + inputs @ self.delta.T


@pytest.mark.parametrize("name", ["input_proj", "recurrent_proj"])
def test_a_wrapped_projection_has_its_effect_and_its_gradient(name):
    torch.manual_seed(0)
    local_rnn = LocalRNN(4, 3, "gru").double()
    padded = torch.randn(2, 9, 4, dtype=torch.float64)
    merged = LocalRNN(4, 3, "gru").double()
    merged.load_state_dict(local_rnn.state_dict())
    adapter = Adapter(getattr(local_rnn, name)).double()
    setattr(local_rnn, name, adapter)
    with torch.no_grad():
        getattr(merged, name).weight += adapter.delta
    torch.testing.assert_close(local_rnn(padded), merged(padded))
    [gradient] = gradients(local_rnn(padded), adapter.delta)
    [expected] = gradients(merged(padded), getattr(merged, name).weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("padding", ["zeros", "none"])
def test_a_hard_lstm_is_an_lstm_with_hard_sigmoids(padding):
    made = LocalRNN(6, 4, "hard_lstm").double()
    inputs = torch.randn(2, 3 + 8, 6, dtype=torch.float64) * 3  # large enough to reach the flat parts
    in_sequence = torch.arange(11).expand(2, -1) >= 3 if padding == "none" else None
    outputs = made(inputs, in_sequence=in_sequence)
    for position in range(8):
        hidden = cell = torch.zeros(2, 6, dtype=torch.float64)
        first = max(position, 3) if padding == "none" else position
        for step in range(first, position + 4):
            gates = made.input_proj(inputs[:, step]) + made.recurrent_proj(hidden)
            i, f, g, o = gates.chunk(4, dim=-1)
            i, f, o = (torch.clamp(0.2 * gate + 0.5, 0, 1) for gate in (i, f, o))
            cell = f * cell + i * g.tanh()
            hidden = o * cell.tanh()
        torch.testing.assert_close(outputs[:, position], hidden)


@pytest.mark.parametrize("implementation", ["c", "triton"])
def test_a_hard_lstm_has_no_kernels(implementation):
    made = LocalRNN(6, 4, "hard_lstm")
    made.implementation = implementation
    with pytest.raises(
        ValueError, match=f"`implementation` must be 'plain' or 'auto' for 'hard_lstm', got '{implementation}'"
    ):
        made(torch.randn(1, 9, 6))
