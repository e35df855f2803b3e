"""Tables of results: for the terminal, and in a README between markers.

    python -m benchmarks.models.report --readme README.md

rewrites what stands between ``<!-- bench:cpu_avx2/unet -->`` and ``<!-- /bench:cpu_avx2/unet -->``
with the table of that part of ``benchmarks/results/cpu_avx2``; any folder of results, and any of
unet, loop, pipeline, vae, text, training, ladder and profile.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_fast.files import whole

from .networks import KINDS
from .run import WHATS
from .store import Group, Results, group_of

RESULTS = Path("benchmarks") / "results"
LEAST_WIDTH = 110  # of a table in the terminal; a narrower one would lose columns
MARKERS = re.compile(
    r"(?P<begin><!-- bench:(?P<folder>[\w.-]+)/(?P<what>\w+) -->\n)"
    r".*?(?P<end><!-- /bench:(?P=folder)/(?P=what) -->)",
    re.DOTALL,
)
BEGIN = re.compile(r"<!-- bench:.*? -->")


def _spread(row: Mapping[str, Any]) -> str:
    return f"{1e3 * row['p20_s']:.4g} to {1e3 * row['p80_s']:.4g}"


def _number(name: str, pattern: str, scale: float = 1) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: format(scale * row[name], pattern) if row.get(name) is not None else ""


Column = Callable[[Mapping[str, Any]], str]
COLUMNS: dict[str, Column] = {
    "ms": _number("p50_s", ".4g", 1e3),
    "p20 to p80": _spread,
    "calls": _number("calls", ".4g"),
    "of the step": _number("share", ".1%"),
    "GF/s": _number("gflops_per_s", ".4g"),
    "GF/s alone": _number("alone_gflops_per_s", ".4g"),
    "steps/s": _number("steps_per_s", ".4g"),
    "images/s": _number("images_per_s", ".4g"),
    "of the limit": _number("share_of_limit", ".1%"),
    "x eager": _number("over_eager", ".2f"),
    "x diffusers": _number("over_diffusers", ".2f"),
    "x last": _number("over_last", ".3f"),
    "of the bare ratio": _number("of_bare", ".2f"),
    "error": _number("error", ".1e"),
    "MB": _number("peak_bytes", ".3g", 1e-6),
    "J/step": _number("joules_per_step", ".3g"),
    "J/image": _number("joules_per_image", ".3g"),
}
LEFT_OUT = {  # where they say nothing new
    "images/s": {"unet", "ladder"},
    "steps/s": {"pipeline", "vae", "text", "training"},
    "J/step": {"loop", "pipeline", "ladder"},
}


def table(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows that ran; columns without any content are left out."""
    ran = [row for row in rows if "reason" not in row]
    whats = {row["what"] for row in ran}
    columns = {
        name: [cell(row) for row in ran]
        for name, cell in COLUMNS.items()
        if not whats & LEFT_OUT.get(name, set())
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    names = [row["variant"] + " (throttled)" * bool(row.get("throttled")) for row in ran]
    return ["variant", *columns], [
        list(line) for line in zip(names, *columns.values(), strict=True)
    ]


def notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each row that could not run, and for what is not as it is elsewhere."""
    rows = list(rows)
    lines = [f"not run: {row['variant']}: {row['reason']}" for row in rows if "reason" in row]
    if any("turns" in row for row in rows):
        lines.append("measured one after the other: there was no memory for all of them at once")
    against = {row.get("truth") for row in rows if "error" in row} - {None, "float64", "float32"}
    return lines + [f"errors are differences from the result of: {name}" for name in against]


def title(group: Group, facts: Mapping[str, Any]) -> str:
    """What was measured, on what, and that the weights are random."""
    what = {"unet": "U-Net step", "vae": "decoding", "text": "text encoders"}
    what["training"] = "training step, forward and backward"
    what["profile"] = "the engine's step by op, mean in a loop"
    steps = f" of {group.steps} steps" if group.steps > 1 else ""
    model = f"{what.get(group.what, group.what)}{steps}: {KINDS[group.model].title}, random weights"
    images = f"{group.batch} image{'s' * (group.batch != 1)}"
    images += f"{' with guidance' * (group.what != 'training')}, {group.dtype}"
    return f"{model}; {images}; {_machine(facts)}"


def _machine(facts: Mapping[str, Any]) -> str:
    if facts.get("driver"):
        return f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}"
    device = f"CPU, no GPU: {facts['device']}, {facts['threads']} thread"
    return device + f"{'s' * (facts['threads'] != 1)}, torch {facts['torch']}"


def show(results: Results, groups: Iterable[Group]) -> None:
    """The groups' tables, in the terminal."""
    from rich.console import Console
    from rich.table import Table

    width = Console().width
    console = Console(width=max(width, LEAST_WIDTH))
    for group in groups:
        rows = results.of(group)
        if not rows:
            continue
        console.print(f"\n{title(group, results.facts(rows[0]))}", highlight=False)
        header, lines = table(rows)
        view = Table(box=None)
        for name in header:
            view.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
        for line in lines:
            view.add_row(*line)
        console.print(view)
        for note in notes(rows):
            console.print(f" {note}", highlight=False)


def markdown(results: Results, what: str) -> str:
    """All groups of a kind, as Markdown.

    Raises:
        ValueError: there are none.
    """
    groups = list(dict.fromkeys(group_of(row) for row in results.rows))
    parts = []
    for group in groups:
        if group.what != what:
            continue
        rows = results.of(group)
        facts = results.facts(rows[0])
        header, lines = table(rows)
        commit = f", commit {facts['commit']}" if facts.get("commit") else ""
        parts.append(f"{title(group, facts)}{commit}:")
        rule = ["---", *["---:"] * (len(header) - 1)]
        parts.append("\n".join(map(_line, [header, rule, *lines])))
        parts += ["\n".join(f"- {line}" for line in notes(rows))] * bool(notes(rows))
    if not parts:
        raise ValueError(f"{results.folder}: expected results of {what}, found none")
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rewrite(text: str, results: Path) -> str:
    """A README with its tables made anew; twice gives the same.

    Raises:
        ValueError: a marker without an end, of no part of a benchmark, or without results.
    """

    def fresh(found: re.Match[str]) -> str:
        if found["what"] not in WHATS:
            raise ValueError(f"{found['begin'].strip()}: expected one of {', '.join(WHATS)}")
        content = markdown(Results(results / found["folder"]), found["what"])
        return f"{found['begin']}\n{content}\n{found['end']}"

    complete = {found.start() for found in MARKERS.finditer(text)}
    for begin in BEGIN.finditer(text):
        if begin.start() not in complete:
            expected = "expected <!-- bench:FOLDER/PART --> on a line, and its end after it"
            raise ValueError(f"{begin[0]}: {expected}")
    return MARKERS.sub(fresh, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite a README's tables from results.")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path: Path = arguments.readme
    before = path.read_text(encoding="utf-8")
    after = rewrite(before, arguments.results)
    if after != before:
        with whole(path) as (temporary,):
            temporary.write_text(after, encoding="utf-8")
    print(f"{path}: {'rewritten' if after != before else 'up to date'}")


if __name__ == "__main__":
    main()
