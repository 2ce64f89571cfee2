"""RSA against the dense REM and softmax, and against fused attention alone, by sequence length."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from modeling_rtransformer.recurrence_encoding import RecurrenceEncoding
from scripts.benchmarks.measuring import Case, backward


HEADS, HEAD_DIM = 8, 64
KINDS = ["regular", "regular", "first_cyclical", "second_cyclical"] * 2


def recurrence_encoding(device: torch.device) -> RecurrenceEncoding:
    recurrence = RecurrenceEncoding([(head, kind, 1) for head, kind in enumerate(KINDS)], HEADS, "layer", True)
    with torch.no_grad():
        recurrence.eta.fill_(1.5), recurrence.nu.fill_(1.5), recurrence.theta.fill_(torch.pi / 4), recurrence.mu.zero_()
    return recurrence.to(device)


def attention(recurrence, query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def rsa(recurrence, query, key, value):
    return recurrence(attention(recurrence, query, key, value), value)


def dense(recurrence, query, key, value):
    """The definition of RSA: the softmax and every REM as dense matrices."""
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf"))
    return (recurrence.mixing_matrix(scores.softmax(-1)) @ value).transpose(1, 2)


def build(functions, lengths, device, small):
    """Forward and backward passes of two of the functions above, each with its length."""
    built = []
    for function, length in zip(functions, lengths):
        length = 70 if small else length
        torch.manual_seed(0)
        tensors = [torch.randn(1, HEADS, length, HEAD_DIM, device=device, requires_grad=True) for _ in range(3)]
        grad = torch.randn(1, length, HEADS, HEAD_DIM, device=device)
        recurrence = recurrence_encoding(device)
        wanted = tensors if function is attention else [*tensors, *recurrence.parameters()]
        built.append(partial(backward, partial(function, recurrence, *tensors), wanted, grad))
    return tuple(built)


def case(length, against, function, quantity, target=None, other_length=None) -> Case:
    """RSA at `length` against another function, at the same or another length."""
    functions = partial(build, (rsa, function), (length, other_length or length))
    return Case(f"RSA B1 H8 d64 L{length}, forward and backward", against, functions, quantity, target)


def cases(device_type: str) -> Iterator[Case]:
    on_gpu = device_type == "cuda"
    for length in (1024, 2048, 4096):
        target = (5 if on_gpu else 10) if length == 4096 else None
        yield case(length, "dense REM and softmax", dense, "speed-up", target)
        yield case(length, "dense REM and softmax", dense, "memory")
    for length in (1024, 2048, 4096, 8192, 16384, *((32768, 65536) if on_gpu else ())):
        target = 1.15 if on_gpu or length >= 4096 else 1.3
        yield case(length, "fused attention alone", attention, "time", target)
        yield case(length, "fused attention alone", attention, "memory")
    # four times the length needs four times the memory, and a little for tables
    yield case(16384, "the same at L4096", rsa, "memory", 4.4, other_length=4096)
