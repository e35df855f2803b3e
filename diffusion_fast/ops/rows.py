"""Rows of tables that lie on the device, picked there."""

from __future__ import annotations

import torch
from torch import Tensor


def picked_row(table: Tensor, row: Tensor) -> Tensor:
    """[B or 1, C]: the row of a table [R, B or 1, C] that ``row``, int64 [1], names; or for int64
    [B] each image's own."""
    if len(row) == 1:
        return table.index_select(0, row)[0]
    if table.shape[1] == 1:
        return table[:, 0].index_select(0, row)
    return table[row, torch.arange(len(row), device=row.device)]
