"""Argument checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def fail(argument: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError that every check raises: ``argument: expected ..., got ...``."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def tensor(argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def floating(argument: str, value: Any) -> None:
    tensor(argument, value)
    if not value.is_floating_point():
        fail(argument, "a floating point dtype", value.dtype)


def shape(argument: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """``meaning`` explains the expected shape in words, such as ``"[B, C]"``."""
    if value.shape != torch.Size(expected):
        fail(argument, f"shape {meaning} = {list(expected)}", list(value.shape))


def same_dtype(argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        fail(argument, f"the dtype of {other_argument} ({other.dtype})", value.dtype)


def same_device(argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    if value.device != other.device:
        fail(argument, f"the device of {other_argument} ({other.device})", value.device)


def like(argument: str, value: Any, other_argument: str, other: Tensor) -> None:
    """The same shape, dtype and device as another argument."""
    tensor(argument, value)
    shape(argument, value, other.shape, f"of {other_argument}")
    same_dtype(argument, value, other_argument, other)
    same_device(argument, value, other_argument, other)


def one_of(argument: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        fail(argument, f"one of {', '.join(known)}", repr(value))


def positive_int(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        fail(argument, "a positive integer", repr(value))


def finite(argument: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        fail(argument, "a finite number", repr(value))


def not_negative(argument: str, value: object) -> None:
    finite(argument, value)
    if value < 0:  # type: ignore[operator]
        fail(argument, "a number of at least 0", value)


def timesteps(argument: str, t: Any, batch: int, count: int) -> None:
    """int64 [B] with values in [0, count). The values are read on the host only for CPU tensors."""
    tensor(argument, t)
    if t.dtype != torch.int64:
        fail(argument, "dtype torch.int64", t.dtype)
    shape(argument, t, (batch,), "[B]")
    if t.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(t))
        if low < 0 or high >= count:
            fail(argument, f"values in [0, {count})", f"values in [{low}, {high}]")
