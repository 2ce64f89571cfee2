# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Recurrence Encoding Matrices (REMs) and the gate that mixes them into attention heads (RSA).

    RSA(x) = [(1 - gate) * softmax(Q K' / sqrt(d)) + gate * P] V,     gate = sigmoid(mu)

P is what a linear RNN with one eigenvalue does to V. With the distance s = i - j >= 1, and zero elsewhere (the diagonal
included), a REM dilated by m, where s is divisible by m and zero where not, has n = s / m and

    regular            P[i, j] = decay^n                     decay = tanh(eta), may be negative
    first cyclical     P[i, j] = decay^n * cos(n * angle)    decay = sigmoid(nu), angle = theta
    second cyclical    P[i, j] = decay^n * sin(n * angle)

The unmasked (bidirectional) form is P + P'. Since P[i, j] depends on i - j alone and is a power, P V needs no L x L
matrix: inside a chunk of C positions it is one small Toeplitz product for all chunks, and what came before the chunk
is summed up in one complex state, so memory is O(L) (`rem_scan`). A query against cached values is a row of P
(`rem_rows`).

Source: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), sections 2.2, 3.1 and 3.2.
"""

# B batch, H attention heads, R heads with a REM, T queries, L keys, d head size, m dilation, C chunk, N chunks

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .head_shard import HeadShard
from .positions import same_segment


class RemHeads(NamedTuple):
    """The eigenvalue of each of R heads, at least float32: `decay` and `angle` `(R,)`, and `is_sine` `(R,)`, bool."""

    decay: torch.Tensor
    angle: torch.Tensor
    is_sine: torch.Tensor

    def powers(self, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Real and imaginary part of eigenvalue^n, each `(R, *exponents.shape)`; the angle of a regular REM is zero."""
        exponents = exponents.to(self.decay.dtype)
        shape = (-1,) + (1,) * exponents.dim()
        magnitude = self.decay.view(shape) ** exponents
        phase = self.angle.view(shape) * exponents
        return magnitude * torch.cos(phase), magnitude * torch.sin(phase)

    def entries(self, steps: torch.Tensor) -> torch.Tensor:
        """P[i, j] for n = `steps`, zero where n < 1: `(R, *steps.shape)`."""
        cosine, sine = self.powers(steps.clamp(min=1))
        values = torch.where(self.is_sine.view((-1,) + (1,) * steps.dim()), sine, cosine)
        return values.masked_fill(steps < 1, 0)


class HeadSelection(NamedTuple):
    """The heads that this process computes: all H of the layer or, under tensor parallelism, a run of them."""

    heads: range
    groups: list[tuple[int, slice]]  # each dilation, and which of the R heads with a REM have it
    run: slice | None  # where the heads with a REM are among `heads`; None if they must be gathered
    index: torch.Tensor  # (R',) the same, in the order of the groups


def rem_matrix(
    heads: RemHeads, positions: torch.Tensor, length: int, dilation: int, is_causal: bool, window: int | None = None
) -> torch.Tensor:
    """
    P itself, the definition. `positions` `(T,)` are the queries' rows, the keys stand at 0 to `length` - 1:
    `(R, T, length)`. Or `positions` `(T, length)` are the distances i - j themselves, with 0 for what is not read. P is
    zero where a key is more than `window` before the query.
    """
    distance = positions
    if positions.dim() == 1:
        distance = positions[:, None] - torch.arange(length, device=positions.device)  # (T, L)
    if not is_causal:
        distance = distance.abs()
    seen = distance % dilation == 0
    if window is not None:
        seen = seen & (distance <= window)
    steps = torch.where(seen, distance // dilation, 0)
    return heads.entries(steps)


def rem_rows(
    heads: RemHeads,
    values: torch.Tensor,
    positions: torch.Tensor,
    dilation: int,
    gates: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """
    The rows `positions` of the causal P, as in [`rem_matrix`], times values `(B, R, L, d)`: `(B, R, T, d)`. For
    decoding. Nothing crosses from one id of `segment_ids` `(B, L)` to another.
    """
    matrix = rem_matrix(heads, positions, values.shape[2], dilation, is_causal=True, window=window)
    if gates is not None:
        matrix = matrix * gates[:, None, None]
    if segment_ids is not None:
        matrix = matrix * same_segment(segment_ids, positions)
    return matrix.to(values.dtype) @ values


def chunk_length(steps: int) -> int:
    """
    Positions a chunk: 64, less for shorter sequences; for long ones the power of two near sqrt(steps), which keeps
    memory O(L). A compiler may know the length only as a symbol, and then it is 64.
    """
    if torch.compiler.is_compiling():
        return 64
    return min(max(64, 2 ** round(math.log2(steps) / 2)), steps)


def toeplitz(column: torch.Tensor) -> torch.Tensor:
    """The lower triangular Toeplitz matrices `(R, n, n)` with these first columns `(R, n)`."""
    size = column.shape[1]
    return F.pad(column, (size - 1, 0)).unfold(1, size, 1).flip(2)


class ChunkTables(NamedTuple):
    """What `rem_scan` multiplies with, for chunks of C positions, N of them, in the values' dtype."""

    inside: torch.Tensor  # (R, C, C) gate * P within a chunk
    collect: torch.Tensor  # (R, 2, C) a chunk's values -> its complex state (real, imaginary) at the chunk's end
    carry: torch.Tensor  # (R, 2, N, 2, N) the states of earlier chunks -> the state at each chunk's start
    spread: torch.Tensor  # (R, C, 2) the state at the chunk's start -> its rows, times the gate

    @classmethod
    def make(
        cls, heads: RemHeads, gates: torch.Tensor | None, chunk: int, chunks: int, dtype: torch.dtype
    ) -> "ChunkTables":
        real, imaginary = heads.powers(torch.arange(chunk + 1, device=heads.decay.device))  # (R, C + 1)
        collect = torch.stack([real, imaginary], dim=1)[:, :, 1:].flip(2)
        is_sine = heads.is_sine[:, None]
        spread = torch.stack([torch.where(is_sine, imaginary, real), torch.where(is_sine, real, -imaginary)], dim=2)
        spread = spread[:, :chunk]
        if gates is not None:
            spread = spread * gates[:, None, None]
        inside = toeplitz(F.pad(spread[:, 1:, 0], (1, 0)))
        order = torch.arange(chunks, device=heads.decay.device)
        gap = order[:, None] - order - 1  # chunks between the end of one and the start of another
        real, imaginary = (part.masked_fill(gap < 0, 0) for part in heads.powers(chunk * gap.clamp(min=0)))
        carry = torch.stack([torch.stack([real, -imaginary], dim=2), torch.stack([imaginary, real], dim=2)], dim=1)
        return cls(inside.to(dtype), collect.to(dtype), carry.to(dtype), spread.to(dtype))


def rem_scan(
    heads: RemHeads,
    values: torch.Tensor,
    dilation: int,
    segment_ids: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The causal P times values, in O(L) memory.

    A REM dilated by m keeps m interleaved streams, one for each remainder of the position: position (c C + a) m + r is
    row a of chunk c of stream r, so the streams are one more axis and cost nothing.

    Args:
        values (`(B, R, L, d)`): zero where padded.
        segment_ids (`(B, L)`, *optional*): packed sequences; nothing crosses from one id to another.
        gates (`(R,)`, *optional*): a factor of each head's P; it costs nothing here.

    Returns:
        `(B, R, L, d)`: P V, laid out as `(B, L, R, d)`.
    """
    batch, num_heads, length, dim = values.shape
    chunk = chunk_length((length - 1) // dilation + 1)
    chunks = (length - 1) // (chunk * dilation) + 1
    if torch.compiler.is_compiling():
        chunks = chunks + 1  # one of zeros, so that no length is a special case in the compiled graph
    padding = chunks * chunk * dilation - length
    if torch.compiler.is_compiling() or padding:
        values = F.pad(values, (0, 0, 0, padding))
    values = values.reshape(batch, num_heads, chunks, chunk, dilation, dim)
    tables = ChunkTables.make(heads, gates, chunk, chunks, values.dtype)
    if segment_ids is None:
        product = _scan(tables, values)
    else:
        segment_ids = F.pad(segment_ids, (0, padding), value=-1).view(batch, chunks, chunk, dilation)
        product = _scan_packed(tables, values, segment_ids)
    return product.reshape(batch, chunks * chunk * dilation, num_heads, dim)[:, :length].transpose(1, 2)


def _scan(tables: ChunkTables, values: torch.Tensor) -> torch.Tensor:
    """`rem_scan` on values `(B, R, N, C, m, d)`, to `(B, N, C, m, R, d)`: four products, one head a batch."""
    batch, num_heads, chunks, chunk, dilation, dim = values.shape
    width = batch * dilation * dim  # sizes are spelled out: a compiler cannot always work out a -1
    columns = values.permute(1, 3, 2, 0, 4, 5).reshape(num_heads, chunk, chunks * width)
    product = tables.inside @ columns
    if chunks > 1:
        states = (tables.collect @ columns).view(num_heads, 2 * chunks, width)
        states = tables.carry.view(num_heads, 2 * chunks, 2 * chunks) @ states
        product = torch.baddbmm(product, tables.spread, states.view(num_heads, 2, chunks * width))
    return product.view(num_heads, chunk, chunks, batch, dilation, dim).permute(3, 2, 1, 4, 0, 5)


def _scan_packed(tables: ChunkTables, values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """
    `rem_scan` on values `(B, R, N, C, m, d)` and ids `(B, N, C, m)`, to `(B, N, C, m, R, d)`. Only the sequence that
    runs over a chunk's end can reach a later chunk, so each state belongs to the id of its chunk's last position.
    """
    values = values.permute(1, 0, 4, 2, 3, 5)  # (R, B, m, N, C, d)
    ids = segment_ids.permute(0, 3, 1, 2)  # (B, m, N, C)
    last = ids[..., -1]  # (B, m, N)
    before = F.pad(last, (1, 0), value=-2)[..., :-1]  # the id that runs into each chunk
    same = ids[..., :, None] == ids[..., None, :]  # (B, m, N, C, C)
    product = (tables.inside[:, None, None, None] * same) @ values
    open_end = (ids == last[..., None])[..., None, :]  # (B, m, N, 1, C)
    states = (tables.collect[:, None, None, None] * open_end) @ values  # (R, B, m, N, 2, d)
    alive = (before[..., :, None] == last[..., None, :])[:, :, None, :, None, :]  # (B, m, 1, N, 1, N)
    carry = tables.carry[:, None, None] * alive  # (R, B, m, 2, N, 2, N)
    states = torch.einsum("rbmxnyk,rbmkyd->rbmnxd", carry, states)
    reached = (ids == before[..., None])[..., None]  # (B, m, N, C, 1)
    product = product + (tables.spread[:, None, None, None] * reached) @ states
    return product.permute(1, 3, 4, 2, 0, 5)


def rem_scan_window(
    heads: RemHeads,
    values: torch.Tensor,
    dilation: int,
    window: int,
    segment_ids: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`rem_scan`] of a P that is zero where a key is more than `window` before the query, from two scans. With the
    eigenvalue z, N = window div m, and Z the scan without a limit: sum over n = 1 .. N of z^n v[t - n m] =
    Z[t] - z^N Z[t - N m]. A head takes the real or the imaginary part of it; the product with z^N needs both.
    """
    steps = window // dilation
    part = rem_scan(heads, values, dilation, segment_ids, gates)
    if (kept := values.shape[2] - steps * dilation) <= 0:
        return part
    other = rem_scan(heads._replace(is_sine=~heads.is_sine), values, dilation, segment_ids, gates)
    real, imaginary = heads.powers(torch.tensor([[steps]], device=values.device))  # (R, 1, 1)
    imaginary = torch.where(heads.is_sine[:, None, None], imaginary, -imaginary).to(values.dtype)
    dropped = real.to(values.dtype) * part[:, :, :kept] + imaginary * other[:, :, :kept]
    if segment_ids is not None:
        dropped = dropped * (segment_ids[:, None, -kept:, None] == segment_ids[:, None, :kept, None])
    return part - F.pad(dropped, (0, 0, steps * dilation, 0))


class RecurrenceEncoding(nn.Module):
    """
    The REMs of one attention layer and their gate.

    Learned: `eta`, one for each regular head; `nu` and `theta`, one for each pair of a first and a second cyclical
    head, which come from one complex eigenvalue pair; `mu`, one a layer or one a head. The n-th first and the n-th
    second cyclical head form a pair, those without and those with dilation counted apart; a head without partner has
    its own.

    Args:
        rem_heads: `(head, kind, dilation)` of each REM head, from [`RTransformerConfig.layer_rem_heads`].
        num_attention_heads: H, the plain heads included.
        gate: `"layer"` or `"head"`.
        is_causal: the masked form P, or else P + P'.
        window: how far back a row of P reaches; None for no limit.
    """

    def __init__(
        self,
        rem_heads: list[tuple[int, str, int]],
        num_attention_heads: int,
        gate: str,
        is_causal: bool,
        window: int | None = None,
    ):
        super().__init__()
        # Heads of one dilation are computed together: ordered by dilation they are slices.
        rem_heads = sorted(rem_heads, key=lambda head: head[2])
        self.num_attention_heads = num_attention_heads
        self.is_causal = is_causal
        self.window = window
        self.head_indices = [head for head, _, _ in rem_heads]
        self.kinds = [kind for _, kind, _ in rem_heads]
        self.dilations = [dilation for _, _, dilation in rem_heads]
        first = self.head_indices[0]
        in_order = self.head_indices == list(range(first, first + len(rem_heads)))
        self.head_run = slice(first, first + len(rem_heads)) if in_order else None  # else they must be gathered
        self.eigenvalue_indices, num_regular, num_pairs = self._share_eigenvalues(rem_heads)
        self.eta = nn.Parameter(torch.empty(num_regular))
        self.nu = nn.Parameter(torch.empty(num_pairs))
        self.theta = nn.Parameter(torch.empty(num_pairs))
        self.mu = nn.Parameter(torch.empty(1 if gate == "layer" else len(rem_heads)))
        for name, index in self.index_buffers().items():
            self.register_buffer(name, index, persistent=False)

    def init_parameters(self) -> None:
        """eta uniform on [-2, -1] u [1, 2], nu uniform on [1, 2], theta pi / 4, mu uniform on [-3, 3]; the indices."""
        eta = torch.empty_like(self.eta).uniform_(-1, 1)
        init.copy_(self.eta, eta + torch.where(eta < 0, -1.0, 1.0))
        init.uniform_(self.nu, 1, 2)
        init.constant_(self.theta, math.pi / 4)
        init.uniform_(self.mu, -3, 3)
        for name, index in self.index_buffers().items():
            init.copy_(getattr(self, name), index)

    @staticmethod
    def _share_eigenvalues(rem_heads: list[tuple[int, str, int]]) -> tuple[list[int], int, int]:
        """For each head the index of its eigenvalue in (regular ones, then pairs), and the number of both."""
        regular = sorted(head for head, kind, _ in rem_heads if kind == "regular")
        indices = {head: index for index, head in enumerate(regular)}
        counts, pairs = Counter(), {}
        for head, kind, dilation in sorted(rem_heads):
            if kind != "regular":
                pair = dilation > 1, counts[kind, dilation > 1]
                counts[kind, dilation > 1] += 1
                indices[head] = len(regular) + pairs.setdefault(pair, len(pairs))
        return [indices[head] for head, _, _ in rem_heads], len(regular), len(pairs)

    def index_buffers(self) -> dict[str, torch.Tensor]:
        """The constants that say which head is what; not saved, so they are set again after loading."""
        return {
            "head_index": torch.tensor(self.head_indices),
            "eigenvalue_index": torch.tensor(self.eigenvalue_indices),
            "is_sine": torch.tensor([kind == "second_cyclical" for kind in self.kinds]),
        }

    def learned(self, shard: HeadShard | None = None) -> tuple[torch.Tensor, ...]:
        """`eta`, `nu`, `theta` and `mu`, in float32 or better whatever the model's dtype."""
        parameters = (self.eta, self.nu, self.theta, self.mu)
        if shard is not None:  # side by side, so that their gradients are one message
            parameters = shard.replicated(torch.cat(parameters)).split([p.numel() for p in parameters])
        dtype = torch.promote_types(self.mu.dtype, torch.float32)
        return tuple(parameter.to(dtype) for parameter in parameters)

    def heads(self, learned: tuple[torch.Tensor, ...] | None = None) -> RemHeads:
        """The eigenvalues of the R heads, ordered by dilation; `learned` if there already."""
        eta, nu, theta, _ = learned or self.learned()
        decay = torch.cat([torch.tanh(eta), torch.sigmoid(nu)])[self.eigenvalue_index]
        angle = torch.cat([torch.zeros_like(eta), theta])[self.eigenvalue_index]
        return RemHeads(decay, angle, self.is_sine)

    def gate_values(self, mu: torch.Tensor) -> torch.Tensor:
        """gate = sigmoid(mu). A variant of RSA overrides this."""
        return torch.sigmoid(mu)

    def gates(self, learned: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """The gate of each of the H attention heads, zero for a plain one: `(H,)`, at least float32."""
        gate = self.gate_values((learned or self.learned())[3])
        return gate.new_zeros(self.num_attention_heads).index_copy(0, self.head_index, gate.expand(len(self.kinds)))

    def selection(self, shard: HeadShard | None = None) -> HeadSelection:
        """All heads, or those of a shard."""
        heads = range(self.num_attention_heads) if shard is None else range(shard.first, shard.last)
        groups = []
        for dilation in dict.fromkeys(self.dilations):
            of_dilation = [
                place
                for place, (head, m) in enumerate(zip(self.head_indices, self.dilations))
                if m == dilation and head in heads
            ]
            if of_dilation:  # a slice, since heads of one dilation are in order
                groups.append((dilation, slice(of_dilation[0], of_dilation[-1] + 1)))
        if shard is None:
            return HeadSelection(heads, groups, self.head_run, self.head_index)
        index = torch.cat([self.head_index[:0], *(self.head_index[group] for _, group in groups)]) - shard.first
        return HeadSelection(heads, groups, None, index)

    def matrix(
        self,
        positions: torch.Tensor,
        length: int,
        segment_ids: torch.Tensor | None = None,
        shard: HeadShard | None = None,
        learned: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """
        P of all H heads, or those of a shard, zero for a plain one.

        Args:
            positions (`(T,)` or `(T, length)`): the queries' rows or the distances, as in [`rem_matrix`].
            segment_ids (`(B, length)`, *optional*): packed sequences; nothing crosses from one id to another.

        Returns:
            `(1, H, T, length)`, or `(B, H, T, length)` with `segment_ids`.
        """
        heads, selected = self.heads(learned), self.selection(shard)
        form = self.is_causal, self.window
        groups = [
            rem_matrix(RemHeads(*(field[group] for field in heads)), positions, length, dilation, *form)
            for dilation, group in selected.groups
        ]
        matrix = heads.decay.new_zeros(len(selected.heads), positions.shape[0], length)
        if groups:
            matrix = matrix.index_copy(0, selected.index, torch.cat(groups))
        matrix = matrix[None]
        if segment_ids is not None:
            matrix = matrix * same_segment(segment_ids, positions)
        return matrix

    def product(
        self,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        gates: torch.Tensor | None = None,
        shard: HeadShard | None = None,
        learned: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """
        P V of the R heads that have a REM, or those of them in a shard, ordered by dilation.

        Args:
            values (`(B, H, L, d)`): of all heads, or the shard's, zero where padded.
            positions (`(T,)` or `(T, L)`, *optional*):
                rows of the queries among the keys, or the distances, as in [`rem_matrix`]; all L rows if None.
            gates (`(R,)`, *optional*): a factor of each head's P.

        Returns:
            `(B, R, T, d)`.
        """
        heads, selected = self.heads(learned), self.selection(shard)
        values = values.index_select(1, selected.index) if selected.run is None else values[:, selected.run]
        products, done = [], 0
        few, limits = chunk_length(values.shape[2]), (segment_ids, self.window)
        for dilation, group in selected.groups:
            group_heads = RemHeads(*(field[group] for field in heads))
            group_gates = None if gates is None else gates[group]
            group_values = values[:, done : done + group.stop - group.start]
            done += group.stop - group.start
            if positions is None:
                products.append(self._whole(group_heads, group_values, dilation, segment_ids, group_gates))
            elif torch.compiler.is_exporting() or positions.dim() == 2 or positions.shape[0] <= few:
                products.append(rem_rows(group_heads, group_values, positions, dilation, group_gates, *limits))
            else:  # as many products as a scan has, which keeps no T x L matrix
                product = self._whole(group_heads, group_values, dilation, segment_ids, group_gates)
                products.append(product.index_select(2, positions))
        return torch.cat(products, dim=1) if len(products) > 1 else products[0]

    def _whole(self, heads, values, dilation, segment_ids, gates):
        if self.window is not None:  # only a causal model has one
            return rem_scan_window(heads, values, dilation, self.window, segment_ids, gates)
        product = rem_scan(heads, values, dilation, segment_ids, gates)
        if self.is_causal:
            return product
        reverse_ids = None if segment_ids is None else segment_ids.flip(1)
        return product + rem_scan(heads, values.flip(2), dilation, reverse_ids, gates).flip(2)

    def forward(
        self,
        attention_output: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        shard: HeadShard | None = None,
    ) -> torch.Tensor:
        """
        (1 - gate) * softmax(...) V + gate * P V for each head; a plain head is left as it is.

        Args:
            attention_output (`(B, T, H, d)`): softmax(Q K' / sqrt(d)) V.
            values, positions, segment_ids: as in [`RecurrenceEncoding.product`].
            shard: which of the heads these are; all of them if None.

        Returns:
            `(B, T, H, d)`.
        """
        selected, learned = self.selection(shard), self.learned(shard)
        gates = self.gates(learned)
        complement = (1 - gates[selected.heads.start : selected.heads.stop])[:, None].to(attention_output.dtype)
        if not selected.groups:  # not left out: every process takes part in the message of the gates' gradients
            return attention_output * complement
        product = self.product(values, positions, segment_ids, gates[self.head_index], shard, learned)
        return self.mix(attention_output, product, complement, selected)

    def mix(
        self,
        attention_output: torch.Tensor,  # (B, T, H, d)
        product: torch.Tensor,  # (B, R, T, d), gate * P V
        complement: torch.Tensor,  # (H, 1), 1 - gate
        selected: HeadSelection,
    ) -> torch.Tensor:
        """complement * softmax(...) V + gate * P V: `(B, T, H, d)`."""
        product = product.transpose(1, 2)  # (B, T, R, d)
        if selected.run is None:
            return (attention_output * complement).index_add(2, selected.index, product)
        first, last = selected.run.start, selected.run.stop
        mixed = torch.addcmul(product, attention_output[:, :, selected.run], complement[selected.run])
        if last - first == self.num_attention_heads:
            return mixed
        return torch.cat([attention_output[:, :, :first], mixed, attention_output[:, :, last:]], dim=2)

    def mixing_matrix(
        self,
        attention_weights: torch.Tensor,
        positions: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        shard: HeadShard | None = None,
    ) -> torch.Tensor:
        """
        (1 - gate) * softmax(...) + gate * P, the matrix that multiplies the values: `(B, H, T, L)`, from attention
        weights of that shape.
        """
        queries, length = attention_weights.shape[2:]
        if positions is None:
            positions = torch.arange(queries, device=attention_weights.device)
        selected, learned = self.selection(shard), self.learned(shard)
        gates = self.gates(learned)[selected.heads.start : selected.heads.stop, None, None]
        matrix = self.matrix(positions, length, segment_ids, shard, learned)
        mixed = (1 - gates) * attention_weights + gates * matrix
        return mixed.to(attention_weights.dtype)

    def extra_repr(self) -> str:
        heads = zip(self.head_indices, self.kinds, self.dilations)
        return ", ".join(f"{head}: {kind}" + (f"/{m}" if m > 1 else "") for head, kind, m in sorted(heads))
