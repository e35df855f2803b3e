"""What ControlNets and T2I-Adapters of ComfyUI add, in the places where our U-Net adds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ...models import UNet2DCondition
from ...models.config import UNetConfig
from ...models.layers import Residual
from ..twin import Unlike

PARTS = ("input", "middle", "output")
Control = Mapping[str, Sequence[Tensor | None]]  # by these
Added = list[list[Residual]]
Shape = tuple[int, ...]


def added_by(control: Control | None, unet: UNet2DCondition, x: Tensor) -> tuple[Added, Added]:
    """Residuals and features of a call, as
    :meth:`UNet2DCondition.denoise <diffusion_fast.UNet2DCondition.denoise>` takes them.

    ComfyUI takes each list from its end: ``output`` as the way up reads the skips, ``input`` as the
    way down makes them.

    Args:
        control: what ComfyUI hands its U-Net; it stays as it is.
        unet: our U-Net.
        x: the U-Net's input [B, C, H, W].

    Raises:
        Unlike: something is added where our U-Net has no place for it, or does not fit there.
    """
    if control is None:
        return [], []
    unknown = {name for name, given in control.items() if given} - set(PARTS)
    if unknown:
        raise Unlike(f"control[{min(unknown)!r}]")
    shapes = list(_skips(unet, (x.shape[2], x.shape[3])))
    count = len(shapes)

    def take(name: str, i: int, shape: Shape) -> list[Residual]:
        """The i-th from the end of a list, as what is added in one place."""
        given = control.get(name) or ()
        one = given[-1 - i] if i < len(given) else None
        if one is None:
            return []
        if tuple(one.shape[1:]) != shape or len(one) not in (1, len(x)):
            got = f"of {list(one.shape)} where {[len(x), *shape]} is added"
            raise Unlike(f"control[{name!r}] {got}")
        return [(one.to(x), None)]

    residuals = [take("output", count - 1 - k, shapes[k]) for k in range(count)]
    residuals.append(take("middle", 0, shapes[-1]))
    inputs = [take("input", k, shapes[k]) for k in range(count)]
    places = list(_level_ends(unet.config))
    for k, here in enumerate(inputs):
        if here and k not in places:
            raise Unlike(f"control['input'] at block {k}, which is not the end of a level")
    features = [inputs[k] for k in places]
    return residuals if any(residuals) else [], features if any(features) else []


def _skips(unet: UNet2DCondition, size: tuple[int, int]) -> Iterator[Shape]:
    """Channels, height and width of what each layer on the way down leaves for the way up."""
    config = unet.config
    widths, layers = config.block_out_channels, config.per_level("layers_per_block")
    sizes = unet.level_sizes(size)
    yield widths[0], *sizes[0]
    for level, (channels, height_width) in enumerate(zip(widths, sizes, strict=True)):
        yield from [(channels, *height_width)] * layers[level]
        if level + 1 < len(sizes):
            yield channels, *sizes[level + 1]


def _level_ends(config: UNetConfig) -> Iterator[int]:
    """The input blocks whose results a T2I-Adapter adds to, one for each level."""
    last = 0
    for level, layers in enumerate(config.per_level("layers_per_block")):
        last += layers
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        downsamples = level + 1 < config.num_levels
        yield last if attends or not downsamples else last + 1
        last += downsamples
