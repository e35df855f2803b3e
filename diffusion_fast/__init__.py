"""diffusion_fast: sample and train diffusion models fast, exact to a plain PyTorch reference."""

from typing import Any

from . import _checkout, integrations, ops  # in this order
from ._version import __version__
from .conditioning import PerStep
from .engine import Engine, sample
from .finetuning import finetune
from .models import AutoencoderKL, UNet2DCondition, UNetConfig, VAEConfig
from .ops import use_backend
from .pipelines import Batcher, StableDiffusion
from .schedule import DiffusionSchedule
from .training import Trainer, train_diffusion

__all__ = [
    "AutoencoderKL",
    "Batcher",
    "DiffusionSchedule",
    "Engine",
    "PerStep",
    "StableDiffusion",
    "Trainer",
    "UNet2DCondition",
    "UNetConfig",
    "VAEConfig",
    "__version__",
    "finetune",
    "integrations",
    "ops",
    "sample",
    "train_diffusion",
    "use_backend",
]


del _checkout


def __getattr__(name: str) -> Any:
    """Schedulers for diffusers, which looks them up here and is imported only then."""
    if name in integrations.TOP_LEVEL:
        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
