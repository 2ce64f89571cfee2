# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The mixer of the Block-Recurrent Transformer: attention over the last M keys, and S recurrent state vectors that are
updated once per block of W positions.

    m = norm(states) + ids;   k', v', q', q'' = projections of m
    tokens    o = W_o [ attention(q, k, v) ; softmax(q2 k') v' ]       each block reads the states before its update
    states    h = [ softmax(q' k') v' ; softmax(q'' k) v ]             k, v of this block and of the block before
        skip     states = gate(states, W_p h)
        dual     y = gate(states, W_p h);   states = gate'(y, W_2 ReLU(W_1 norm(y)))
        single   states = gate(states, tanh(W_2 ReLU(W_1 h)))
    gate fixed   g x + (1 - g) z,   g = sigmoid(b)
    gate lstm    sigmoid(W_f e + b_f + 1) x + sigmoid(W_i e + b_i - 1) z,   e = the input of the matrix that makes z

Blocks are counted from the first position of a row. A call may begin and end anywhere inside a block: the states are
updated when a block is full. Gradients flow through all blocks of one call; the states are carried to the next call
without their graph.

Source: Hutchins et al. 2022, "Block-Recurrent Transformers" (arXiv 2203.07852), section 3, and the published code.
"""

# B batch, T positions of this call, S states, W block, D hidden size, H heads, d head size, I intermediate size

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import Heads, HeadScale, RTransformerAttention, unit_length
from .configuration_rtransformer import RTransformerConfig
from .layer_norms import make_layer_norm
from .memory import segment_ids_of_keys
from .positions import SequenceInfo


def check_padding(key_mask: torch.Tensor, block_length: int) -> None:
    """
    Raise a ValueError if padding shifts the blocks: blocks are counted from the first column, so that the padding of
    each row must be whole blocks on the left, or on the right.

    Args:
        key_mask (`(B, past + T)`): 0 where padded. Other masks are not looked at.
    """
    if key_mask.dim() != 2 or bool((key_mask != 0).all()):
        return
    real = key_mask != 0
    left = real.long().argmax(-1)  # padded columns before the first real one
    shifted = left[left % block_length != 0]
    if len(shifted):
        raise ValueError(
            f"`attention_mask` must pad the left by a multiple of `block_length` ({block_length}), got "
            f"{shifted[0].item()} padded positions; `pad_to_multiple_of={block_length}` pads so only if the rows have "
            "whole blocks; or pad on the right, for scoring"
        )
    if bool((real[:, 1:] & ~real[:, :-1]).sum(-1).gt((left > 0).long()).any()):
        raise ValueError("`attention_mask` must not have padded positions between real ones with `recurrent_layers`")


def check_documents(segment_ids: torch.Tensor, queries: int, positions: int, block_length: int) -> None:
    """
    Raise a ValueError if a document begins inside a block.

    Args:
        segment_ids (`(B, n)`): of the last n of so many `positions`; the `queries` new ones are the last.
    """
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    places = positions - segment_ids.shape[1] + 1 + torch.arange(begins.shape[1], device=begins.device)
    inside = begins & (places % block_length != 0) & (places >= positions - queries)
    if bool(inside.any()):
        place = places[inside.any(0)][0].item()
        raise ValueError(
            f"documents must begin at a multiple of `block_length` ({block_length}) with `recurrent_layers`, got one "
            f"that begins at position {place}"
        )


class StateGate(nn.Module):
    """The gate between the old states x and their update z, from e, the input of the matrix that makes z."""

    def __init__(self, config: RTransformerConfig, input_size: int):
        super().__init__()
        self.kind = config.state_gate
        if self.kind == "fixed":
            self.bias = nn.Parameter(torch.empty(config.hidden_size))
        else:
            self.forget_proj = nn.Linear(input_size, config.hidden_size)
            self.input_proj = nn.Linear(input_size, config.hidden_size)

    def init_parameters(self) -> None:
        """b normal(0, .1); weights normal(0, sqrt(.1 / inputs)), their biases 0"""
        if self.kind == "fixed":
            init.normal_(self.bias, 0.0, 0.1)
            return
        for proj in (self.forget_proj, self.input_proj):
            init.normal_(proj.weight, 0.0, math.sqrt(0.1 / proj.in_features))
            init.zeros_(proj.bias)

    def forward(self, states: torch.Tensor, update: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.kind == "fixed":
            share = torch.sigmoid(self.bias)
            return states * share + update * (1 - share)
        forget = torch.sigmoid(self.forget_proj(features) + 1)
        return states * forget + update * torch.sigmoid(self.input_proj(features) - 1)


class StateCell(nn.Module):
    """The states' half of the mixer: their projections, and their update by a full block."""

    def __init__(self, config: RTransformerConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias
        self.head_dim = config.head_dim
        self.kind = config.state_update
        self.initial = nn.Parameter(torch.empty(config.num_state_vectors, size))
        self.ids = nn.Parameter(torch.empty(config.num_state_vectors, size))
        self.norm = make_layer_norm(config)
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.q_proj = nn.Linear(size, size, bias=bias)  # q', to the states
        self.token_q_proj = nn.Linear(size, size, bias=bias)  # q'', to the tokens
        self.scale = HeadScale(config) if config.normalize_keys else None
        self.token_scale = HeadScale(config) if config.normalize_keys else None
        if self.kind != "single":
            self.o_proj = nn.Linear(2 * size, size, bias=bias)
            self.gate = StateGate(config, 2 * size)
        if self.kind != "skip":
            self.up_proj = nn.Linear(size if self.kind == "dual" else 2 * size, inner, bias=config.mlp_bias)
            self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)
            self.mlp_gate = StateGate(config, inner)
        self.mlp_norm = make_layer_norm(config) if self.kind == "dual" else None

    def init_parameters(self) -> None:
        """S_0 normal(0, .1), ids normal(0, 1)"""
        init.normal_(self.initial, 0.0, 0.1)
        init.normal_(self.ids, 0.0, 1.0)

    def heads_of(self, proj: nn.Linear, vectors: torch.Tensor, scale: nn.Module | None = None) -> torch.Tensor:
        """A projection of `(B, n, D)` as heads `(B, H, n, d)`; of unit length and scaled where a scale is given."""
        heads = proj(vectors).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads if scale is None else scale(unit_length(heads))

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k' and v' `(B, H, S, d)`."""
        memory = self.norm(states) + self.ids
        keys = self.heads_of(self.k_proj, memory)
        return keys if self.scale is None else unit_length(keys), self.heads_of(self.v_proj, memory)

    def forward(
        self,
        states: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The states after a block.

        Args:
            states (`(B, S, D)`): before it.
            own: their k' and v'.
            keys, values (`(B, H, up to 2 W, d)`): of the block and of the block before.
            seen (`(B, up to 2 W)`, *optional*): which of them the states see; all if None.
        """
        memory = self.norm(states) + self.ids
        scaling = 1.0 if self.scale is not None else None
        of_states = F.scaled_dot_product_attention(self.heads_of(self.q_proj, memory, self.scale), *own, scale=scaling)
        mask = None if seen is None else seen[:, None, None]
        of_tokens = F.scaled_dot_product_attention(
            self.heads_of(self.token_q_proj, memory, self.token_scale), keys, values, attn_mask=mask, scale=scaling
        )
        found = torch.cat([of_states, of_tokens], dim=1).transpose(1, 2).flatten(2)  # (B, S, 2 D)
        if self.kind == "single":
            hidden = F.relu(self.up_proj(found))
            return self.mlp_gate(states, torch.tanh(self.down_proj(hidden)), hidden)
        states = self.gate(states, self.o_proj(found), found)
        if self.kind == "dual":
            hidden = F.relu(self.up_proj(self.mlp_norm(states)))
            states = self.mlp_gate(states, self.down_proj(hidden), hidden)
        return states


class BlockRecurrentAttention(RTransformerAttention):
    """The block-recurrent mixer of a block."""

    def __init__(self, config: RTransformerConfig, layer_idx: int, index: int = 0):
        super().__init__(config, layer_idx, index)
        self.block_length = config.block_length
        self.state_q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)  # q2
        self.state_scale = HeadScale(config) if config.normalize_keys else None
        self.cell = StateCell(config)

    @staticmethod
    def make_output(config: RTransformerConfig) -> nn.Linear:
        return nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        sequence: SequenceInfo,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output `(B, T, D)` and, from an implementation that has them, the weights of the tokens' keys."""
        past_length = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        states, own = self._states_before(hidden_states, past_length, cache)
        heads = self.attend(hidden_states, sequence, cache, **kwargs)
        queries = self.cell.heads_of(self.state_q_proj, hidden_states, self.state_scale)  # (B, H, T, d)
        numbers = self._key_numbers(sequence, heads, hidden_states.shape[:2], past_length)
        dropout = self.attention_dropout if self.training else 0.0
        scaling = 1.0 if self.state_scale is not None else None
        readings = []
        begin = 0
        while begin < hidden_states.shape[1]:
            end = min(hidden_states.shape[1], begin + self.block_length - (past_length + begin) % self.block_length)
            states = self._restarted(states, numbers, heads.first_row + begin, past_length + begin)
            own = self.cell.keys_and_values(states) if own is None else own
            reading = F.scaled_dot_product_attention(queries[:, :, begin:end], *own, dropout_p=dropout, scale=scaling)
            readings.append(reading)
            if (past_length + end) % self.block_length == 0:
                states, own = self._updated(states, own, heads, numbers, heads.first_row + end), None
            begin = end
        if cache is not None:
            for index, remembered in enumerate((states, *(own or ()))):
                cache.update_recurrent_state(remembered.detach(), self.layer_idx, index)
        of_states = torch.cat(readings, dim=2).transpose(1, 2)  # (B, T, H, d)
        output = torch.cat([heads.output, of_states], dim=2).flatten(2)
        return self.o_proj(output), heads.weights

    def _states_before(
        self, hidden_states: torch.Tensor, past_length: int, cache: Cache | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        The states `(B, S, D)` that the first position reads: S_0 until a block was full. Without gradients also their
        k' and v', if the call before ended inside the block: to make them again for each token would take long.
        """
        batch = hidden_states.shape[0]
        initial = self.cell.initial.to(hidden_states.dtype).expand(batch, -1, -1)
        remembered = None if cache is None else cache.layers[self.layer_idx].recurrent_states
        states = initial if past_length < self.block_length else remembered[0]
        if states is None or states.shape != initial.shape:
            raise ValueError(
                f"`cache` must hold the recurrent states {tuple(initial.shape)} with the keys and values of its "
                f"{past_length} positions, got {None if states is None else tuple(states.shape)}"
            )
        if states is not initial:
            states = states.clone()  # the cache overwrites the tensor, which a backward pass still needs
        inside = past_length % self.block_length != 0 and not torch.is_grad_enabled()
        own = (remembered[1].clone(), remembered[2].clone()) if inside and remembered[1] is not None else None
        return states, own

    def _key_numbers(
        self, sequence: SequenceInfo, heads: Heads, shape: torch.Size, past_length: int
    ) -> torch.Tensor | None:
        """
        The numbers `(B, L)` of the documents that the keys at hand belong to, -1 for padding; None if all are equal.
        """
        length = heads.keys.shape[2]
        numbers = segment_ids_of_keys(sequence.segment_ids, heads.first_row, shape[1], length)
        mask = sequence.key_mask
        if mask is None or mask.dim() != 2 or bool((mask != 0).all()):
            return numbers
        last = past_length + shape[1]
        mask = F.pad(mask, (0, max(0, last - mask.shape[1])), value=1)[:, :last] != 0  # without columns to come
        mask = mask[:, last - heads.first_row - shape[1] :]
        mask = F.pad(mask, (0, length - mask.shape[1]), value=False)
        numbers = torch.zeros_like(mask, dtype=torch.long) if numbers is None else numbers
        return numbers.masked_fill(~mask, -1)

    def _restarted(self, states: torch.Tensor, numbers: torch.Tensor | None, row: int, position: int) -> torch.Tensor:
        """The states, those of S_0 in the rows in which a document begins at `row`."""
        if numbers is None or row == 0:
            return states
        begins = (numbers[:, row] != numbers[:, row - 1]) & (numbers[:, row] >= 0)
        if position % self.block_length == 0:
            return torch.where(begins[:, None, None], self.cell.initial.to(states.dtype), states)
        return states

    def _updated(
        self,
        states: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        heads: Heads,
        numbers: torch.Tensor | None,
        end: int,
    ) -> torch.Tensor:
        """The states after the block whose last key stands at `end` - 1; as they were in rows that are padding."""
        keys_of = slice(max(0, end - 2 * self.block_length), end)
        keys, values = heads.keys[:, :, keys_of], heads.values[:, :, keys_of]
        if numbers is None:
            return self.cell(states, own, keys, values, None)
        number = numbers[:, max(0, end - self.block_length)]  # of the block's document
        seen = (numbers[:, keys_of] == number[:, None]) & (numbers[:, keys_of] >= 0)
        real = number >= 0
        updated = self.cell(states, own, keys, values, seen | ~real[:, None])  # a row that sees nothing is not used
        return torch.where(real[:, None, None], updated, states)
