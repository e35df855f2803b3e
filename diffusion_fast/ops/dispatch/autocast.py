"""torch.autocast for the ops: they take what PyTorch's own functions take, and give its dtype.

A policy gets an op's arguments and returns them as the op wants them under autocast, with the dtype
of the result where that isn't the op's own (None: it is).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Policy = tuple[tuple[Any, ...], torch.dtype | None]


def enabled(x: Any) -> bool:
    """Whether functions of ``x`` follow autocast here; float64 and meta never do."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


def cast(device: torch.device, *values: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, as products want them; a None stays one."""
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(value if value is None else value.to(dtype) for value in values)


def widest(*values: Any) -> torch.dtype:
    """The dtype that holds all of these floating tensors; other values don't count."""
    return functools.reduce(torch.promote_types, (v.dtype for v in values if _floats(v)))


def promoted(*args: Any) -> Policy:
    """All floating tensors in the widest dtype among them, as arithmetic promotes them."""
    dtype = widest(*args)
    return tuple(value.to(dtype) if _floats(value) else value for value in args), None


def norm(x: Tensor, values: tuple[Any, ...], parameters: tuple[Any, ...]) -> Policy:
    """``values`` and ``parameters`` of a norm, one behind the other, in one dtype.

    PyTorch computes norms in float32 under autocast, on a CPU with a result as its input is.
    """
    result = widest(x, *values)
    if x.device.type != "cpu":
        result = torch.promote_types(result, torch.float32)
    dtype = torch.promote_types(result, widest(*parameters))
    both = *values, *parameters
    return tuple(value.to(dtype) if _floats(value) else value for value in both), result


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
