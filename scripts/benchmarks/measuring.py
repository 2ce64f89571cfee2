"""Compare two functions: time by alternating calls in one process, peak memory in a process of its own for each."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch


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
        flops, bytes: lower bounds of the arithmetic and the memory traffic, for a share of the roofline.
        tokens: positions of a call, for tokens a second.
        sizes: the sizes that the figures depend on, for plots.
    """

    name: str
    against: str
    build: Callable[[torch.device, bool], tuple[Function, Function]]
    quantity: str = "speed-up"
    target: float | None = None
    flops: float | None = None
    bytes: float | None = None
    tokens: int | None = None
    sizes: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}, {self.quantity} against {self.against}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Function, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def alternate(ours: Function, theirs: Function, device: torch.device, repeats: int) -> tuple[list, list]:
    """Seconds of `repeats` alternating calls of each, so that a change of the machine's speed affects both."""
    ours(), theirs()  # warm-up: compilation and caches do not count
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def peak_resident() -> int:
    """The peak resident memory of this process in bytes."""
    try:  # getrusage would start with the peak of the parent process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_memory(case: Case, side: int, device_name: str, small: bool) -> int:
    device = torch.device(device_name)
    case.build(device, True)[side]()  # warm-up: memory that libraries allocate once
    function = case.build(device, small)[side]
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    function()
    return max(peak_resident() - before, 1)


def peak_memory(case: Case, side: int, device: torch.device, small: bool) -> int:
    """Peak bytes that one call allocates beside its inputs, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (case, side, str(device), small))


def roofline(device: torch.device, small: bool) -> dict[str, float]:
    """Measured limits of this machine a second in float32: `flops` of a large square product, `bytes` of a copy."""
    size = 256 if small else (2048 if device.type == "cpu" else 8192)
    left, right, result = (torch.randn(size, size, device=device) for _ in range(3))
    source = torch.randn(2**20 if small else 2**26, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(left, right, out=result), device) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return {"flops": 2 * size**3 / product, "bytes": 2 * 4 * source.numel() / copy}


def measure(case: Case, device: torch.device, repeats: int, small: bool, limits: dict[str, float]) -> dict:
    """The row of a case: its figures, the ratio, and whether the ratio reaches the target."""
    row = {"name": case.name, "against": case.against, "quantity": case.quantity, "target": case.target}
    row |= {"sizes": case.sizes}
    if case.quantity == "memory":
        ours, theirs = (peak_memory(case, side, device, small) for side in (0, 1))
        row |= {"ours_bytes": ours, "theirs_bytes": theirs, "ratio": ours / theirs}
    else:
        ours, theirs = alternate(*case.build(device, small), device, repeats)
        ratios = [their / our if case.quantity == "speed-up" else our / their for our, their in zip(ours, theirs)]
        our, their = statistics.median(ours), statistics.median(theirs)
        row |= {"ours_seconds": our, "theirs_seconds": their, "lowest": min(ratios), "highest": max(ratios)}
        row["ratio"] = their / our if case.quantity == "speed-up" else our / their
        if case.flops:
            least = max(case.flops / limits["flops"], (case.bytes or 0) / limits["bytes"])
            row |= {"flops_per_second": case.flops / our, "share_of_roofline": least / our}
        if case.tokens:
            row |= {"tokens_per_second": case.tokens / our, "their_tokens_per_second": case.tokens / their}
    if case.target is not None:
        row["reached"] = row["ratio"] >= case.target if case.quantity == "speed-up" else row["ratio"] <= case.target
    return row
