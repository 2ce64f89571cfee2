# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
Which attention heads a process has under tensor parallelism. Projections need not know; REMs differ from head to head,
so they have to be told.
"""

from typing import Any, NamedTuple

import torch


class HeadShard(NamedTuple):
    """The heads `first` to `last` - 1 of a layer; the processes of `mesh` (a 1D `DeviceMesh`) share all of them out."""

    first: int
    last: int
    mesh: Any

    @classmethod
    def of(cls, weight: torch.Tensor, heads: int, all_heads: int) -> "HeadShard | None":
        """
        From a projection's weight, which is sharded where a process computes only `heads` of `all_heads` heads; None
        where it computes them all.

        Raises:
            ValueError: fewer heads, but no mesh to tell which.
        """
        if heads == all_heads:
            return None
        mesh = getattr(weight, "device_mesh", None)
        if mesh is None or heads * mesh.size() != all_heads:
            raise ValueError(
                f"`v_proj` gives {heads} of {all_heads} heads, and REMs must know which: shard it with "
                "`from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))`, N a divisor of "
                "`num_attention_heads`"
            )
        first = mesh.get_local_rank() * heads
        return cls(first, first + heads, mesh)

    def replicated(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter, equal on all processes; its gradient is the sum of theirs, each from a process's own heads."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(parameter, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])
