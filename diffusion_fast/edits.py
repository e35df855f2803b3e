"""What was done to a model between two looks: other parts, or other values in its tensors.

Whoever derives tensors from weights, or captures graphs of them, asks here whether they still hold.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, filterfalse
from operator import attrgetter, is_, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .conditioning import Model

SAMPLE = 64  # elements of each tensor, at least
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_version = attrgetter("_version")


class Edit(enum.IntEnum):
    """What was done to a model."""

    NONE = 0
    VALUES = 1  # its weights were written to, where they are
    MODEL = 2  # it has other tensors, modules, hooks or settings


class Watch:
    """Sees what was done to models between two looks.

    Args:
        verify: read all weights, to see the writes that nothing else tells of, see
            :class:`Writes`.
    """

    def __init__(self, verify: bool = False) -> None:
        self.verify = verify
        self._seen: _Seen | None = None
        self._model: Model | None = None

    def look(self, model: Model, closely: bool = True) -> Edit:
        """What was done since the last look; a model that was not looked at then is another one.

        Args:
            model: the model as it is now.
            closely: whether to read elements too, for writes that nothing tells of.
        """
        before, same = self._seen, model is self._model
        self._model = model
        if same and not isinstance(model, nn.Module):
            return Edit.NONE
        if same and before is not None and before.unchanged():
            written = before.writes() if closely else before.writes.counted()
            return Edit.VALUES if written else Edit.NONE
        self._seen = now = _Seen(model, self.verify) if isinstance(model, nn.Module) else None
        if not same or before is None or now is None or now.identity != before.identity:
            return Edit.MODEL
        return Edit.VALUES if before.writes() else Edit.NONE


class _Seen:
    """A model as it was, in lists that are compared without a Python call for each module.

    Attributes:
        identity: the submodules, tensors and hooks of all modules, their settings, and where and
            how tensors lie. Settings are strings, flags and floats, such as the active adapter of
            a LoRA and its scale, and an own ``forward``; other attributes may be counters, or what
            a call keeps. Modules of this package and of PyTorch have no settings in containers.
        writes: to the parameters and buffers.
    """

    def __init__(self, model: nn.Module, verify: bool) -> None:
        modules = list(model.modules())
        self._attributes = list(map(vars, modules))
        self._sizes = list(map(len, self._attributes))
        kept = list(chain.from_iterable(map(_kept_by, modules)))
        self._full, self._empty = list(filter(len, kept)), list(filterfalse(len, kept))
        self._dicts = [one for one in self._full if type(one) is dict]
        self._ordered = [one for one in self._full if type(one) is not dict]  # hooks are
        self._lengths = list(map(len, self._full))
        self._contents = list(self._content())
        self._tensors = [*model.parameters(), *model.buffers()]
        self._flat = [tensor for tensor in self._tensors if tensor.dim() < 2]
        self._deep = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._places = self._place()
        settings: list[tuple[nn.Module, str]] = []
        others: list[tuple[nn.Module, str]] = []
        for module, own in zip(modules, self._attributes, strict=True):
            for name, value in own.items():
                if name not in _BOOKKEEPING:
                    (settings if _watched[type(value)] else others).append((module, name))
        # Settings and containers are compared themselves, counters and so on by their types.
        self._settings, self._others = _Attributes(settings), _Attributes(others)
        self._containers = [
            setting
            for (module, _), setting in zip(settings, self._settings.values, strict=True)
            if isinstance(setting, _CONTAINER)
            and not type(module).__module__.startswith(_NO_CONTAINERS)
        ]
        self._plain = list(map(_plain, self._containers))
        self.writes = Writes(self._tensors, verify)
        self.identity = (
            list(map(id, self._contents)),
            [
                (id(vars(module)), name, setting)
                for (module, name), setting in zip(settings, self._settings.values, strict=True)
                if name == "forward" or isinstance(setting, _SETTING)
            ],
            [plain for plain in self._plain if plain is not None],
            self._places,
        )

    def unchanged(self) -> bool:
        """Whether the model is sure to be the same, but for what was written to its tensors."""
        return (
            list(map(len, self._attributes)) == self._sizes
            and not any(self._empty)
            and list(map(len, self._full)) == self._lengths
            and all(map(is_, self._content(), self._contents))
            and self._settings.same()
            and self._others.same_types()
            and self._place() == self._places
            and list(map(_plain, self._containers)) == self._plain
        )

    def _content(self) -> Iterator[Any]:
        """Submodules, parameters, buffers and hooks."""
        several = (map(dict.values, self._dicts), map(_values, self._ordered))
        return chain.from_iterable(chain(*several))

    def _place(self) -> list[list[Any]]:
        """Where tensors lie and how they are read. Of one dimension the size is the shape, and is
        made faster.
        """
        return [
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.stride, self._tensors)),
            list(map(_dtype, self._tensors)),
            list(map(Tensor.numel, self._flat)),
            list(map(_shape, self._deep)),
        ]


class _Attributes:
    """Some attributes of modules, and what they were."""

    def __init__(self, places: list[tuple[nn.Module, str]]) -> None:
        self._owners = [vars(module) for module, _ in places]
        self._names = [name for _, name in places]
        self.values = list(self._now())
        self._types = list(map(type, self.values))

    def same(self) -> bool:
        return all(map(is_, self._now(), self.values))

    def same_types(self) -> bool:
        return list(map(type, self._now())) == self._types

    def _now(self) -> Iterator[Any]:
        return map(dict.get, self._owners, self._names)


class _Watched(dict[type, bool]):
    """Whether attributes of a type are compared, found out once for each type."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, _SETTING + _CONTAINER) or issubclass(kind, Callable)  # type: ignore[arg-type]
        return self[kind]


