"""The processes of a run: one, or those that torchrun started. Over accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, on which device."""

    rank: int
    size: int
    device: torch.device
    state: PartialState

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @cached_property
    def distributed(self) -> bool:
        return self.size > 1

    def wait(self) -> None:
        """Until every process is here."""
        self.state.wait_for_everyone()

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes: one flat all-reduce for each dtype, in place."""
        if not self.distributed or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch._utils._flatten_dense_tensors(list(tensors))
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch._utils._unflatten_dense_tensors(flat, list(tensors)), strict=True):
            tensor.copy_(summed)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum a few Python numbers over all processes, in float64."""
        if not self.distributed:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return self.sum([float(here)])[0] > 0

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the main process's values."""
        if self.distributed:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def join_world() -> World:
    """This process's world: gloo on a CPU, NCCL on CUDA, alone without torchrun."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return World(state.process_index, state.num_processes, state.device, state)
