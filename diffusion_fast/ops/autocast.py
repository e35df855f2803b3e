"""torch.autocast for the ops that are products: PyTorch knows its own and not these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def enabled(x: Tensor) -> bool:
    """Whether products of ``x`` run in autocast's dtype here; float64 and meta never do."""
    if x.dtype == torch.float64 or x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


def cast(device: torch.device, *values: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype; a None stays one."""
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(value if value is None else value.to(dtype) for value in values)
