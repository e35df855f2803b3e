"""How images lie in memory. No Triton here: the ops' definitions ask too."""

import torch


def channels_last(value: torch.Tensor) -> bool:
    """Whether [B, C, H, W] is dense with its channels innermost.

    Where one channel or one pixel fits both layouts, strides decide.
    """
    if value.dim() != 4:
        return False
    (batch, channels, height, width), strides = value.shape, value.stride()
    rows = height == 1 or strides[2] == width * channels
    images = batch == 1 or strides[0] == height * width * channels
    inner = strides[1] == 1 and strides[3] == channels
    return inner and rows and images and channels * height * width != 1


def format_of(*values: torch.Tensor) -> torch.memory_format:
    """The layout of a result: channels_last if one of these is, else contiguous."""
    return torch.channels_last if any(map(channels_last, values)) else torch.contiguous_format
