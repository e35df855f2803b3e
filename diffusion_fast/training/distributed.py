"""Several processes that train as one.

A step's random numbers (timesteps, noise, dropped conditions) are drawn for the batch of all
processes by each of them, and each keeps its part. That costs little beside the model, needs no
communication, and makes a run the same whatever the number of processes: only the order in which
gradients are added differs.

For ``torchrun --max-restarts`` set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: otherwise restarted
processes find the addresses of those that died in the store that torchrun shares with them.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """The processes that torchrun started, or those of an initialised process group.

        Joins the group (gloo on CPUs, NCCL on GPUs) where torchrun started this process.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and dist.is_torchelastic_launched():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.rank == 0

    def part(self, joint: Tensor) -> Tensor:
        """This process's rows of what was drawn for all, [count * B, ...] to [B, ...]."""
        return joint if self.count == 1 else joint.chunk(self.count)[self.rank]

    def gather(self, mine: Tensor) -> Tensor:
        """The rows of all processes in the order of their ranks, [B, ...] to [count * B, ...]."""
        if self.count == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def mean(self, mine: Tensor) -> Tensor:
        """The mean over all processes, elementwise."""
        if self.count == 1:
            return mine
        total = mine.clone()
        dist.all_reduce(total)
        return total / self.count

    def any(self, mine: bool, device: torch.device) -> bool:
        """Whether it is so in any process; waits for all."""
        if self.count == 1:
            return mine
        flag = torch.tensor(float(mine), device=device)
        dist.all_reduce(flag)
        return bool(flag)

    def wait(self) -> None:
        """Until all have come this far."""
        if self.count > 1:
            dist.barrier()


def local_device(kind: str = "cuda") -> torch.device:
    """The device of this process under torchrun: GPU number LOCAL_RANK, or the CPU."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
