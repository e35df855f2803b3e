"""The notebooks of examples/notebooks, run cell by cell in this process, as the tests do.

    python -m benchmarks.tools.notebooks [NAME ...]

writes what their cells print and draw to docs/notebooks/, which the site shows beside their code.
A cell with the tag ``machine`` says how fast this machine is: what it prints stays out.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from diffusion_fast.files import whole

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "notebooks"
SHOWN = ROOT / "docs" / "notebooks"


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["cells"]
    return found


def code_of(name: str) -> str:
    """A digest of a notebook's code: outputs of another one are out of date."""
    code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def run(name: str, changes: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Each code cell once it has run, what it printed, and the figure that it drew, or None.

    Args:
        name: the notebook's name, without its folder and suffix.
        changes: what replaces the values that the cell tagged ``parameters`` gives.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {}
    for cell in cells(name):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert changes.keys() <= names.keys(), (
                f"{name}: expected among its parameters: {changes}"
            )
            names.update(changes)
        yield cell, printed.getvalue(), plt.gcf() if plt.get_fignums() else None
        plt.close("all")


def write(name: str) -> None:
    """Run a notebook as it is and keep what its cells print and draw."""
    said: dict[str, str] = {}
    drawn: dict[str, bytes] = {}
    for cell, printed, figure in run(name, {}):
        if printed and "machine" not in cell["metadata"].get("tags", ()):
            said[cell["id"]] = printed
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
            drawn[cell["id"]] = picture.getvalue()
    text = json.dumps({"code": code_of(name), "printed": said}, indent=1) + "\n"
    outputs = {SHOWN / f"{name}-{cell}.png": picture for cell, picture in drawn.items()}
    outputs[SHOWN / f"{name}.json"] = text.encode()
    with whole(*outputs) as temporary:
        for path, data in zip(temporary, outputs.values(), strict=True):
            path.write_bytes(data)
    for path in set(SHOWN.glob(f"{name}-*.png")) - outputs.keys():
        path.unlink()


if __name__ == "__main__":
    for chosen in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        write(chosen)
        print(f"{chosen}: written")
