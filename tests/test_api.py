"""Names and signatures of the public interface stand in api.txt; a change must be in the changelog.

python tests/test_api.py    # writes api.txt anew, after the changelog says what changed
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import diffusion_fast as df

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "api.txt"


def signature(value: object) -> str:
    """Parameters with their defaults; annotations are left out, as they change for mypy alone."""
    if isinstance(value, type) and issubclass(value, Exception):
        return ""  # which another Python writes in another way
    try:
        parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
    text = str(inspect.Signature(plain))
    return re.sub(r"<[\w.]*?(\w+)( object)? at 0x[0-9a-f]+>", r"<\1>", text)


def entries(prefix: str, module: object) -> Iterator[str]:
    for name in sorted(module.__all__):  # type: ignore[attr-defined]
        value = getattr(module, name)
        if inspect.ismodule(value) or not callable(value):
            yield f"{prefix}.{name}"
            continue
        yield f"{prefix}.{name}{signature(value)}"
        if inspect.isclass(value) and value.__module__.startswith("diffusion_fast"):
            ours = [one for one in value.__mro__ if one.__module__.startswith("diffusion_fast")]
            for method in sorted({name for one in ours for name in vars(one)}):
                if method.startswith("_") and method != "__call__":
                    continue
                bound = getattr(value, method)
                yield f"{prefix}.{name}.{method}{signature(bound) if callable(bound) else ''}"


def interface() -> list[str]:
    return [*entries("df", df), *entries("df.ops", df.ops)]


def unreleased() -> str:
    """The changelog's newest section."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[1]


def test_the_interface_is_what_the_file_says() -> None:
    old, new = FILE.read_text(encoding="utf-8").splitlines(), interface()
    gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    assert not gone + added, (
        "the interface changed: say so in CHANGELOG.md, by name, then run"
        f" python tests/test_api.py\nno longer: {gone}\nnew: {added}"
    )


def write() -> None:
    """Take the interface as it is, if the changelog names every name that differs."""
    old = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else interface()
    changed = set(old) ^ set(interface())
    names = {
        re.split(r"[.(]", line.removeprefix("df.").removeprefix("ops."))[0] for line in changed
    }
    missing = sorted(name for name in names if name not in unreleased())
    if missing:
        raise SystemExit(f"CHANGELOG.md: expected its first section to name {', '.join(missing)}")
    FILE.write_text("".join(f"{line}\n" for line in interface()), encoding="utf-8")


if __name__ == "__main__":
    write()
