"""Settings of a picture as AUTOMATIC1111's web UI writes them, which many programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from .._version import __version__
from ..samplers import SAMPLERS
from ..samplers.names import A1111_SCHEDULES

_SCHEDULES = {name: label for label, name in reversed(A1111_SCHEDULES.items())}


def infotext(
    settings: Mapping[str, Any],
    seed: int,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    model: str = "",
    loras: Mapping[str, float] | None = None,
) -> str:
    """Prompt, negative prompt, and a line of everything else. No folders: files have names only.

    A sampler that AUTOMATIC1111 doesn't have is written by our name, a schedule of diffusers not at
    all.

    Args:
        settings: those of a :class:`~.result.Result`.
        seed: the picture's own.
        prompt: the picture's own.
        negative_prompt: the picture's own.
        model: name or path of the model.
        loras: scales by names or paths.
    """
    height, width = settings["size"]
    asked = settings["sampler"]  # by any of its names
    sampler = SAMPLERS[asked].a1111 if asked in SAMPLERS else None
    facts = {
        "Steps": settings["steps"],
        "Sampler": sampler or asked,
        "Schedule type": _SCHEDULES.get(settings["timestep_spacing"]),
        "CFG scale": settings["guidance_scale"],
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": _name(model),
        "Denoising strength": settings["strength"],
        "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,
        "LoRAs": ", ".join(f"{_name(name)}: {scale:g}" for name, scale in (loras or {}).items()),
        "Version": f"diffusion_fast {__version__}",
    }
    lines = [prompt, f"Negative prompt: {negative_prompt}" if negative_prompt else ""]
    lines.append(
        ", ".join(f"{name}: {_quoted(v)}" for name, v in facts.items() if v not in (None, ""))
    )
    return "\n".join(filter(None, lines))


def _name(path: str) -> str:
    """The last part of a path, without the suffix of weights."""
    return re.sub(r"\.(safetensors|ckpt|pth?|bin|sft)$", "", PurePath(path).name)


def _quoted(value: Any) -> str:
    """A value, as JSON where it holds what parts values from one another."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text
