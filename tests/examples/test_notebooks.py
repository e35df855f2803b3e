"""The notebooks, run cell by cell in this process at a small size."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.tools.notebooks import FOLDER, SHOWN, cells, code_of, run

SMALL: dict[str, dict[str, Any]] = {
    "train_and_sample": {"EPOCHS": 1, "STEPS": 3},
    "write_a_sampler": {"GRIDS": (16, 32, 64, 128)},
    "profile_an_op": {"CHANNELS": 32, "SIDE": 8, "ROUNDS": 2},
    "chapters": {"STEPS": 2, "SLOW": 3},
}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name: str) -> None:
    said: list[str] = []
    drawn = set()
    for cell, printed, figure in run(name, SMALL[name]):
        assert not cell["outputs"], "committed without outputs"
        said += printed.splitlines()
        if figure is not None:
            drawn.add(f"{name}-{cell['id']}.png")
    assert drawn == {path.name for path in SHOWN.glob(f"{name}-*.png")}, "the site shows others"
    if name == "write_a_sampler":
        orders = dict(line.split(": order ") for line in said)
        assert float(orders["mine"]) == pytest.approx(2, abs=0.3)
        assert float(orders["dpmpp_1"]) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("name", SMALL)
def test_the_site_shows_what_this_code_made(name: str) -> None:
    """Otherwise: python -m benchmarks.tools.notebooks."""
    shown = json.loads((SHOWN / f"{name}.json").read_text(encoding="utf-8"))
    assert shown["code"] == code_of(name)
    assert shown["printed"].keys() <= {cell["id"] for cell in cells(name)}
