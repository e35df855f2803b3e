"""The sampling loop."""

from .engine import Engine, sample

__all__ = ["Engine", "sample"]
