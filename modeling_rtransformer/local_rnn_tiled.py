# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
The K steps of a LocalRNN on a CPU, tile by tile, with a backward pass of its own.

The products of a LocalRNN run near the processor's peak by themselves. What costs is memory: a dozen elementwise
operations a step on tensors that fit into no cache, and autograd, which keeps most of them and adds the gradient of
each step's slice to one as large as the whole input. Here a tile of positions goes through all K steps in buffers that
stay in the cache and serve the next tile too, time first, so that the inputs of a step are one contiguous slice. Of
each step the gates alone are kept for the backward pass; the states follow from them without a product.

The readable twin is `local_rnn_plain` in local_rnn.py; local_rnn_fused.py is the same in C.
"""

# R rows of a tile (T positions of S sequences, time first), D hidden size, G gates, K window

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


# Rows a tile: so many elements in a buffer of width D, which caches hold, and rows enough for the products to run well.
TILE_ELEMENTS = 2**18
TILE_ROWS = 512


def sigmoid_backward_(grad: torch.Tensor, output: torch.Tensor) -> None:
    torch.ops.aten.sigmoid_backward.grad_input(grad, output, grad_input=grad)


def tanh_backward_(grad: torch.Tensor, output: torch.Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(grad, output, grad_input=grad)


class Gates(NamedTuple):
    """
    A tensor of gates `(R, G D)` as a cell takes it apart: `sigmoids` side by side `(R, (G - 1) D)`, the gate that is
    not one, `new` `(R, D)`, and each of the sigmoids alone, `parts`.
    """

    sigmoids: torch.Tensor
    new: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    @classmethod
    def each_step(cls, gates: torch.Tensor, size: int) -> list["Gates"]:
        """From gates of all steps `(K, R, G D)`."""
        return cls.of_blocks(gates[..., :-size], gates[..., -size:].unbind(), size)

    @classmethod
    def of_blocks(cls, sigmoids: torch.Tensor, new: Sequence[torch.Tensor], size: int) -> list["Gates"]:
        """From `(K, R, (G - 1) D)` and K times `(R, D)`."""
        parts = [part.unbind() for part in sigmoids.split(size, dim=-1)]
        if sigmoids.shape[-1] == 0:
            parts = []
        return [cls(*step[:2], step[2:]) for step in zip(sigmoids.unbind(), new, *parts)]


class Cell:
    """
    One kind of RNN on a tile, every method in place. A step is `activate`, which makes what is kept of it from the
    inputs, which have `input_bias` in them, and the product W_h h, which it may overwrite; then `advance`, which makes
    its states, `num_states` times `(R, D)`, from that. Before the first step product and states are None, for zero.
    `order` says which gates of torch.nn's order come first, second, ... here, the one that is no sigmoid last.
    """

    order: tuple[int, ...]
    num_states: int
    num_grads: int  # gradients handed from step to step, the hidden state's first
    hidden_passes_by = False  # some of the hidden state reaches the next step outside the product

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        self.size = weight.shape[1]
        self.weight, self.bias = self.reorder(weight), self.reorder(bias)
        self.input_bias = self.bias
        self.new_bias = self.bias[-self.size :]

    def reorder(self, gates: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """`(G D, ...)` from torch.nn's order into this one, or back."""
        order = self.order
        if order == tuple(sorted(order)):
            return gates
        if inverse:
            order = [order.index(gate) for gate in range(len(order))]
        return gates.unflatten(0, (-1, self.size))[list(order)].flatten(0, 1)

    def columns(self) -> list[tuple[slice, slice]]:
        """Where each run of gates lies in torch.nn's order, and where here."""
        if self.order == tuple(sorted(self.order)):
            return [(slice(None), slice(None))]
        span = [slice(gate * self.size, (gate + 1) * self.size) for gate in range(len(self.order))]
        return [(span[there], span[here]) for here, there in enumerate(self.order)]

    def kept_size(self, steps: int, rows: int) -> int:
        return steps * rows * len(self.weight)

    def kept(self, flat: torch.Tensor, steps: int, rows: int) -> list[Gates]:
        """What is kept of each step, in a flat buffer: sigmoids and new gates apart, since tanh is slow on columns."""
        sigmoids = steps * rows * (len(self.weight) - self.size)
        new = flat[sigmoids:].view(-1, rows, self.size)
        return Gates.of_blocks(flat[:sigmoids].view(steps, rows, -1), self.new_of_steps(new), self.size)

    def new_of_steps(self, new: torch.Tensor) -> Sequence[torch.Tensor]:
        return new.unbind()

    def hidden(self, kept: Gates, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return states[-1]

    def activate(self, inputs: Gates, recurrent: Gates | None, kept: Gates) -> None:
        raise NotImplementedError

    def advance(self, inputs: Gates, kept: Gates, before, after) -> None:
        raise NotImplementedError

    def backward(self, kept: Gates, before, after, grads, grad_recurrent: Gates, work) -> torch.Tensor:
        """
        Writes the gradient of W_h h + b_h and brings `grads` to before the step, all but what passes through the
        product. The gradient of the inputs' sigmoids is the same; that of their new gate is returned.
        """
        raise NotImplementedError


class GruCell(Cell):
    """Keeps (reset, update) and W_h h + b_h of the new gate; its states are (new, hidden)."""

    order, num_states, num_grads = (0, 1, 2), 2, 1
    hidden_passes_by = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__(weight, bias)
        self.input_bias = self.bias.clone()
        self.input_bias[-self.size :] = 0

    def kept_size(self, steps, rows):  # of the first step W_h h + b_h is b_h
        return super().kept_size(steps, rows) - rows * self.size

    def new_of_steps(self, new):
        return [self.new_bias.expand(new.shape[1], -1), *new.unbind()]

    def activate(self, inputs, recurrent, kept):
        if recurrent is None:
            torch.sigmoid(inputs.sigmoids, out=kept.sigmoids)
        else:
            torch.sigmoid(recurrent.sigmoids.add_(inputs.sigmoids), out=kept.sigmoids)
            torch.add(recurrent.new, self.new_bias, out=kept.new)

    def advance(self, inputs, kept, before, after):
        reset, update = kept.parts
        new, hidden = after
        torch.addcmul(inputs.new, reset, kept.new, out=new).tanh_()
        if before is None:
            torch.addcmul(new, update, new, value=-1, out=hidden)
        else:
            torch.lerp(new, before[-1], update, out=hidden)

    def backward(self, kept, before, after, grads, grad_recurrent, work):
        reset, update = kept.parts
        grad_reset, grad_update = grad_recurrent.parts
        (grad_hidden,), new, grad_new = grads, after[0], work
        torch.addcmul(grad_hidden, grad_hidden, update, value=-1, out=grad_new)
        tanh_backward_(grad_new, new)
        if before is None:
            torch.mul(grad_hidden, new, out=grad_update).neg_()
        else:
            torch.sub(before[-1], new, out=grad_update).mul_(grad_hidden)
        torch.mul(grad_new, kept.new, out=grad_reset)
        sigmoid_backward_(grad_recurrent.sigmoids, kept.sigmoids)
        torch.mul(grad_new, reset, out=grad_recurrent.new)
        grad_hidden.mul_(update)
        return grad_new


class LstmCell(Cell):
    """Keeps (input, forget, output) and the new cell's input; its states are (cell, tanh(cell), hidden)."""

    order, num_states, num_grads = (0, 1, 3, 2), 3, 2

    def activate(self, inputs, recurrent, kept):
        if recurrent is None:
            torch.sigmoid(inputs.sigmoids, out=kept.sigmoids)
            kept.new.copy_(inputs.new).tanh_()
        else:
            torch.sigmoid(recurrent.sigmoids.add_(inputs.sigmoids), out=kept.sigmoids)
            torch.add(recurrent.new, inputs.new, out=kept.new).tanh_()

    def advance(self, inputs, kept, before, after):
        input_gate, forget_gate, output_gate = kept.parts
        cell, tanh_cell, hidden = after
        torch.mul(input_gate, kept.new, out=cell)
        if before is not None:
            cell.addcmul_(forget_gate, before[0])
        torch.tanh(cell, out=tanh_cell)
        torch.mul(output_gate, tanh_cell, out=hidden)

    def backward(self, kept, before, after, grads, grad_recurrent, work):
        input_gate, forget_gate, output_gate = kept.parts
        grad_input, grad_forget, grad_output = grad_recurrent.parts
        (grad_hidden, grad_cell), tanh_cell = grads, after[1]
        torch.mul(grad_hidden, tanh_cell, out=grad_output)
        tanh_backward_(grad_hidden.mul_(output_gate), tanh_cell)
        grad_cell.add_(grad_hidden)
        torch.mul(grad_cell, kept.new, out=grad_input)
        if before is None:
            grad_forget.zero_()
        else:
            torch.mul(grad_cell, before[0], out=grad_forget)
        sigmoid_backward_(grad_recurrent.sigmoids, kept.sigmoids)
        torch.mul(grad_cell, input_gate, out=grad_recurrent.new)
        tanh_backward_(grad_recurrent.new, kept.new)
        grad_cell.mul_(forget_gate)
        return grad_recurrent.new


class TanhCell(Cell):
    """Keeps its hidden state, which is all there is."""

    order, num_states, num_grads = (0,), 0, 1

    def hidden(self, kept, states):
        return kept.new

    def activate(self, inputs, recurrent, kept):
        if recurrent is None:
            torch.tanh(inputs.new, out=kept.new)
        else:
            torch.tanh(recurrent.new.add_(inputs.new), out=kept.new)

    def advance(self, inputs, kept, before, after):
        pass

    def backward(self, kept, before, after, grads, grad_recurrent, work):
        grad_recurrent.new.copy_(grads[0])
        tanh_backward_(grad_recurrent.new, kept.new)
        return grad_recurrent.new


CELLS = {"gru": GruCell, "lstm": LstmCell, "rnn": TanhCell}


class Tile(NamedTuple):
    """The sequences and the positions of a tile."""

    sequences: slice
    positions: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(T, S), time first."""
        return self.positions.stop - self.positions.start, self.sequences.stop - self.sequences.start

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]

    def reach(self, window: int) -> slice:
        """The inputs that the tile reads, of K - 1 + L."""
        return slice(self.positions.start, self.positions.stop + window - 1)

    def add_to(self, whole: torch.Tensor, part: torch.Tensor, window: int, columns: list[tuple[slice, slice]]) -> None:
        """
        Writes its part `((T + K - 1) S, G D)` into `whole` `(B, K - 1 + L, G D)`. The K - 1 positions that it shares
        with the tile before are written already, and added to.
        """
        whole = whole[self.sequences, self.reach(window)].transpose(0, 1)
        part = part.view(*whole.shape)
        shared = window - 1 if self.positions.start else 0
        for there, here in columns:
            whole[:shared, :, there].add_(part[:shared, :, here])
            whole[shared:, :, there].copy_(part[shared:, :, here])


def make_tiles(batch: int, length: int, size: int) -> list[Tile]:
    """Tiles of about equal size: parts of one sequence where it is long, several sequences where they are short."""
    rows = max(TILE_ROWS, TILE_ELEMENTS // size)
    parts = -(-length // rows)  # of one sequence
    groups = -(-batch // max(rows // max(length, 1), 1))  # of sequences
    positions, sequences = -(-length // max(parts, 1)), -(-batch // max(groups, 1))
    return [
        Tile(slice(b, min(b + sequences, batch)), slice(t, min(t + positions, length)))
        for b in range(0, batch, max(sequences, 1))
        for t in range(0, length, max(positions, 1))
    ]


class Workspace:
    """Buffers that are made for the largest tile and lent to each in turn."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.buffers = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = self.like.new_empty(count)
        return self.buffers[name][:count].view(shape)


def step_slices(buffer: torch.Tensor, rows: int, sequences: int) -> torch.Tensor:
    """The slices `(K, R, G D)` of a time-first buffer `((K - 1 + T) S, G D)` that the K steps read; a view."""
    return buffer.unfold(0, rows, sequences).transpose(1, 2)


def in_own_segment(segment_ids: torch.Tensor | None, tile: Tile, window: int) -> torch.Tensor | None:
    """`(S, K, T)`, whether the k-th input of a position's window is of its own segment; None where all are."""
    if segment_ids is None:
        return None
    segments = segment_ids[tile.sequences]
    neighbours = F.pad(segments, (window - 1, 0), value=-1)[:, tile.reach(window)]
    same = neighbours.unfold(1, tile.shape[0], 1) == segments[:, None, tile.positions]
    return None if same.all() else same


class TileInputs:
    """What a tile's steps read: the projected inputs with the cell's bias, time first, and what packing hides."""

    def __init__(self, workspace, tile, window, cell, projected, segment_ids, zero_input):
        length, sequences = tile.shape
        reach = tile.reach(window)
        width = projected.shape[2]
        inputs = workspace("inputs", length + window - 1, sequences, width)
        source = projected[tile.sequences, reach].transpose(0, 1)
        for there, here in cell.columns():
            torch.add(source[..., there], cell.input_bias[here], out=inputs[..., here])
        steps = step_slices(inputs.view(-1, width), tile.rows, sequences)
        self.same = None  # (K, R, 1), whether a step's input is of the window's own sequence
        same = in_own_segment(segment_ids, tile, window)
        if same is not None:
            self.same = same.permute(1, 2, 0).reshape(window, -1, 1)
            zero_input = cell.reorder(zero_input.reshape(-1)) + cell.input_bias
            steps = torch.where(self.same, steps, zero_input)
        self.steps = Gates.each_step(steps, cell.size)


class TiledLocalRnn(torch.autograd.Function):
    """`local_rnn` on a CPU in float32 or float64; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(ctx, projected, weight, bias, zero_input, segment_ids, rnn_type, window, keep):
        batch, length, size = projected.shape[0], projected.shape[1] - window + 1, weight.shape[1]
        cell = CELLS[rnn_type](weight, bias)
        workspace = Workspace(projected)
        outputs = projected.new_empty(batch, length, size)
        kept_tiles = []
        for tile in make_tiles(batch, length, size):
            inputs = TileInputs(workspace, tile, window, cell, projected, segment_ids, zero_input)
            kept_steps = window if keep else 3  # without a backward pass the first, and two by turns
            kept_size = cell.kept_size(kept_steps, tile.rows)
            if keep:
                kept_tiles.append(projected.new_empty(kept_size))
            kept = cell.kept(kept_tiles[-1] if keep else workspace("kept", kept_size), kept_steps, tile.rows)
            states = [step.unbind() for step in workspace("states", 2, cell.num_states, tile.rows, size)]
            product = workspace("product", tile.rows, len(weight))
            (recurrent,) = Gates.each_step(product[None], size)
            before = hidden = None
            for step in range(window):
                now, after = kept[step if keep or step == 0 else 2 - step % 2], states[step % 2]
                if step:
                    torch.mm(hidden, cell.weight.T, out=product)
                cell.activate(inputs.steps[step], recurrent if step else None, now)
                cell.advance(inputs.steps[step], now, before, after)
                before, hidden = after, cell.hidden(now, after)
            outputs[tile.sequences, tile.positions] = hidden.view(*tile.shape, size).transpose(0, 1)
        ctx.options = rnn_type, window
        ctx.save_for_backward(projected, weight, bias, zero_input, segment_ids, *kept_tiles)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        rnn_type, window = ctx.options
        projected, weight, bias, zero_input, segment_ids, *kept_tiles = ctx.saved_tensors
        batch, length, size = grad_outputs.shape
        cell = CELLS[rnn_type](weight, bias)
        workspace = Workspace(projected)
        grad_projected = torch.empty_like(projected)
        grad_weight = torch.zeros_like(weight)
        # One sum for each tile and step is added to these: in float64, or the order of the tiles would show.
        grad_bias, grad_zero_input = (torch.zeros_like(bias, dtype=torch.float64) for _ in range(2))
        for tile, kept in zip(make_tiles(batch, length, size), kept_tiles):
            inputs = TileInputs(workspace, tile, window, cell, projected, segment_ids, zero_input)
            kept = cell.kept(kept, window, tile.rows)
            states = [step.unbind() for step in workspace("states", window, cell.num_states, tile.rows, size)]
            for step in range(window):
                cell.advance(inputs.steps[step], kept[step], states[step - 1] if step else None, states[step])

            grad_inputs = workspace("grad_inputs", (tile.shape[0] + window - 1) * tile.shape[1], len(bias)).zero_()
            grad_steps = Gates.each_step(step_slices(grad_inputs, tile.rows, tile.shape[1]), size)
            grad_recurrent = workspace("grad_recurrent", tile.rows, len(bias))
            (grad_gates,) = Gates.each_step(grad_recurrent[None], size)
            work = workspace("work", tile.rows, size)
            grads = workspace("grads", cell.num_grads, tile.rows, size).zero_().unbind()
            grads[0].view(*tile.shape, size).copy_(grad_outputs[tile.sequences, tile.positions].transpose(0, 1))
            for step in reversed(range(window)):
                before = states[step - 1] if step else None
                grad_new = cell.backward(kept[step], before, states[step], grads, grad_gates, work)
                grad_bias += grad_recurrent.sum(dim=0)
                if step:
                    grad_weight.addmm_(grad_recurrent.T, cell.hidden(kept[step - 1], before))
                    grads[0].addmm_(grad_recurrent, cell.weight, beta=int(cell.hidden_passes_by))
                if inputs.same is not None:
                    same = inputs.same[step]
                    grad_zero_input[:-size] += grad_gates.sigmoids.masked_fill(same, 0).sum(dim=0)
                    grad_zero_input[-size:] += grad_new.masked_fill(same, 0).sum(dim=0)
                    grad_gates.sigmoids.mul_(same)
                    grad_new.mul_(same)
                grad_steps[step].sigmoids.add_(grad_gates.sigmoids)
                grad_steps[step].new.add_(grad_new)
            tile.add_to(grad_projected, grad_inputs, window, cell.columns())
        grad_weight, grad_bias, grad_zero_input = (
            cell.reorder(grad.to(weight.dtype), inverse=True) for grad in (grad_weight, grad_bias, grad_zero_input)
        )
        grad_zero_input = None if zero_input is None else grad_zero_input.view_as(zero_input)
        return grad_projected, grad_weight, grad_bias, grad_zero_input, None, None, None, None
