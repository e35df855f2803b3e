"""Training."""

from .ema import EMA
from .loss import diffusion_loss, drop_condition
from .trainer import Trainer, TrainingOptions, train_diffusion

__all__ = [
    "EMA",
    "Trainer",
    "TrainingOptions",
    "diffusion_loss",
    "drop_condition",
    "train_diffusion",
]
