# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Linear layers whose weight is a product of sparse factors, and the choice between them and `nn.Linear`:

    Monarch     two block-diagonal factors with a fixed permutation between them: 2 / nb of the weights at n = m
    butterfly   log2 N factors of 2 x 2 blocks a butterfly: 2 N log2 N weights, slow by design

Each has `multiply`, the product by its factors, and `fold`, the dense weight that it applies, differentiable. Which of
the two is faster depends on the size and on the number of rows; the results are equal up to rounding.

Sources: Dao et al. 2022, "Monarch" (arXiv 2204.00595); Dao et al. 2019, "Learning Fast Algorithms for Linear Transforms
Using Butterfly Factorizations" (arXiv 1903.05895); Dao et al. 2020, "Kaleidoscope" (arXiv 2012.14966). The parameters
have the names of the authors' code (HazyResearch/fly and HazyResearch/butterfly), whose weights load as they are.
"""

# R rows, n inputs, m outputs. Monarch: nb blocks, p = ceil(n / nb), o = ceil(m / nb), q = min(p, o) rows of a block of
# the first factor. Butterfly: N = 2^ceil(log2 n), S = ceil(m / N) stacks, s stride

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_rtransformer import RTransformerConfig


# Rows that a product by factors takes at once on a CPU, so that what is between the factors stays in a core's cache.
ROWS_AT_ONCE = 256
# From so many rows on, a Monarch matrix of at most so many elements is folded for the product (measured on a CPU).
FOLD_FROM_ROWS = 256
FOLD_UP_TO_SIZE = 2**14


def product_dtype(inputs: torch.Tensor) -> torch.dtype:
    """The type of a linear layer's outputs: under autocast another one than that of the inputs."""
    device = inputs.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on "meta"
    return torch.get_autocast_dtype(device) if is_autocast else inputs.dtype


