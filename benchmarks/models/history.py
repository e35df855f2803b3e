"""Results over time: a line of a CSV file for each variant of each recorded run, never rewritten.

``diffusion-fast bench --record`` appends to it; the documentation site draws it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_fast.files import whole

from .store import GROUP, Group, Results, group_of

HISTORY = "history.csv"
MACHINE = ("device", "threads", "torch")
COLUMNS = ("time", "commit", *MACHINE, *GROUP, "variant", "p20_s", "p50_s", "p80_s")
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """The lines of a history; none where there is no file.

    Raises:
        ValueError: a file that is no history.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}")
    return rows


def lines(rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> Rows:
    """What a history keeps of the rows of one environment: those that ran."""
    return [
        {name: str({**facts, **row}.get(name) or "") for name in COLUMNS}
        for row in rows
        if row.get("p50_s") is not None and "reason" not in row
    ]


def record(path: Path, results: Results, groups: Iterable[Group]) -> int:
    """Append what was measured of some groups; a line that is there already is not written twice.

    Returns:
        How many lines are new.
    """
    wanted, old = set(groups), read(path)
    known = {_key(line) for line in old}
    found: Rows = []
    for row in results.rows:
        if group_of(row) in wanted:
            found += lines([row], results.facts(row))
    new = [line for line in found if _key(line) not in known]
    write(path, old + new)
    return len(new)


def write(path: Path, rows: Rows) -> None:
    """All lines, whole or not at all."""
    with (
        whole(path) as (temporary,),
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _key(line: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(line[name] for name in ("time", *MACHINE, *GROUP, "variant"))
