"""What the norms check of the tensors that stand beside their input.

Good calls are nearly all calls, so that they are told first and at once; what is wrong with another
is then found out one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks


def beside(name: str, value: Any, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    """A tensor of this shape, with the dtype and on the device of ``x``."""
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype == x.dtype
        and value.device == x.device
    ):
        return
    checks.tensor(name, value)
    checks.shape(name, value, shape, meaning)
    checks.same_device(name, value, "x", x)
    checks.same_dtype(name, value, "x", x)


def table(name: str, value: Any, images: int, channels: int, x: Tensor) -> None:
    """[R, B or 1, C], with the dtype and on the device of ``x``."""
    checks.tensor(name, value)
    if value.dim() != 3 or value.shape[1] not in (1, images) or value.shape[2] != channels:
        expected = f"shape [R, B or 1, C] with B, C = {[images, channels]}"
        checks.fail(name, expected, list(value.shape))
    checks.same_device(name, value, "x", x)
    checks.same_dtype(name, value, "x", x)


def row(name: str, value: Any, x: Tensor) -> None:
    """int64 [1] on the device of ``x``."""
    checks.tensor(name, value)
    if value.dtype != torch.int64:
        checks.fail(name, "dtype torch.int64", value.dtype)
    checks.shape(name, value, (1,), "[1]")
    checks.same_device(name, value, "x", x)
