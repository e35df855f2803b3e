"""Weights made from weights: the algebra behind the rewrites, each a function with its formula.

Sums are taken in float64 and rounded once, so that a derived weight is as good as one trained in
its dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """What a linear layer or a convolution runs on."""

    weight: Tensor  # [N, K] or [O, C, kh, kw]
    bias: Tensor | None = None
    column_sums: Tensor | None = None  # [N], where a layer norm is folded in


def as_linear(weights: Weights) -> Weights:
    """A 1x1 convolution [O, C, 1, 1] as a product over the channels [O, C]: a view.

    Weights [O, C] stay as they are.
    """
    return Weights(weights.weight.flatten(1), weights.bias)


def fused(*layers: Weights) -> Weights:
    """Layers that read the same input as one, [x A^T, x B^T] = x [A; B]^T. None has a bias, or all.

    Args:
        layers: weights [N_i, K].

    Returns:
        [sum N_i, K], the outputs one behind the other.
    """
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    weight = torch.cat(tuple(layer.weight for layer in layers))
    return Weights(weight, torch.cat(biases) if biases else None)


def with_layer_norm(weights: Weights, norm: nn.LayerNorm) -> Weights:
    r"""A layer norm folded into the product behind it.

    .. math:: \mathrm{LN}(x) W^T + b = r (x W'^T - \mu s) + b', \quad W' = W \gamma,
              \quad s_n = \sum_k W'_{nk}, \quad b' = b + W \beta

    with each row's mean and r = 1 / deviation (:func:`diffusion_fast.ops.row_statistics`). The
    column sums are those of the rounded W': x W' and mu s cancel where the mean is large, so both
    must hold the same W'.

    Args:
        weights: a weight [N, K] and its bias.
        norm: a layer norm of K channels.
    """
    weight, bias, _ = weights
    exact = weight.double()
    folded = (exact * norm.weight.double()).to(weight.dtype)
    shift = exact @ norm.bias.double()  # [N]
    if bias is not None:
        shift = shift + bias.double()
    sums = folded.double().sum(1).to(torch.promote_types(weight.dtype, torch.float32))
    return Weights(folded, shift.to(weight.dtype), sums)


def with_upsample(conv: Weights) -> Weights:
    """A 3x3 convolution of an image doubled by nearest neighbours, as 2x2 ones of the image itself.

    In one dimension, output 2i reads the doubled image at 2i-1, 2i, 2i+1, which is x at i-1, i, i;
    output 2i+1 reads x at i, i, i+1::

        y[2i]     =  w0       x[i-1] + (w1 + w2) x[i]
        y[2i + 1] = (w0 + w1) x[i]   +  w2       x[i+1]

    and both dimensions do so. The four kernels stand one behind the other as one convolution with
    4 O outputs, parities (0,0), (0,1), (1,0), (1,1) of (row, column): see :func:`interleaved`.

    Args:
        conv: weight [O, C, 3, 3] of a convolution with padding 1, and its bias.

    Returns:
        weight [4 O, C, 2, 2], for padding 1.
    """
    exact = conv.weight.double()
    kernels = [both for rows in _halves(exact, 2) for both in _halves(rows, 3)]
    weight = torch.cat(kernels).to(conv.weight.dtype)
    return Weights(weight, None if conv.bias is None else conv.bias.repeat(4))


def _halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The kernels of even and odd outputs along one dimension."""
    w0, w1, w2 = kernel.unbind(dim)
    return torch.stack((w0, w1 + w2), dim), torch.stack((w0 + w1, w2), dim)


def interleaved(parities: Tensor) -> Tensor:
    """The doubled image from the four parities of its pixels, in one copy.

    The 2x2 kernels with padding 1 give H + 1 rows: those of parity 0 use rows 0 to H - 1, those of
    parity 1 rows 1 to H, y[2i + a] = p_a[i + a]; the same for columns.

    Args:
        parities: [B, 4 O, H + 1, W + 1].

    Returns:
        [B, O, 2H, 2W], in the memory format of ``parities``.
    """
    batch, channels, height, width = parities.shape
    out = channels // 4
    last = parities.is_contiguous(memory_format=torch.channels_last)
    b, c, h, w = parities.stride()
    view = parities.as_strided(  # [B, O, H, a, W, b]
        (batch, out, height - 1, 2, width - 1, 2),
        (b, c, h, h + 2 * out * c, w, w + out * c),
        parities.storage_offset(),
    )
    if last:
        view = view.permute(0, 2, 3, 4, 5, 1)
        shape = (batch, 2 * (height - 1), 2 * (width - 1), out)
        return view.reshape(shape).permute(0, 3, 1, 2)
    return view.reshape(batch, out, 2 * (height - 1), 2 * (width - 1))
