"""``diffusion-fast comfyui``: the node in a ComfyUI folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def comfyui(
    path: Annotated[Path, typer.Argument(help="The folder of ComfyUI, which holds its main.py.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the node out again.")] = False,
) -> None:
    """Put the node into a ComfyUI folder: one file among its custom nodes.

    Restart ComfyUI afterwards. The node is found as "Speed up (diffusion_fast)".
    """
    from ..integrations.comfyui import install

    file = install.remove(path) if remove else install.install(path)
    typer.echo(f"{'removed' if remove else 'wrote'} {file}")
