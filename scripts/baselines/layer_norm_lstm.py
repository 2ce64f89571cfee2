"""
The LSTM of RNMT+, whose gates are layer-normalised one by one:

    z = W_x x + W_h h                                        split into new value n, input i, forget f and output o
    g = (z - mean(z)) / sqrt(var(z) + 1e-8) * scale + bias   for each gate, over its D values
    c = clip(sigmoid(f) c + sigmoid(i) tanh(n), -cell_clip, cell_clip)
    h = sigmoid(o) c                                         without a tanh

LayerNorms act on the sum of both products, so that an input cannot be normalised before its step. This file has the
definition and the choice between it and layer_norm_lstm_c.py, which computes the same in C.

Source: Chen et al. 2018, "The Best of Both Worlds" (arXiv 1804.09849), section 4; tensorflow/lingvo, by the authors,
`LayerNormalizedLSTMCellSimple` without its output nonlinearity.
"""

# B batch, T positions, I input size, D hidden size; gates are stacked as n, i, f, o

import functools

import torch
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer.local_rnn_steps import needs_grad, reason_for_plain


EPSILON = 1e-8
IMPLEMENTATIONS = ("auto", "plain", "c")


def layer_norm_lstm_step(
    sums: torch.Tensor, cell: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, cell_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: `(hidden, cell)`, both `(B, D)`, from W_x x + W_h h `(B, 4 D)`, the old cell, scale and bias."""
    normalized = F.layer_norm(sums.unflatten(-1, (4, -1)), cell.shape[-1:], eps=EPSILON).flatten(-2)
    new, input_gate, forget_gate, output_gate = torch.addcmul(bias, normalized, scale).chunk(4, dim=-1)
    cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(new)
    cell = cell.clamp(-cell_clip, cell_clip)
    return torch.sigmoid(output_gate) * cell, cell


def layer_norm_lstm_plain(
    projected: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, cell_clip: float
) -> torch.Tensor:
    """The definition, a loop over the positions: h `(B, T, D)` from W_x x `(B, T, 4 D)` and W_h `(4 D, D)`."""
    hidden = cell = projected.new_zeros(len(projected), weight.shape[1])
    outputs = []
    for inputs in projected.unbind(1):
        hidden, cell = layer_norm_lstm_step(F.linear(hidden, weight) + inputs, cell, scale, bias, cell_clip)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1) if outputs else projected[..., : weight.shape[1]]


@functools.cache
def reason_without_c() -> str | None:
    """Why this machine cannot compile the C functions; None where it can. The first call compiles them."""
    from modeling_rtransformer.compiled_c import NoCompiler
    from scripts.baselines.layer_norm_lstm_c import functions

    try:
        functions(torch.float32)
    except NoCompiler as error:
        return str(error)
    return None


def layer_norm_lstm(
    projected: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    cell_clip: float,
    implementation: str = "auto",
) -> torch.Tensor:
    """
    h `(B, T, D)` from a zero state.

    Args:
        projected (`(B, T, 4 D)`): W_x x.
        weight (`(4 D, D)`): W_h.
        scale, bias (`(4 D)`): of the LayerNorms.
        implementation: `"plain"`, the definition; `"c"` (CPU, float32 and float64, an `ImportError` without a C
            compiler); or `"auto"`, C for float32 on a CPU where it can be compiled.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    weight, scale, bias = (each.to(projected.dtype) for each in (weight, scale, bias))  # under autocast
    if implementation == "auto":
        in_c = projected.device.type == "cpu" and projected.dtype == torch.float32
        in_c = in_c and reason_for_plain(projected, weight) is None and reason_without_c() is None
        implementation = "c" if in_c else "plain"
    if implementation == "plain":
        return layer_norm_lstm_plain(projected, weight, scale, bias, cell_clip)
    from scripts.baselines.layer_norm_lstm_c import CLayerNormLSTM

    return CLayerNormLSTM.apply(
        projected, weight, scale, bias, cell_clip, EPSILON, needs_grad(projected, weight, scale, bias)
    )


class LayerNormLSTM(nn.Module):
    """
    One layer, from I to D. Initial values are the authors': weights uniform(-0.04, 0.04), scale 1, bias 0.

    Args:
        cell_clip: largest absolute value of the cell.
    """

    def __init__(self, input_size: int, hidden_size: int, cell_clip: float = 10.0):
        super().__init__()
        self.cell_clip = cell_clip
        self.implementation = "auto"
        self.input_weight = nn.Parameter(torch.empty(4 * hidden_size, input_size).uniform_(-0.04, 0.04))
        self.recurrent_weight = nn.Parameter(torch.empty(4 * hidden_size, hidden_size).uniform_(-0.04, 0.04))
        self.scale = nn.Parameter(torch.ones(4 * hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T, I) -> (B, T, D)"""
        return layer_norm_lstm(
            F.linear(inputs, self.input_weight),
            self.recurrent_weight,
            self.scale,
            self.bias,
            cell_clip=self.cell_clip,
            implementation=self.implementation,
        )
