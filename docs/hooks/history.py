"""The plots of docs/results.md, drawn from benchmarks/results/history.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks" / "results" / "history.csv"
MARK = "<!-- history -->"
HEADLINES = {  # what is drawn, in this order
    ("unet", "sd15"): "A U-Net step of Stable Diffusion 1.5 at 512 x 512",
    ("unet", "sdxl"): "A U-Net step of SDXL at 1024 x 1024",
    ("unet", "small"): "A U-Net step of the small model",
    ("loop", "small"): "The small model's loop",
    ("pipeline", "small"): "The small model's pipeline",
    ("unet", "emoji"): "A U-Net step of the emoji model",
    ("loop", "emoji"): "The emoji model's loop",
}
VARIANTS = {
    "eager": "tab:gray",
    "diffusers": "tab:orange",
    "openvino": "tab:green",
    "onnxruntime": "tab:purple",
    "engine": "tab:blue",
}
Rows = list[dict[str, str]]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with the mark in it, with the plots in its place."""
    if MARK not in markdown:
        return markdown
    with FILE.open(newline="", encoding="utf-8") as file:
        return markdown.replace(MARK, "\n\n".join(_sections(list(csv.DictReader(file)))))


def _sections(rows: Rows) -> Iterable[str]:
    for (what, model), title in HEADLINES.items():
        chosen = [row for row in rows if (row["what"], row["model"]) == (what, model)]
        kinds = dict.fromkeys(_machine(row) for row in chosen)
        if not kinds:
            continue
        yield f"## {title}"
        for kind in kinds:
            own = [row for row in chosen if _machine(row) == kind]
            yield f"{kind}:"
            yield f'<div class="plot">{_plot(own, title)}</div>'


def _machine(row: dict[str, str]) -> str:
    steps = f", {row['steps']} steps" if row["what"] != "unet" else ""
    threads = f"{row['threads']} thread{'s' * (row['threads'] != '1')}"
    work = f"{row['dtype']}, {row['batch']} image{'s' * (row['batch'] != '1')}{steps}"
    return f"{row['device']}, {threads}, torch {row['torch']}; {work}"


def _plot(rows: Rows, title: str) -> str:
    """An SVG of time against commits, a line per variant."""
    # A commit that was measured twice is two points.
    order = list(dict.fromkeys((row["time"], row["commit"]) for row in sorted(rows, key=_time)))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.5, 3), layout="constrained")
        axes = figure.subplots()
        for variant, color in VARIANTS.items():
            own = sorted((row for row in rows if row["variant"] == variant), key=_time)
            if not own:
                continue
            at = [order.index((row["time"], row["commit"])) for row in own]
            p20, p50, p80 = ([1e3 * float(row[name]) for row in own] for name in _TIMES)
            low = [middle - value for middle, value in zip(p50, p20, strict=True)]
            high = [value - middle for middle, value in zip(p50, p80, strict=True)]
            axes.errorbar(at, p50, (low, high), label=variant, color=color, marker="o", capsize=3)
        axes.set_xticks(range(len(order)), [f"{commit}\n{time[:10]}" for time, commit in order])
        axes.set_ylabel("milliseconds")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.legend(frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return "".join(line.strip() + " " for line in svg.splitlines())


def _time(row: dict[str, str]) -> str:
    return row["time"]


_TIMES = ("p20_s", "p50_s", "p80_s")
