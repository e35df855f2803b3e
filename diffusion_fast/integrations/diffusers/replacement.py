"""A module of a diffusers pipeline, and what its ``forward`` is replaced by."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from torch import nn

from .attention_processor import AttentionProcessor
from .twin import DiffusersTwin

# They all compute softmax(Q K^T / sqrt(D)) V, in different amounts of memory.
_PROCESSORS = {
    AttentionProcessor,
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
}

_FREEU = ("s1", "s2", "b1", "b2")
_MODES = {"processor", "_chunk_size", "gradient_checkpointing", *_FREEU}


class Replacement:
    """A module of a pipeline, and what its ``forward`` is replaced by.

    Attributes:
        theirs, ours: diffusers' module, and ours over its layers.
        calls: how many calls ours has run.
        others: how many diffusers' own forward has run, by reason.
    """

    theirs: Any
    ours: Any
    forward: Callable[..., Any]

    def __init__(self, name: str, theirs: Any, ours: Any) -> None:
        self.name = name
        self.theirs, self.ours = theirs, ours
        self.twin = DiffusersTwin(theirs, ours)
        self.calls = 0
        self.others: Counter[str] = Counter()
        self._blocks: list[nn.Module] = []
        self._attributes: list[dict[str, Any]] = []

    def problem(self) -> str | None:
        """Why the next call could not be ours, whatever its arguments; None if it can."""
        if problem := self.twin.problem():
            return problem
        for attributes in self._modes():
            if mode := _mode(attributes):
                return mode
        return None

    def _modes(self) -> list[dict[str, Any]]:
        """The attributes of blocks that have one of those that matter; new ones come by linking."""
        if self._blocks is not self.twin.blocks:
            self._blocks = self.twin.blocks
            every = [module.__dict__ for module in (self.theirs, *self._blocks)]
            self._attributes = [attributes for attributes in every if _MODES & attributes.keys()]
        return self._attributes

    def run(self, reason: str | None, ours: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        """Ours if there is no ``reason`` against it, else diffusers' own forward."""
        reason = reason or self.problem()
        if reason is None:
            self.calls += 1
            return ours()
        if reason not in self.others:
            warnings.warn(
                f"diffusion_fast: the {self.name} runs diffusers' own forward: {reason}",
                stacklevel=2,
            )
        self.others[reason] += 1
        return type(self.theirs).forward(self.theirs, **arguments)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.calls} calls by diffusion_fast"]
        lines += [f"  {count} by diffusers: {why}" for why, count in self.others.items()]
        if problem := self.problem():
            lines.append(f"  the next one by diffusers: {problem}")
        return "\n".join(lines)


def _mode(attributes: dict[str, Any]) -> str | None:
    """What a block was told to do that our model can't."""
    processor = attributes.get("processor")
    if processor is not None and type(processor) not in _PROCESSORS:
        return f"the attention processor {type(processor).__name__}"
    if any(attributes.get(name) is not None for name in _FREEU):
        return "FreeU"
    if attributes.get("_chunk_size"):
        return "chunked feed-forward layers"
    if attributes.get("gradient_checkpointing") and torch.is_grad_enabled():
        return "gradient checkpointing"
    return None


def replacement_of(module: nn.Module) -> Replacement | None:
    """What :func:`accelerate` put into a module."""
    owner = getattr(vars(module).get(slot_of(module)), "__self__", None)
    return owner if isinstance(owner, Replacement) else None


def slot_of(module: Any) -> str:
    """The name of the forward in effect: a hook of accelerate keeps it under another one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"
