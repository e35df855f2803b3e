"""What all configs share: the contents of a diffusers ``config.json``, read and written."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..ops import checks

# Fields of diffusers that a model fixes, with the values that mean "off" or "as usual"; the first
# one is what is written.
Fixed = Mapping[str, tuple[Any, ...]]


def own_fields(config: type, kind: str, fixed: Fixed, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config's own fields, without keys that start with ``_``.

    Args:
        config: a dataclass.
        kind: name of the diffusers class that it stands for.
        fixed: the fields of that class which the config doesn't have.
        values: the contents of a ``config.json``.

    Fields that neither has, such as those that a trainer adds, are left out with one warning.

    Raises:
        ValueError: another kind of model, or a field with an unsupported value.
    """
    got = values.get("_class_name", kind)
    if got != kind:
        checks.fail("_class_name", kind, repr(got))
    names = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    unknown = sorted(given.keys() - names - fixed.keys())
    if unknown:
        listed = ", ".join(map(repr, unknown))
        warnings.warn(f"{kind}: unknown fields of its config are left out: {listed}", stacklevel=2)
    own = {}
    for name, value in given.items():
        if name in names:
            own[name] = value
        elif name in fixed and not _is_fixed(value, fixed[name]):
            supported = " or ".join(repr(known) for known in fixed[name])
            raise ValueError(f"{name}: {value!r} is not supported, only {supported}")
    return own


def json_values(config: Any, fixed: Fixed) -> dict[str, Any]:
    """The contents of a ``config.json`` that diffusers reads; JSON types only."""
    values = {name: known[0] for name, known in fixed.items()}
    for name, value in dataclasses.asdict(config).items():
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _is_fixed(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a value is a known one, or a list of nothing else (one per level)."""
    values = value if isinstance(value, (list, tuple)) and value else [value]
    return all(v in known for v in values)
