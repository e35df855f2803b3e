"""A loss's gradient by the parameters of a network; of a small one without most of its Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import Edit, Watch
from ..engine.rewrites.recorded import Recorded
from ..models.layers import hooked

KNOWN = ("torch", "diffusion_fast")  # packages whose modules do nothing but compute
WITH_ADAPTERS = (*KNOWN, "peft", "transformers")  # those of fine-tuning too


def only_computes(model: nn.Module, packages: Collection[str] = KNOWN) -> bool:
    """Whether no call of a network can do more than to compute: no hooks, no foreign modules.

    Args:
        model: the network.
        packages: whose modules may be in it. Those beside :data:`KNOWN` may have hooks of their
            own: by these transformers notes what its layers return.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    known = {type(one).__module__.partition(".")[0] for one in modules}.issubset(packages)
    return known and not _hooked(modules, packages) and not _watched(modules, parameters)


def _hooked(modules: list[nn.Module], packages: Collection[str]) -> bool:
    """Whether a call of a module does more, or something else, than these packages have it do."""
    theirs = set(packages).difference(KNOWN)
    hooks = (
        hook
        for one in hooked(*modules)
        for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
    )
    return any("forward" in vars(one) for one in modules) or any(
        str(getattr(hook, "__module__", "")).partition(".")[0] not in theirs for hook in hooks
    )


def _watched(modules: list[nn.Module], parameters: list[nn.Parameter]) -> bool:
    """Whether anything is called in the backward pass, or after it."""
    return any(one._backward_hooks or one._backward_pre_hooks for one in modules) or any(
        one._backward_hooks or one._post_accumulate_grad_hooks for one in parameters
    )


class Gradient:
    """A loss and its gradient, which is added to the parameters', on a CPU in one process.

    From the fourth call of a kind on, the operators of forward and backward pass are called without
    the network's Python and without autograd, see :class:`~..engine.rewrites.recorded.Recorded`:
    bit for bit what they give with both. Networks that may do more than to compute are always
    called themselves.

    Args:
        network: what has the parameters.
        loss: called with tensors, numbers and nested dicts of them; returns a scalar, and what else
            is to be known, without a gradient.
    """

    def __init__(self, network: nn.Module, loss: Callable[..., tuple[Tensor, Any]]) -> None:
        self.network, self.loss = network, loss
        self._watch = Watch()
        # What the watch doesn't see: which parameters are trained, modes, hooks on the way back.
        self._state: tuple[list[bool], list[bool], bool] | None = None
        self._modules: list[nn.Module] = []
        self._all: list[nn.Parameter] = []
        self._trained: list[nn.Parameter] = []
        self._recorded: Recorded | None = None

    def __call__(self, *args: Any) -> tuple[Tensor, Any]:
        """Add the gradient, and return what the loss function does."""
        if self._watch.look(self.network, closely=False) is Edit.MODEL:
            self._modules, self._all = list(self.network.modules()), list(self.network.parameters())
            self._state = None
        flags = [one.requires_grad for one in self._all]
        training = [one.training for one in self._modules]
        state = flags, training, _watched(self._modules, self._all)
        if state != self._state:
            self._state, self._trained = state, list(itertools.compress(self._all, flags))
            whole = only_computes(self.network)
            self._recorded = Recorded(self._compute, gradients=True) if whole else None
        if self._recorded is None:
            loss, more = self.loss(*args)
            loss.backward()
            return loss.detach(), more
        with torch.no_grad():
            loss, more, gradients = self._recorded(*args)
            for parameter, gradient in zip(self._trained, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
        return loss, more

    def _compute(self, *args: Any) -> tuple[Tensor, Any, list[Tensor | None]]:
        with torch.enable_grad():
            loss, more = self.loss(*args)
            found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        seen: set[int] = set()
        pairs = zip(found, self._trained, strict=True)
        return loss.detach(), more, [_own(one, like, seen) for one, like in pairs]


def _own(gradient: Tensor | None, parameter: Tensor, seen: set[int]) -> Tensor | None:
    """A gradient laid out as its parameter, in memory that no other one has."""
    if gradient is None or gradient.layout != torch.strided:
        return gradient
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    place = gradient.untyped_storage().data_ptr()
    if place in seen or any(one != other for size, one, other in strides if size > 1):
        return torch.zeros_like(parameter).copy_(gradient)
    seen.add(place)
    return gradient