class StructuredLinear(nn.Module):
    """
    y = W x + b with a structured W. A subclass has the factors as parameters, and `multiply`, `fold` and
    `init_factors`.

    Args:
        in_features, out_features: n and m.
        bias: whether there is a b.
        std: initial standard deviation of the entries of W; 1 / sqrt(3 n), that of `nn.Linear`, if None.
        bias_bound: initial values of b are uniform(-bound, bound); 1 / sqrt(n), as in `nn.Linear`, if None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        std: float | None = None,
        bias_bound: float | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.std = (3 * in_features) ** -0.5 if std is None else std
        self.bias_bound = in_features**-0.5 if bias_bound is None else bias_bound
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_buffer("folded", None, persistent=False)  # see `folded_linears`

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """W x of each row, without the bias: `(R, n)` to `(R, m)`."""
        raise NotImplementedError

    def fold(self) -> torch.Tensor:
        """The dense W `(m, n)`, through which gradients reach the factors."""
        raise NotImplementedError

    def init_factors(self) -> None:
        """Give the factors values for which the entries of W have mean 0 and standard deviation `std`."""
        raise NotImplementedError

    def folds_for(self, rows: int | None) -> bool:
        """Whether folding W for one product is faster than `multiply`; `rows` is None where a compiler traces."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """W `(m, n)`; computed from the factors in each access, except in [`folded_linears`]."""
        return self.fold() if self.folded is None or torch.is_grad_enabled() else self.folded

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`(..., n)` to `(..., m)`."""
        if self.folded is not None and not torch.is_grad_enabled():
            return F.linear(inputs, self.folded, self.bias)
        # A choice by the number of rows would fix that number in the graph of a compiler.
        rows = None if torch.compiler.is_compiling() else inputs.numel() // self.in_features
        if self.folds_for(rows):
            return F.linear(inputs, self.fold(), self.bias)
        parts = inputs.reshape(-1, self.in_features)
        if rows is not None and rows > ROWS_AT_ONCE and inputs.device.type == "cpu":
            outputs = torch.cat([self.multiply(part) for part in parts.split(ROWS_AT_ONCE)])
        else:
            outputs = self.multiply(parts)
        outputs = outputs.to(product_dtype(inputs))
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    @torch.no_grad()
    def init_parameters(self) -> None:
        """The initial values that the class describes."""
        self.init_factors()
        if self.bias is not None:
            init.uniform_(self.bias, -self.bias_bound, self.bias_bound)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class MonarchLinear(StructuredLinear):
    """
    A Monarch matrix, x padded with zeros to nb p, y cut to m:

        h[k] = W1[k] x[k p : (k + 1) p]                         nb vectors of q numbers, (k q + i) the place of h[k, i]
        y[s nb + l] = sum_r W2[l, s, r] h[r nb + l]             r from 0 to q - 1

    W1 is `blkdiag1` (nb, q, p), W2 `blkdiag2` (nb, o, q). Where nb divides q, the block of W from the inputs k p..
    to the outputs l, nb + l, 2 nb + l.. has rank q / nb. Multiplications a row: nb q (p + o), in place of n m.

    Args:
        blocks: nb.

    Source: Dao et al. 2022, section 3; `MonarchLinear` of HazyResearch/fly.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, blocks: int = 4, **options):
        super().__init__(in_features, out_features, bias, **options)
        self.blocks = blocks
        p, o = -(-in_features // blocks), -(-out_features // blocks)
        q = min(p, o)
        self.blkdiag1 = nn.Parameter(torch.empty(blocks, q, p))
        self.blkdiag2 = nn.Parameter(torch.empty(blocks, o, q))
        self.init_parameters()

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        nb, q, p = self.blkdiag1.shape
        if nb * p != self.in_features:
            inputs = F.pad(inputs, (0, nb * p - self.in_features))
        # Rows last: what the permutation moves is then contiguous, and both products read their operands in place.
        hidden = self.blkdiag1 @ inputs.view(-1, nb, p).permute(1, 2, 0)  # (nb, q, R)
        hidden = hidden.view(q, nb, -1).permute(1, 2, 0)  # (nb, R, q): h[r nb + l] at [l, :, r]
        outputs = hidden @ self.blkdiag2.transpose(1, 2)  # (nb, R, o)
        outputs = outputs.permute(1, 2, 0).reshape(-1, nb * self.blkdiag2.shape[1])
        return outputs[:, : self.out_features]

    def fold(self) -> torch.Tensor:
        nb, q, p = self.blkdiag1.shape
        o = self.blkdiag2.shape[1]
        if q % nb == 0:  # a product of rank a = q / nb for each of the nb x nb blocks
            a = q // nb
            second = self.blkdiag2.view(nb, o, nb, a).transpose(1, 2)  # (l, k, o, a)
            first = self.blkdiag1.view(nb, a, nb, p).permute(2, 0, 1, 3)  # (l, k, a, p)
            weight = (second @ first).permute(2, 0, 1, 3)  # (o, l, k, p)
        else:
            first = torch.block_diag(*self.blkdiag1).view(q, nb, nb * p).transpose(0, 1)  # (l, r, n)
            weight = (self.blkdiag2 @ first).transpose(0, 1)  # (o, l, n)
        return weight.reshape(nb * o, nb * p)[: self.out_features, : self.in_features]

    @property
    def share(self) -> float:
        """Elements of the factors over those of W, and multiplications likewise."""
        return (self.blkdiag1.numel() + self.blkdiag2.numel()) / (self.in_features * self.out_features)

    def folds_for(self, rows: int | None) -> bool:
        return rows is not None and rows >= FOLD_FROM_ROWS and self.in_features * self.out_features <= FOLD_UP_TO_SIZE

    def init_factors(self) -> None:
        """normal(0, p^-1/2) for W1, so that h is as large as x, and for W2 what makes `std` of their product"""
        nb, q, p = self.blkdiag1.shape
        init.normal_(self.blkdiag1, std=p**-0.5)
        init.normal_(self.blkdiag2, std=self.std * math.sqrt(p * nb / q))

    @torch.no_grad()
    def project(self, weight: torch.Tensor) -> float:
        """
        Set the factors to the Monarch matrix that is nearest to `weight` `(m, n)`, and the relative error in the
        Frobenius norm that remains. The blocks of a Monarch matrix do not depend on each other, so the nearest has in
        each block the leading singular vectors, as many as the block has rank.

        Source: Dao et al. 2022, section 3.3, there for square matrices with sqrt(n) blocks.
        """
        nb, q, p = self.blkdiag1.shape
        o = self.blkdiag2.shape[1]
        padded = F.pad(weight.double(), (0, nb * p - self.in_features, 0, nb * o - self.out_features))
        u, s, v = torch.linalg.svd(padded.view(o, nb, nb, p).permute(1, 2, 0, 3), full_matrices=False)  # (l, k, ...)
        place = torch.arange(nb * q, device=weight.device)
        k, i, row, r = place // q, place % q, place % nb, place // nb  # of each element of h
        number = i // nb  # h[k, i] is this one of its block's
        root = s[row, k, number].sqrt()[:, None]
        self.blkdiag1[k, i] = (root * v[row, k, number]).to(self.blkdiag1.dtype)
        self.blkdiag2[row, :, r] = (root * u[row, k, :, number]).to(self.blkdiag2.dtype)
        return ((self.fold().double() - weight).norm() / weight.double().norm()).item()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"


class ButterflyLinear(StructuredLinear):
    """
    S butterflies side by side, each N x N; x padded with zeros to N, the outputs cut to m. A factor of stride s mixes
    pairs, with one 2 x 2 matrix for each pair j:

        [y[p]; y[p + s]] = twiddle[i, j] [x[p]; x[p + s]],   p = 2 (j - j mod s) + j mod s

    for s = 1, 2, .. N / 2 (increasing) or N / 2, .. 1. A second butterfly has its strides in the other order, a third
    in the first. `twiddle` is (S, blocks, log2 N, N / 2, 2, 2).

    Slow by design: log2 N passes over the rows, each of few operations. It exists for the models that others trained
    with it and for few parameters. For N rows or more the product with the identity and one dense product are faster.

    Args:
        blocks: butterflies one after the other.
        increasing_stride: the order of the strides in the first.

    Source: Dao et al. 2019, section 3; Dao et al. 2020 for two butterflies; `Butterfly` of HazyResearch/butterfly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: int = 2,
        increasing_stride: bool = True,
        **options,
    ):
        super().__init__(in_features, out_features, bias, **options)
        self.increasing_stride = increasing_stride
        depth = max(1, math.ceil(math.log2(in_features)))
        self.size = 2**depth  # N
        stacks = -(-out_features // self.size)
        self.twiddle = nn.Parameter(torch.empty(stacks, blocks, depth, self.size // 2, 2, 2))
        self.init_parameters()

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        stacks, blocks, depth = self.twiddle.shape[:3]
        values = F.pad(inputs, (0, self.size - self.in_features))[:, None].expand(-1, stacks, -1)  # (R, S, N)
        for block in range(blocks):
            increasing = self.increasing_stride == (block % 2 == 0)
            for i in range(depth):
                stride = 2 ** (i if increasing else depth - 1 - i)
                pairs = values.reshape(-1, stacks, self.size // (2 * stride), 1, 2, stride)
                twiddle = self.twiddle[:, block, i].view(stacks, -1, stride, 2, 2).permute(0, 1, 3, 4, 2)
                values = (twiddle * pairs).sum(dim=-2)  # (R, S, N / 2s, 2, s)
        return values.reshape(-1, stacks * self.size)[:, : self.out_features]

    def fold(self) -> torch.Tensor:
        identity = torch.eye(self.in_features, dtype=self.twiddle.dtype, device=self.twiddle.device)
        return self.multiply(identity).T

    def folds_for(self, rows: int | None) -> bool:
        return rows is None or rows >= self.size

    def init_factors(self) -> None:
        """Each 2 x 2 matrix a random rotation or reflection, times a common factor that makes `std` of the product."""
        blocks, depth = self.twiddle.shape[1:3]
        angle = 2 * math.pi * torch.rand(self.twiddle.shape[:-2], device=self.twiddle.device)
        sign = torch.randint(0, 2, angle.shape, device=angle.device) * 2 - 1
        cos, sin = angle.cos(), angle.sin()
        rows = torch.stack([torch.stack([sign * cos, -sign * sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)
        scale = (self.std * math.sqrt(self.size)) ** (1 / (blocks * depth))  # an orthogonal matrix has N^-1/2
        init.copy_(self.twiddle, scale * rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.twiddle.shape[1]}, increasing_stride={self.increasing_stride}"


def make_linear(
    config: RTransformerConfig,
    part: str,
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    dense: Callable[..., nn.Module] = nn.Linear,
) -> nn.Module:
    """
    The linear layer n -> m of a `part` of a block ("local_rnn", "attention" or "feed_forward"): `dense`, or with the
    structure that the config asks for. The initial W has the standard deviation of the dense one.
    """
    if part not in config.structured_parts:
        return dense(in_features, out_features, bias=bias)
    options = {} if part == "local_rnn" else {"std": config.initializer_range, "bias_bound": 0.0}
    if config.linear_structure == "monarch":
        return MonarchLinear(in_features, out_features, bias, blocks=config.linear_blocks, **options)
    return ButterflyLinear(in_features, out_features, bias, **options)


@contextlib.contextmanager
def folded_linears(model: nn.Module) -> Iterator[None]:
    """
    Within this context, and without gradients, each [`StructuredLinear`] of the model applies its dense weight, which
    is computed once, at the beginning. For decoding: a product with one row is slower by the factors. `generate` does
    it by itself. Parameters must not change meanwhile. Layers whose parameters are elsewhere (offloaded, sharded) keep
    their factors.
    """
    chosen = []
    for module in model.modules():
        if isinstance(module, StructuredLinear) and module.folded is None:
            if all(type(each) is nn.Parameter and not each.is_meta for each in module.parameters()):
                chosen.append(module)
    try:
        with torch.no_grad():
            for module in chosen:
                module.folded = module.fold()
        yield
    finally:
        for module in chosen:
            module.folded = None


def with_folded_linears(method: Callable) -> Callable:
    """Decorate a method of a model so that it runs in [`folded_linears`]."""

    @functools.wraps(method)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with folded_linears(model):
            return method(model, *args, **kwargs)

    return wrapped


def refuse_structure(config: RTransformerConfig) -> None:
    """Raise a ValueError for what a model with structured weights cannot do."""
    if not config.structured_parts:
        return
    remedy = "`python -m scripts.convert fold` makes a dense model of it, which can"
    distributed = getattr(config, "distributed_config", None)
    tp_size = getattr(distributed, "tp_size", None) or 1
    if tp_size > 1:
        raise ValueError(
            f"`linear_structure` must be 'dense' with `tp_size` ({tp_size}) above 1, since the factors cannot be "
            f"divided by heads, got {config.linear_structure!r}; {remedy}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"`linear_structure` must be 'dense' with a `quantization_config`, since quantization changes nn.Linear "
            f"layers only, got {config.linear_structure!r}; {remedy}"
        )
