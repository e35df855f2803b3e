"""Regressions against older results, and the floors that speed is held to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .store import Group, Results, group_of

SLOWER = 1.05  # a change below 5 % is none, however little the samples vary
# Times that diffusers takes over ours, on a CPU in float32 for one image with guidance.
FLOORS = {
    ("unet", "sd15", "model"): 1.15,
    ("unet", "sd15", "engine"): 1.3,
    ("loop", "small", "engine"): 1.5,
}


def regressions(old: Results, new: Results, groups: Iterable[Group]) -> list[str]:
    """Rows of ``groups`` that are slower than before by more than noise, or that no longer run.

    A row is slower if its median is 5 % longer and four fifths of its samples are longer than four
    fifths of the old ones. A row that the old results lack is not compared.

    Raises:
        ValueError: results of another device or number of threads.
    """
    before = {_key(row): row for row in old.rows}
    wanted, found = set(groups), []
    for row in new.rows:
        then = before.get(_key(row))
        if then is None or group_of(row) not in wanted or "reason" in then:
            continue
        _check_machine(old.facts(then), new.facts(row))
        name = f"{group_of(row)}, {row['variant']}"
        if "reason" in row:
            found.append(f"{name}: ran before, now: {row['reason']}")
        elif row["p50_s"] > SLOWER * then["p50_s"] and row["p20_s"] > then["p80_s"]:
            times = f"{1e3 * then['p50_s']:.4g} ms before, {1e3 * row['p50_s']:.4g} ms now"
            found.append(f"{name}: {row['p50_s'] / then['p50_s']:.2f} times as long, {times}")
    return found


def compared(old: Results, new: Results, groups: Iterable[Group]) -> int:
    """How many rows both have numbers for."""
    before = {_key(row) for row in old.rows if "reason" not in row}
    wanted = set(groups)
    return sum(group_of(row) in wanted and _key(row) in before for row in new.rows)


def missed_floors(results: Results, groups: Iterable[Group]) -> list[str]:
    """Rows under their floor, or that did not run.

    Raises:
        ValueError: none of the groups has a floor.
    """
    missed, checked = [], 0
    for group in groups:
        for row in results.of(group):
            floor = FLOORS.get((group.what, group.model, row["variant"]))
            if floor is None or (group.dtype, group.batch) != ("float32", 1):
                continue
            checked += 1
            ratio = row.get("over_diffusers")
            if ratio is None:
                why = row.get("reason", "diffusers did not run")
                missed.append(f"{group}, {row['variant']}: not known: {why}")
            elif ratio < floor:
                missed.append(
                    f"{group}, {row['variant']}: {ratio:.2f} times as fast as diffusers,"
                    f" expected {floor}"
                )
    if not checked:
        known = ", ".join(f"{what} of {model}" for what, model, _ in FLOORS)
        raise ValueError(f"--assert: expected a run of {known} (float32, batch 1), got none")
    return missed


def _key(row: dict[str, Any]) -> tuple[Group, str]:
    return group_of(row), row["variant"]


def _check_machine(old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in ("device", "threads"):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"--compare: expected results of the same {name}, {new.get(name)},"
                f" got {old.get(name)}"
            )
