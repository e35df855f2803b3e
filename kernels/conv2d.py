"""A convolution with its neighbours as an implicit GEMM: see matmul.py for the formula and kernel.

Layout: any strides, in and out; fast where x, x2, the weight and y are channels_last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, matmul, product
from .layout import format_of


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    """y [B, O, H', W'], channels_last if x is or the weight is, else contiguous."""
    form = format_of(x, weight)
    last = form == torch.channels_last
    left, right, top, bottom = padding
    (batch, channels, height, width), (columns, _, rows, window) = x.shape, weight.shape
    out_height = (height + top + bottom - rows) // stride + 1
    out_width = (width + left + right - window) // stride + 1
    y = torch.empty(
        (batch, columns, out_height, out_width),
        dtype=x.dtype,
        device=x.device,
        memory_format=form,
    )
    if not y.numel():
        return y
    if packed:
        weight = packed[0]
    if residual is not None:
        residual = launch.laid_out_like(residual, y)
    pixels = out_height * out_width
    epilogue = (bias, add, None, None, None)
    p = product.Product(
        x=x,
        x_strides=x.stride(),
        x2=x2,
        x2_strides=(0, 0, 0, 0) if x2 is None else x2.stride(),
        w=weight,
        w_strides=weight.stride(),
        y=y,
        y_strides=(columns * pixels, columns, 1) if last else (columns * pixels, 1, pixels),
        epilogue=tuple(None if t is None else t.contiguous() for t in epilogue),
        residual=residual,
        shape=(batch * pixels, columns, pixels),
        channels=(channels, 0 if x2 is None else x2.shape[1]),
        size=(height, width),
        out_width=out_width,
        window=(rows, window),
        stride=stride,
        pads=(top, left),
        geglu=False,
    )
    matmul.run("conv2d", p)
    return y
