"""RSA against the dense REM and softmax, and against fused attention alone, by sequence length."""

from functools import partial

import torch
from torch.nn import functional as F

from modeling_rtransformer.recurrence_encoding import RecurrenceEncoding
from scripts.benchmarks.measuring import Case


HEADS, HEAD_DIM = 8, 64
KINDS = ["regular", "regular", "first_cyclical", "second_cyclical"] * 2


def recurrence_encoding(device: torch.device) -> RecurrenceEncoding:
    recurrence = RecurrenceEncoding([(head, kind, 1) for head, kind in enumerate(KINDS)], HEADS, "layer", True)
    with torch.no_grad():
        recurrence.eta.fill_(1.5), recurrence.nu.fill_(1.5), recurrence.theta.fill_(torch.pi / 4), recurrence.mu.zero_()
    return recurrence.to(device)


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def attend_with_rsa(recurrence, query, key, value):
    return recurrence(attend(query, key, value), value)


def attend_dense(recurrence, query, key, value):
    """The definition of RSA: the softmax and every REM as dense matrices."""
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf"))
    return (recurrence.mixing_matrix(scores.softmax(-1)) @ value).transpose(1, 2)


def run(function, wanted, grad):
    torch.autograd.grad(function(), wanted, grad)


def build(kinds, lengths, device, small):
    """Forward and backward passes of two of `"rsa"`, `"attention"` and `"dense"`, each with its length."""
    functions = []
    for kind, length in zip(kinds, lengths):
        length = 70 if small else length
        torch.manual_seed(0)
        tensors = [torch.randn(1, HEADS, length, HEAD_DIM, device=device, requires_grad=True) for _ in range(3)]
        grad = torch.randn(1, length, HEADS, HEAD_DIM, device=device)
        recurrence = recurrence_encoding(device)
        parameters = [] if kind == "attention" else list(recurrence.parameters())
        function = {
            "attention": partial(attend, *tensors),
            "rsa": partial(attend_with_rsa, recurrence, *tensors),
            "dense": partial(attend_dense, recurrence, *tensors),
        }[kind]
        functions.append(partial(run, function, tensors + parameters, grad))
    return tuple(functions)


def cases(device_type: str) -> list[Case]:
    on_gpu = device_type == "cuda"
    label = "RSA B1 H8 d64 L{}, forward and backward"
    found = []
    for length in (1024, 2048, 4096):
        target = (5 if on_gpu else 10) if length == 4096 else None
        against_dense = partial(build, ("rsa", "dense"), (length, length))
        name, sizes = label.format(length), {"L": length}
        found.append(Case(name, "dense REM and softmax", against_dense, target=target, sizes=sizes))
        found.append(Case(name, "dense REM and softmax", against_dense, quantity="memory", sizes=sizes))
    for length in (1024, 2048, 4096, 8192, 16384, *((32768, 65536) if on_gpu else ())):
        target = 1.15 if on_gpu or length >= 4096 else 1.3
        alone = partial(build, ("rsa", "attention"), (length, length))
        name, sizes = label.format(length), {"L": length}
        found.append(Case(name, "fused attention alone", alone, "time", target, tokens=length, sizes=sizes))
        found.append(Case(name, "fused attention alone", alone, "memory", sizes=sizes))
    found.append(
        Case(label.format(16384), "the same at L4096", partial(build, ("rsa", "rsa"), (16384, 4096)), "memory", 4.4)
    )  # four times the length needs four times the memory, and a little for tables
    return found
