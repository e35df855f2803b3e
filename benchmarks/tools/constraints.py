"""The exact versions of everything that the development environment needs.

    python -m benchmarks.tools.constraints

writes constraints.txt, from the environment that it runs in. ``make setup`` and continuous
integration install these, so run it in an environment that the tests pass in.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from diffusion_fast.files import whole

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "constraints.txt"
LEFT_OUT = "peers"  # an extra that nothing here needs: other programs, for benchmarks


def asked_for() -> list[Requirement]:
    """What pyproject.toml names: dependencies, groups and extras but :data:`LEFT_OUT`.

    The project's own extras are no package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    texts = list(project["project"]["dependencies"])
    for extra, names in project["project"]["optional-dependencies"].items():
        texts += names if extra != LEFT_OUT else []
    for names in project["dependency-groups"].values():
        texts += [name for name in names if isinstance(name, str)]
    wanted = map(Requirement, texts)
    return [one for one in wanted if canonicalize_name(one.name) != "diffusion-fast"]


def pins(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name and version of these and of all that they need, as installed here.

    Raises:
        ValueError: one of them is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [requirement for requirement in wanted if _applies(requirement)]
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            raise ValueError(f"{requirement}: expected it to be installed here") from None
        found[key[0]] = Version(package.version).public  # 2.13.0 of 2.13.0+cpu
        needed = map(Requirement, package.requires or ())
        todo += [one for one in needed if _applies(one, requirement.extras)]
    return dict(sorted(found.items()))


def _applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras))


def main() -> None:
    lines = [f"{name}=={version}\n" for name, version in pins(asked_for()).items()]
    head = "# Made by `python -m benchmarks.tools.constraints`; the tests pass with these.\n"
    with whole(FILE) as (temporary,):
        temporary.write_text(head + "".join(lines), encoding="utf-8")
    print(f"{FILE.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
