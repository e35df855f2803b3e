"""A U-Net whose batch has images of one half and of two, each with its own time and context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close
from prepared import LIKE_SDXL, TEXT_TIME, conditions, unet
from torch import Tensor

from diffusion_fast.engine.rewrites.rows import Rows, RowsUNet, side_by_side

GRID = torch.tensor([951.0, 400.5, 17.0, 3.0])
IMAGE = [1, 0, 0, 2]  # an image of two halves between two of one
TIMES = [2, 0, 3]


def outputs(model: Any, rewrites: Any, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Of a batch of rows, and of each of them by itself."""
    network = RowsUNet(model, images=3, times=2 * len(GRID), rewrites=rewrites)
    x = torch.randn(3, model.config.in_channels, 8, 8).to(model.conv_in.weight)
    given = [conditions(model, 1, tokens) for tokens in lengths]
    of_row = torch.tensor(TIMES)[IMAGE]
    for r, one in enumerate(given):  # rows of pooled text have times of their own
        if network.pooled:
            network.write_times(GRID[of_row[r] : of_row[r] + 1], r, one)
        else:
            network.write_times(GRID, 1)
    at = torch.arange(4) if network.pooled else of_row + 1
    made = [network.condition(one)[0] for one in given]
    kv = side_by_side(made, len(IMAGE), max(lengths))
    seen = None if len(set(lengths)) == 1 else torch.tensor(lengths)
    rows = Rows(torch.tensor(IMAGE), torch.tensor(TIMES) + 1, at, kv, seen)
    result = network(x, rows)
    with torch.no_grad():
        alone = [model(x[i : i + 1], GRID[of_row[r]], **given[r]) for r, i in enumerate(IMAGE)]
    return result, torch.cat(alone)


@pytest.mark.parametrize("rewrites", ["all", "none", ["shared_prefix", "fused_qkv"]])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"down_block_types": ("DownBlock2D", "DownBlock2D")},
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
    ],
)
def test_each_row_is_what_it_is_alone(changes: dict[str, Any], rewrites: Any) -> None:
    result, expected = outputs(unet(torch.float64, **changes), rewrites, [5, 5, 5, 5])
    assert_close(result, expected)


@pytest.mark.parametrize("changes", [{}, LIKE_SDXL | TEXT_TIME])
def test_contexts_of_several_lengths(changes: dict[str, Any]) -> None:
    result, expected = outputs(unet(torch.float64, **changes), "all", [5, 1, 9, 3])
    assert_close(result, expected)


def test_a_row_of_nan_stays_by_itself() -> None:
    model = unet(torch.float64)
    network = RowsUNet(model, images=2, times=4)
    network.write_times(GRID, 0)
    kv = side_by_side(network.condition(torch.randn(2, 5, 24).double()), 2, 5)
    same = torch.tensor([0, 1])
    rows = Rows(same, same, same, kv, None)
    x = torch.randn(2, model.config.in_channels, 8, 8).double()
    before = network(x, rows)
    x[1] = float("nan")
    after = network(x, rows)
    assert torch.equal(before[0], after[0])
    assert after[1].isnan().all()


def test_bad_contexts_and_sizes_are_refused() -> None:
    model = unet()
    network = RowsUNet(model, images=2, times=4)
    with pytest.raises(ValueError, match=r"context: expected shape \[B or 1, L, cross_attention"):
        network.condition(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match="context: expected text states, got None"):
        network.condition(None)
    with pytest.raises(ValueError, match="slots, max_steps: expected a table of times"):
        RowsUNet(model, images=2, times=2**24)
