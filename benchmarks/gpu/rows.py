"""The rows of all ops in one file: ``ops.csv``, from what pytest-benchmark stored under ``ops/``.

python -m benchmarks.gpu.rows benchmarks/results/nvidia_h200
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_fast.files import read_json, staged

NAME = "ops.csv"


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each benchmark: what it is, its wall time, and all that it says of itself."""
    for path in sorted((folder / "ops").glob("*.json")):
        for one in read_json(path)["benchmarks"]:
            row = {"op": path.stem, "benchmark": one["name"], "wall_s": one["stats"]["median"]}
            yield row | dict(_flat(one["extra_info"]))


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", number) for inner, number in _flat(value))
        else:
            yield name, value


def write(folder: Path) -> int:
    """How many rows there are.

    Raises:
        ValueError: a file that is no JSON, OSError: one that can't be read or written.
    """
    found = list(rows(folder))
    columns = dict.fromkeys(name for row in found for name in row)
    with staged(folder) as temporary, (temporary / NAME).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(found)
    return len(found)


def main() -> None:
    folder = Path(sys.argv[1])
    print(f"{folder / NAME}: {write(folder)} rows")


if __name__ == "__main__":
    main()
