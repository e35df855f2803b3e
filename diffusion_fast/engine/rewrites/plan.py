"""The rewrites: which of them a network uses, why, and what they save.

Each but the lossy one leaves the mathematics alone and changes what is computed when, how often, or
in how many passes. Most are swaps of leaves (:mod:`.leaves`); the others are done by what calls the
network (:mod:`.prepare`). To add one is a line of :data:`REWRITES`, and a file for its swap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models import UNet2DCondition
from ...models.blocks import ResBlock
from ...models.controlled import ControlledUNet
from ...models.controlnet import ControlNet
from ...models.layers import hooked
from ...ops import checks
from ...ops.int8 import supports as int8_supports
from . import leaves
from .int8 import quantized

Rewritable = UNet2DCondition | ControlledUNet
OpCall = tuple[str, tuple[Any, ...]]  # an op's name and its arguments


@dataclass(frozen=True)
class Rewrite:
    """A rewrite.

    Attributes:
        does: what changes, in words.
        swap: puts its leaves into a network; None where it is what calls the network that changes.
    """

    does: str
    swap: Callable[[nn.Module], None] | None = None


# In the order in which leaves are swapped: one may build on those before.
REWRITES = {
    "cached_context": Rewrite("keys and values of cross-attention once per prompt"),
    "cached_images": Rewrite("keys and values of an IP-Adapter once per image"),
    "joined_contexts": Rewrite(
        "text and images in one attention call, each with a softmax of its own",
        leaves.joined_contexts,
    ),
    "time_table": Rewrite("time embedding and its projections once per run, a table row per step"),
    "shared_prefix": Rewrite("one half of guidance until the first cross-attention"),
    "folded_upsample": Rewrite(
        "nearest neighbours and 3x3 convolution as four 2x2 ones of the small image",
        leaves.folded_upsample,
    ),
    "split_skips": Rewrite(
        "norm and shortcut read both sources, nothing is concatenated for them",
        leaves.split_skips,
    ),
    "fused_qkv": Rewrite("q, k and v of self-attention as one product", leaves.fused_qkv),
    "epilogues": Rewrite(
        "gate, residual and, on a CPU, time as part of the product or convolution before",
        leaves.epilogues,
    ),
    "folded_layer_norm": Rewrite(
        "the layer norm's affine in the next product's weight", leaves.folded_layer_norm
    ),
    "packed_weights": Rewrite(
        "channels_last throughout, weights laid out once as the products read them",
        leaves.packed_weights,
    ),
    "removed_no_ops": Rewrite("no dropout, no pass that only pads", leaves.removed_no_ops),
    "recorded_step": Rewrite("operators of a step called again, without the blocks' Python"),
    "control_hint": Rewrite("what ControlNets and T2I-Adapters make of a hint alone once per run"),
    "control_context": Rewrite("keys and values of ControlNets once per prompt"),
    "control_prefix": Rewrite("ControlNets for one half of guidance until their cross-attention"),
    "control_residuals": Rewrite("residuals scaled and added in one pass, where a skip is read"),
}
# What is used where it is asked for by name, and only there: "all" are the exact ones.
LOSSY = {
    "int8": Rewrite(
        "LOSSY: transformer blocks' products and residual blocks' convolutions in int8, rounded at"
        " every call",
        quantized,
    )
}
CONTROL = tuple(name for name in REWRITES if name.startswith("control_"))  # of a ControlledUNet
IMAGES = ("cached_images", "joined_contexts")  # of a U-Net with IP-Adapters
TABLE_LIMIT = 2**28  # bytes of a time table; a larger one is not worth its memory


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did, and what it saves in each step at the size of the last call.

    Attributes:
        name: the rewrite's name among :data:`REWRITES` or :data:`LOSSY`.
        on: whether it is used.
        why: what it does, or why it is not used.
        launches: saved passes over memory and products; None where the size is not known yet, and
            for a lossy rewrite, which saves time and none of these.
        bytes: saved bytes, read and written.
        flops: saved operations of products, convolutions and attention.
    """

    name: str
    on: bool
    why: str
    launches: int | None = None
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class RewritePlan:
    """The rewrites of one network at one batch.

    Attributes:
        batch: number of images, without the halves of guidance.
        halves: how many halves of guidance run in a call, 1 or 2.
        max_rows: the most rows of the sampler's tables to come.
        dtype, device: those of the model's parameters.
        off: why each rewrite that is not used is not, by name.
        lossy: those of :data:`LOSSY` that are used.
    """

    batch: int
    halves: int
    max_rows: int
    dtype: torch.dtype
    device: torch.device
    off: dict[str, str]
    lossy: frozenset[str] = frozenset()

    @functools.cached_property
    def on(self) -> frozenset[str]:
        """The rewrites that are used."""
        return frozenset(REWRITES).difference(self.off) | self.lossy

    @property
    def repeatable(self) -> bool:
        """Whether no Python of somebody else's runs in a step, which may be called to be timed."""
        return "recorded_step" in self.on

    def check_rows(self, timesteps: Tensor) -> None:
        checks.tensor("timesteps", timesteps)
        if timesteps.dim() != 1 or not 1 <= len(timesteps) <= self.max_rows:
            checks.fail("timesteps", f"[N] with N in [1, {self.max_rows}]", list(timesteps.shape))


def check_placement(name: str, weight: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError for the weight of a model that was moved or cast since it was prepared."""
    if (weight.dtype, weight.device) != (dtype, device):
        planned = f"a model of {dtype} on {device}, as planned"
        checks.fail(name, planned, f"{weight.dtype} on {weight.device}")


class Bypassed(ValueError):
    """A model's block has hooks, or a forward of its own, that a prepared network would not run.

    Args:
        place: the block's name.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"model: expected one without hooks on its blocks, got one with a hook on {place!r}"
        )


