"""A U-Net for a batch whose images share neither time nor context nor number of halves.

Each row of its batch belongs to an image: one with guidance has two, others one. Each reads its own
row of one table of times, and its own keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...conditioning import Context
from ...kernels.layout import channels_last
from ...models import UNet2DCondition
from ...models.unet_encoder import ContextProjections
from ...ops import checks
from .plan import TABLE_LIMIT, check_placement, make_plan, time_table_bytes
from .prepare import TimeTable, rewritten
from .recorded import recorded

ADDITIONS = ("text_embeds", "time_ids", "timestep_cond")  # of a context, to the time embedding


@dataclass(frozen=True)
class Condition:
    """What one row of the batch is conditioned on.

    Attributes:
        kv: keys and values of each cross-attention, [1, L, H, D].
        length: L.
    """

    kv: ContextProjections
    length: int


@dataclass(frozen=True)
class Rows:
    """How the rows of a batch belong to its images.

    Attributes:
        image: int64 [R], the image of each row.
        time_of_image: int64 [B], the row of the time table that each image is at.
        time_of_row: int64 [R], the same for each row.
        kv: keys and values of each cross-attention, [R, L, H, D].
        lengths: int64 [R], how many of the L keys each row sees; None for all.
    """

    image: Tensor
    time_of_image: Tensor
    time_of_row: Tensor
    kv: ContextProjections
    lengths: Tensor | None


class RowsUNet:
    """A U-Net with the exact rewrites, for :class:`Rows`.

    Parameters are shared with the model; :meth:`refresh` derives again what depends on them.

    Args:
        model: the plain U-Net.
        images: the most images of a batch.
        times: how many rows the time table has.
        rewrites: as :class:`~diffusion_fast.Engine` takes them; the time table and cached contexts
            are always used.

    Attributes:
        pooled: whether the time embedding depends on the prompt too (SDXL), so that both halves of
            an image have rows of their own in the time table.

    Raises:
        ValueError: a time table that is too large; hooks on blocks, which would not run.
    """

    def __init__(
        self,
        model: UNet2DCondition,
        *,
        images: int,
        times: int,
        rewrites: str | Iterable[str] = "all",
    ) -> None:
        if len(model.ip_adapters):
            checks.fail("model", "one without IP-Adapters", f"{len(model.ip_adapters)} of them")
        self.model = model
        self.plan = make_plan(model, batch=images, halves=2, max_rows=1, rewrites=rewrites)
        self.network, self._leaves = rewritten(model, self.plan.on)
        self.pooled = model.config.addition_embed_type is not None
        size = time_table_bytes(model, times)
        if size > TABLE_LIMIT:
            expected = f"a table of times of at most {TABLE_LIMIT >> 20} MiB"
            checks.fail("slots, max_steps", expected, f"{size >> 20} MiB for {times} rows")
        self.times = TimeTable(self.network, times, 1)
        self.run = recorded(self.network.denoise, self.plan)
        self._shared = model.shared_blocks()

    @torch.no_grad()
    def condition(self, context: Context) -> list[Condition]:
        """Keys and values of each item of a context: text states [N, L, C] or labels [N], or a dict
        of the model's keywords.

        Raises:
            ValueError: a context that doesn't fit the model.
        """
        given = dict(context) if not isinstance(context, Tensor) and context else {}
        tokens = given["context"] if given else context
        count = 0 if not isinstance(tokens, Tensor) else len(tokens)
        image = self.model.conv_in.weight.new_empty(count, self.model.config.in_channels, 1, 1)
        t = torch.zeros((), device=image.device)
        more = [given.get(name) for name in (*ADDITIONS, "context_lengths")]
        self.model.check_inputs(image, t, tokens, *more)
        if more[-1] is not None:
            checks.fail("context_lengths", "a context of its own length", "lengths")
        kv = self.model.project_context(self.model.embed_context(tokens))  # type: ignore[arg-type]
        length = 1 if tokens.dim() == 1 else tokens.shape[1]  # type: ignore[union-attr]
        return [
            Condition(tree_map(lambda one, i=i: one[i : i + 1], kv), length) for i in range(count)
        ]

    @torch.no_grad()
    def write_times(self, timesteps: Tensor, first: int, context: Context = None) -> None:
        """Take timesteps [N] as the rows ``first`` and on of the time table.

        Args:
            context: of one image, as :meth:`condition` takes it; what of it enters the time
                embedding is taken.
        """
        given = dict(context) if not isinstance(context, Tensor) and context else {}
        more = {name: given[name].expand(len(timesteps), -1) for name in ADDITIONS if name in given}
        self.times.write(self.model.embed_time(timesteps, **more), first)

    @torch.no_grad()
    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        """The model's output [R, out, H, W] for images [B, C, H, W]."""
        image: Tensor | None = rows.image
        if "shared_prefix" not in self.plan.on:
            x, image = x.index_select(0, rows.image), None
        if "packed_weights" in self.plan.on:
            x = channels_last(x)
        time = [
            [
                (table, rows.time_of_image if shared and image is not None else rows.time_of_row)
                for table, shared in zip(tables, of_block, strict=True)
            ]
            for tables, of_block in zip(self.times.tables, self._shared, strict=True)
        ]
        return self.run(x, time, rows.kv, rows.lengths, (), (), image)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again what depends on the weights.

        Raises:
            ValueError: the model was moved or cast: that takes a new network.
        """
        check_placement("model", self.model.conv_in.weight, self.plan.dtype, self.plan.device)
        self.run = recorded(self.network.denoise, self.plan)
        for leaf in self._leaves:
            leaf.refresh()


def side_by_side(conditions: Sequence[Condition], count: int, length: int) -> ContextProjections:
    """Keys and values [count, length, H, D] of a batch: those given, each filled up with zeros.

    Rows behind those given are zeros too.
    """
    flat, form = zip(*(tree_flatten(one.kv) for one in conditions), strict=True)
    joined = []
    for tensors in zip(*flat, strict=True):
        rows = [F.pad(one, (0, 0, 0, 0, 0, length - one.shape[1])) for one in tensors]
        rows += [torch.zeros_like(rows[0])] * (count - len(rows))
        joined.append(torch.cat(rows))
    made: ContextProjections = tree_unflatten(joined, form[0])
    return made
