"""The exact rewrites: which of them a U-Net's loop uses, why, and what they save.

Each rewrite leaves the mathematics alone and changes what is computed when, how often, or in how
many passes. What it does stands where it is done: :mod:`.folding` has the algebra,
:mod:`.conditions` and :mod:`.prepared_blocks` the order of the work, :mod:`.network` the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from ..models import UNet2DCondition
from ..models.blocks import ResBlock, hooked
from ..ops import checks
from .cost import DEVICE, Bench, Cost
from .network import PreparedUNet
from .prepared_blocks import time_width

DOES = {
    "cached_context": "keys and values of cross-attention once per prompt",
    "time_table": "time embedding and its projections once per run, a table row per step",
    "shared_prefix": "one half of guidance until the first cross-attention",
    "folded_upsample": "nearest neighbours and 3x3 convolution as four 2x2 ones of the small image",
    "split_skips": "norm and shortcut read both sources, nothing is concatenated for them",
    "fused_qkv": "q, k and v of self-attention as one product",
    "epilogues": "gate, residual and, on a CPU, time as part of the product or convolution before",
    "folded_layer_norm": "the layer norm's affine in the next product's weight",
    "packed_weights": "channels_last throughout, weights laid out once as the products read them",
    "removed_no_ops": "no dropout, no pass that only pads",
}
REWRITES = tuple(DOES)
TABLE_LIMIT = 2**28  # bytes of a time table; a larger one is not worth its memory


@dataclass(frozen=True)
class Row:
    """What a rewrite did, and what it saves in each step at the size of the last call.

    Attributes:
        name: of the rewrite.
        on: whether it is used.
        why: what it does, or why it is not used.
        launches: passes over memory or products saved; None where the size is not known yet.
        bytes: read and written.
        flops: of products, convolutions and attention.
    """

    name: str
    on: bool
    why: str
    launches: int | None = None
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Plan:
    """The rewrites of one network at one batch.

    Attributes:
        batch: images, without the halves of guidance.
        halves: of guidance that run in a call, 1 or 2.
        max_rows: of the sampler's tables to come.
        dtype, device: of the model.
        off: why each rewrite that is not used is not.
    """

    batch: int
    halves: int
    max_rows: int
    dtype: torch.dtype
    device: torch.device
    off: dict[str, str]

    @property
    def on(self) -> frozenset[str]:
        """The rewrites that are used."""
        return frozenset(REWRITES) - self.off.keys()

    def check_rows(self, timesteps: Tensor) -> None:
        checks.tensor("timesteps", timesteps)
        if timesteps.dim() != 1 or not 1 <= len(timesteps) <= self.max_rows:
            checks.fail("timesteps", f"[N] with N in [1, {self.max_rows}]", list(timesteps.shape))

    def check_placement(self, model: UNet2DCondition) -> None:
        """Raises ValueError for a model that was moved or cast since."""
        weight = model.conv_in.weight
        if (weight.dtype, weight.device) != (self.dtype, self.device):
            planned = f"a model of {self.dtype} on {self.device}, as planned"
            checks.fail("model", planned, f"{weight.dtype} on {weight.device}")

    def explain(
        self, model: UNet2DCondition, size: tuple[int, int] | None, tokens: int
    ) -> list[Row]:
        """A row for each rewrite; see :class:`Row`.

        Args:
            model: the plain U-Net.
            size: height and width of its input; None leaves the savings open.
            tokens: of the context.
        """

        bench = size and Bench(
            model.config, self.dtype, self.halves * self.batch, size, max(tokens, 1)
        )

        def cost_of(on: Collection[str]) -> Cost:
            off = {name: "" for name in REWRITES if name not in on}
            plan = Plan(self.batch, self.halves, 1, self.dtype, DEVICE, off)
            assert bench is not None
            return bench.step(lambda twin: PreparedUNet(twin, plan)).total

        now = cost_of(self.on) if bench else None
        rows = []
        for name in REWRITES:
            on, saved = name not in self.off, Cost() if now else None
            if on and now:
                saved = cost_of(self.on - {name}) - now
            why = DOES[name] if on else self.off[name]
            rows.append(Row(name, on, why, *(astuple(saved) if saved else ())))
        return rows


def make_plan(
    model: UNet2DCondition,
    *,
    batch: int,
    halves: int,
    max_rows: int,
    rewrites: str | Iterable[str] = "all",
) -> PreparedUNet:
    """A U-Net as a sampling loop runs it, see :class:`PreparedUNet`.

    Args:
        model: the plain U-Net; its parameters are shared, not copied.
        batch: images, without the halves of guidance.
        halves: of guidance that run in a call, 1 or 2.
        max_rows: of the sampler's tables to come.
        rewrites: ``"all"`` that apply to this model, batch, device and dtype and pay there,
            ``"none"``, or names among :data:`REWRITES`: those that apply are then used whether they
            pay or not.

    Raises:
        ValueError: an unknown name, a size below 1, or a model with forward hooks on anything but
            its layers, which a prepared network would not run.
    """
    for argument, value in (("batch", batch), ("halves", halves), ("max_rows", max_rows)):
        checks.positive_int(argument, value)
    asked = _names(rewrites)
    hook = bypassed(model)
    if hook is not None:
        checks.fail("model", "one without hooks on its blocks", f"one with a hook on {hook!r}")
    off = {name: "not asked for" for name in REWRITES if name not in asked}
    off |= _inapplicable(model, batch, halves, max_rows)
    weight = model.conv_in.weight
    if rewrites == "all":
        off = _unprofitable(weight.device) | off
    plan = Plan(batch, halves, max_rows, weight.dtype, weight.device, off)
    return PreparedUNet(model, plan)


def _names(rewrites: str | Iterable[str]) -> frozenset[str]:
    if isinstance(rewrites, str) and rewrites in ("all", "none"):
        return frozenset(REWRITES if rewrites == "all" else ())
    names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    for name in names:
        checks.one_of("rewrites", name, ("all", "none", *REWRITES))
    if names in (["all"], ["none"]):
        return _names(names[0])
    return frozenset(names)


def _inapplicable(model: UNet2DCondition, batch: int, halves: int, max_rows: int) -> dict[str, str]:
    """Why rewrites can't be used on this model at this batch."""
    config, off = model.config, {}
    pooled = config.addition_embed_type is not None
    if halves == 1:
        off["shared_prefix"] = "one half of guidance runs"
    elif pooled:
        off["shared_prefix"] = "pooled text enters the time embedding"
    if config.num_levels == 1:
        off["folded_upsample"] = "the model has one level"
    weight = model.conv_in.weight
    widths = [time_width(block) for block in model.modules() if isinstance(block, ResBlock)]
    images = halves * batch if pooled else 1
    size = max_rows * images * sum(widths) * weight.element_size()
    if size > TABLE_LIMIT:
        off["time_table"] = f"{size / 2**20:.0f} MB, more than {TABLE_LIMIT >> 20} MB"
    return off


def _unprofitable(device: torch.device) -> dict[str, str]:
    """Why rewrites that could be used are not among "all" on a device."""
    if device.type == "cpu":
        return {
            "split_skips": "on a CPU norm and shortcut would each join the sources for themselves",
            "folded_layer_norm": "on a CPU the product applies the norm in passes of its own, which"
            " was measured to take longer than the norm does",
        }
    return {
        "folded_layer_norm": "whether it pays on a GPU was not measured; it can be asked for by"
        " name"
    }


def bypassed(model: nn.Module) -> str | None:
    """The first module whose hooks or own forward a prepared network would not run."""
    for name, module in model.named_modules():
        if hooked(module) and not _is_layer(module):
            return name or type(model).__name__
    return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))
