"""Argument checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("diffusion_fast", "FRAGMENT")
_watchers = torch._C._len_torch_dispatch_stack


def fail(argument: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError that every check raises: ``argument: expected ..., got ...``."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def tensor(argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def floating(argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
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


def together(needed: dict[str, Any], **others: Any) -> None:
    """Tensors of one floating dtype on one device, by their names; ``others`` may be None."""
    first, x = next(iter(needed.items()))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        floating(first, x)
    for name, value in (needed | others).items():
        alike = isinstance(value, Tensor) and (value.dtype, value.device) == (x.dtype, x.device)
        if not alike and (value is not None or name in needed):
            tensor(name, value)
            same_device(name, value, first, x)
            same_dtype(name, value, first, x)


def shapes(*expected: tuple[str, Tensor | None, Sequence[int], str]) -> None:
    """What :func:`shape` takes, of several arguments; one may be None."""
    for argument, value, size, meaning in expected:
        if value is not None and value.shape != tuple(size):
            shape(argument, value, size, meaning)


def one_of(argument: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        fail(argument, f"one of {', '.join(known)}", repr(value))


def whole(argument: str, value: Any, expected: str, least: int = 0) -> int:
    """An integer of at least ``least``, of Python or NumPy, as an int; no bool.

    ``expected`` says so in words, for the message.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        fail(argument, expected, repr(value))
    return int(value)


def whole_between(argument: str, value: Any, low: int, high: int | None = None) -> int:
    """The same with both limits, and a message that says them."""
    limits = f">= {low}" if high is None else f"in [{low}, {high}]"
    number = whole(argument, value, f"an integer {limits}", low)
    if high is not None and number > high:
        fail(argument, f"an integer {limits}", number)
    return number


def positive_int(argument: str, value: Any) -> int:
    """A positive integer of Python or NumPy, as an int."""
    if type(value) is int and value > 0:
        return value
    return whole(argument, value, "a positive integer", 1)


def finite(argument: str, value: Any) -> float:
    """A finite number of Python or NumPy, as a float."""
    # By comparison, which a compiler that takes the number for a variable can trace.
    if not isinstance(value, numbers.Real) or not abs(float(value)) < math.inf:
        fail(argument, "a finite number", repr(value))
    return float(value)


def not_negative(argument: str, value: Any) -> float:
    """A finite number of at least 0, as a float."""
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        finite(argument, value)
        fail(argument, "a number of at least 0", value)
    return float(value)


def timesteps(argument: str, t: Any, batch: int, count: int) -> None:
    """int64 [B] with values in [0, count), which are read on the host only for CPU tensors."""
    tensor(argument, t)
    if t.dtype != torch.int64:
        fail(argument, "dtype torch.int64", t.dtype)
    shape(argument, t, (batch,), "[B]")
    values_between(argument, t, 0, count - 1, f"[0, {count})")


def values_between(argument: str, value: Tensor, low: int, high: int, meaning: str) -> None:
    """Integers in [low, high], looked at where that costs no transfer and no trace depends on it.

    ``meaning`` is the range as the message prints it. What watches PyTorch's operators sees one, so
    that a recorder can look again where other values are.
    """
    if value.device.type != "cpu" or not value.numel() or torch.compiler.is_compiling():
        return
    if not transformed():
        look = torch.ops.diffusion_fast.values_between if _watchers() else _look
        look(value, argument, low, high, meaning)


def _look(value: Tensor, argument: str, low: int, high: int, meaning: str) -> None:
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most > high:
        fail(argument, f"values in {meaning}", f"values in [{least}, {most}]")


_LIBRARY.define("values_between(Tensor value, str argument, int low, int high, str meaning) -> ()")
_LIBRARY.impl("values_between", _look, "CompositeExplicitAutograd")
torch.library.register_fake("diffusion_fast::values_between", lambda *_: None, lib=_LIBRARY)


def transformed() -> bool:
    """Whether torch.func (vmap, grad, ...) is at work, whose tensors have no numbers to look at, or
    forward-mode AD."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def needs_gradient(*values: Any) -> bool:
    """Whether autograd would record a function of these; values that are no tensors don't count."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )
