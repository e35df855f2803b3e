"""Whole models: a prompt in, images out."""

from .batcher import Batcher, BatcherClosed, Pending, QueueFull
from .result import Result
from .stable_diffusion import StableDiffusion
from .tiny import make_tiny

__all__ = [
    "Batcher",
    "BatcherClosed",
    "Pending",
    "QueueFull",
    "Result",
    "StableDiffusion",
    "make_tiny",
]
