# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
LocalRNN: one shared RNN run from a zero state over the K inputs that end at each position.

    out[t] = RNN(x[t-K+1], ..., x[t]),   inputs before the sequence are zero, or the RNN begins with the first one

The positions do not depend on each other, so only K steps are sequential, whatever the length. Two consequences make it
cheap: an input has the same projection W_x x + b in each of the K windows that it belongs to, so it is projected once;
and the k-th inputs of all windows are one slice of the padded projections, so nothing is gathered or copied K times.

Source: Wang et al. 2019, "R-Transformer" (arXiv 1907.05572), section 3.1 and the published code.
"""

# B batch, L length, D hidden size, K window, G gates: GRU 3 (reset, update, new), LSTM 4 (input, forget, cell, output),
# tanh RNN 1. Gates are stacked in this order along the last dimension, as in torch.nn.GRU, LSTM and RNN.

import functools
import importlib.util

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .configuration_rtransformer import RTransformerConfig
from .local_rnn_tiled import TiledLocalRnn
from .positions import SequenceInfo


logger = logging.get_logger(__name__)

NUM_GATES = {"gru": 3, "lstm": 4, "rnn": 1}
TORCH_RNNS = {"gru": torch.gru, "lstm": torch.lstm, "rnn": torch.rnn_tanh}


def local_rnn_reference(
    inputs: torch.Tensor,
    rnn: nn.RNNBase,
    window: int,
    segment_ids: torch.Tensor | None = None,
    started: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The definition: every window unfolded, all of them run through a batch-first `torch.nn` RNN. Costs K copies of the
    input. `inputs` is `(B, K - 1 + L, D)`, the result `(B, L, D)`; `segment_ids` `(B, L)` and `started`
    `(B, K - 1 + L)` as in [`LocalRNN`], where `started` says that nothing stands for the inputs before a sequence.
    """
    windows = inputs.unfold(1, window, 1).transpose(2, 3)  # (B, L, K, D)
    batch, length, _, hidden = windows.shape
    belongs = torch.ones(batch, length, window, dtype=torch.bool, device=inputs.device)
    if segment_ids is not None:
        neighbours = F.pad(segment_ids, (window - 1, 0), value=-1).unfold(1, window, 1)  # (B, L, K)
        belongs = neighbours == segment_ids[..., None]
    windows = torch.where(belongs[..., None], windows, 0).reshape(batch * length, window, hidden)
    if started is None:
        outputs, _ = rnn(windows)
        return outputs[:, -1].reshape(batch, length, hidden)
    belongs = (belongs & started.unfold(1, window, 1)).reshape(batch * length, window)
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
    new = torch.tanh(new_x + reset * new_h)
    return new - update * new if hidden is None else torch.lerp(new, hidden, update)


