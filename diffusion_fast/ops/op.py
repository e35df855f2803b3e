"""An op: one function with several implementations, known to autograd and compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autocast, checks
from . import backend as _backend
from .backend import BACKENDS, BackendError, Choice, Implementation

_LIBRARY = torch.library.Library("diffusion_fast", "FRAGMENT")


class Op:
    """A named function ``torch.ops.diffusion_fast.<name>`` with a reference and faster backends.

    Eager calls run a native implementation directly, so that on a CPU an op costs what its PyTorch
    code costs. Under ``torch.compile`` and ``torch.export``, for kernels, and on the meta device
    the call goes through the registered operator, which has a fake (shape-only) version and a
    gradient.

    Args:
        name: of the op.
        schema: its signature without the name, ``"(Tensor x, float eps) -> Tensor"``.
        reference: the definition in plain PyTorch.
        fake: the same signature; returns empty tensors of the right shapes, dtypes and strides.
        check: raises ValueError or TypeError for arguments of the same signature that don't fit.
        policy: what autocast does to the arguments, see :mod:`~.autocast`; None: nothing.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
        policy: Callable[..., autocast.Policy] | None = None,
    ) -> None:
        self.name, self._check, self._policy = name, check, policy
        self.last_ran: str | None = None
        self.implementations = [
            Implementation("reference", reference, _always, _always_supported, True, True)
        ]
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffusion_fast::{name}", fake, lib=_LIBRARY)
        self.torch_op = getattr(torch.ops.diffusion_fast, name).default
        _backend.known_ops[name] = self

    def autograd(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Register the gradient; see :func:`torch.library.register_autograd`."""
        torch.library.register_autograd(
            f"diffusion_fast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY
        )

    def add(
        self,
        backend: str,
        run: Callable[..., Any],
        unavailable: Callable[[], str | None] | None = None,
        unsupported: Callable[..., str | None] | None = None,
        native: bool = False,
        composite: bool = False,
    ) -> None:
        """Add a backend. It takes its place in the order of :data:`~.backend.BACKENDS`."""
        asks = unavailable or _always, unsupported or _always_supported
        self.implementations.append(Implementation(backend, run, *asks, native, composite))
        self.implementations.sort(key=lambda i: BACKENDS.index(i.backend))

    def __call__(self, *args: Any) -> Any:
        """Check the arguments and compute, as PyTorch's own function would under autocast."""
        if self._policy is not None and autocast.enabled(args[0]):
            args, dtype = self._policy(*args)
            with torch.autocast(args[0].device.type, enabled=False):
                result = self(*args)
            return result if dtype is None else result.to(dtype)
        if self._check is not None:
            self._check(*args)
        return self._computed(*args)

    def _computed(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.torch_op(*args)
        chosen = self.choose(*args)
        if chosen.native and not args[0].is_meta:
            self.last_ran = chosen.backend
            return chosen.run(*args)
        return self.torch_op(*args)

    def _run(self, *args: Any) -> Any:
        chosen = self.choose(*args)
        self.last_ran = chosen.backend
        return chosen.run(*args)

    def settle(self, *args: Any) -> Callable[..., Any]:
        """What computes calls like this one, for good where nothing but their kind decides."""
        if torch.is_grad_enabled() or autocast.enabled(args[0]):
            return self
        chosen = self.choose(*args)
        self.last_ran = chosen.backend
        return chosen.run

    def choose(self, *args: Any) -> Implementation:
        """The implementation for this call. Raises BackendError if the one asked for can't run."""
        name = _backend.requested(self.name)
        if name == "auto":
            for candidate in self.implementations:
                if candidate.unavailable() is None and _why_not(candidate, args) is None:
                    return candidate
        reasons = {}
        for candidate in self.implementations:
            if candidate.backend == name:
                why = candidate.unavailable() or _why_not(candidate, args)
                if why is None:
                    return candidate
                reasons[name] = why
        why = reasons.get(name, "not implemented for this op")
        raise BackendError(f"{self.name}: backend {name!r} was asked for and can't run: {why}")

    def explain(self, *args: Any) -> Choice:
        """The choice for a call, or for this machine when called without arguments."""
        rejected = dict.fromkeys(BACKENDS, "not implemented for this op")
        chosen: str | None = None
        asked = _backend.requested(self.name)
        for candidate in self.implementations:
            why = candidate.unavailable()
            if why is None and args:
                why = _why_not(candidate, args)
            if why is None and asked not in ("auto", candidate.backend):
                why = f"{asked} was asked for"
            if why is None and chosen is None:
                chosen = candidate.backend
            rejected[candidate.backend] = why or f"{chosen} is faster"
        if chosen is not None:
            del rejected[chosen]
        return Choice(self.name, chosen or f"none ({asked} can't run)", rejected, self.last_ran)


class Site:
    """One place in a network that calls an op with its own, fitting tensors, again and again.

    ``site(...)`` computes what the op does on the same arguments, whose backend is chosen at the
    first call of a kind and kept: shape, strides, dtype and device of the first argument, from
    which those of the others follow; the backends asked for; gradients and autocast. Arguments are
    not checked.

    Args:
        name: of the op.
    """

    def __init__(self, name: str) -> None:
        self._op: Op = _backend.known_ops[name]
        self._settled: tuple[Any, Callable[..., Any]] = None, self._op

    def __call__(self, x: Tensor, *args: Any) -> Any:
        if x.is_meta:
            return self._op(x, *args)
        device = x.device
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)
        kind = x.shape, x.stride(), x.dtype, device, modes, _backend.overrides
        known, run = self._settled
        if kind != known:
            run = self._op.settle(x, *args)
            self._settled = kind, run
        return run(x, *args)


def _why_not(candidate: Implementation, args: tuple[Any, ...]) -> str | None:
    if checks.transformed() and not candidate.composite:
        return "torch.func transforms PyTorch's own functions only"
    return candidate.unsupported(*args)


def _always() -> None:
    return None


def _always_supported(*args: Any) -> None:
    return None
