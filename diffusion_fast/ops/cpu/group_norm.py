"""group_norm_silu and its gradient on the kernels of csrc/cpu."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import format_of
from ..dispatch import checks
from ..dispatch.backend import requested
from ..rows import picked_row
from . import library
from .library import DTYPES

_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


# Elements of contiguous images from which the kernels are faster than PyTorch's own, which are good
# there: without and with a gradient. In channels_last the kernels always are.
LEAST, LEAST_WITH_GRADIENT = 2**14, 2**20


def slower(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *rest: Any) -> list[str]:
    """Why "auto" leaves a call to PyTorch."""
    if requested("group_norm_silu") != "auto" or format_of(x) == torch.channels_last:
        return []
    tensors = (value for value in rest if isinstance(value, Tensor))
    least = LEAST_WITH_GRADIENT if checks.needs_gradient(x, weight, bias, *tensors) else LEAST
    return [f"fewer than {least:,} elements, not in channels_last"] if x.numel() < least else []


class _Arguments(ctypes.Structure):
    """``GroupNorm`` of csrc/cpu/group_norm.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "x2", "y", "weight", "bias", "add", "scale", "shift")),
        *((f"{name}_stride", _INT) for name in ("add", "scale", "shift")),
        *((name, _INT) for name in ("batch", "channels", "channels2", "pixels", "groups")),
        ("eps", ctypes.c_double),
        *((name, _FLAG) for name in ("dtype", "last", "silu", "threads")),
        *((name, _POINTER) for name in ("grad", "dx", "dx2")),
        *((name, _POINTER) for name in ("dweight", "dbias", "dadd", "dscale", "dshift")),
    )


def _run(
    x: Tensor,
    x2: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    per_channel: dict[str, Tensor | None],
    made: dict[str, int],
    others: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """Call the kernel.

    Args:
        x, x2, num_groups, eps, silu: as in :func:`~diffusion_fast.ops.group_norm_silu`.
        per_channel: weight, bias, add, scale and shift, [C] or [B or 1, C].
        made: names of the images that it makes, with their channels.
        others: what else it is given, as it lies in memory.

    Returns:
        The images made, in the layout of ``x``.
    """
    layout = format_of(x)
    kept = {"x": x.contiguous(memory_format=layout), **(others or {})}
    if x2 is not None:
        kept["x2"] = x2.contiguous(memory_format=layout)
    c = _Arguments(
        batch=x.shape[0],
        channels=x.shape[1],
        channels2=0 if x2 is None else x2.shape[1],
        pixels=math.prod(x.shape[2:]),
        groups=num_groups,
        eps=eps,
        dtype=DTYPES[x.dtype],
        last=layout == torch.channels_last,
        silu=silu,
        threads=torch.get_num_threads(),
    )
    for name, value in per_channel.items():
        if value is not None:
            value = value.float()
            kept[name] = value = value if value.stride(-1) == 1 else value.contiguous()
            if value.dim() == 2:
                setattr(c, f"{name}_stride", value.stride(0) if len(value) > 1 else 0)
    images = {
        name: torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, memory_format=layout)
        for name, channels in made.items()
    }
    for name, value in (*kept.items(), *images.items()):
        setattr(c, name, value.data_ptr())
    library.kernels.group_norm_silu(ctypes.byref(c))
    return [*images.values()]


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """[B, C, ...], in the memory format of ``x``."""
    if row is not None:
        picked = (v if v is None else picked_row(v, row) for v in (add, scale, shift))
        add, scale, shift = picked
    given = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    return _run(x, x2, num_groups, eps, silu, given, {"y": weight.shape[0]})[0]


def backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x2: Tensor | None = None,
) -> tuple[Any, ...]:
    """Gradients of x, weight, bias, add, scale, shift and x2; empty for one that is None."""
    given = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    made = {"dx": x.shape[1]} | ({} if x2 is None else {"dx2": x2.shape[1]})
    sums = {
        f"d{name}": torch.empty((len(x), len(weight))[value.dim() == 1 :], dtype=torch.float32)
        for name, value in given.items()
        if value is not None
    }
    others = {"grad": grad.contiguous(memory_format=format_of(x)), **sums}
    dx, *dx2 = _run(x, x2, num_groups, eps, silu, given, made, others)
    empty = x.new_empty(0)
    found = (sums[f"d{name}"].to(x.dtype) if f"d{name}" in sums else empty for name in given)
    last = empty if x2 is None else dx2[0].contiguous(memory_format=format_of(x2))
    return dx, *found, last
