"""Whether a model is still the one that graphs were captured from and tensors derived from."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from itertools import chain, filterfalse
from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import Tensor, nn

from ..conditioning import Model
from ..writes import Writes


class Edit(enum.IntEnum):
    """What was done to a model."""

    NONE = 0
    VALUES = 1  # its weights were written to, where they are
    MODEL = 2  # it has other tensors, modules, hooks or settings


class Watch:
    """Sees what was done to models between two looks.

    Args:
        verify: read all weights, to see the writes that nothing else tells of, see
            :class:`~diffusion_fast.writes.Writes`.
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
        self._contents = self._content()
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = _places(self._tensors)
        places = [
            (module, name)
            for module, own in zip(modules, self._attributes, strict=True)
            for name in own
            if name not in _BOOKKEEPING
        ]
        self._owners = [vars(module) for module, _ in places]
        self._names = [name for _, name in places]
        self._settings = self._setting()
        self._containers = [
            setting
            for (module, _), setting in zip(places, self._settings, strict=True)
            if isinstance(setting, _CONTAINER)
            and not type(module).__module__.startswith(_NO_CONTAINERS)
        ]
        self._plain = list(map(_plain, self._containers))
        self.writes = Writes(self._tensors, verify)
        self.identity = (
            list(map(id, self._contents)),
            [
                (id(own), name, setting)
                for own, name, setting in zip(
                    self._owners, self._names, self._settings, strict=True
                )
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
            and _same(self._content(), self._contents)
            and _same(self._setting(), self._settings)
            and _places(self._tensors) == self._places
            and list(map(_plain, self._containers)) == self._plain
        )

    def _setting(self) -> list[Any]:
        """Settings and containers themselves, of counters and other attributes the type alone."""
        values = map(dict.get, self._owners, self._names)
        return [value if _watched[type(value)] else type(value) for value in values]

    def _content(self) -> list[Any]:
        """Submodules, parameters, buffers and hooks."""
        return list(chain.from_iterable(map(_values, self._full)))


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
_PLACE: tuple[Callable[[Tensor], Any], ...] = (
    methodcaller("data_ptr"),
    methodcaller("stride"),
    attrgetter("dtype"),
    attrgetter("shape"),
)


def _same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _places(tensors: list[Tensor]) -> list[list[Any]]:
    """Where tensors lie and how they are read."""
    return [list(map(ask, tensors)) for ask in _PLACE]


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
