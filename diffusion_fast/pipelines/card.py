"""What a model's card says of how to sample: ``README.md`` in its folder.

The front matter is that of the Hugging Face hub, whose widget reads the same two values::

    ---
    inference:
      parameters:
        num_inference_steps: 20
        guidance_scale: 3.0
    ---
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"


@dataclass(frozen=True)
class Defaults:
    """What a call of the pipeline takes where it is not told.

    Attributes:
        steps: number of the sampler's steps.
        guidance_scale: how closely to follow the prompt.
    """

    steps: int = 20
    guidance_scale: float = 7.5


LCM = Defaults(steps=4, guidance_scale=8.5)  # of diffusers' pipeline for such models


def read_defaults(folder: Path, usual: Defaults | None = None) -> Defaults:
    """The defaults of the folder's card, or the usual ones where it says nothing.

    A value that can't be is left out with a warning that names the file and the value.

    Args:
        folder: the model's.
        usual: what is usual for its kind of model.
    """
    usual, file = usual or Defaults(), folder / CARD
    if not file.is_file():
        return usual
    text = file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        warnings.warn(f"{file}: its front matter is no YAML: {error}", stacklevel=2)
        return usual
    for name in ("inference", "parameters"):
        found = found.get(name) if isinstance(found, dict) else None
    return _defaults(file, found, usual) if isinstance(found, dict) else usual


def write_defaults(defaults: Defaults, folder: Path) -> None:
    """Write a card, unless it would say the usual."""
    if defaults == Defaults():
        return
    values = {"num_inference_steps": defaults.steps, "guidance_scale": defaults.guidance_scale}
    front = yaml.safe_dump({"inference": {"parameters": values}}, sort_keys=False)
    (folder / CARD).write_text(f"---\n{front}---\n", encoding="utf-8")


def _defaults(file: Path, found: dict[str, Any], usual: Defaults) -> Defaults:
    steps = found.get("num_inference_steps", usual.steps)
    scale = found.get("guidance_scale", usual.guidance_scale)
    if type(steps) is not int or steps < 1:
        warnings.warn(f"{file}: num_inference_steps: no number of steps: {steps!r}", stacklevel=3)
        steps = usual.steps
    if type(scale) not in (int, float) or not math.isfinite(scale):
        warnings.warn(f"{file}: guidance_scale: no finite number: {scale!r}", stacklevel=3)
        scale = usual.guidance_scale
    return Defaults(steps, float(scale))
