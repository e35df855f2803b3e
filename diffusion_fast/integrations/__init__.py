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
# Those that are not in the module "schedulers".
_ELSEWHERE = {
    "sigma_schedulers": (
        *("DPMSolverSDE", "Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "LMS"),
    ),
    "solver_schedulers": ("DEIS", "DPMSolver", "DPMSolverSinglestep", "SASolver", "UniPC"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in TOP_LEVEL:
        short = name.removeprefix("DiffusionFast")
        where = next((one for one, names in _ELSEWHERE.items() if short in names), "schedulers")
        return getattr(importlib.import_module(f"{__name__}.diffusers.{where}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
