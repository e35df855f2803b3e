"""Samplers as tables of coefficients; :func:`make_table` builds any of them.

A sampler is layered: a :class:`~.grids.Grid` of noise levels, a function from the grid to the
coefficients of its model calls (:class:`~.sampler.Sampler` is both under one name), and what all
share: prediction type, clipping, guidance, image-to-image (:mod:`.registry`).
"""

from .grids import Grid
from .registry import (
    SAMPLERS,
    make_table,
    of_diffusers,
    reads_unconditional,
    table_from_grid,
    table_of,
)
from .sampler import Sampler, SamplerOptions
from .table import StepTable

__all__ = [
    "SAMPLERS",
    "Grid",
    "Sampler",
    "SamplerOptions",
    "StepTable",
    "make_table",
    "of_diffusers",
    "reads_unconditional",
    "table_from_grid",
    "table_of",
]
