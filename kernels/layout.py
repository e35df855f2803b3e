"""How images lie in memory. No Triton here: the ops' definitions ask too."""

import torch


def format_of(*values: torch.Tensor) -> torch.memory_format:
    """The layout of a result: channels_last if one of these is, else contiguous.

    An image [B, C, H, W] is where it is dense with its channels innermost; where one channel or one
    pixel fits both layouts, strides decide.
    """
    for value in values:
        if value.dim() == 4 and value.stride(1) == 1 and value.stride(3) == value.shape[1]:
            batch, channels, height, width = value.shape
            rows = height == 1 or value.stride(2) == width * channels
            images = batch == 1 or value.stride(0) == height * width * channels
            if rows and images and channels * height * width != 1:
                return torch.channels_last
    return torch.contiguous_format


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """An image [B, C, H, W] with its channels innermost, which its strides say for one channel too.

    Where one channel fits both layouts PyTorch leaves the strides of the other one, and everything
    that is computed from them would stay in it.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)
