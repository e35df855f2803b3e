"""A U-Net as the sampling loop runs it: its own walk over its own blocks, with other leaves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...conditioning import Context, PerRow, contexts_of
from ...kernels.layout import channels_last
from ...models import UNet2DCondition
from ...models.blocks import Composite, ResBlock
from ...models.controlnet import ControlNet
from ...models.layers import GroupNorm, LayerNorm
from ...models.unet_encoder import ContextProjections, Residuals, TimeProjections, UNetEncoder
from ...ops import checks
from ...ops.cpu.contest import Work
from ..buffers import Clock, Order
from ..graphs.policy import surroundings
from . import cost
from .derived import Derived, Executor, eagerly
from .leaves import Leaf, modules, plain_leaves
from .plan import LOSSY, REWRITES, RewritePlan, RewriteReport, check_placement, repeats
from .recorded import recorded

Network = TypeVar("Network", bound=nn.Module)
Encoder = TypeVar("Encoder", bound=UNetEncoder)


def rewritten(model: Network, on: Collection[str]) -> tuple[Network, list[Leaf]]:
    """A copy of the model's blocks, which share its layers, with the leaves of the rewrites on.

    Returns:
        The network, and those of its leaves whose weights must be refreshed with the model's.
    """
    blocks = modules(model, Composite, nn.ModuleList, GroupNorm, LayerNorm)
    copies: dict[Any, Any] = {block: copy.copy(block) for block in blocks}
    for block in copies.values():
        children = block._modules.items()
        vars(block)["_modules"] = {name: copies.get(child, child) for name, child in children}
    network: Network = copies[model]
    plain_leaves(network)
    for name, rewrite in (REWRITES | LOSSY).items():
        if name in on and rewrite.swap is not None:
            rewrite.swap(network)
    _called_directly(network, model)
    leaves = [module for module in network.modules() if isinstance(module, Leaf)]
    with torch.no_grad():
        for leaf in leaves:
            leaf.refresh()
    return network, leaves


def _called_directly(network: nn.Module, model: nn.Module) -> None:
    """Spare a step what nn.Module does around each call: on a CPU it takes a tenth of a small one.

    Nobody hooks the copies and leaves. What is the model's own is called as it always is.
    """
    own = set(model.modules())
    for module in network.modules():
        if module not in own:
            vars(module).update(module._modules)  # found without nn.Module.__getattr__
            kind: Any = type(module)
            module.__class__ = _direct(kind)


@functools.cache
def _direct(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, whose instances are called without hooks."""
    return type(kind.__name__, (kind,), {"__call__": kind.forward, "__module__": kind.__module__})


class TimeTable:
    """What each residual block takes from the time embedding, for every row of a sampler's table.

    Args:
        network: whose residual blocks take it.
        max_rows: the most rows of the tables to come.
        images: 1 where the time is the same for all images; else their number.
    """

    def __init__(self, network: UNetEncoder, max_rows: int, images: int) -> None:
        self.network = network
        weight = network.conv_in.weight
        self.tables: TimeProjections = [
            [
                weight.new_zeros(max_rows, images, cast("ResBlock", resnet).time_width)
                for resnet in block.resnets
            ]
            for block in network.blocks()
        ]

    def write(self, emb: Tensor, first: int = 0) -> None:
        """Take the embedding [rows * images, T] of a run's grid, as row ``first`` and on."""
        made = tree_leaves(self.network.project_time(emb))
        for table, value in zip(tree_leaves(self.tables), made, strict=True):
            rows = value.view(-1, *table.shape[1:])
            table[first : first + len(rows)] = rows

    def at(self, clock: Clock) -> TimeProjections:
        """The clock's row [images, C] of each table, or the table and the device's counter."""
        if clock.counts_on_device:
            return [[(table, clock.counter) for table in block] for block in self.tables]
        return [[table[clock.row] for table in block] for block in self.tables]


@dataclass(frozen=True)
class _Given:
    """One context, checked.

    Attributes:
        context, lengths: text states or labels; how many of them count.
        additions: to the time embedding.
        images: an IP-Adapter's tokens, weights and masks.
    """

    context: Tensor
    lengths: Tensor | None
    additions: tuple[Tensor | None, Tensor | None, Tensor | None]
    images: tuple[Any, Tensor | None, Any]


