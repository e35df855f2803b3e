"""Weights of networks that a machine has no room for twice."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

ALIGNED = 64  # bytes: a line of a cache


class Widened(Tensor):
    """A tensor in a wider dtype of which no copy is kept: each operator that reads it makes one."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor, dtype: torch.dtype) -> Widened:
        given = {"strides": kept.stride(), "dtype": dtype, "device": kept.device}
        made: Widened = Tensor._make_wrapper_subclass(cls, kept.shape, **given)  # type: ignore
        made.kept = kept
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_map_only(cls, lambda one: one.kept.to(one.dtype), (args, kwargs or {}))
        return func(*given[0], **given[1])


def widened(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in another dtype; integers as they are."""
    return Widened(value.detach(), dtype) if value.is_floating_point() else value


def fill_in_file(model: nn.Module) -> None:
    """Give a model on the meta device zeros for weights, in a file that is mapped into memory.

    So programs map a checkpoint: the system may take such memory back while nobody reads it, and
    read the file again. The file goes with the weights.

    Raises:
        MemoryError: no room for it in the folder of temporary files.
    """
    weights = dict(model.named_parameters())
    places, end = {}, 0
    for name, one in weights.items():
        places[name] = end
        end += -(-one.nbytes // ALIGNED) * ALIGNED
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if end > free:
        needs = f"needs {end / 1e9:.3g} GB in {tempfile.gettempdir()}, {free / 1e9:.3g} are free"
        raise MemoryError(needs)
    with tempfile.NamedTemporaryFile() as file:
        whole = torch.from_file(file.name, shared=True, size=end, dtype=torch.uint8)
    filled = {
        name: whole[places[name] :][: one.nbytes].view(one.dtype).view(one.shape)
        for name, one in weights.items()
    }
    model.load_state_dict(filled, strict=True, assign=True)
