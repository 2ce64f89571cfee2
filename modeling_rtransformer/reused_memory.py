# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Large arrays in main memory that are lent again and again.

What a training step keeps for its way back is freed and asked for again in each step. malloc hands so much back to the
system, which clears every page anew: a tenth of a LocalRNN's time at width 512, a quarter at width 32.
"""

import mmap
import threading
import weakref

import torch


LARGE = 2**20  # bytes; malloc keeps less by itself
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # to the process


class ReusedMemory:
    """
    Makes uninitialized tensors. Their memory goes on a shelf when the last tensor on it is gone, and from there into
    the next one: there are never more pieces of it than were in use at once.
    """

    def __init__(self) -> None:
        self.shelf: list[mmap.mmap] = []
        self.lock = threading.Lock()

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """`like.new_empty(shape)`, for a `like` in main memory."""
        count = torch.Size(shape).numel()
        size = count * like.element_size()
        if size < LARGE or torch.are_deterministic_algorithms_enabled():  # which has it filled
            return like.new_empty(shape)
        try:
            lent = memoryview(self._take(size))
        except OSError:  # the system has no such piece; what malloc still holds may do, and PyTorch's error is known
            return like.new_empty(shape)
        weakref.finalize(lent, self.shelf.append, lent.obj).atexit = False
        return torch.frombuffer(lent, dtype=like.dtype, count=count).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        """The smallest on the shelf that is large enough, or a new one in place of the largest there."""
        with self.lock:
            pieces = sorted(self.shelf, key=len)
            taken = next((piece for piece in pieces if len(piece) >= size), pieces[-1] if pieces else None)
            if taken is not None:
                self.shelf.remove(taken)
        if taken is not None and len(taken) >= size:
            return taken
        del taken
        piece = mmap.mmap(-1, size, **PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            piece.madvise(mmap.MADV_HUGEPAGE)
        return piece

    def clear(self) -> None:
        """Give what lies on the shelf back to the system."""
        self.shelf.clear()
