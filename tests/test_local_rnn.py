"""The LocalRNN equals torch's own RNNs run over unfolded windows, gradients included."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer.local_rnn import LocalRNN, local_rnn_reference


TORCH_RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
SHAPES = [(2, 63, 20, 7), (1, 5, 3, 9), (3, 1, 4, 2), (2, 10, 6, 1)]


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


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-D{}-K{}".format(*s))
@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_it_equals_the_unfolded_reference(rnn_type, shape, packed):
    batch, length, hidden, window = shape
    torch.manual_seed(0)
    local_rnn = LocalRNN(hidden, window, rnn_type).double()
    inputs = torch.randn(batch, length, hidden, dtype=torch.float64, requires_grad=True)
    padded = F.pad(inputs, (0, 0, window - 1, 0))
    segment_ids = torch.arange(length).div(4, rounding_mode="floor").expand(batch, -1) if packed else None
    ours = local_rnn(padded, segment_ids)
    theirs = local_rnn_reference(padded, torch_rnn(local_rnn), window, segment_ids)
    torch.testing.assert_close(ours, theirs)
    wanted = (inputs, *local_rnn.parameters())
    torch.testing.assert_close(gradients(ours, *wanted), gradients(theirs, *wanted))


@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_float32_is_as_exact_as_the_reference(rnn_type):
    torch.manual_seed(0)
    local_rnn = LocalRNN(20, 7, rnn_type)
    padded = F.pad(torch.randn(2, 63, 20), (0, 0, 6, 0))
    with torch.no_grad():
        fast, plain = local_rnn(padded), local_rnn_reference(padded, torch_rnn(local_rnn), 7)
        exact = local_rnn.double()(padded.double())
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7


@pytest.mark.parametrize("rnn_type", TORCH_RNNS)
def test_gradcheck(rnn_type):
    torch.manual_seed(0)
    local_rnn = LocalRNN(3, 4, rnn_type).double()
    inputs = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    segment_ids = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    assert torch.autograd.gradcheck(local_rnn, (inputs, segment_ids))


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
