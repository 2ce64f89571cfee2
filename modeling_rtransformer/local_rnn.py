# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The LocalRNN as a module with its parameters, and the mixer of a block that is made of it, with padding and the cache.
local_rnn_steps.py has the definition and the K steps.
"""

# B batch, L length, T positions of this call, D hidden size, K window, G gates: GRU 3, LSTM and hard LSTM 4, tanh RNN 1

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_rtransformer import RTransformerConfig
from .local_rnn_steps import (
    NUM_GATES,
    local_rnn,
    local_rnn_plain,
    log_once,
    needs_grad,
    reason_for_plain,
    resting_input,
)
from .positions import SequenceInfo
from .structured_linear import MonarchLinear, StructuredLinear, make_linear, product_dtype


TORCH_RNNS = {"gru": torch.gru, "lstm": torch.lstm, "rnn": torch.rnn_tanh}

# A single window is one run of torch's RNN from so many inputs on. With fewer inputs the K steps are faster on a CPU,
# since torch's LSTM packs the weights in each call.
ONE_RUN_FROM = 64

# The K steps multiply by the factors of a Monarch W_h from this D and so many positions on, if the factors have at most
# this share of the elements of W_h (measured on a CPU).
FACTORS_FROM_SIZE = 256
FACTORS_FROM_POSITIONS = 64
FACTORS_UP_TO_SHARE = 1 / 3


def dense_weight(linear: nn.Module, in_features: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `(weight, bias)` that a linear layer applies. Those of a plain layer are read, those of a structured one
    folded; for a layer that replaces it (a LoRA adapter, quantized or offloaded weights) they are computed by applying
    it to the unit vectors.
    """
    if (type(linear) is GateProjection or isinstance(linear, StructuredLinear)) and not hasattr(linear, "_hf_hook"):
        return linear.weight, linear.bias
    unit_and_zero = torch.eye(in_features + 1, in_features, dtype=like.dtype, device=like.device)
    rows = linear(unit_and_zero)  # (D + 1, G D): the columns of the weight plus the bias, then the bias
    return (rows[:-1] - rows[-1]).T, rows[-1]


