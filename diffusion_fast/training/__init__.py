"""Training."""

from .batches import Batches
from .checkpoint import Checkpoints
from .distributed import local_device
from .ema import EMA
from .image_folder import ImageFolder
from .latent_cache import LatentData, cache_latents
from .log import CsvLog, SampleGrids, TensorBoardLog
from .loss import diffusion_loss, drop_condition
from .options import TrainingOptions
from .timestep_sampling import ImportanceSampler, LogitNormalSampler, UniformSampler
from .trainer import Trainer, train_diffusion
from .validation import validation_loss
from .watch import Progress
from .weighting import P2, Debiased, LossWeighting, MinSNR

__all__ = [
    "EMA",
    "P2",
    "Batches",
    "Checkpoints",
    "CsvLog",
    "Debiased",
    "ImageFolder",
    "ImportanceSampler",
    "LatentData",
    "LogitNormalSampler",
    "LossWeighting",
    "MinSNR",
    "Progress",
    "SampleGrids",
    "TensorBoardLog",
    "Trainer",
    "TrainingOptions",
    "UniformSampler",
    "cache_latents",
    "diffusion_loss",
    "drop_condition",
    "local_device",
    "train_diffusion",
    "validation_loss",
]
