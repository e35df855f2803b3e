"""The notebooks of examples/notebooks as pages, with what their cells printed and drew.

``python -m benchmarks.tools.notebooks`` runs them and keeps that in docs/notebooks/.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "notebooks"
SHOWN = ROOT / "docs" / "notebooks"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The files of the site with a page for each notebook."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = "\n\n".join(_parts(path))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def _parts(path: Path) -> Iterable[str]:
    printed = json.loads((SHOWN / f"{path.stem}.json").read_text(encoding="utf-8"))["printed"]
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            if number == 0:
                yield f"*The notebook `{path.relative_to(ROOT)}`, as it ran on a CPU.*"
            continue
        yield f"```py\n{source}\n```"
        if "machine" in cell["metadata"].get("tags", ()):
            yield "*It prints what your machine says.*"
        if cell["id"] in printed:
            yield f"```text\n{printed[cell['id']].rstrip()}\n```"
        picture = f"{path.stem}-{cell['id']}.png"
        if (SHOWN / picture).is_file():
            yield f"![What the cell draws]({picture})"
