"""Compare two functions: time by alternating calls in one process, peak memory in a process of its own for each."""

import multiprocessing
import re
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.utils.benchmark import timer  # seconds, after the device has finished its work


REPEATS = 5
Function = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """
    One row of the table.

    Args:
        name, against: the measured function and the reference.
        build: `(device, small)` to the two functions; `small` asks for tiny sizes.
        quantity: `"speed-up"`, their time over ours; `"time"`, our time over theirs; `"memory"`, our peak over theirs.
        target: the ratio to reach, at least for a speed-up, at most for the others; None for no target.
    """

    name: str
    against: str
    build: Callable[[torch.device, bool], tuple[Function, Function]]
    quantity: str = "speed-up"
    target: float | None = None

    @property
    def key(self) -> str:
        return f"{self.name}, {self.quantity} against {self.against}"


def backward(function: Function, wanted: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Call the function and compute the gradients of the tensors `wanted`; `grad` is that of its result."""
    torch.autograd.grad(function(), wanted, grad)


def alternate(ours: Function, theirs: Function) -> list[tuple[float, float]]:
    """Seconds of `REPEATS` alternating calls of each, so that a change of the machine's speed affects both."""
    ours(), theirs()  # warm-up: compilation and caches do not count
    pairs = []
    for _ in range(REPEATS):
        start = timer()
        ours()
        middle = timer()
        theirs()
        pairs.append((middle - start, timer() - middle))
    return pairs


def peak_resident() -> int:
    """The peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would start with the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_memory(case: Case, side: int, device: torch.device, small: bool) -> int:
    case.build(device, True)[side]()  # warm-up: memory that libraries allocate once
    function = case.build(device, small)[side]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    function()
    return max(peak_resident() - before, 1)


def peak_memory(case: Case, side: int, device: torch.device, small: bool) -> int:
    """Peak bytes that one call allocates beside its inputs, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (case, side, device, small))


def measure(case: Case, device: torch.device, small: bool) -> dict:
    """
    The row of a case: both figures in seconds or bytes, their ratio, and whether it reaches the target.

    The ratio of times is that of the medians; `lowest` and `highest` are ratios of single pairs of calls.
    """
    row = {"key": case.key, "name": case.name, "against": case.against, "quantity": case.quantity}
    if case.quantity == "memory":
        ours, theirs = (peak_memory(case, side, device, small) for side in (0, 1))
        ratios = []
    else:
        pairs = alternate(*case.build(device, small))
        ours, theirs = map(statistics.median, zip(*pairs))
        ratios = [their / our if case.quantity == "speed-up" else our / their for our, their in pairs]
        row |= {"lowest": min(ratios), "highest": max(ratios)}
    ratio = theirs / ours if case.quantity == "speed-up" else ours / theirs
    row |= {"ours": ours, "theirs": theirs, "ratio": ratio, "target": case.target}
    if case.target is not None:
        row["reached"] = ratio >= case.target if case.quantity == "speed-up" else ratio <= case.target
    return row
