"""diffusion_fast: sample and train diffusion models fast, exact to a plain PyTorch reference."""

from . import ops
from ._version import __version__
from .engine import Engine, sample
from .models import UNet2DCondition, UNetConfig
from .ops import use_backend
from .schedule import DiffusionSchedule
from .training import Trainer, train_diffusion

__all__ = [
    "DiffusionSchedule",
    "Engine",
    "Trainer",
    "UNet2DCondition",
    "UNetConfig",
    "__version__",
    "ops",
    "sample",
    "train_diffusion",
    "use_backend",
]
