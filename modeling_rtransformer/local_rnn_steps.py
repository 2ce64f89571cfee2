# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
LocalRNN: one shared RNN run from a zero state over the K inputs that end at each position.

    out[t] = RNN(x[t-K+1], ..., x[t]),   inputs before the sequence are zero, or the RNN begins with the first one

The positions do not depend on each other, so only K steps are sequential, whatever the length. Two consequences make it
cheap: an input has the same projection W_x x + b in each of the K windows that it belongs to, so it is projected once;
and the k-th inputs of all windows are one slice of the padded projections, so nothing is gathered or copied K times.

This file has the definition, the K steps in plain PyTorch, and the choice between them and the kernels, which compute
the same: local_rnn_c.py on a CPU, local_rnn_triton.py on a GPU.

Source: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3.1 and the published code.
"""

# B batch, L length, D hidden size, K window, G gates: GRU 3 (reset, update, new), LSTM and hard LSTM 4
# (input, forget, cell, output), tanh RNN 1. Gates are stacked in this order along the last dimension, as in
# torch.nn.GRU, LSTM and RNN.

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging


logger = logging.get_logger(__name__)

NUM_GATES = {"gru": 3, "lstm": 4, "hard_lstm": 4, "rnn": 1}
KERNEL_TYPES = ("gru", "lstm", "rnn")  # the RNNs of torch.nn, for which there are kernels


def local_rnn_reference(
    inputs: torch.Tensor,
    rnn: nn.RNNBase,
    window: int,
    segment_ids: torch.Tensor | None = None,
    in_sequence: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The definition: every window unfolded, all of them run through a batch-first `torch.nn` RNN. Costs K copies of the
    input. `inputs` is `(B, K - 1 + L, D)`, the result `(B, L, D)`; `segment_ids` `(B, L)` and `in_sequence`
    `(B, K - 1 + L)` are those of [`LocalRNN.forward`].
    """
    windows = inputs.unfold(1, window, 1).transpose(2, 3)  # (B, L, K, D)
    batch, length, _, hidden = windows.shape
    belongs = torch.ones(batch, length, window, dtype=torch.bool, device=inputs.device)
    if segment_ids is not None:
        neighbours = F.pad(segment_ids, (window - 1, 0), value=-1).unfold(1, window, 1)  # (B, L, K)
        belongs = neighbours == segment_ids[..., None]
    windows = torch.where(belongs[..., None], windows, 0).reshape(batch * length, window, hidden)
    if in_sequence is None:
        outputs, _ = rnn(windows)
        return outputs[:, -1].reshape(batch, length, hidden)
    belongs = (belongs & in_sequence.unfold(1, window, 1)).reshape(batch * length, window)
    state = None
    for step in range(window):
        _, state = rnn(windows[:, step : step + 1], state)
        begun = belongs[:, step, None]
        state = tuple(torch.where(begun, part, 0) for part in state) if isinstance(state, tuple) else state * begun
    hidden_state = state[0] if isinstance(state, tuple) else state
    return hidden_state.reshape(batch, length, hidden)


