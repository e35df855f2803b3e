"""Rows on disk: written group by group, so that a run that is stopped goes on where it was."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_fast.files import read_json, whole, write_json

from ..lib.environment import identity

JSON, CSV = "results.json", "results.csv"
GROUP = ("what", "model", "dtype", "batch", "steps")
ERRORS = ("error", "truth")
COLUMNS = (
    *GROUP,
    "weights",
    "shape",
    "variant",
    "backend",
    "reason",
    *("p20_s", "p50_s", "p80_s", "samples", "turns", "steps_per_s", "images_per_s"),
    *("over_eager", "over_diffusers", "over_last", "of_bare"),
    *("limit_steps_per_s", "share_of_limit"),
    *ERRORS,
    *("peak_bytes", "launches", "bytes", "flops"),
    *(
        "joules_per_step",
        "joules_per_image",
        "sm_clock_MHz",
        "memory_clock_MHz",
        "power_W",
        "temperature_C",
    ),
    *("throttled", "does"),
    *("calls", "share", "gflops_per_s", "alone_gflops_per_s"),
)
MACHINE = (
    *("device", "commit", "source", "torch", "triton", "diffusers", "openvino", "onnxruntime"),
    *("cuda", "driver"),
    *("threads", "time"),
)


@dataclass(frozen=True)
class Group:
    """What is measured together, in turns.

    Attributes:
        what: ``"unet"``, ``"loop"``, ``"pipeline"``, ``"vae"``, ``"text"``, ``"training"``,
            ``"ladder"`` or ``"profile"``.
        model, dtype: names.
        batch: images.
        steps: of the sampler; 1 where one network is called once.
    """

    what: str
    model: str
    dtype: str
    batch: int
    steps: int

    def __str__(self) -> str:
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        return f"{self.what}, {self.model}, {self.dtype}, batch {self.batch}{steps}"


def group_of(row: Mapping[str, Any]) -> Group:
    return Group(**{name: row[name] for name in GROUP})


class Results:
    """The rows of a folder. Each names the environment it was measured in.

    Args:
        folder: of ``results.json`` and ``results.csv``; it may not exist yet.

    Raises:
        ValueError: a file that is no results; OSError: it can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environments: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        path = folder / JSON
        if path.exists():
            content = read_json(path)
            if content.keys() != {"environments", "rows"}:
                raise ValueError(f"{path}: expected results of `diffusion-fast bench`")
            self.environments, self.rows = content["environments"], content["rows"]

    def of(self, group: Group) -> list[dict[str, Any]]:
        return [row for row in self.rows if group_of(row) == group]

    def current(self, group: Group, facts: Mapping[str, Any]) -> bool:
        """Whether the group was measured with this code on this machine."""
        rows = self.of(group)
        return bool(rows) and all(row["environment"] == identity(dict(facts)) for row in rows)

    def add(
        self, group: Group, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        """Put the group's rows in the place of older ones, and write the files."""
        name = identity(dict(facts))
        fresh = [{**asdict(group), **row, "environment": name} for row in rows]
        self.rows = [row for row in self.rows if group_of(row) != group] + fresh
        self.environments[name] = dict(facts)
        used = {row["environment"] for row in self.rows}
        self.environments = {k: v for k, v in self.environments.items() if k in used}
        write_json({"environments": self.environments, "rows": self.rows}, self.folder / JSON)
        self._write_csv()

    def facts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The environment of a row."""
        return self.environments[row["environment"]]

    def _write_csv(self) -> None:
        with (
            whole(self.folder / CSV) as (temporary,),
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, (*COLUMNS, *MACHINE), extrasaction="ignore")
            writer.writeheader()
            for row in self.rows:
                writer.writerow({**{k: self.facts(row).get(k) for k in MACHINE}, **row})