class GateProjection(nn.Linear):
    """W x + b for all gates at once: a class of its own because its initial values are those of `torch.nn`'s RNNs."""

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
        rnn_type: `"gru"`, `"lstm"`, `"hard_lstm"` or `"rnn"` (tanh).
        make_projection: `make_projection(D, G D)` makes each of the two linear layers.
    """

    def __init__(
        self,
        hidden_size: int,
        window: int,
        rnn_type: str,
        make_projection: Callable[[int, int], nn.Module] = GateProjection,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.window = window
        self.rnn_type = rnn_type
        self.implementation = "auto"
        self.input_proj = make_projection(hidden_size, NUM_GATES[rnn_type] * hidden_size)
        self.recurrent_proj = make_projection(hidden_size, NUM_GATES[rnn_type] * hidden_size)

    def forward(
        self, inputs: torch.Tensor, segment_ids: torch.Tensor | None = None, in_sequence: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            inputs (`(B, K - 1 + L, D)`): the K - 1 inputs before the sequence (zeros, or from the cache), then the L.
            segment_ids (`(B, L)`, *optional*): equal ids mark the positions of one packed sequence.
            in_sequence (`(B, K - 1 + L)`, bool, *optional*):
                False for the inputs before the sequence. They are not read: the RNN of a window begins with the first
                input for which it is True. Without it, as in the paper, the RNN reads all K inputs of each window.

        Returns:
            `(B, L, D)`: out[t] for each of the L inputs.
        """
        one_long_window = inputs.shape[1] == self.window >= ONE_RUN_FROM  # a decoding step: L is 1
        if one_long_window and segment_ids is None and inputs.device.type == "cpu" and self.can_run_over(inputs):
            return self.over_sequence(inputs, in_sequence)[:, -1:]
        by_factors = self.steps_by_factors(inputs)
        if by_factors:
            weight, bias = None, self.recurrent_proj.bias
        else:
            weight, bias = dense_weight(self.recurrent_proj, self.hidden_size, inputs)
        projected, before = self.input_proj(inputs), None
        if in_sequence is not None:
            before = resting_input(bias.to(projected.dtype), self.rnn_type)
            projected = torch.where(in_sequence[..., None], projected, before)
        elif segment_ids is not None:
            before = self.input_proj(inputs.new_zeros(1, 1, self.hidden_size))
        if by_factors:
            log_once("plain", "the products by the factors of W_h are faster")
            steps = projected, weight, bias.to(projected.dtype), before, segment_ids, self.rnn_type, self.window
            return local_rnn_plain(*steps, self.recurrent_proj)
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

    def steps_by_factors(self, inputs: torch.Tensor) -> bool:
        """
        Whether the steps for inputs `(B, K - 1 + L, D)` multiply by the factors of W_h in place of the folded weight.
        Only the plain steps can do that, and save more time by it than the kernels do where D and the batch are large.
        """
        if self.implementation != "auto" or type(self.recurrent_proj) is not MonarchLinear or self.window == 1:
            return False
        if torch.compiler.is_compiling() or hasattr(self.recurrent_proj, "_hf_hook"):
            return False
        positions = inputs.shape[0] * (inputs.shape[1] - self.window + 1)
        is_large = self.hidden_size >= FACTORS_FROM_SIZE and positions >= FACTORS_FROM_POSITIONS
        return is_large and self.recurrent_proj.share <= FACTORS_UP_TO_SHARE

    def can_run_over(self, inputs: torch.Tensor) -> bool:
        """Whether `over_sequence` may replace `forward` for inputs `(B, L, D)` that begin their sequences."""
        if self.implementation != "auto" or self.rnn_type not in TORCH_RNNS:
            return False
        if reason_for_plain(inputs, next(self.recurrent_proj.parameters())):
            return False
        # some CPUs lack an LSTM in half precision
        has_lstm = inputs.device.type != "cpu" or product_dtype(inputs) in (torch.float32, torch.float64)
        return has_lstm and inputs.shape[1] <= self.window

    def over_sequence(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        `forward` for L <= K inputs `(B, L, D)` that begin their sequences, without `local_padding`: the RNN of every
        window begins with the first input, so one run of torch's own RNN computes all of them. In a row of `mask`
        `(B, L)` the sequence begins at the first 1.
        """
        log_once(f"torch's {self.rnn_type.upper()} in one run", "the window holds the whole sequence")
        (input_weight, input_bias), (weight, bias) = (
            dense_weight(projection, self.hidden_size, inputs) for projection in (self.input_proj, self.recurrent_proj)
        )
        parameters = [input_weight, weight, input_bias, bias]
        if mask is not None:  # move each row to the left, so that its sequence begins at 0
            in_sequence = mask.cumsum(1) > 0
            num_before = in_sequence.logical_not().sum(1, keepdim=True)
            positions = torch.arange(inputs.shape[1], device=inputs.device)
            inputs = inputs.take_along_dim((positions + num_before).clamp(max=len(positions) - 1)[..., None], dim=1)
        state = inputs.new_zeros(1, inputs.shape[0], self.hidden_size)
        state = (state, state) if self.rnn_type == "lstm" else state
        train = needs_grad(inputs, *parameters)  # without it cuDNN keeps nothing for a backward pass
        outputs = TORCH_RNNS[self.rnn_type](inputs, state, parameters, True, 1, 0.0, train, False, True)[0]
        if mask is not None:
            outputs = outputs.take_along_dim((positions - num_before).clamp(min=0)[..., None], dim=1)
            outputs = torch.where(in_sequence[..., None], outputs, 0)
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
        make_projection = partial(make_linear, config, "local_rnn", dense=GateProjection)
        self.rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type, make_projection)
        self.reverse_rnn = None
        if not config.is_causal:
            self.reverse_rnn = LocalRNN(config.hidden_size, config.local_window, config.local_rnn_type, make_projection)

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
        if segment_ids is not None and segment_ids.shape[1] > hidden_states.shape[1]:
            return self._run_across_calls(rnn, hidden_states, padding_mask, segment_ids, cache)
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
        return rnn(windows[..., :-1], segment_ids, in_sequence=(windows[..., -1] != 0).cumsum(1) > 0)

    def _run_across_calls(
        self,
        rnn: LocalRNN,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None,
        segment_ids: torch.Tensor,  # (B, n), n > T
        cache: Cache,
    ) -> torch.Tensor:
        """
        `_run` where positions before this call have segment ids too: over the K - 1 inputs before as over the new ones,
        so that windows end at their segment's beginning. The outputs of the former are not used.
        """
        before = self.window - 1
        if before == 0:
            return rnn(hidden_states, segment_ids[:, -hidden_states.shape[1] :])
        present = torch.ones_like(hidden_states[..., :1])
        if padding_mask is not None:
            present = present * padding_mask[..., None].to(present.dtype)
        channels = hidden_states if self.padded_with_zeros else torch.cat([hidden_states, present], dim=-1)
        windows = F.pad(self._with_window_before(channels, cache), (0, 0, before, 0))
        length = before + hidden_states.shape[1]
        ids = F.pad(segment_ids, (max(0, length - segment_ids.shape[1]), 0), value=-1)[:, -length:]
        if self.padded_with_zeros:
            return rnn(windows, ids)[:, before:]
        return rnn(windows[..., :-1], ids, in_sequence=(windows[..., -1] != 0).cumsum(1) > 0)[:, before:]

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
