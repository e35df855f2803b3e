"""The lossy rewrite: products of transformer blocks, convolutions of residual blocks in int8."""

from __future__ import annotations

from torch import nn

from ...models import blocks
from ...ops import int8
from .leaves import Convolution, Product, modules


def quantized(network: nn.Module) -> None:
    """Products and 3x3 convolutions in int8, see :mod:`diffusion_fast.ops.int8`.

    The first and the last layer, projections into and out of transformers, shortcuts, resampling
    and the time embedding stay as they are, and so does a product that a layer norm is folded into,
    whose mean it cancels.
    """
    for block in modules(network, blocks.TransformerBlock):
        for product in modules(block, Product):
            if not product.folds:
                product.compute, product.packs = (int8.linear, int8.pack_linear), True
    for resnet in modules(network, blocks.ResBlock):
        for conv in (resnet.conv1, resnet.conv2):
            if isinstance(conv, Convolution):
                conv.compute, conv.packs = (int8.conv2d, int8.pack_conv2d), True
