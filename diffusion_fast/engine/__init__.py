"""The sampling loop."""

from .engine import Engine
from .sampling import sample

__all__ = ["Engine", "sample"]
