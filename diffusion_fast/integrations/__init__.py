"""Our models, ops and samplers inside other tools. Each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("comfyui", "diffusers", "k_diffusion")

# Names that a diffusers model_index.json looks up in the package itself.
TOP_LEVEL = (
    "DiffusionFastDDIM",
    "DiffusionFastDDPM",
    "DiffusionFastDPMSolver",
    "DiffusionFastEuler",
    "DiffusionFastEulerAncestral",
    "DiffusionFastHeun",
    "DiffusionFastLCM",
    "DiffusionFastUniPC",
    "SchedulerMixin",  # diffusers' own: how it recognizes the schedulers among them
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in TOP_LEVEL:
        return getattr(importlib.import_module(f"{__name__}.diffusers.schedulers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
