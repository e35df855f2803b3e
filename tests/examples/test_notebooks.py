"""The notebooks, run cell by cell in this process at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
SMALL: dict[str, dict[str, Any]] = {
    "train_and_sample": {"EPOCHS": 1, "STEPS": 3},
    "write_a_sampler": {"GRIDS": (16, 32, 64, 128)},
    "profile_an_op": {"CHANNELS": 32, "SIDE": 8, "ROUNDS": 2},
    "chapters": {"STEPS": 2, "SLOW": 3},
}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import pyplot as plt

    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    small = 0
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "committed without outputs"
        exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert SMALL[name].keys() <= names.keys()
            names |= SMALL[name]
            small += 1
    assert small == 1
    plt.close("all")
    if name == "write_a_sampler":
        said = dict(line.split(": order ") for line in capsys.readouterr().out.splitlines())
        assert float(said["mine"]) == pytest.approx(2, abs=0.3)
        assert float(said["dpmpp_1"]) == pytest.approx(1, abs=0.3)
