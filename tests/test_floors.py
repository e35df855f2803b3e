"""Imports point down only, kernels < ops < models, samplers < engine, training < pipelines <
serving, command line, and never in circles."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from benchmarks.tools.count_calls import circle

ROOT = Path(__file__).parents[1]
FLOORS = {
    "_checkout": 0,
    "_version": 0,
    "cores": 0,
    "files": 0,
    "kernels": 0,
    "ops": 1,
    "hardware": 1,
    "turns": 1,
    "images": 2,
    "models": 2,
    "schedule": 2,
    "prediction": 2,
    "guidance": 2,
    "conditioning": 2,
    "edits": 2,
    "samplers": 2,
    "engine": 3,
    "training": 3,
    "pipelines": 4,
    "finetuning": 5,
    "integrations": 4,
    "serving": 5,
    "cli": 6,
    "": 7,  # the package's own __init__ may name everything
    "__main__": 7,
}
SOURCES = [*(ROOT / "diffusion_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


def module_of(path: Path) -> tuple[str, ...]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["diffusion_fast", *parts]
    return tuple(parts)


def imports(path: Path) -> list[tuple[str, ...]]:
    """Absolute names of everything imported, at the top and inside functions."""
    found: list[tuple[str, ...]] = []
    package = module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found += [(*module, alias.name) for alias in node.names]
    return found


def room(module: tuple[str, ...]) -> str:
    name = module[1] if len(module) > 1 else ""
    return "" if name == "__init__" else name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room(module_of(path))
    assert here in FLOORS, f"{here}: give it a floor"
    for module in imports(path):
        if module[0] != "diffusion_fast":
            continue
        there = room(module)
        there = there if there in FLOORS else ""
        assert there == here or FLOORS[there] <= FLOORS[here], f"{here} imports {'.'.join(module)}"


def test_no_circles() -> None:
    """No file imports itself, however far round: inside functions and for types alone too."""
    assert not circle()


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for module in imports(path):
        assert module[0] in {"torch", "triton", "diffusion_fast"} | sys.stdlib_module_names, module
        assert module[0] != "diffusion_fast" or module[1] == "kernels", module