def make_plan(
    model: Rewritable,
    *,
    batch: int,
    halves: int,
    max_rows: int,
    rewrites: str | Iterable[str] = "all",
) -> RewritePlan:
    """The rewrites that a sampling loop uses for a U-Net.

    Args:
        model: the plain U-Net, or one with what steers it.
        batch: number of images, without the halves of guidance.
        halves: how many halves of guidance run in a call, 1 or 2.
        max_rows: the most rows of the sampler's tables to come.
        rewrites: ``"all"`` that apply to this model, batch, device and dtype and pay there,
            ``"none"``, or names among :data:`REWRITES`: those that apply are then used whether they
            pay or not. ``"all"`` may be one of several names; :data:`LOSSY` ones are used by name
            only.

    Raises:
        ValueError: an unknown name, a size below 1, or a lossy rewrite that this model or machine
            can't have.
        Bypassed: a model with forward hooks on anything but its layers.
    """
    for argument, value in (("batch", batch), ("halves", halves), ("max_rows", max_rows)):
        checks.positive_int(argument, value)
    names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    asked = asked_for(names, REWRITES, LOSSY)
    place = bypassed(model)
    if place is not None:
        raise Bypassed(place)
    off = {name: "not asked for" for name in REWRITES if name not in asked}
    lossy = asked & LOSSY.keys()
    off |= {name: "lossy, and not asked for by name" for name in LOSSY if name not in lossy}
    off |= _inapplicable(model, batch, halves, max_rows)
    weight = unet_of(model).conv_in.weight
    if "int8" in lossy and (why := int8_supports(weight.device, weight.dtype)):
        checks.fail("rewrites", "'int8' for a model in float32 on a CPU with VNNI only", why[0])
    if "all" in names:
        unprofitable = _unprofitable(weight.device).items()
        off = {name: why for name, why in unprofitable if name not in names} | off
    return RewritePlan(batch, halves, max_rows, weight.dtype, weight.device, off, lossy)


def asked_for(
    rewrites: str | Iterable[str], exact: Iterable[str], lossy: Iterable[str] = ()
) -> frozenset[str]:
    """The names that ``rewrites`` asks for: ``"none"``, or some, ``"all"`` being the exact ones.

    Raises:
        ValueError: a name that is not known, or ``"none"`` beside others.
    """
    exact = tuple(exact)
    names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    if names == ["none"]:
        return frozenset()
    for name in names:
        checks.one_of("rewrites", name, (*exact, *lossy, "all", "none"))
    if "none" in names:
        checks.fail("rewrites", "'none' alone", names)
    return frozenset((*names, *exact) if "all" in names else names) - {"all"}


def unet_of(model: Rewritable) -> UNet2DCondition:
    """The U-Net itself."""
    return model.unet if isinstance(model, ControlledUNet) else model


def _inapplicable(model: Rewritable, batch: int, halves: int, max_rows: int) -> dict[str, str]:
    """Why rewrites can't be used on this model at this batch."""
    unet = unet_of(model)
    config, off = unet.config, {}
    if halves == 1:
        off["shared_prefix"] = "one half of guidance runs"
    elif config.addition_embed_type is not None:
        off["shared_prefix"] = "pooled text enters the time embedding"
    elif config.time_cond_proj_dim is not None:
        off["shared_prefix"] = "the guidance scale enters the time embedding"
    if not len(unet.ip_adapters):
        off |= dict.fromkeys(IMAGES, "the model has no IP-Adapter")
    if config.num_levels == 1:
        off["folded_upsample"] = "the model has one level"
    if not isinstance(model, ControlledUNet):
        off |= dict.fromkeys(CONTROL, "no ControlNet, no T2I-Adapter")
    elif not any(isinstance(control, ControlNet) for control in model.controls):
        off |= dict.fromkeys(CONTROL[1:], "no ControlNet")
    elif "shared_prefix" in off:
        off["control_prefix"] = off["shared_prefix"]
    elif model.guess_mode:
        off["control_prefix"] = "guess mode runs them for one half of guidance alone"
    weight = unet.conv_in.weight
    if weight.device.type != "cpu":
        off["recorded_step"] = "for CPUs alone: on a GPU a graph holds the step"
    elif not repeats(model):
        off["recorded_step"] = "a layer is more than its weights: its Python may matter"
    images = halves * batch if config.time_per_image else 1
    size = time_table_bytes(model, max_rows * images)
    if size > TABLE_LIMIT:
        off["time_table"] = f"{size / 2**20:.0f} MB, more than {TABLE_LIMIT >> 20} MB"
    return off


def time_table_bytes(model: nn.Module, rows: int) -> int:
    """The size of a table of what all residual blocks of a model take from the time."""
    blocks = [block for block in model.modules() if isinstance(block, ResBlock)]
    item = blocks[0].conv1.weight.element_size()
    return rows * sum(block.time_width for block in blocks) * item


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
        " name",
    }


def repeats(model: nn.Module) -> bool:
    """Whether the same inputs leave the same behind: no layer is more than its weights."""
    parts = list(model.modules())
    return not hooked(*parts) and all(type(one).__module__.startswith(_KNOWN) for one in parts)


_KNOWN = ("torch.nn.", __name__.partition(".")[0] + ".")


def bypassed(model: nn.Module) -> str | None:
    """The first module but a layer that has hooks or a forward of its own."""
    touched = [m for m in hooked(*model.modules()) if not isinstance(m, (nn.Linear, nn.Conv2d))]
    names = (name for name, module in model.named_modules() if module is touched[0])
    return next(names) or type(model).__name__ if touched else None
