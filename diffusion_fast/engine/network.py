"""The U-Net as the loop runs it: the plain model's computation on prepared blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..conditioning import Context
from ..models import UNet2DCondition
from ..models import blocks as plain
from ..models.blocks import KeyValue
from ..models.unet import Block
from ..ops import checks
from .clock import Clock
from .conditions import Contexts, Times
from .layers import Layer
from .prepared_blocks import (
    Downsample,
    GroupNorm,
    On,
    ResBlock,
    Time,
    Transformer2D,
    Upsample,
    same_conv,
    widened,
)

if TYPE_CHECKING:
    from .plan import Plan, Row


@dataclass
class Given:
    """What a call takes beside the image, in the order in which the blocks ask for it."""

    time: Iterator[Time]
    kv: Iterator[KeyValue]
    key_lengths: Tensor | None


class Stage:
    """A residual block, and a transformer after it where there is attention."""

    def __init__(self, resnet: ResBlock, attention: Transformer2D | None) -> None:
        self.resnet, self.attention = resnet, attention
        self.layers = [*resnet.layers, *(attention.layers if attention else ())]

    def __call__(self, x: Tensor, skip: Tensor | None, given: Given) -> Tensor:
        x = self.resnet(x, skip, next(given.time))
        if self.attention is None:
            return x
        kv = list(itertools.islice(given.kv, len(self.attention.blocks)))
        return self.attention(x, kv, given.key_lengths)


class Level:
    """The stages of one resolution, and what leads to the next."""

    def __init__(self, block: Block, on: On) -> None:
        resnets = (ResBlock(one, on) for one in cast("list[plain.ResBlock]", block.resnets))
        attentions = (
            Transformer2D(one, on) for one in cast("list[plain.Transformer2D]", block.attentions)
        )
        self.stages = [Stage(*pair) for pair in itertools.zip_longest(resnets, attentions)]
        self.downsample = [Downsample(one, on) for one in getattr(block, "downsamplers", ())]
        self.upsample = [Upsample(one, on) for one in getattr(block, "upsamplers", ())]
        parts: list[Stage | Downsample | Upsample] = [*self.stages]
        parts += [*self.downsample, *self.upsample]
        self.layers: list[Layer] = [layer for part in parts for layer in part.layers]


class PreparedUNet:
    """A :class:`~diffusion_fast.engine.predictor.Predictor` that computes what its model computes.

    Parameters are shared with the model; what rewrites derive from them is computed at the start
    and by :meth:`refresh`, in place.

    Args:
        model: the plain U-Net.
        plan: the rewrites that are on, and the sizes they were planned for.
    """

    def __init__(self, model: UNet2DCondition, plan: Plan) -> None:
        self.model, self.plan = model, plan
        on = plan.on
        with torch.no_grad():
            self.conv_in = same_conv(model.conv_in, on)
            self.conv_out = same_conv(model.conv_out, on)
            self.norm_out = GroupNorm(model.conv_norm_out)
            self.down = [Level(block, on) for block in cast("list[Block]", model.down_blocks)]
            self.mid = Level(model.mid_block, on)
            self.up = [Level(block, on) for block in cast("list[Block]", model.up_blocks)]
        self._levels = [*self.down, self.mid, *self.up]
        resnets = [stage.resnet for level in self._levels for stage in level.stages]
        batch = plan.halves * plan.batch
        self.times = Times(model, resnets, plan.max_rows, batch, "time_table" in on)
        self.contexts = Contexts(model, batch, "cached_context" in on)
        self._size: tuple[int, int] | None = None  # of the last call
        self._explained: dict[tuple[object, int], list[Row]] = {}

    @torch.no_grad()
    def prepare(self, context: Context, timesteps: Tensor) -> None:
        """Take a run's context and time grid.

        Args:
            context: as the model takes it, for all halves: text states [halves * B or 1, L, C] or
                labels [halves * B], or a dict of the model's keywords.
            timesteps: [N], N at most the plan's ``max_rows``.

        Raises:
            ValueError: a context that doesn't fit the model, or too many timesteps.
        """
        given = dict(context) if isinstance(context, Mapping) else {"context": context}
        self._prepare(timesteps, **given)

    def _prepare(
        self,
        timesteps: Tensor,
        context: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> None:
        self.plan.check_rows(timesteps)
        image = self.model.conv_in.weight.new_empty(
            self.contexts.batch, self.model.config.in_channels, 1, 1
        )
        self.model.check_inputs(
            image, timesteps[0], context, text_embeds, time_ids, context_lengths
        )
        assert context is not None  # checked
        self.times.prepare(timesteps, text_embeds, time_ids)
        self.contexts.prepare(context, context_lengths)

    @torch.no_grad()
    def __call__(self, x: Tensor, clock: Clock) -> Tensor:
        """The model's output [halves * B, out, H, W] for x [halves * B, C, H, W].

        With ``shared_prefix`` the halves of x must be equal: the first one is read.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.model.check_image(x)
        if len(x) != self.contexts.batch:
            checks.fail("x", f"a batch of {self.contexts.batch}, as planned", len(x))
        self._size = (x.shape[2], x.shape[3])
        pairs, key_lengths = self.contexts.keys_and_values()
        given = Given(iter(self.times.at(clock)), iter(pairs), key_lengths)

        if "shared_prefix" in self.plan.on:
            x = x[: self.plan.batch]
        if "packed_weights" in self.plan.on:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for stage in level.stages:
                x = stage(x, None, given)
                skips.append(x)
            for downsample in level.downsample:
                x = downsample(x)
                skips.append(x)
        for stage in self.mid.stages:
            x = stage(x, None, given)
        for level in self.up:
            for stage in level.stages:
                x = stage(x, widened(skips.pop(), len(x)), given)
            for upsample in level.upsample:
                x = upsample(x, skips[-1].shape[2:])  # odd sizes don't just double
        return self.conv_out(self.norm_out(x))

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again what depends on the weights; then :meth:`prepare` the next run.

        Raises:
            ValueError: the model was moved or cast: that takes a new plan.
        """
        self.plan.check_placement(self.model)
        for layer in self.layers():
            layer.refresh()

    def layers(self) -> Iterator[Layer]:
        """Every product and convolution."""
        yield self.conv_in
        for level in self._levels:
            yield from level.layers
        yield self.conv_out

    def explain(self) -> list[Row]:
        """A row for each rewrite, see :class:`~diffusion_fast.engine.plan.Row`.

        Savings are per step at the size of the last call; before the first they are not known.
        """
        key = self._size, self.contexts.tokens
        if key not in self._explained:
            self._explained[key] = self.plan.explain(self.model, *key)
        return self._explained[key]