_watched = _Watched()
_BOOKKEEPING = frozenset(vars(nn.Module()))  # of every module: its parameters, hooks and so on
_SETTING = (str, bool, float)
_CONTAINER = (Mapping, list, tuple, set, frozenset)
_NO_CONTAINERS = ("torch.nn.", __name__.partition(".")[0] + ".")
_kept_by = attrgetter("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_values = methodcaller("values")
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


def _plain(value: Any) -> Any:
    """The strings, flags and floats in a value, as something that compares; None without any."""
    if isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, Mapping):
        items = [(str(key), _plain(one)) for key, one in value.items()]
        return tuple(item for item in items if item[1] is not None) or None
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [part for part in map(_plain, value) if part is not None]
        return tuple(parts if isinstance(value, (list, tuple)) else sorted(parts, key=repr)) or None
    return None


class Writes:
    """The writes to some tensors, from one question to the next.

    Three things tell of a write. PyTorch counts most of them. The steps of optimizers are heard of,
    because fused ones are not counted. Writes through ``.data``, by NumPy or another process are
    not counted either, but whole tensors that are written so differ in a sample of their elements.
    Of single elements written so, only a checksum of all bits tells.

    Args:
        tensors: what to watch; they are kept alive.
        verify: take a checksum of all bits at each question.
    """

    def __init__(self, tensors: Iterable[Tensor], verify: bool = False) -> None:
        self._tensors, self._verify = list(tensors), verify
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._ids, self._stepped = set(map(id, self._tensors)), False
        arrays: dict[torch.dtype, list[np.ndarray[Any, Any]]] = {}
        views: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._apart: list[Tensor] = []  # which have no such view
        readable = [  # not on the meta device, and not spread over processes or compressed
            tensor
            for tensor in self._tensors
            if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
            and not (tensor.is_meta or tensor.is_quantized)
            and tensor.layout == torch.strided
        ]
        for tensor, sample in zip(readable, spread(*readable), strict=True):
            if sample.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                self._apart.append(tensor)
            elif sample.device.type == "cpu":  # NumPy joins them in half of PyTorch's time
                arrays.setdefault(sample.dtype, []).append(sample.numpy())
            else:
                views.setdefault((sample.device, sample.dtype), []).append(sample)
        self._arrays, self._views = list(arrays.values()), list(views.values())
        self._versions, self._uncounted = self._read_versions(), self._read_elements()
        _asked.append(weakref.ref(self, _asked.remove))

    def __call__(self) -> bool:
        """Whether there were any since the last question, or since the start."""
        before, self._uncounted = self._uncounted, self._read_elements()
        (arrays, samples, sums), (old_arrays, old_samples, old_sums) = self._uncounted, before
        return (
            self.counted()
            or sums != old_sums
            or not all(map(np.array_equal, arrays, old_arrays))
            or not all(map(torch.equal, samples, old_samples))
        )

    def counted(self) -> bool:
        """The same without a look at the elements: whether PyTorch or an optimizer told of any."""
        stepped, self._stepped = self._stepped, False
        before, self._versions = self._versions, self._read_versions()
        return stepped or self._versions != before

    def _read_versions(self) -> list[int]:
        return list(map(_version, self._counted))

    def _read_elements(self) -> tuple[list[np.ndarray[Any, Any]], list[Tensor], list[int]]:
        samples = [*map(torch.cat, self._views), *spread(*self._apart)]
        sums = checksums(self._tensors) if self._verify else []
        return list(map(np.concatenate, self._arrays)), samples, sums

    def hear_of(self, parameters: Iterable[int]) -> None:
        """An optimizer has made a step with the tensors of these ids."""
        if not self._ids.isdisjoint(parameters):
            self._stepped = True


_asked: list[weakref.ref[Writes]] = []


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _asked:
        return
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for reference in tuple(_asked):
        writes = reference()
        if writes is not None:
            writes.hear_of(parameters)


register_optimizer_step_post_hook(_after_step)


def spread(*tensors: Tensor) -> Iterator[Tensor]:
    """At least 64 elements of each tensor, or all there are, as integers of their bits, 1-D.

    They lie evenly in memory. Their distance shares no factor with the sizes, so that they are of
    many rows and columns. It is a view, unless the tensor's elements lie apart or overlap.
    """
    orders = (sorted(range(tensor.dim()), key=tensor.stride)[::-1] for tensor in tensors)
    for flat in _bits(tensor.permute(order) for tensor, order in zip(tensors, orders, strict=True)):
        count = flat.numel()
        distances = range(count // SAMPLE, 1, -1)
        yield flat[:: next((n for n in distances if math.gcd(n, count) == 1), 1)]


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A number per tensor that any change of one element changes; one host read per device.

    The bits of element i, as an integer, times 2 i + 1, summed modulo 2^64. An odd factor has an
    inverse there, so no change of an element is lost.
    """
    sums = []
    for flat in _bits(tensors):
        odd = torch.arange(1, 2 * len(flat) + 1, 2, device=flat.device)
        sums.append((flat.long() * odd).sum())
    found = [0] * len(sums)
    for device in {value.device for value in sums}:
        places = [i for i, value in enumerate(sums) if value.device == device]
        values = torch.stack([sums[i] for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found


def _bits(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The elements of each in their order as integers, which compare where they are no numbers."""
    for tensor in tensors:
        flat = tensor.detach()
        flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
        yield flat.view(_INTEGERS[flat.element_size()]) if flat.is_floating_point() else flat
