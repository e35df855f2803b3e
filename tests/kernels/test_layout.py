"""How images lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from diffusion_fast.kernels.layout import channels_last, format_of


@pytest.mark.parametrize("size", [(2, 1, 5, 4), (1, 1, 1, 1), (2, 3, 5, 4), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_strides_say_that_channels_are_innermost(size: tuple[int, ...], last: bool) -> None:
    x = torch.randn(size)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    result = channels_last(x)
    assert torch.equal(result, x)
    _, channels, height, width = size
    assert result.stride() == (height * width * channels, 1, width * channels, channels)
    if size != (1, 1, 1, 1):
        assert format_of(result) == torch.channels_last
        y = F.conv2d(result, torch.randn(6, channels, 1, 1))
        assert format_of(y) == torch.channels_last


def test_an_image_of_one_channel_is_not_copied() -> None:
    x = torch.randn(2, 1, 5, 4)
    assert channels_last(x).data_ptr() == x.data_ptr()
