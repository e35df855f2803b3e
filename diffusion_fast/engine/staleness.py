"""Whether a model is still the one that graphs were captured from and tensors derived from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Model


@dataclass(frozen=True)
class Fingerprint:
    """What can be seen of a model without reading its weights.

    Attributes:
        identity: addresses, dtypes, shapes and devices of parameters and buffers, the modules, and
            their settings: strings, flags and floats, such as the active adapter of a LoRA and its
            scale. Another identity is another model.
        versions: how often each tensor was written to. Where only these differ, the same model has
            new weights.
        checksum: of all bits of the weights, or None. PyTorch counts no writes that go through
            ``.data``; only this sees them.
    """

    identity: tuple[Any, ...]
    versions: tuple[int, ...]
    checksum: tuple[int, ...] | None = None


def fingerprint(model: Model, verify: bool = False) -> Fingerprint:
    """The fingerprint of a model as it is now; ``verify`` reads all weights for a checksum."""
    if not isinstance(model, nn.Module):
        return Fingerprint((id(model),), ())
    tensors = list(_tensors(model))
    places = tuple((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors)
    modules = tuple(_settings(module) for module in model.modules())
    versions = tuple(-1 if t.is_inference() else t._version for t in tensors)
    return Fingerprint((places, modules), versions, checksums(tensors) if verify else None)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


_BOOKKEEPING = frozenset(vars(nn.Module()))  # of every module: its parameters, hooks and so on


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """A module, its hooks, own forward, and attributes that are no tensors, modules or counters."""
    hooks = *module._forward_hooks, *module._forward_pre_hooks, vars(module).get("forward")
    plain = ((n, _plain(value)) for n, value in vars(module).items() if n not in _BOOKKEEPING)
    return id(module), hooks, tuple(pair for pair in plain if pair[1] is not None)


def _plain(value: Any) -> Any:
    """The strings, flags and floats in a value, as something that compares; None without any."""
    if isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, Mapping):
        items = [(str(key), _plain(one)) for key, one in value.items()]
        return tuple(item for item in items if item[1] is not None) or None
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = sorted(value) if isinstance(value, (set, frozenset)) else value
        return tuple(part for part in map(_plain, parts) if part is not None) or None
    return None


def checksums(tensors: list[Tensor]) -> tuple[int, ...]:
    """A number per tensor that any change of one element changes; one host read per device.

    The bits of element i, as an integer, times 2 i + 1, summed modulo 2^64. An odd factor has an
    inverse there, so no change of an element is lost.
    """
    sums = [_checksum(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(i)
    found: dict[int, int] = {}
    for places in by_device.values():
        values = torch.stack([sums[i] for i in places]).tolist()
        found.update(zip(places, values, strict=True))
    return tuple(found[i] for i in range(len(sums)))


def _checksum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point():
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        flat = flat.view(integers[flat.element_size()])
    odd = torch.arange(1, 2 * len(flat) + 1, 2, device=flat.device)
    return (flat.long() * odd).sum()