class PreparedNetwork(Generic[Encoder]):
    """A U-Net, or the first half of one, with what does not depend on the image prepared.

    Parameters are shared with the model; what rewrites derive from them is computed at the start
    and by :meth:`refresh`, in place.

    Args:
        model: the plain network.
        plan: the rewrites that are on, and the sizes they were planned for.
    """

    def __init__(self, model: Encoder, plan: RewritePlan) -> None:
        self.model, self.plan = model, plan
        self.network, self._leaves = rewritten(model, plan.on)
        self.batch = plan.halves * plan.batch
        self._images = self.batch if model.config.time_per_image else 1
        self.times: TimeTable | None = None
        if "time_table" in plan.on:
            self.times = TimeTable(self.network, plan.max_rows, self._images)
        weight = model.conv_in.weight
        self._grid = torch.zeros(plan.max_rows, 1, dtype=torch.float32, device=weight.device)
        self._order = Order(plan.max_rows, weight.device)
        # Of this run: context, its keys and values, lengths, additions, images.
        self.given: Any = None
        self._repeats = plan.device.type != "meta" and repeats(model)
        self._record()
        self._of_contexts, self._of_times = Derived(), Derived()
        self.tokens = 0  # of the context
        # Images and tokens of each IP-Adapter.
        self.images_of: tuple[tuple[int, int], ...] = ()

    @torch.no_grad()
    def prepare(
        self, context: Context | PerRow, timesteps: Tensor, execute: Executor = eagerly
    ) -> None:
        """Take a run's context and time grid; what is there already is not computed again.

        Args:
            context: as the model takes it, for all halves: text states [halves * B or 1, L, C] or
                labels [halves * B], or a dict of the model's keywords; or several for the rows.
            timesteps: [N], N at most the plan's ``max_rows``.
            execute: how to compute, see :class:`Derived`.

        Raises:
            ValueError: a context that doesn't fit the model, or too many timesteps.
        """
        self.plan.check_rows(timesteps)
        several = [
            self._checked(timesteps, **(one if isinstance(one, Mapping) else {"context": one}))
            for one in contexts_of(context)
        ]
        around = surroundings(timesteps.device) if self._repeats else None
        self._order.take(context)
        self.tokens = 1 if several[0].context.dim() == 1 else several[0].context.shape[1]
        self.images_of = tuple(tuple(one.shape[1:3]) for one in several[0].images[0])
        apart = (None, None, None) if self.times is not None else None  # the table has them
        parts = [(one.context, one.lengths, apart or one.additions, one.images) for one in several]
        self.given = self._of_contexts.compute(parts, self._made, execute, around)
        if self.times is None:
            self._grid[: len(timesteps)] = timesteps[:, None]
            return
        order = context.order if isinstance(context, PerRow) else [0] * len(timesteps)
        of_row = [several[number].additions for number in order]
        pooled = [None if one[0] is None else torch.cat(one) for one in zip(*of_row, strict=True)]
        times = timesteps.repeat_interleave(self._images)
        self._of_times.compute((times, *pooled), self._write_times, execute, around)

    def _write_times(self, inputs: tuple[Any, ...]) -> None:
        assert self.times is not None
        self.times.write(self.model.embed_time(*inputs))

    def _checked(
        self,
        timesteps: Tensor,
        context: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        context_lengths: Tensor | None = None,
        image_tokens: Sequence[Tensor] = (),
        image_weights: Tensor | None = None,
        image_masks: Sequence[Tensor] = (),
    ) -> _Given:
        image = self.model.conv_in.weight.new_empty(self.batch, self.model.config.in_channels, 1, 1)
        self.model.check_inputs(
            image, timesteps[0], context, text_embeds, time_ids, timestep_cond, context_lengths
        )
        assert context is not None  # checked
        if isinstance(self.model, UNet2DCondition) and (
            len(self.model.ip_adapters) or len(image_tokens)
        ):
            self.model.check_images(self.batch, image_tokens, image_weights, image_masks)
        pictured = tuple(image_tokens), image_weights, tuple(image_masks)
        additions = text_embeds, time_ids, timestep_cond
        return _Given(context, context_lengths, additions, pictured)

    def _made(self, several: list[tuple[Any, ...]]) -> Any:
        """What the steps read of all contexts."""
        return self._order.join([self._made_of(*one) for one in several])

    def _made_of(
        self, context: Tensor, lengths: Tensor | None, additions: Any, pictured: Any
    ) -> tuple[Any, ...]:
        context = context.expand(self.batch, *context.shape[1:])
        kv = self._project(context) if "cached_context" in self.plan.on else None
        images, weights, masks = pictured
        if images and "cached_images" in self.plan.on:
            assert isinstance(self.model, UNet2DCondition)  # a ControlNet is given none
            images = self.model.project_images(images)
            if kv is not None:
                assert weights is not None  # checked
                kv = self.model.with_images(kv, images, weights, masks)
                images, weights, masks = (), None, ()
        return (
            context if kv is None else None,
            kv,
            lengths,
            additions,
            (images, weights, masks),
        )

    def _project(self, context: Tensor) -> ContextProjections:
        return self.model.project_context(self.model.embed_context(context))

    def _record(self) -> None:
        """Have ``run`` compute a step, as the weights are now."""
        network: Any = self.network
        half = isinstance(network, ControlNet)
        self.run = recorded(network.residuals if half else network.denoise, self.plan)

    def seen(self, x: Tensor) -> Tensor:
        """What the blocks read of x [halves * B, C, H, W]: with ``shared_prefix`` the first half.

        Raises:
            ValueError: another batch.
        """
        if len(x) != self.batch:
            checks.fail("x", f"a batch of {self.batch}, as planned", len(x))
        if "shared_prefix" in self.plan.on:
            x = x[: self.plan.batch]
        if "packed_weights" in self.plan.on:
            x = channels_last(x)
        return x

    def conditions(self, clock: Clock) -> tuple[TimeProjections, ContextProjections, Any]:
        """What the blocks take of time and context at the clock's row; the context's lengths."""
        given = self._order.pick(self.given, clock)
        context, kv, lengths, additions, (images, weights, masks) = given
        if kv is None:
            kv = self._project(context)
        if weights is not None:
            assert isinstance(self.model, UNet2DCondition)  # a ControlNet is given none
            if "cached_images" not in self.plan.on:
                images = self.model.project_images(images)
            kv = self.model.with_images(kv, images, weights, masks)
        if self.times is not None:
            return self.times.at(clock), kv, lengths
        t = clock.pick(self._grid).expand(self._images)
        return self.network.project_time(self.model.embed_time(t, *additions)), kv, lengths

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again what depends on the weights; then :meth:`prepare` the next run.

        Raises:
            ValueError: the model was moved or cast: that takes a new plan.
        """
        self._record()
        check_placement("model", self.model.conv_in.weight, self.plan.dtype, self.plan.device)
        for derived in (self._of_contexts, self._of_times):
            derived.forget()
        for leaf in self._leaves:
            leaf.refresh()


class PreparedUNet(PreparedNetwork[UNet2DCondition]):
    """A :class:`~diffusion_fast.engine.predictor.Predictor` that computes what its model computes.

    Args:
        model: the plain U-Net.
        plan: the rewrites that are on, and the sizes they were planned for.
    """

    def __init__(self, model: UNet2DCondition, plan: RewritePlan) -> None:
        super().__init__(model, plan)
        self.size: tuple[int, int] | None = None  # of the last call
        self._explained: dict[tuple[object, ...], list[RewriteReport]] = {}

    @torch.no_grad()
    def __call__(
        self, x: Tensor, clock: Clock, residuals: Residuals = (), features: Residuals = ()
    ) -> Tensor:
        """The model's output [halves * B, out, H, W] for x [halves * B, C, H, W].

        With ``shared_prefix`` the halves of x must be equal: the first one is read.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.model.check_image(x)
        self.size = (x.shape[2], x.shape[3])
        x = self.seen(x)
        return self.run(x, *self.conditions(clock), residuals, features)

    @property
    def repeatable(self) -> bool:
        """See :class:`~diffusion_fast.engine.predictor.Predictor`."""
        return self.plan.repeatable

    def work(self, size: Sequence[int]) -> Work:
        """The op calls of a step for x [halves * B, C, *size], see :func:`.cost.calls`."""
        plan, config = self.plan, self.model.config
        sizes = plan.dtype, plan.batch, plan.halves, (size[0], size[1])
        found = functools.partial(cost.calls, config, PreparedUNet, plan.on, *sizes)
        pixels = plan.halves * plan.batch * size[0] * size[1]
        return cost.work_of(self.model, pixels, found, config, plan.on, *sizes)

    def explain(self) -> list[RewriteReport]:
        """A report of each rewrite, see :class:`RewriteReport`.

        Savings are per step at the size of the last call; before the first they are not known.
        """
        key = self.size, self.tokens, self.images_of
        if key not in self._explained:
            self._explained[key] = cost.explain(self.plan, self.model, PreparedUNet, *key)
        return self._explained[key]
