"""diffusion_fast: sample and train diffusion models fast, exact to a plain PyTorch reference."""

from . import ops
from ._version import __version__
from .ops import use_backend

__all__ = ["__version__", "ops", "use_backend"]