def lstm_step(
    projected: torch.Tensor, recurrent: torch.Tensor, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One LSTM step: `(hidden, cell)`, both `(..., D)`. `projected` and `recurrent` are `(..., 4 D)`."""
    input_gate, forget_gate, new, output_gate = (projected + recurrent).chunk(4, dim=-1)
    new_cell = torch.sigmoid(input_gate) * torch.tanh(new)
    if cell is not None:
        new_cell = torch.addcmul(new_cell, torch.sigmoid(forget_gate), cell)
    return torch.sigmoid(output_gate) * torch.tanh(new_cell), new_cell


def local_rnn_plain(
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    zero_input: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    rnn_type: str,
    window: int,
) -> torch.Tensor:
    """The K steps of all windows at once in plain PyTorch, on any device and in any dtype; arguments of `local_rnn`."""
    length = projected.shape[1] - window + 1
    if segment_ids is not None:
        neighbours = F.pad(segment_ids, (window - 1, 0), value=-1)  # (B, K - 1 + L)
    hidden = cell = None
    for step in range(window):
        inputs = projected[:, step : step + length]  # (B, L, G D), a view
        if segment_ids is not None and step < window - 1:
            same = neighbours[:, step : step + length] == segment_ids
            inputs = torch.where(same[..., None], inputs, zero_input)
        recurrent = bias if hidden is None else F.linear(hidden, weight, bias)
        if rnn_type == "gru":
            hidden = gru_step(inputs, recurrent, hidden)
        elif rnn_type == "lstm":
            hidden, cell = lstm_step(inputs, recurrent, cell)
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


def local_rnn_tiled(projected, weight, bias, zero_input, segment_ids, rnn_type, window):
    """`local_rnn_plain` on a CPU in float32 or float64, several times as fast and without its copies."""
    keep = needs_grad(projected, weight, bias, zero_input)
    return TiledLocalRnn.apply(projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep)


@functools.cache
def can_fuse() -> bool:
    """Whether the C compiler of this machine makes the kernels of the fused form; says why not, once."""
    from .compiled_c import NoCompiler
    from .local_rnn_fused import kernels

    try:
        kernels(torch.float32)
    except NoCompiler as error:
        logger.warning(f"LocalRNN runs without its kernels in C, slower: {error}")
        return False
    return True


def local_rnn_fused(projected, weight, bias, zero_input, segment_ids, rnn_type, window):
    """`local_rnn_tiled` in C, block by block, that is compiled and imported only here."""
    from .local_rnn_fused import FusedLocalRnn

    keep = needs_grad(projected, weight, bias, zero_input)
    return FusedLocalRnn.apply(projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep)


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def local_rnn_triton(projected, weight, bias, zero_input, segment_ids, rnn_type, window):
    """`local_rnn_plain` on a GPU in float32, bfloat16 or float16 in Triton's kernels, which are imported only here."""
    from .local_rnn_triton import TritonLocalRnn

    keep = needs_grad(projected, weight, bias, zero_input)
    return TritonLocalRnn.apply(projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep)


# Where each is faster than plain operations, with gradients, on two cores. C lays the weights out anew in each call:
# so many positions pay for that, or it is little, up to so many elements of W_h.
FUSED_POSITIONS = 16
FUSED_WEIGHTS = 2**18
TILED_FROM = 2**18  # elements of the projected input

# Inputs of one window from which, on a CPU, torch's RNN over them is faster than as many plain steps: its LSTM lays the
# weights out anew in each call.
ONE_RUN_FROM = 64

IMPLEMENTATIONS = {
    "plain": local_rnn_plain,
    "tiled": local_rnn_tiled,
    "fused": local_rnn_fused,
    "triton": local_rnn_triton,
}


def needs_plain(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a compiler, an exporter, torch.func or a tensor subclass (sharded weights) asks for plain operations."""
    plain_tensors = type(inputs) is torch.Tensor and type(weight) in (torch.Tensor, nn.Parameter)
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not plain_tensors


def best_implementation(projected: torch.Tensor, weight: torch.Tensor, window: int) -> str:
    """The name of the fastest implementation for these tensors."""
    if needs_plain(projected, weight):
        return "plain"
    if projected.device.type == "cpu":
        positions = projected.shape[0] * (projected.shape[1] - window + 1)
        pays = positions >= FUSED_POSITIONS or weight.numel() <= FUSED_WEIGHTS
        if projected.dtype == torch.float32 and pays and can_fuse():
            return "fused"
        in_tiles = projected.dtype in (torch.float32, torch.float64) and projected.numel() >= TILED_FROM
        return "tiled" if in_tiles else "plain"
    on_gpu = projected.is_cuda and projected.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if on_gpu and triton_is_installed():
        return "triton"
    return "plain"


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
        rnn_type: `"gru"`, `"lstm"` or `"rnn"`.
        segment_ids (`(B, L)`, integer, *optional*): windows do not reach into another segment.
        zero_input (`(G D)`):
            what stands for inputs of other segments, needed with `segment_ids`: the projection of a zero input, or
            [`resting_input`].
        implementation: `"plain"`, `"tiled"` (CPU, float32 and float64, differentiable once), `"fused"` (the same in C;
            an `ImportError` without a C compiler), `"triton"` (CUDA, float32, bfloat16 and float16,
            differentiable once; an `ImportError` without Triton) or `"auto"`.

    Returns:
        `(B, L, D)`: the last hidden state of each window.
    """
    recurrent_weight = recurrent_weight.to(projected.dtype)  # under autocast the projection is in half precision
    recurrent_bias = recurrent_bias.to(projected.dtype)
    if window == 1:  # W_h has no effect, but a gradient of zero, which data-parallel training waits for
        recurrent_bias = F.linear(torch.zeros_like(recurrent_weight[0]), recurrent_weight, recurrent_bias)
    if implementation == "auto":
        implementation = best_implementation(projected, recurrent_weight, window)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` is {implementation!r}, not 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](
        projected, recurrent_weight, recurrent_bias, zero_input, segment_ids, rnn_type, window
    )


def dense_weight(linear: nn.Module, in_features: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `(weight, bias)` that a linear layer applies. A plain layer's are read; of anything that stands in its place (a LoRA
    adapter, quantized or offloaded weights) the effect is measured on the unit vectors, so that it counts.
    """
    if type(linear) is GateProjection and not hasattr(linear, "_hf_hook"):
        return linear.weight, linear.bias
    unit_and_zero = torch.eye(in_features + 1, in_features, dtype=like.dtype, device=like.device)
    rows = linear(unit_and_zero)  # (D + 1, G D): the columns of the weight plus the bias, then the bias
    return (rows[:-1] - rows[-1]).T, rows[-1]


class GateProjection(nn.Linear):
    """W x + b for all gates at once; a class of its own because it starts as `torch.nn`'s RNNs do, not as a linear."""

    def init_parameters(self) -> None:
        """uniform(-1 / sqrt(D), 1 / sqrt(D))"""
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)


class LocalRNN(nn.Module):
    """
    A LocalRNN with its parameters: `input_proj` (W_x, b_x) and `recurrent_proj` (W_h, b_h), both D -> G D, which are
    the `weight_ih_l0`, `bias_ih_l0`, `weight_hh_l0` and `bias_hh_l0` of the `torch.nn` RNN of the same type.

    Args:
        hidden_size: D, of the input and of the state.
        window: K, at least 1.
        rnn_type: `"gru"`, `"lstm"` or `"rnn"` (tanh).
    """

    def __init__(self, hidden_size: int, window: int, rnn_type: str):
        super().__init__()
        self.hidden_size = hidden_size
        self.window = window
        self.rnn_type = rnn_type
        self.implementation = "auto"
        self.input_proj = GateProjection(hidden_size, NUM_GATES[rnn_type] * hidden_size)
        self.recurrent_proj = GateProjection(hidden_size, NUM_GATES[rnn_type] * hidden_size)

    def forward(
        self, inputs: torch.Tensor, segment_ids: torch.Tensor | None = None, started: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            inputs (`(B, K - 1 + L, D)`): the K - 1 inputs before the sequence (zeros, or from the cache), then the L.
            segment_ids (`(B, L)`, *optional*): equal ids mark the positions of one packed sequence.
            started (`(B, K - 1 + L)`, bool, *optional*):
                False for inputs before the sequence, which are not read then: a window begins with the first True one.
                Without it, and so in the paper, they are inputs as any other.

        Returns:
            `(B, L, D)`: out[t] for each of the L inputs.
        """
        one_long_window = inputs.shape[1] == self.window >= ONE_RUN_FROM  # a decoding step: L is 1
        if one_long_window and segment_ids is None and inputs.device.type == "cpu" and self.can_run_over(inputs):
            return self.over_sequence(inputs, started)[:, -1:]
        weight, bias = dense_weight(self.recurrent_proj, self.hidden_size, inputs)
        projected, before = self.input_proj(inputs), None
        if started is not None:
            before = resting_input(bias.to(projected.dtype), self.rnn_type)
            projected = torch.where(started[..., None], projected, before)
        elif segment_ids is not None:
            before = self.input_proj(inputs.new_zeros(1, 1, self.hidden_size))
        return local_rnn(
            projected,
            weight,
            bias,
            rnn_type=self.rnn_type,
            window=self.window,
            segment_ids=segment_ids,
            zero_input=before,
            implementation=self.implementation,
        )

    def can_run_over(self, inputs: torch.Tensor) -> bool:
        """Whether `over_sequence` is `forward` for inputs `(B, L, D)` with nothing before them, and may be run."""
        if self.implementation != "auto" or needs_plain(inputs, self.recurrent_proj.weight):
            return False
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        has_lstm = device != "cpu" or dtype in (torch.float32, torch.float64)  # in half precision not every CPU has
        return has_lstm and inputs.shape[1] <= self.window

    def over_sequence(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        What `forward` gives where every window holds all inputs before it and begins with the first: one run of torch's
        own RNN over `inputs` `(B, L, D)`, which begins at the first 1 of each row of `mask` `(B, L)`.
        """
        (input_weight, input_bias), (weight, bias) = (
            dense_weight(projection, self.hidden_size, inputs) for projection in (self.input_proj, self.recurrent_proj)
        )
        parameters = [input_weight, weight, input_bias, bias]
        if mask is not None:  # every row to the left, so that it begins at 0
            begun = mask.cumsum(1) > 0
            before = begun.logical_not().sum(1, keepdim=True)
            places = torch.arange(inputs.shape[1], device=inputs.device)
            inputs = inputs.take_along_dim((places + before).clamp(max=len(places) - 1)[..., None], dim=1)
        state = inputs.new_zeros(1, inputs.shape[0], self.hidden_size)
        state = (state, state) if self.rnn_type == "lstm" else state
        train = needs_grad(inputs, *parameters)  # cuDNN keeps nothing for a backward pass otherwise
        outputs = TORCH_RNNS[self.rnn_type](inputs, state, parameters, True, 1, 0.0, train, False, True)[0]
        if mask is not None:
            outputs = outputs.take_along_dim((places - before).clamp(min=0)[..., None], dim=1)
            outputs = torch.where(begun[..., None], outputs, 0)
        return outputs

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, window={self.window}, rnn_type={self.rnn_type!r}"


class RTransformerLocalRNN(nn.Module):
    """
    The LocalRNN mixer of a block: a LocalRNN with its padding and its window in the cache; in a bidirectional model the
    sum of two, the second of which runs from right to left over x[t..t+K-1].

    With `local_padding` "none" a further channel goes through the window and the cache: 1 for the inputs of the
    sequence, 0 for what stands before them.
    """

    def __init__(self, config: RTransformerConfig, layer_idx: int, index: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.index = index  # which of the block's LocalRNNs, and so which of the cache's windows
        self.window = config.local_window
        self.padded_with_zeros = config.local_padding == "zeros"
        self.rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type)
        self.reverse_rnn = None
        if not config.is_causal:
            self.reverse_rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        sequence: SequenceInfo,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, None]:
        padding_mask, segment_ids = sequence.padding_mask, sequence.segment_ids
        if padding_mask is not None:
            hidden_states = hidden_states * padding_mask[..., None].to(hidden_states.dtype)
        outputs = self._run(self.rnn, hidden_states, padding_mask, segment_ids, cache)
        if self.reverse_rnn is not None:
            turned = (None if tensor is None else tensor.flip(1) for tensor in (padding_mask, segment_ids))
            outputs = outputs + self._run(self.reverse_rnn, hidden_states.flip(1), *turned).flip(1)
        return outputs, None

    def _run(
        self,
        rnn: LocalRNN,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """`(B, T, D)`: the LocalRNN from left to right, after what the cache has of the inputs before."""
        if self.padded_with_zeros or self.window == 1:
            return rnn(self._with_window_before(hidden_states, cache), segment_ids)
        is_first = cache is None or not cache.has_previous_state(self.layer_idx, self.index)
        runs_over = is_first and segment_ids is None and rnn.can_run_over(hidden_states)
        if runs_over and cache is None:  # nothing reads the windows
            return rnn.over_sequence(hidden_states, padding_mask)
        present = torch.ones_like(hidden_states[..., :1])
        if padding_mask is not None:
            present = present * padding_mask[..., None].to(present.dtype)
        windows = self._with_window_before(torch.cat([hidden_states, present], dim=-1), cache)
        if runs_over:
            return rnn.over_sequence(hidden_states, padding_mask)
        return rnn(windows[..., :-1], segment_ids, started=(windows[..., -1] != 0).cumsum(1) > 0)

    def _with_window_before(self, hidden_states: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """`(B, K - 1 + T, D)`: the K - 1 inputs before, which are zeros at the beginning, then the T inputs."""
        if cache is None or self.window == 1:
            return F.pad(hidden_states, (0, 0, self.window - 1, 0))
        needed = self.window - 1 + hidden_states.shape[1]
        inputs = hidden_states.transpose(1, 2)
        if not cache.has_previous_state(self.layer_idx, self.index):
            inputs = F.pad(inputs, (self.window - 1, 0))  # here, where the cache would make short inputs a special case
        states = cache.update_conv_state(inputs, self.layer_idx, state_idx=self.index, conv_kernel_size=self.window)
        return states[..., -needed:].transpose(1, 2)
