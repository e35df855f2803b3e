"""How much of the project there is, and what a step passes through: functions, files, how often.

    python benchmarks/tools/count_calls.py          # statements, imports, calls of a first picture
    python benchmarks/tools/count_calls.py --step   # and the way of one step

The picture is the first `pipe("a cat", steps=2)` of the tiny model after loading, in a process of
its own. Counted are calls of Python functions of this repository, in all threads; generators and
comprehensions are not. Nothing is timed.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("diffusion_fast", "kernels", "benchmarks")
_NO_CALLS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_NO_FUNCTIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
_STEP = ("diffusion_fast/engine/loop.py", "step")

Place = tuple[str, str]  # a file and a function in it


class Calls:
    """Counts calls of the project's functions while it is the profiler.

    Attributes:
        by_place: calls of each function.
        way: calls on the way of the last step, by the functions that lead to them.
    """

    def __init__(self) -> None:
        self.by_place: Counter[Place] = Counter()
        self.way: Counter[tuple[Place, ...]] = Counter()
        self._places: dict[CodeType, Place | None] = {}
        self._stack: list[Place] = []  # from the step on

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        place = self._place(frame.f_code)
        if place is None:
            return
        if event == "call":
            self.by_place[place] += 1
            if place == _STEP:
                self._stack = []
                self.way.clear()
            if self._stack or place == _STEP:
                self._stack.append(place)
                self.way[tuple(self._stack)] += 1
        elif self._stack and self._stack[-1] == place:
            self._stack.pop()

    def _place(self, code: CodeType) -> Place | None:
        if code not in self._places:
            path = Path(os.path.realpath(code.co_filename))
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS
            counts = inside and not code.co_flags & _NO_CALLS and code.co_name not in _NO_FUNCTIONS
            name = str(path.relative_to(ROOT)) if counts else ""
            self._places[code] = (name, code.co_qualname) if counts else None
        return self._places[code]


def draw() -> None:
    """Draw the picture here, and print the calls as JSON."""
    sys.path.insert(0, str(ROOT))
    calls = Calls()
    import diffusion_fast as df

    pipe = df.StableDiffusion.from_pretrained("tiny")
    threading.setprofile(calls)
    sys.setprofile(calls)
    pipe("a cat", steps=2)
    sys.setprofile(None)
    print(json.dumps([list(calls.by_place.items()), list(calls.way.items())]))


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def statements(path: Path) -> int:
    """Statements of a file, without docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        n for n in nodes if isinstance(n, documented) and ast.get_docstring(n) is not None
    ]
    return sum(isinstance(node, ast.stmt) for node in nodes) - len(docstrings)


def circle() -> list[str]:
    """Files that import each other in a circle, package __init__ files left out; none if empty."""
    files = [path for path in sources("diffusion_fast", "kernels") if path.name != "__init__.py"]
    names = {_module(path): path for path in files}
    graph = {
        name: {one for one in _imported(path, name.split(".")) if one in names and one != name}
        for name, path in names.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "diffusion_fast" else ("diffusion_fast", *parts))


def _imported(path: Path, module: list[str]) -> Iterator[str]:
    """Names that may be modules, of everything imported, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*module[: -node.level or 0], *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def show_way(way: list[tuple[list[Place], int]]) -> None:
    """A line for each function below the step, deeper ones further in."""
    for places, count in way:
        file, function = places[-1]
        times = f" x {count}" if count > 1 else ""
        print(f"{'  ' * len(places)}{function}{times}  ({file})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of the project, and a step's way.")
    parser.add_argument("--step", action="store_true", help="print the way of one step")
    parser.add_argument("--draw", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.draw:
        draw()
        return
    counts = {folder: sum(map(statements, sources(folder))) for folder in FOLDERS}
    detail = ", ".join(f"{folder} {count}" for folder, count in counts.items())
    print(f"statements: {sum(counts.values())} ({detail})")
    print(f"circle of imports: {' -> '.join(circle()) or 'none'}")
    done = subprocess.run(
        [sys.executable, __file__, "--draw"], check=True, capture_output=True, text=True
    )
    by_place, way = json.loads(done.stdout.splitlines()[-1])
    by_file: Counter[str] = Counter()
    for (file, _), count in by_place:
        by_file[file] += count
    functions, files = len(by_place), len(by_file)
    print(f"first picture: {by_file.total()} calls of {functions} functions in {files} files")
    for file, count in by_file.most_common(5):
        print(f"  {count} in {file}")
    if wanted.step:
        files = len({places[-1][0] for places, _ in way})
        print(f"one step: {sum(count for _, count in way)} calls in {files} files")
        show_way(way)


if __name__ == "__main__":
    main()
