"""What a network takes beside the image: the timestep and the context, kept at fixed addresses.

Neither depends on the image, so with the rewrites ``time_table`` and ``cached_context`` everything
made of them alone is made once per run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import UNet2DCondition
from ..models.blocks import KeyValue
from .clock import Clock
from .prepared_blocks import ResBlock, Time, time_width


class Times:
    """What each residual block takes from the time embedding, for every row of the sampler's table.

    With ``tabled`` a table [rows, images, C] for each, filled once per run; a row of it is read per
    step. Without, the timesteps [rows] and the work of the plain model in each step. The time is
    the same for all images, unless pooled text enters the embedding.

    Args:
        model: whose embedding it is.
        resnets: the residual blocks in the order of the computation.
        max_rows: of the sampler's tables to come.
        batch: of the model's input.
        tabled: see above.
    """

    def __init__(
        self,
        model: UNet2DCondition,
        resnets: Sequence[ResBlock],
        max_rows: int,
        batch: int,
        tabled: bool,
    ) -> None:
        self.model, self.resnets, self.tabled = model, resnets, tabled
        weight = model.conv_in.weight
        self.pooled = model.config.addition_embed_type is not None
        self.images = batch if self.pooled else 1
        widths = [time_width(resnet.block) for resnet in resnets] if tabled else []
        self._tables = [weight.new_zeros(max_rows, self.images, width) for width in widths]
        self._t = torch.zeros(max_rows, 1, dtype=torch.float32, device=weight.device)
        self._additions: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._addition: tuple[Tensor, Tensor] | None = None

    def prepare(
        self, timesteps: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None
    ) -> None:
        """Take the grid [N] and what joins the embedding, [batch, P] and [batch, K]."""
        n = len(timesteps)
        if not self.tabled:
            self._t[:n] = timesteps[:, None]
            self._keep(text_embeds, time_ids)
            return
        t = timesteps.repeat_interleave(self.images)  # [N * images]
        if text_embeds is not None and time_ids is not None:
            text_embeds, time_ids = text_embeds.repeat(n, 1), time_ids.repeat(n, 1)
        emb = self.model.embed_time(t, text_embeds, time_ids)
        for resnet, table in zip(self.resnets, self._tables, strict=True):
            table[:n] = resnet.project_time(emb).view(n, *table.shape[1:])

    def _keep(self, text_embeds: Tensor | None, time_ids: Tensor | None) -> None:
        if text_embeds is None or time_ids is None:
            return
        if time_ids.shape not in self._additions:
            self._additions[time_ids.shape] = text_embeds.clone(), time_ids.clone()
        self._addition = self._additions[time_ids.shape]
        self._addition[0].copy_(text_embeds)
        self._addition[1].copy_(time_ids)

    def at(self, clock: Clock) -> list[Time]:
        """For each residual block."""
        if self.tabled and clock.counts_on_device:
            return [Time(table, clock.counter) for table in self._tables]
        if self.tabled:
            return [Time(table[clock.row]) for table in self._tables]
        t = clock.pick(self._t).expand(self.images)
        emb = self.model.embed_time(t, *(self._addition or (None, None)))
        return [Time(resnet.project_time(emb)) for resnet in self.resnets]


class Contexts:
    """Keys and values of every cross-attention, in the order of the computation.

    With ``cached`` they are kept, written once per run; without, the context is kept and projected
    in each step. Tensors of each shape of context live on, as captured graphs read them.

    Args:
        model: whose context it is.
        batch: of the model's input.
        cached: see above.
    """

    def __init__(self, model: UNet2DCondition, batch: int, cached: bool) -> None:
        self.model, self.batch, self.cached = model, batch, cached
        self._kept: dict[tuple[object, ...], list[Tensor]] = {}
        self._now: list[Tensor] = []
        self._lengths: Tensor | None = None
        self.tokens = 0

    def prepare(self, context: Tensor, key_lengths: Tensor | None) -> None:
        """Take the context as the model takes it, and how many tokens each item sees [batch]."""
        context = context.expand(self.batch, *context.shape[1:])
        self.tokens = 1 if context.dim() == 1 else context.shape[1]
        lengths = [] if key_lengths is None else [key_lengths]
        made = [*self._projected(context), *lengths] if self.cached else [context, *lengths]
        key = (context.shape, made[0].dtype, bool(lengths))  # autocast makes others of the same
        if key not in self._kept:
            self._kept[key] = [value.clone() for value in made]
        self._now = self._kept[key]
        for kept, new in zip(self._now, made, strict=True):
            kept.copy_(new)
        self._lengths = self._now[-1] if lengths else None

    def _projected(self, context: Tensor) -> list[Tensor]:
        blocks = self.model.project_context(self.model.embed_context(context))
        return [part for block in blocks for layers in block for kv in layers for part in kv]

    def keys_and_values(self) -> tuple[list[KeyValue], Tensor | None]:
        """[batch, L, H, D] each, and the lengths."""
        parts = self._now if self.cached else self._projected(self._now[0])
        return list(zip(parts[::2], parts[1::2], strict=False)), self._lengths
