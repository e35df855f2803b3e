"""What ``Engine.sample`` is given, checked before anything is touched."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import checks


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        checks.fail("shape", "positive sizes [B, ...]", repr(shape))
    if not sizes or min(sizes) < 1:
        checks.fail("shape", "positive sizes [B, ...]", list(sizes))
    return sizes


def check_starts(
    shape: tuple[int, ...],
    x_T: Tensor | None,
    x_0: Tensor | None,
    mask: Tensor | None,
    *,
    has_strength: bool,
) -> None:
    """x_0 is for image-to-image and inpainting, which both need it."""
    if x_0 is None and has_strength:
        checks.fail("x_0", "an image to start from, because strength is given", None)
    if x_0 is None and mask is not None:
        checks.fail("x_0", "an image to keep, because mask is given", None)
    if x_0 is not None and mask is None and not has_strength:
        checks.fail("strength", "how far to noise x_0, in (0, 1], or a mask", None)
    for name, given in (("x_T", x_T), ("x_0", x_0)):
        if given is not None:
            checks.floating(name, given)
            checks.shape(name, given, shape, "of the samples")
    if mask is not None:
        _check_beside("mask", mask, shape, (1, *shape[1:2]))
        if mask.is_floating_point():
            low, high = (value.item() for value in torch.aminmax(mask))
            if not (low >= 0 and high <= 1):
                checks.fail("mask", "values in [0, 1]", f"values in [{low:g}, {high:g}]")
        elif mask.dtype != torch.bool:
            checks.fail("mask", "a floating point dtype or torch.bool", mask.dtype)


def check_extra(shape: tuple[int, ...], extra_channels: Tensor | None) -> None:
    if extra_channels is not None:
        _check_beside("extra_channels", extra_channels, shape, None)
        checks.floating("extra_channels", extra_channels)


def _check_beside(
    name: str, value: Tensor, shape: tuple[int, ...], channels: tuple[int, ...] | None
) -> None:
    """[1 or B, C', ...] with the sizes of the samples [B, C, ...]; C' any for ``channels`` None."""
    checks.tensor(name, value)
    fits = (
        len(shape) > 1
        and value.dim() == len(shape)
        and len(value) in (1, shape[0])
        and (channels is None or value.shape[1] in channels)
        and value.shape[2:] == shape[2:]
    )
    if not fits:
        kinds = "any" if channels is None else " or ".join(str(n) for n in sorted({*channels}))
        expected = f"shape [1 or {shape[0]}, {kinds}, ...] beside samples {list(shape)}"
        checks.fail(name, expected, list(value.shape))