def gru_step(projected: torch.Tensor, recurrent: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """One GRU step: h `(..., D)`, from W_x x + b_x and W_h h + b_h, both `(..., 3 D)`, and the old h or None for 0."""
    reset_x, update_x, new_x = projected.chunk(3, dim=-1)
    reset_h, update_h, new_h = recurrent.chunk(3, dim=-1)
    reset = torch.sigmoid(reset_x + reset_h)
    update = torch.sigmoid(update_x + update_h)
    # The backward pass needs `new_h`: a copy of it, since a view would keep all of `recurrent`.
    new = torch.tanh(torch.addcmul(new_x, reset, new_h.contiguous()))
    return new - update * new if hidden is None else torch.lerp(new, hidden, update)


def hard_sigmoid(values: torch.Tensor) -> torch.Tensor:
    """min(max(z / 5 + 1 / 2, 0), 1), the hard sigmoid of Theano and Keras; torch's own has a slope of 1 / 6."""
    return (0.2 * values + 0.5).clamp(0, 1)


def lstm_step(
    projected: torch.Tensor,
    recurrent: torch.Tensor,
    cell: torch.Tensor | None,
    sigmoid: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One LSTM step: `(hidden, cell)`, both `(..., D)`. `projected` and `recurrent` are `(..., 4 D)`."""
    input_gate, forget_gate, new, output_gate = (projected + recurrent).chunk(4, dim=-1)
    new_cell = sigmoid(input_gate) * torch.tanh(new)
    if cell is not None:
        new_cell = torch.addcmul(new_cell, sigmoid(forget_gate), cell)
    return sigmoid(output_gate) * torch.tanh(new_cell), new_cell


def local_rnn_plain(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    rnn_type: str,
    window: int,
    recurrent_proj: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The K steps of all windows at once in plain PyTorch, on any device and in any dtype; arguments of `local_rnn`. With
    `recurrent_proj`, which computes W_h h + b_h, `weight` is not read.
    """
    if recurrent_proj is None:

        def recurrent_proj(hidden: torch.Tensor) -> torch.Tensor:
            return F.linear(hidden, weight, bias)

    length = projected.shape[1] - window + 1
    if segment_ids is not None:
        neighbours = F.pad(segment_ids, (window - 1, 0), value=-1)  # (B, K - 1 + L)
    hidden = cell = None
    for step in range(window):
        inputs = projected[:, step : step + length]  # (B, L, G D), a view
        if segment_ids is not None and step < window - 1:
            same = neighbours[:, step : step + length] == segment_ids
            inputs = torch.where(same[..., None], inputs, zero_input)
        recurrent = bias if hidden is None else recurrent_proj(hidden)
        if rnn_type == "gru":
            hidden = gru_step(inputs, recurrent, hidden)
        elif rnn_type == "lstm":
            hidden, cell = lstm_step(inputs, recurrent, cell)
        elif rnn_type == "hard_lstm":
            hidden, cell = lstm_step(inputs, recurrent, cell, hard_sigmoid)
        else:
            hidden = torch.tanh(inputs + recurrent)
    return hidden


def resting_input(bias: torch.Tensor, rnn_type: str) -> torch.Tensor:
    """
    The projected input `(G D)` that leaves a zero state at zero, to the last bit and with all gradients, from b_h
    `(G D)`: every gate's sum is 0, and with it the new value.
    """
    if rnn_type != "gru":
        return -bias
    reset, update, new = bias.chunk(3)
    return torch.cat([-reset, -update, -new / 2])  # the reset gate is 1/2 then


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def reason_for_plain(inputs: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why only PyTorch's own operations can run on these tensors; None where kernels can run too."""
    if torch.compiler.is_compiling():
        return "a compiler or exporter traces it"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it"
    if type(inputs) is not torch.Tensor or type(weight) not in (torch.Tensor, nn.Parameter):
        return "it runs on a subclass of torch.Tensor"
    return None


@functools.cache
def reason_without_c() -> str | None:
    """Why this machine cannot compile the C kernels; None where it can. The first call compiles them."""
    from .compiled_c import NoCompiler
    from .local_rnn_c import kernels

    try:
        kernels(torch.float32)
    except NoCompiler as error:
        return str(error)
    return None


def reason_without_triton(device: torch.device, dtype: torch.dtype, gates: int, size: int, packed: bool) -> str | None:
    """Why the Triton kernels of these sizes do not run on this device; None where they do. The first call compiles."""
    if not triton_is_installed():
        return "Triton is not installed"
    from .local_rnn_triton import reason_against

    return reason_against(device, dtype, gates, size, packed)


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


# The C kernels pack the weights in each call. That pays from so many positions on, or for a W_h of at most so many
# elements (measured forward and backward, two cores).
C_POSITIONS = 16
C_WEIGHTS = 2**18


class Choice(NamedTuple):
    """An implementation of [`local_rnn`] by its name, why it was chosen, and whether that deserves a warning."""

    name: str
    reason: str | None = None
    warn: bool = False


def best_implementation(projected: torch.Tensor, weight: torch.Tensor, window: int, *, packed: bool = False) -> Choice:
    """The fastest implementation for these tensors."""
    reason = reason_for_plain(projected, weight)
    if reason is not None:
        return Choice("plain", reason)
    if projected.device.type == "cpu" and projected.dtype == torch.float32:
        positions = projected.shape[0] * (projected.shape[1] - window + 1)
        if positions < C_POSITIONS and weight.numel() > C_WEIGHTS:
            return Choice("plain", "for a few positions the C kernels would take longer to pack the weights")
        reason = reason_without_c()
        return Choice("c") if reason is None else Choice("plain", reason, warn=True)
    if projected.is_cuda and projected.dtype in (torch.float32, torch.bfloat16, torch.float16):
        size = weight.shape[1]
        reason = reason_without_triton(projected.device, projected.dtype, len(weight) // size, size, packed)
        return Choice("triton") if reason is None else Choice("plain", reason, warn=triton_is_installed())
    return Choice("plain", f"no kernel is made for {projected.dtype} on {projected.device.type}")


LOGGED_NAMES = {"plain": "plain", "c": "fused C", "triton": "Triton"}


@torch.compiler.assume_constant_result  # torch.compile calls it while it traces and leaves it out of the graph
def log_once(what: str, reason: str | None = None, warn: bool = False) -> None:
    """Log which implementation runs and why, once per process for each pair of them."""
    log = logger.warning_once if warn else logger.info_once
    log(f"LocalRNN: {what}" if reason is None else f"LocalRNN: {what}, because {reason}")


def local_rnn(
    projected: torch.Tensor,
    recurrent_weight: torch.Tensor,
    recurrent_bias: torch.Tensor,
    *,
    rnn_type: str,
    window: int,
    segment_ids: torch.Tensor | None = None,
    zero_input: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """
    The K steps of all windows, on inputs that are projected already.

    Args:
        projected (`(B, K - 1 + L, G D)`): W_x x + b_x of the K - 1 inputs before the sequence and of the L inputs.
        recurrent_weight (`(G D, D)`), recurrent_bias (`(G D)`): W_h and b_h.
        rnn_type: `"gru"`, `"lstm"`, `"hard_lstm"` or `"rnn"`.
        segment_ids (`(B, L)`, integer, *optional*): windows do not reach into another segment.
        zero_input (`(G D)`):
            what stands for inputs of other segments, needed with `segment_ids`: the projection of a zero input, or
            [`resting_input`].
        implementation:
            `"plain"`; `"c"` (CPU, float32 and float64, an `ImportError` without a C compiler); `"triton"` (CUDA,
            float32, bfloat16 and float16, an `ImportError` without Triton); or `"auto"`, the fastest for these tensors.
            The backward passes of `"c"` and `"triton"` are not differentiable.

    Returns:
        `(B, L, D)`: the last hidden state of each window.
    """
    recurrent_weight = recurrent_weight.to(projected.dtype)  # under autocast the projection is in half precision
    recurrent_bias = recurrent_bias.to(projected.dtype)
    if window == 1:  # W_h has no effect, but a gradient of zero, which data-parallel training waits for
        recurrent_bias = F.linear(torch.zeros_like(recurrent_weight[0]), recurrent_weight, recurrent_bias)
    if implementation == "auto" and rnn_type not in KERNEL_TYPES:
        choice = Choice("plain", f"no kernel is made for {rnn_type!r}")
    elif implementation == "auto":
        choice = best_implementation(projected, recurrent_weight, window, packed=segment_ids is not None)
    elif implementation in LOGGED_NAMES:
        choice = Choice(implementation, "`implementation` names it")
    else:
        raise ValueError(f"`implementation` is {implementation!r}, not 'auto' or one of {', '.join(LOGGED_NAMES)}")
    if choice.name != "plain" and rnn_type not in KERNEL_TYPES:
        raise ValueError(f"`implementation` must be 'plain' or 'auto' for {rnn_type!r}, got {choice.name!r}")
    log_once(LOGGED_NAMES[choice.name], choice.reason, choice.warn)
    arguments = projected, recurrent_weight, recurrent_bias, zero_input, segment_ids, rnn_type, window
    if choice.name == "plain":
        return local_rnn_plain(*arguments)
    keep = needs_grad(projected, recurrent_weight, recurrent_bias, zero_input)
    if choice.name == "c":
        from .local_rnn_c import CLocalRnn

        return CLocalRnn.apply(*arguments, keep)
    from .local_rnn_triton import local_rnn_triton

    return local_rnn_triton(*arguments, keep)
