"""Tensors that are derived from a run's inputs: at fixed addresses, and only when inputs change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Work = Callable[[], None]
Executor = Callable[[Hashable, Work], None]  # does work, of which the first argument tells the kind


def eagerly(kind: Hashable, work: Work) -> None:
    """Do work operator by operator."""
    work()


class Kept:
    """Nested tensors at fixed addresses, and what stands beside them (None, numbers).

    For each set of shapes and dtypes there are tensors of their own, which live on: captured graphs
    read them.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[Any]] = {}

    def write(self, values: Any) -> Any:
        """The same values in the same lists and tuples, in the kept tensors."""
        new, form = tree_flatten(values)
        key = kind_of(values)
        if key not in self._kept:
            self._kept[key] = [one.clone() if isinstance(one, Tensor) else one for one in new]
        kept = self._kept[key]
        for old, value in zip(kept, new, strict=True):
            if isinstance(value, Tensor):
                old.copy_(value)
        return tree_unflatten(kept, form)


def kind_of(values: Any) -> Hashable:
    """Shapes and dtypes of nested tensors, and what stands beside them."""
    return tuple(
        (one.shape, one.dtype) if isinstance(one, Tensor) else one for one in tree_leaves(values)
    )


class Derived:
    """What is computed from nested tensors alone, and from weights.

    It is not computed again for the same values. From the second time on that inputs of some shapes
    and dtypes are computed with, an ``execute`` may do it by a graph: the inputs are read from
    fixed addresses, and the results lie at fixed ones.
    """

    def __init__(self) -> None:
        self._inputs, self._results = Kept(), Kept()
        self._made: dict[Hashable, Any] = {}  # results of each kind of inputs
        self._last: tuple[Hashable, Hashable, Any] | None = None  # surroundings, kind, inputs

    def compute(
        self, inputs: Any, make: Callable[[Any], Any], execute: Executor, around: Hashable
    ) -> Any:
        """``make(inputs)``, in tensors that are the same for all inputs of a kind.

        Args:
            inputs: nested lists and tuples of tensors and None.
            make: computes nested tensors; what it reads beside the inputs and weights may depend on
                their kind only.
            execute: does the work. A graph must have been dropped when weights change.
            around: all else that the result depends on; None where that can't be told, so that it
                is computed at every call.
        """
        if around is None:
            return self._results.write(make(inputs))
        kind = kind_of(inputs)
        if (
            self._last is None
            or self._last[:2] != (around, kind)
            or not _equal(inputs, self._last[2])
        ):
            self._last = None  # until all is done
            kept = self._inputs.write(inputs)

            def work() -> None:
                self._made[kind] = self._results.write(make(kept))

            execute((self, kind), work)
            self._last = around, kind, kept
        return self._made[kind]

    def forget(self) -> None:
        """The weights have other values now."""
        self._last = None


def _equal(these: Any, those: Any) -> bool:
    """Whether nested tensors of one kind have the same values."""
    return all(
        torch.equal(one, other)
        for one, other in zip(tree_leaves(these), tree_leaves(those), strict=True)
        if isinstance(one, Tensor)
    )
