"""diffusion_fast inside diffusers: its pipelines on our models, our samplers, our attention."""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "diffusion_fast.integrations.diffusers needs the package diffusers: pip install diffusers"
    ) from error

from .accelerate import Explanation, accelerate, explain, restore
from .attention_processor import AttentionProcessor
from .schedulers import (
    DiffusionFastDDIM,
    DiffusionFastDDPM,
    DiffusionFastLCM,
    DiffusionFastPNDM,
    DiffusionFastTCD,
)
from .sigma_schedulers import (
    DiffusionFastDPMSolverSDE,
    DiffusionFastEuler,
    DiffusionFastEulerAncestral,
    DiffusionFastHeun,
    DiffusionFastKDPM2,
    DiffusionFastKDPM2Ancestral,
    DiffusionFastLMS,
)
from .solver_schedulers import (
    DiffusionFastDEIS,
    DiffusionFastDPMSolver,
    DiffusionFastDPMSolverSinglestep,
    DiffusionFastSASolver,
    DiffusionFastUniPC,
)

__all__ = [
    "AttentionProcessor",
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
    "Explanation",
    "accelerate",
    "explain",
    "restore",
]
