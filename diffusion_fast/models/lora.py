"""Several LoRAs on one model, each with a scale, switched without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..edits import spread
from ..files import AnyPath
from ..ops import checks
from .adapters import Adapter
from .lora_file import read_lora


@dataclass
class _Changed:
    """A weight as it was, and as this module left it."""

    base: Tensor
    version: int
    dtype: torch.dtype
    sample: Tensor

    def is_left(self, weight: Tensor) -> bool:
        """Whether nobody wrote to the weight since; it may have been moved or cast."""
        if weight._version != self.version:
            return False
        return weight.dtype != self.dtype or torch.equal(next(spread(weight)).cpu(), self.sample)


@dataclass
class LoRAs:
    """The LoRAs of a model's networks. Weights change in place, in the model's dtype.

    A changed parameter is W + sum_i scale_i D_i(W), with D_i as :class:`~.adapters.Adapter` says,
    summed in float32 from a kept copy of W: switching adds up no rounding, and taking all of them
    off restores every bit.

    Args:
        components: the networks by their names in a pipeline: ``unet``, ``text_encoder``,
            ``text_encoder_2``.
    """

    components: Mapping[str, nn.Module]
    scales: dict[str, float] = field(default_factory=dict, init=False)
    _loaded: dict[str, dict[tuple[str, str], Adapter]] = field(
        default_factory=dict, init=False, repr=False
    )
    _changed: dict[tuple[str, str], _Changed] = field(default_factory=dict, init=False, repr=False)

    @property
    def names(self) -> list[str]:
        """Of all that are loaded, on or off."""
        return list(self._loaded)

    def load(self, path: AnyPath, name: str, scale: float = 1.0) -> None:
        """Read a file (see :func:`~.lora_file.read_lora`) and switch it on, beside those that are.

        Raises:
            CheckpointError: a damaged file, or one for another model; nothing changes then.
            ValueError: a name that is taken, or a scale that isn't finite.
        """
        if not isinstance(name, str) or not name.strip():
            checks.fail("name", "a word", repr(name))
        if name in self._loaded:
            checks.fail("name", f"one that isn't taken ({', '.join(self.names)})", repr(name))
        checks.finite("scale", scale)
        found = read_lora(path, self.components)
        self._loaded[name] = {
            (component, name): adapter
            for component, adapters in found.items()
            for name, adapter in adapters.items()
        }
        self.set({**self.scales, name: scale})

    def set(self, scales: Mapping[str, float] | None = None) -> None:
        """Switch to these LoRAs, each with its scale, and all others off; None: all off.

        Raises:
            ValueError: a name that isn't loaded, a scale that isn't finite.
            RuntimeError: a weight was edited while a LoRA was on it, so that what it was without
                is not known any more.
        """
        if not isinstance(scales, Mapping | None):
            raise TypeError(f"scales: expected a mapping of names to numbers, got {scales!r}")
        scales = dict(scales or {})
        for name, scale in scales.items():
            checks.one_of("scales", name, self._loaded)
            checks.finite(f"scales[{name!r}]", scale)
        scales = {name: float(scale) for name, scale in scales.items() if scale}
        wanted = {key for name in scales for key in self._loaded[name]}
        for key, changed in self._changed.items():
            if not changed.is_left(self._weight(key)):
                raise RuntimeError(
                    f"{'.'.join(key)}: was edited while a LoRA was on it; take LoRAs off first"
                )
        with torch.no_grad():
            for key in self._changed.keys() - wanted:
                self._weight(key).copy_(self._changed.pop(key).base)
            for key in wanted:
                self._change(key, scales)
        self.scales = scales

    def unload(self, name: str) -> None:
        """Switch a LoRA off and forget it. Raises ValueError: it isn't loaded."""
        checks.one_of("name", name, self._loaded)
        self.set({other: scale for other, scale in self.scales.items() if other != name})
        del self._loaded[name]

    def _weight(self, key: tuple[str, str]) -> Tensor:
        component, name = key
        return self.components[component].get_parameter(name)

    def _change(self, key: tuple[str, str], scales: Mapping[str, float]) -> None:
        weight = self._weight(key)
        kept = self._changed.get(key)
        base = weight.clone() if kept is None else kept.base.to(weight)
        wide = base if base.dtype == torch.float64 else base.float()
        total = wide
        for name, scale in scales.items():
            if key in self._loaded[name]:
                total = total + scale * self._loaded[name][key].delta(wide)
        weight.copy_(total)
        sample = next(spread(weight)).to("cpu", copy=True)
        self._changed[key] = _Changed(base, weight._version, weight.dtype, sample)
