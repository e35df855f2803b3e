"""Pictures of results: steps per second beside the baselines and the limit, and the ladder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .report import title
from .store import Group, Results

IMAGES = ("pipeline", "vae", "text", "training")  # not measured in steps


def draw(results: Results, groups: Iterable[Group]) -> list[Path]:
    """A PNG for each group that has numbers, into the results' folder.

    Raises:
        ImportError: without matplotlib.
    """
    paths = []
    for group in groups:
        rows = [row for row in results.of(group) if "reason" not in row]
        if rows and group.what != "profile":
            paths.append(_draw(group, rows, results))
    return paths


def _draw(group: Group, rows: list[dict[str, Any]], results: Results) -> Path:
    from matplotlib.figure import Figure

    unit = "images_per_s" if group.what in IMAGES else "steps_per_s"
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["variant"] for row in rows][::-1]
    values = [row[unit] for row in rows][::-1]
    spread = [_spread(row, unit) for row in rows][::-1]
    colours = ["tab:blue" if _ours(group, name) else "tab:gray" for name in names]
    bars = axes.barh(names, values, color=colours, xerr=list(zip(*spread, strict=True)))
    axes.bar_label(bars, labels=[f"{v:.4g}" for v in values], padding=4)
    limit = rows[0].get("limit_steps_per_s")
    if limit is not None:
        axes.axvline(limit, color="tab:red", linestyle="--")
        axes.annotate("limit", (limit, -0.4), color="tab:red", ha="right")
    axes.margins(x=0.15)
    axes.set_xlabel(f"{unit.replace('_per_s', '')} per second (line: p20 to p80)")
    axes.set_title(title(group, results.facts(rows[0])).replace("; ", "\n"), fontsize="small")
    name = "_".join(map(str, (group.what, group.model, group.dtype, f"batch{group.batch}")))
    path = results.folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path


def _ours(group: Group, name: str) -> bool:
    return name != "eager" if group.what == "ladder" else name in ("model", "engine")


def _spread(row: dict[str, Any], unit: str) -> tuple[float, float]:
    """How far p80 and p20 of the time are from the median, in the bar's unit."""
    slow, fast = (row[unit] * row["p50_s"] / row[name] for name in ("p80_s", "p20_s"))
    return row[unit] - slow, fast - row[unit]
