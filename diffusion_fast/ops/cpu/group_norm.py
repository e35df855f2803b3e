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
from .library import DTYPES, function

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


class _Call:
    """A call's arguments, and the tensors that they point to."""

    def __init__(self, x: Tensor, x2: Tensor | None, silu: bool, groups: int, eps: float) -> None:
        self.layout = format_of(x)
        self.c = c = _Arguments()
        self._kept: list[Tensor] = []
        self.x = self.image("x", x)
        self.x2 = None if x2 is None else self.image("x2", x2)
        c.batch, c.channels = x.shape[:2]
        c.channels2 = 0 if x2 is None else x2.shape[1]
        c.pixels, c.groups, c.eps = math.prod(x.shape[2:]), groups, eps
        c.dtype, c.last = DTYPES[x.dtype], self.layout == torch.channels_last
        c.silu, c.threads = silu, torch.get_num_threads()

    def image(self, name: str, value: Tensor) -> Tensor:
        """An image in the layout of x."""
        return self._at(name, value.contiguous(memory_format=self.layout))

    def channels(self, name: str, value: Tensor) -> None:
        """float32 [C], or [B or 1, C] with a stride of its own."""
        value = value.float()
        if value.stride(-1) != 1:
            value = value.contiguous()
        self._at(name, value)
        if value.dim() == 2:
            setattr(self.c, f"{name}_stride", value.stride(0) if len(value) > 1 else 0)

    def made(self, name: str, like: Tensor | None, *shape: int) -> Tensor:
        """A float32 tensor of the result; empty, and not asked for, where ``like`` is None."""
        if like is None:
            return torch.empty(0, dtype=torch.float32)
        return self._at(name, torch.empty(shape, dtype=torch.float32))

    def out(self, name: str, channels: int) -> Tensor:
        """An image of the result."""
        size = (len(self.x), channels, *self.x.shape[2:])
        return self._at(name, torch.empty(size, dtype=self.x.dtype, memory_format=self.layout))

    def _at(self, name: str, value: Tensor) -> Tensor:
        setattr(self.c, name, value.data_ptr())
        self._kept.append(value)
        return value

    def run(self) -> None:
        function("group_norm_silu")(ctypes.byref(self.c))


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
    call = _Call(x, x2, silu, num_groups, eps)
    call.channels("weight", weight)
    call.channels("bias", bias)
    for name, value in (("add", add), ("scale", scale), ("shift", shift)):
        if value is not None:
            call.channels(name, value if row is None else picked_row(value, row))
    y = call.out("y", weight.shape[0])
    call.run()
    return y


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
    call = _Call(x, x2, silu, num_groups, eps)
    call.image("grad", grad)
    given = (("add", add), ("scale", scale), ("shift", shift))
    for name, value in (("weight", weight), ("bias", bias), *given):
        if value is not None:
            call.channels(name, value)
    dx = call.out("dx", x.shape[1])
    dx2 = x.new_empty(0) if x2 is None else call.out("dx2", x2.shape[1])
    channels = weight.shape[0]
    dweight, dbias = (call.made(name, weight, channels) for name in ("dweight", "dbias"))
    others = [call.made(f"d{name}", value, len(x), channels) for name, value in given]
    call.run()
    if x2 is not None:
        dx2 = dx2.contiguous(memory_format=format_of(x2))
    return dx, *(one.to(x.dtype) for one in (dweight, dbias, *others)), dx2
