"""Several processes that train as one, and a model whose weights are spread over them.

A step's random numbers (timesteps, noise, dropped conditions) are drawn for the batch of all
processes by each of them, and each keeps its part. That costs little beside the model, needs no
communication, and makes a run the same whatever the number of processes: only the order in which
gradients are added differs.

A model may be spread (FSDP2): each process keeps one part of every parameter (and of its gradient,
moments and average), cut along the first dimension. A unit, such as a residual block, has its
weights gathered when it computes and dropped again after it. Sharded parameters are DTensors; what
is elementwise works on the local part alone.

For ``torchrun --max-restarts`` set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: otherwise restarted
processes find the addresses of those that died in the store that torchrun shares with them.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.blocks import ResBlock, Transformer2D

UNITS = (ResBlock, Transformer2D)  # of this library's U-Net


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
        flag = torch.tensor(float(mine), dtype=torch.float32, device=device)
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


def shard(model: nn.Module, processes: Processes, device: torch.device) -> None:
    """Spread the parameters of a model in place; all processes get those of the first.

    Units are the residual and transformer blocks of the U-Net, and those modules of other models
    that were given to ``fully_shard`` before; what is left over is one more unit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if not is_sharded(value):
                dist.broadcast(value, 0)
    mesh = init_device_mesh(device.type, (processes.count,))
    for unit in [module for module in model.modules() if isinstance(module, UNITS)]:
        fully_shard(unit, mesh=mesh)
        for name in ("project_time", "project_context"):  # called from outside, beside forward
            if hasattr(unit, name):
                register_fsdp_forward_method(unit, name)
    # The last unit drops its weights too: they may be swapped for their average before the next
    # forward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor (asked so that its module is imported by who makes one)."""
    return hasattr(value, "to_local")


def local(value: Any) -> Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself if it is whole."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        return value.to_local()


def whole(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Tensors with all their parts. Every process has to call this.

    Those that were spread come one after the other to the memory of the first process's host. The
    other processes get empty ones in their place.
    """
    found = {}
    for name, value in tensors.items():
        if is_sharded(value):
            gathered = value.full_tensor().detach()  # type: ignore[attr-defined]
            found[name] = gathered.cpu() if processes.first else gathered.new_empty(0)
        else:
            found[name] = value
    return found


@torch.no_grad()
def fill(target: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread, without communication."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
        target, value = target.to_local(), spread.to_local()
    fill_local(target, value)


@torch.no_grad()
def fill_local(target: Tensor, value: Tensor) -> None:
    """Copy a tensor into one that may be expanded: its first rows then stand for all."""
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)
