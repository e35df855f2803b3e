"""Whole models: a prompt in, images out."""

from .result import Result
from .stable_diffusion import StableDiffusion
from .tiny import make_tiny

__all__ = ["Result", "StableDiffusion", "make_tiny"]
