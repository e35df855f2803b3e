"""Bytes that a computation moves, and how far its result is from the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def nbytes(*values: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, Tensor))


class _Traffic(TorchDispatchMode):
    """Adds up what operators read and write; views move nothing."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.namespace == "prim" or "empty" in func.name()):
            self.bytes += nbytes(args, kwargs, out)
        return out


def bytes_moved(call: Callable[..., object], **inputs: Any) -> int:
    """Bytes that the operators of a call read and write (meta tensors will do)."""
    with _Traffic() as traffic:
        call(**inputs)
    return traffic.bytes


def max_error(result: Any, truth: Any) -> float:
    """Largest of max|result - truth| / max|truth| over the tensors of a structure.

    Raises:
        ValueError: tensors of different shapes.
    """
    worst = 0.0
    for a, b in zip(tree_leaves(result), tree_leaves(truth), strict=True):
        if isinstance(a, Tensor) and a.numel():
            if a.shape != b.shape:
                raise ValueError(f"expected shape {list(b.shape)}, got {list(a.shape)}")
            a, b = a.double().to(b.device), b.double()
            worst = max(worst, ((a - b).abs().max() / (b.abs().max().item() or 1.0)).item())
    return worst
