"""Our models, ops and samplers inside other tools. Each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("comfyui", "diffusers", "k_diffusion")

# Names that a diffusers model_index.json looks up in the package itself.
TOP_LEVEL = (
    "DiffusionFastDDIM",
    "DiffusionFastDDPM",
    "DiffusionFastDEIS",
    "DiffusionFastDPMSolver",
    "DiffusionFastDPMSolverSDE",
    "DiffusionFastDPMSolverSinglestep",
    "DiffusionFastEuler",
    "DiffusionFastEulerAncestral",
    "DiffusionFastHeun",
    "DiffusionFastKDPM2",
    "DiffusionFastKDPM2Ancestral",
    "DiffusionFastLCM",
    "DiffusionFastLMS",
    "DiffusionFastPNDM",
    "DiffusionFastSASolver",
    "DiffusionFastTCD",
    "DiffusionFastUniPC",
    "SchedulerMixin",  # diffusers' own: how it recognizes the schedulers among them
)
_OF_SIGMA = tuple(
    f"DiffusionFast{name}"
    for name in (
        "DPMSolverSDE",
        "Euler",
        "EulerAncestral",
        "Heun",
        "KDPM2",
        "KDPM2Ancestral",
        "LMS",
    )
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in TOP_LEVEL:
        where = "sigma_schedulers" if name in _OF_SIGMA else "schedulers"
        return getattr(importlib.import_module(f"{__name__}.diffusers.{where}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
