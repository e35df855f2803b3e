"""One of our models over the layers of another program's: the same weights, nothing copied.

Their modules stay what they are and where they are, so all code that loads, adapts, moves or
edits their weights keeps working. Our model is built beside them on the meta device, and then

- a plain layer (``nn.Linear``, ``nn.Conv2d``, a norm) lends its dict of parameters to ours, so that
  a weight that is edited, moved, cast or replaced is so for both, and
- any other layer (PEFT's with its adapters, a quantized one, one with hooks) is called as it is.

Nothing is derived from a weight and kept. What could make the two differ, namely modules that were
put in, taken out or patched, is looked for before each call: see :meth:`Twin.problem`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Dropout)
_ATTRIBUTES = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Dropout: ("p",),
}


class Called(nn.Module):
    """A layer that is more than its weight, called where our model has a layer of its own."""

    layer: Any

    def __init__(self, layer: nn.Module, ours: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        pads = getattr(ours, "pads", 0)
        self.pads = pads if isinstance(pads, tuple) else None  # they pad these beforehand

    @property
    def weight(self) -> Tensor:
        """Empty, of the layer's dtype and device: the layer must be called, its weight not read."""
        return torch.empty_like(self.layer.weight[:0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.pads is None else F.pad(x, self.pads))


class Unlike(ValueError):
    """Their model does not compute what ours does; the message says where."""


class Twin:
    """Our model ``ours`` (on the meta device) over the layers of ``theirs``.

    Args:
        theirs: their model.
        ours: our model.
        names: their names of the layers that are linked by ours; None for the same.

    Attributes:
        blocks: the modules of theirs that are no layers.
        links: another object each time that ours is linked anew.
        known: the packages whose code ours computes in place of. Anything else was patched.
        beside: class names of modules that whoever runs our model calls where they are.

    Raises:
        Unlike: they can't be linked.
    """

    known: tuple[str, ...] = ()
    beside: frozenset[str] = frozenset()

    def __init__(
        self, theirs: nn.Module, ours: nn.Module, names: Mapping[str, str] | None = None
    ) -> None:
        self.theirs, self.ours = theirs, ours
        self.blocks: list[nn.Module] = []
        found = {n: m for n, m in ours.named_modules() if isinstance(m, _LAYERS)}
        names = {name: name for name in found} if names is None else names
        self._layers = {names[n]: m for n, m in found.items() if n in names}
        self._paths = {theirs: ours for ours, theirs in names.items()}
        self._link()

    def patch(self, module: nn.Module) -> str | None:
        """What makes a call of the module more than its class's forward."""
        if module._forward_hooks or module._forward_pre_hooks:
            return "forward hooks"
        for name in ("forward", "_conv_forward", "__call__"):
            if name in vars(module) and not self.same(module, name):
                return f"a {name} of its own"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"padding_mode {module.padding_mode!r}"
        return None

    def same(self, module: nn.Module, name: str) -> bool:
        """Whether a method of the module's own does what its class's does."""
        return bool(vars(module)[name] == getattr(type(module), name).__get__(module))

    def plain(self, layer: nn.Module) -> bool:
        """Whether a layer's class and its weight and bias are all that its call is."""
        return type(layer) in _ATTRIBUTES and not self.patch(layer)

    def state(self) -> Any:
        """What else the answers above depend on, to be compared."""
        return None

    def problem(self) -> str | None:
        """Why ours would not compute what theirs does now; None if it would.

        Changed modules are linked anew first. To look at every module takes a few hundred
        microseconds for SDXL.
        """
        if self._linked and self._unchanged():
            return None
        try:
            self._link()
        except Unlike as error:
            return str(error)
        return None

    def _link(self) -> None:
        self._linked = False
        found = set()
        self.blocks = []
        watched: list[tuple[dict[str, Any], str, nn.Module]] = []
        hooks: list[Any] = []
        for parent, key, path, module in self._walk(self.theirs, ""):
            watched.append((parent._modules, key, module))
            if path in self._layers:
                found.add(path)
                plain = self.plain(module)
                self._link_layer(path, module, plain)
                if not plain:
                    continue  # its hooks run, because it is called
            else:
                self._check_block(path, module)
                self.blocks.append(module)
            hooks += [module._forward_hooks, module._forward_pre_hooks]
        if missing := self._layers.keys() - found:
            raise Unlike(f"{min(missing)}: there is no such layer")
        self._dicts, self._keys, self._modules = map(list, zip(*watched, strict=True))
        self._hooks = hooks
        self._types = list(map(type, self._modules))
        sized = [*map(vars, self._modules), *(m._modules for m in (self.theirs, *self._modules))]
        self._sized, self._sizes = sized, list(map(len, sized))
        self._convolutions = [m for m in self._modules if isinstance(m, nn.Conv2d)]
        self._padding = list(map(attrgetter("padding_mode"), self._convolutions))
        self._classes = list(set(self._types))
        self._forwards = list(map(attrgetter("forward"), self._classes))
        self._state = self.state()
        self.links = object()
        self._linked = True

    def _walk(
        self, module: nn.Module, prefix: str
    ) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
        """Parent, key, path and module of all in theirs, but not into layers."""
        for key, child in module._modules.items():
            if child is not None:
                yield module, key, prefix + key, child
                if prefix + key not in self._layers and type(child).__name__ not in self.beside:
                    yield from self._walk(child, f"{prefix}{key}.")

    def _link_layer(self, path: str, layer: nn.Module, plain: bool) -> None:
        ours: nn.Module = self._layers[path]
        base = next(cls for cls in _LAYERS if isinstance(ours, cls))
        if plain and isinstance(layer, base):
            for name in _ATTRIBUTES[base]:
                expected, got = getattr(ours, name), getattr(layer, name)
                if name == "padding" and len(expected) == 4:
                    expected = (0, 0)  # they pad these beforehand
                if got != expected:
                    raise Unlike(f"{path}.{name}: expected {expected}, got {got}")
            vars(ours)["_parameters"] = layer._parameters
            if base is nn.Dropout:
                ours = layer  # that knows whether it is in training
        elif base in (nn.Linear, nn.Conv2d):
            shape = getattr(getattr(layer, "weight", None), "shape", None)
            if shape is None:
                raise Unlike(f"{path}: a {type(layer).__name__}, which has no weight")
            ours = Called(layer, ours)
        else:
            raise Unlike(
                f"{path}: expected {base.__name__}, got {self.patch(layer) or type(layer)}"
            )
        parent, _, key = self._paths[path].rpartition(".")
        self.ours.get_submodule(parent)._modules[key] = ours

    def _check_block(self, path: str, module: nn.Module) -> None:
        """A block, or something that ours has no counterpart of because it does nothing."""
        if patch := self.patch(module):
            raise Unlike(f"{path}: {patch}")
        cls = type(module)
        known = self.known
        if not cls.__module__.startswith(known) or not cls.forward.__module__.startswith(known):
            name, whose = f"{cls.__module__}.{cls.__name__}", known[0].rstrip(".")
            raise Unlike(f"{path}: {name}, or its forward, is not of {whose}")
        if any(value is not None for value in module._parameters.values()):
            raise Unlike(f"{path}: a {cls.__name__} with weights, which our model does not have")
        if isinstance(module, nn.Dropout) and module.p:
            raise Unlike(f"{path}: dropout, which our model does not have there")

    def _unchanged(self) -> bool:
        try:
            modules = map(getitem, self._dicts, self._keys)
            if not all(map(is_, modules, self._modules)):
                return False
        except KeyError:
            return False
        return (
            list(map(len, self._sized)) == self._sizes
            and list(map(type, self._modules)) == self._types
            and not any(self._hooks)
            and list(map(attrgetter("padding_mode"), self._convolutions)) == self._padding
            and list(map(attrgetter("forward"), self._classes)) == self._forwards
            and self.state() == self._state
        )
