"""Docstrings, written with Sphinx' roles, as mkdocstrings reads them: Markdown with links."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?P<role>[a-z]+):`(?P<short>~?)(?P<target>[^`]+)`")
DISPLAY = re.compile(
    r"^(?P<indent> *)\.\. math:: (?P<first>.*(?:\n(?P=indent) +.*)*)", re.MULTILINE
)
TITLED = re.compile(r"(?P<title>[^<]+) <(?P<target>[^>]+)>")
LITERAL = re.compile(r"::$", re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Turns roles into links to what they name, which must exist, and formulas into Markdown's."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        seen: set[str] = set()
        modules: list[griffe.Module] = []
        todo: list[griffe.Object | griffe.Alias] = [pkg]
        while todo:
            one = todo.pop()
            if one.is_alias or one.path in seen:
                continue
            seen.add(one.path)
            todo += one.members.values()
            if isinstance(one, griffe.Module):
                modules.append(one)
            if one.docstring is not None:
                one.docstring.value = _markdown(one.docstring.value, one, pkg)
        aliases = [one for module in modules for one in module.members.values() if one.is_alias]
        for alias in aliases:
            _resolve(alias, pkg)
        for module in modules:
            _unshadow(module, aliases)


def _resolve(alias: griffe.Alias, pkg: griffe.Module) -> None:
    """Find what an alias stands for while files still have their names; not where it is a file."""
    if alias.target_path.startswith(f"{pkg.name}."):
        try:
            target = pkg[alias.target_path.removeprefix(f"{pkg.name}.")]
        except KeyError:
            return
        if not target.is_alias and not target.is_module:
            alias.target = target


def _unshadow(module: griffe.Module, aliases: list[griffe.Alias]) -> None:
    """What a package exports, in the place of the submodule that it has its name from.

    ``ops/geglu.py`` defines ``geglu``, and ``ops.geglu`` is the function.
    """
    for name in map(str, module.exports or ()):
        file = module.members.get(name)
        if isinstance(file, griffe.Module) and name in file.members:
            own = file.members[name]
            if own.is_alias:
                continue
            own.parent = module
            module.members[name] = own
            for alias in aliases:
                if alias.target_path == own.path:
                    alias.target = own


def _markdown(text: str, place: griffe.Object, pkg: griffe.Module) -> str:
    text = DISPLAY.sub(lambda m: f"{m['indent']}$$ {' '.join(m['first'].split())} $$", text)
    text = LITERAL.sub(":", text)
    return ROLE.sub(lambda m: _link(m, place, pkg), text)


def _link(found: re.Match[str], place: griffe.Object, pkg: griffe.Module) -> str:
    target = found["target"]
    if found["role"] == "math":
        return f"${target}$"
    titled = TITLED.fullmatch(target)
    if titled is not None:
        target = titled["target"]
    short = found["short"] or target.startswith(".")
    name = target.rpartition(".")[2] if short else target
    name = titled["title"] if titled is not None else name
    path = _path_of(target.removeprefix("~"), place, pkg)
    # Optional: much that docstrings name is not part of the reference. Then it is the name alone.
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'


def _path_of(target: str, place: griffe.Object, pkg: griffe.Module) -> str:
    """The full path of what a role names, seen from where it stands.

    Raises:
        LookupError: there is no such thing.
    """
    scopes: list[str] = []
    here: griffe.Object | None = place
    while here is not None:
        scopes.append(here.path)
        here = here.parent  # type: ignore[assignment]
    if target.startswith("."):
        dots = len(target) - len(target.lstrip("."))
        module = place if place.is_module else place.module
        base = module.path.split(".")
        base = base if module.is_init_module else base[:-1]
        base = base[: len(base) - dots + 1]
        candidates = [".".join([*base, target.lstrip(".")])]
    else:
        candidates = [*(f"{scope}.{target}" for scope in scopes), target]
    for path in candidates:
        first, _, rest = path.partition(".")
        if first != pkg.name:
            if importlib.util.find_spec(first) is not None:
                return path  # of another package
            continue
        try:
            return pkg[rest].path if rest else pkg.path
        except (KeyError, griffe.AliasResolutionError):
            continue
    raise LookupError(f"{place.path}: expected the name of something in a role, got {target!r}")
