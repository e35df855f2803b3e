"""The node in a ComfyUI folder: one file among its custom nodes."""

from __future__ import annotations

from pathlib import Path

from ...files import AnyPath, whole
from ...ops import checks

# ComfyUI imports each file of custom_nodes under the file's name: it must not be the package's.
NAME = "diffusion_fast_node.py"
FIRST_LINE = '"""diffusion_fast\'s node, put here by `diffusion-fast comfyui`.'
TEXT = f"""{FIRST_LINE}

The Python that runs ComfyUI needs the package: `python -m pip install diffusion-fast`.
\"\"\"

from diffusion_fast.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
"""
# What is in every ComfyUI folder, and beside each other in no other.
MARKS = ("main.py", "nodes.py", "comfy/model_patcher.py", "custom_nodes")


def install(path: AnyPath) -> Path:
    """Put the node into a ComfyUI folder; a node that an earlier version put there is replaced.

    Returns:
        The file.

    Raises:
        ValueError: a folder that is not ComfyUI, or a file of that name that is another's.
        OSError: it can't be written; nothing has changed.
    """
    file = _file(path)
    with whole(file) as (temporary,):
        temporary.write_text(TEXT, encoding="utf-8")
    return file


def remove(path: AnyPath) -> Path:
    """Take the node out of a ComfyUI folder.

    Returns:
        The file that was there.

    Raises:
        ValueError: a folder that is not ComfyUI, or one without the node.
        OSError: it can't be deleted.
    """
    file = _file(path)
    if not file.exists():
        checks.fail("path", "a ComfyUI folder with the node in it", f"{path} without {file.name}")
    file.unlink()
    return file


def _file(path: AnyPath) -> Path:
    """Where the node belongs, checked."""
    folder = Path(path)
    missing = [name for name in MARKS if not (folder / name).exists()]
    if missing:
        checks.fail("path", "a ComfyUI folder", f"{folder} without {', '.join(missing)}")
    file = folder / "custom_nodes" / NAME
    if file.exists() and not _is_ours(file):
        checks.fail("path", f"no file {NAME} of another's in custom_nodes", file)
    return file


def _is_ours(file: Path) -> bool:
    return file.is_file() and file.read_bytes().startswith(FIRST_LINE.encode())
