# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The REMs of one attention module of another model, times the keys that its softmax sees:

    gate * (P * visible) V

where `visible[i, j]` is 1 where query i may use key j. Two forms give it: rows of P times the mask, the definition
([`RsaEncoding.rows`]), and a scan in O(L) memory for masks that are made of padding, packed sequences and a window
([`RsaEncoding.scan`], [`read_visible_keys`]).

Source: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), section 3.
"""

# B batch, H attention heads, G value heads, R heads with a REM, T queries, L keys, d head size, m dilation

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import initialization as init

from .recurrence_encoding import RecurrenceEncoding, RemHeads, rem_matrix, rem_scan


GATE_FORMS = ("zero", "sigmoid")


class VisibleKeys(NamedTuple):
    """
    Which keys each query sees where the L keys are the queries' own positions: those that are not padded, of the same
    segment, no farther than `reach` and, in a causal module, not later.

    Args:
        padding_mask (`(B or 1, L)`): bool, False where padded; None where nothing is.
        segment_ids (`(B or 1, L)`): equal ids mark the positions of one packed sequence; None for one sequence.
        reach: the largest distance; None for any.
    """

    padding_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    reach: int | None = None

    def matrix(self, length: int, is_causal: bool, device: torch.device) -> torch.Tensor:
        """The definition: `(B or 1, L, L)`, bool, True where the query of a row sees the key of a column."""
        positions = torch.arange(length, device=device)
        visible = torch.ones(1, length, length, dtype=torch.bool, device=device)
        if is_causal:
            visible = visible & (positions[:, None] >= positions)
        if self.reach is not None:
            visible = visible & ((positions[:, None] - positions).abs() <= self.reach)
        if self.padding_mask is not None:
            visible = visible & self.padding_mask[:, None, :]
        if self.segment_ids is not None:
            visible = visible & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        return visible


def read_visible_keys(visible: torch.Tensor, is_causal: bool) -> VisibleKeys | None:
    """
    Padding, segments and reach of a mask `(B or 1, 1 or H, L, L)`, bool; None if the mask has another form.

    What is read from two diagonals is compared with the whole mask, so a result is exact.
    """
    rows = visible[:, 0]
    if visible.shape[1] > 1 and not torch.equal(visible, visible[:, :1].expand_as(visible)):
        return None
    length, device = rows.shape[1], rows.device
    padding_mask = rows.diagonal(dim1=1, dim2=2)  # a position that is not padded sees itself
    begins = padding_mask[:, :-1] & ~rows.diagonal(offset=-1, dim1=1, dim2=2)  # and the one before, of its segment
    segment_ids = F.pad(begins.cumsum(1), (1, 0)) if begins.any() else None
    keys = VisibleKeys(None if padding_mask.all() else padding_mask, segment_ids)
    if torch.equal(keys.matrix(length, is_causal, device).expand_as(rows), rows):
        return keys
    positions = torch.arange(length, device=device)
    distance = (positions[:, None] - positions).abs()
    keys = keys._replace(reach=int(torch.where(rows.any(0), distance, 0).max()))
    return keys if torch.equal(keys.matrix(length, is_causal, device).expand_as(rows), rows) else None


def windowed_scan(
    heads: RemHeads,
    values: torch.Tensor,
    dilation: int,
    segment_ids: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    reach: int | None = None,
) -> torch.Tensor:
    """
    [`rem_scan`] over the distances up to `reach`. With the eigenvalue z, k = floor(reach / m) and the whole scan S,

        sum over n = 1 ... k of z^n V[t - n m]   =   S[t] - z^k S[t - k m]

    whose real part is that of a first cyclical head and whose imaginary part is that of a second one, so that both
    scans are needed.
    """
    product = rem_scan(heads, values, dilation, segment_ids, gates)
    if reach is None or reach // dilation * dilation >= values.shape[2] - 1:
        return product
    steps = reach // dilation
    shift = steps * dilation
    real, imaginary = heads.powers(torch.full((), steps, device=values.device))
    other = rem_scan(heads._replace(is_sine=~heads.is_sine), values, dilation, segment_ids, gates)
    imaginary = torch.where(heads.is_sine, imaginary, -imaginary)
    beyond = (part.view(-1, 1, 1).to(values.dtype) for part in (real, imaginary))
    beyond = sum(factor * scan for factor, scan in zip(beyond, (product, other)))
    beyond = F.pad(beyond[:, :, : values.shape[2] - shift], (0, 0, shift, 0))
    if segment_ids is not None:
        same = F.pad(segment_ids[:, shift:] == segment_ids[:, : values.shape[2] - shift], (shift, 0))
        beyond = beyond * same[:, None, :, None]
    return product - beyond


class RsaEncoding(RecurrenceEncoding):
    """
    The REMs and gates of one attention module of another model.

    Args:
        rem_heads, num_attention_heads, gate, is_causal: as in [`RecurrenceEncoding`].
        gate_form: `"zero"`, gate = tanh(mu) and mu = 0 at first, so that the model's outputs are those of before; or
            `"sigmoid"`, the paper's gate = sigmoid(mu).
    """

    def __init__(
        self,
        rem_heads: list[tuple[int, str, int]],
        num_attention_heads: int,
        gate: str,
        is_causal: bool,
        gate_form: str,
    ):
        super().__init__(rem_heads, num_attention_heads, gate, is_causal)
        self.gate_form = gate_form

    def init_parameters(self) -> None:
        """As in [`RecurrenceEncoding`]; mu is 0 with the gate form "zero"."""
        super().init_parameters()
        if self.gate_form == "zero":
            init.zeros_(self.mu)

    def gate_values(self, mu: torch.Tensor) -> torch.Tensor:
        return torch.tanh(mu) if self.gate_form == "zero" else torch.sigmoid(mu)

    def complement(self) -> torch.Tensor:
        """1 - gate of each of the H heads: `(H, 1)`."""
        return (1 - self.gates())[:, None]

    def _groups(self) -> list[tuple[int, slice, RemHeads, torch.Tensor]]:
        """For each dilation: its place among the R heads, their eigenvalues and their gates."""
        learned = self.learned()
        heads, gates = self.heads(learned), self.gate_values(learned[3]).expand(len(self.kinds))
        return [
            (dilation, group, RemHeads(*(field[group] for field in heads)), gates[group])
            for dilation, group in self.selection().groups
        ]

    def rows(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """gate * P, the rows `positions` `(T,)` and the columns 0 to `length` - 1: `(R, T, length)`."""
        parts = [
            rem_matrix(heads, positions, length, dilation, self.is_causal) * gates[:, None, None]
            for dilation, _, heads, gates in self._groups()
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def scan(self, value: torch.Tensor, keys: VisibleKeys) -> torch.Tensor:
        """gate * (P * visible) V in O(L) memory: `(B, R, L, d)` from the values `(B, G, L, d)` of the queries."""
        values, segment_ids = self.rem_values(value), keys.segment_ids
        if keys.padding_mask is not None:
            values = values * keys.padding_mask[:, None, :, None].to(values.dtype)
        if segment_ids is not None:
            segment_ids = segment_ids.expand(values.shape[0], -1)
        products = []
        for dilation, group, heads, gates in self._groups():
            product = windowed_scan(heads, values[:, group], dilation, segment_ids, gates, keys.reach)
            if not self.is_causal:
                flipped = values[:, group].flip(2), dilation, None if segment_ids is None else segment_ids.flip(1)
                product = product + windowed_scan(heads, *flipped, gates, keys.reach).flip(2)
            products.append(product)
        return torch.cat(products, dim=1) if len(products) > 1 else products[0]

    def value_heads(self, available: int) -> list[int]:
        """The value head of each of the R heads: with grouped queries, neighbouring heads share one of the G."""
        group, rest = divmod(self.num_attention_heads, available)
        if rest:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {available} value heads evenly")
        return [head // group for head in self.head_indices]

    def rem_values(self, value: torch.Tensor) -> torch.Tensor:
        """The values of the R heads `(B, R, L, d)`, from those of the G value heads."""
        heads = self.value_heads(value.shape[1])
        if heads == list(range(heads[0], heads[0] + len(heads))):
            return value[:, heads[0] : heads[0] + len(heads)]
        return value.index_select(1, self.head_index // (self.num_attention_heads // value.shape[1]))

    def times_values(self, rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Rows `(B or 1, R, T, L)` times the values of the R heads: `(B, R, T, d)`. Shared values are not copied."""
        heads = self.value_heads(value.shape[1])
        rows = rows.to(value.dtype)
        share = len(heads) // (heads[-1] - heads[0] + 1)
        if share < 2 or heads != [heads[0] + index // share for index in range(len(heads))]:
            return rows @ self.rem_values(value)
        queries, length = rows.shape[2:]
        product = rows.reshape(rows.shape[0], -1, share * queries, length) @ value[:, heads[0] : heads[-1] + 1]
        return product.reshape(value.shape[0], len(heads), queries, value.shape[3])


__all__ = ["GATE_FORMS", "RsaEncoding", "VisibleKeys", "read_visible_keys", "windowed_scan"]
