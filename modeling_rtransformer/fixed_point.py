# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
A recurrence over positions solved by passes over all positions at once. The step f gives each position's memory from
the memories of the positions before it, so that the memories of the sequence are the fixed point of

    m = f(m),       m^(0) = start,      m^(i+1) = f(m^(i))

After i passes the first i positions are exact, so that as many passes as positions always suffice; the passes end when
the memories change by no more than a tolerance, relative to the largest. The gradient is that of the recurrence: with L
a function of m and of other outputs o(m) of the last pass,

    lambda = dL/dm + (do/dm)' dL/do + (df/dm)' lambda

is a fixed point too, and solved alike; one more product takes lambda and dL/do to the parameters.

Source: the passes are those of Wu and Tu 2024, "Layer-Condensed KV Cache" (arXiv 2405.10637), section 2.3, not cut off
after a fixed number; the adjoint is that of Bai et al. 2019, "Deep Equilibrium Models" (NeurIPS 2019), section 3.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def has_settled(old: torch.Tensor, new: torch.Tensor, tolerance: float) -> bool:
    """
    Whether no entry changed by more than `tolerance` times the largest. In half precision the tolerance is at least
    two rounding errors. What is not a number has settled: more passes would not change it.
    """
    tolerance = max(tolerance, 2 * torch.finfo(new.dtype).eps)
    return not bool((new - old).abs().max() > tolerance * new.abs().max())


@torch.no_grad()
def fixed_point(
    step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, tolerance: float, most: int
) -> tuple[torch.Tensor, bool]:
    """m after at most `most` passes, and whether it has settled."""
    memories = start
    for _ in range(most):
        memories, old = step(memories), memories
        if has_settled(old, memories, tolerance):
            return memories, True
    return memories, False


class AtFixedPoint(torch.autograd.Function):
    """
    `AtFixedPoint.apply(tolerance, start, memories, *others)`: `memories` and `others` as they are, with the gradients
    of the recurrence. They are outputs of one pass from `start`, a leaf that has the values of the fixed point.
    """

    @staticmethod
    def forward(ctx, tolerance, start, memories, *others):
        ctx.tolerance = tolerance
        ctx.save_for_backward(start, memories, *others)
        return tuple(tensor.view_as(tensor) for tensor in (memories, *others))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_memories, *grad_others):
        start, memories, *others = ctx.saved_tensors

        def back(outputs, gradients):
            [gradient] = torch.autograd.grad(outputs, start, gradients, retain_graph=True, allow_unused=True)
            return torch.zeros_like(start) if gradient is None else gradient

        depends = [pair for pair in zip(others, grad_others) if pair[0].requires_grad]
        direct = grad_memories + back(*zip(*depends)) if depends else grad_memories
        adjoint, _ = fixed_point(
            lambda value: direct + back(memories, value), direct, ctx.tolerance, most=start.shape[1]
        )
        return (None, None, adjoint, *grad_others)
