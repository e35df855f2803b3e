"""A U-Net with ControlNets and T2I-Adapters as the sampling loop runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...conditioning import Context, PerRow, contexts_of
from ...models import UNet2DCondition
from ...models.controlled import SHARED, ControlledUNet, by_place
from ...models.controlnet import ControlNet
from ...models.layers import Residual, widened
from ...models.unet_encoder import Residuals
from ...ops import checks
from ...ops.cpu.contest import Work
from ..buffers import Clock
from . import cost
from .derived import Executor, Kept, eagerly
from .plan import Rewritable, RewritePlan, RewriteReport, make_plan
from .prepare import PreparedNetwork, PreparedUNet

HINT_NAMES = ("hints", "scales", "windows")
# Which rewrite of a ControlNet each of a U-Net is.
_OF_CONTROLS = {"cached_context": "control_context", "shared_prefix": "control_prefix"}


class PreparedControlled:
    """A :class:`~diffusion_fast.engine.predictor.Predictor` that computes what its model computes.

    Scales and windows become a table of factors, one row for each of the sampler's; where the host
    counts the rows, a network does not run in those where all its factors are 0.

    Args:
        model: the plain U-Net with what steers it.
        plan: the rewrites that are on, and the sizes they were planned for.
    """

    def __init__(self, model: ControlledUNet, plan: RewritePlan) -> None:
        self.model, self.plan = model, plan
        self.unet = PreparedUNet(model.unet, plan)
        self._one_half = model.guess_mode and plan.halves == 2  # the conditional one
        own = self._plan_of_controls()
        self.controls: list[PreparedNetwork[ControlNet] | None] = [
            PreparedNetwork(control, own) if isinstance(control, ControlNet) else None
            for control in model.controls
        ]
        self.batch = plan.halves * plan.batch
        weight = model.unet.conv_in.weight
        shape = plan.max_rows, len(self.controls), self.batch
        self.factors = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._acts: list[list[bool]] = []  # per row, of each network
        self._kept = Kept()
        self.made: Any = None  # of this run's hints, for each network
        self._sides: tuple[int, ...] = ()
        self._explained: dict[tuple[object, ...], list[RewriteReport]] = {}

    def _plan_of_controls(self) -> RewritePlan:
        """The U-Net's plan with the ControlNets' own choices."""
        off = {name: why for name, why in self.plan.off.items() if name not in _OF_CONTROLS}
        own = {name: self.plan.off.get(own) for name, own in _OF_CONTROLS.items()}
        off |= {name: why for name, why in own.items() if why is not None}
        return replace(self.plan, halves=1 if self._one_half else self.plan.halves, off=off)

    @torch.no_grad()
    def prepare(
        self, context: Context | PerRow, timesteps: Tensor, execute: Executor = eagerly
    ) -> None:
        """Take a run's context, hints and time grid.

        Args:
            context: the keywords of :meth:`ControlledUNet.forward
                <diffusion_fast.models.controlled.ControlledUNet.forward>`, for all halves; or
                several for the rows, with the same hints.
            timesteps: [N], N at most the plan's ``max_rows``.
            execute: how to compute keys, values and times, see :class:`~.derived.Derived`.

        Raises:
            ValueError: what doesn't fit the model, hints that differ between the halves of guidance
                where ``control_prefix`` computes them for one, or between rows; too many timesteps.
        """
        several: list[dict[str, Any]] = [
            dict(one) if isinstance(one, Mapping) else {"context": one}
            for one in contexts_of(context)
        ]
        hints = [[one.pop(name, None) for name in HINT_NAMES] for one in several]
        for made in hints:
            self.model.check_hints(self.batch, None, *made)
            for name, first, other in zip(HINT_NAMES, hints[0], made, strict=True):
                if other is not first and not torch.equal(other, first):
                    checks.fail(name, "the same at all steps", "others")
        self.unet.prepare(_like(context, several), timesteps, execute)
        for i, given in enumerate(several):
            shared = {name: given[name] for name in ("context", *SHARED) if name in given}
            if self._one_half:
                shared = {name: _last(value, self.plan.batch) for name, value in shared.items()}
            several[i] = shared
        for control in self.controls:
            if control is not None:
                control.prepare(_like(context, several), timesteps, execute)
        self._take_hints(timesteps, *hints[0])

    def _take_hints(
        self, timesteps: Tensor, hints: Tensor, scales: Tensor, windows: Tensor
    ) -> None:
        halves = {"hints": hints, "windows": windows}
        if not self._one_half:
            halves["scales"] = scales
        for name, value in halves.items():
            parts = value.split(self.plan.batch)
            if self.plan.device.type != "meta" and not torch.equal(parts[0], parts[-1]):
                checks.fail(name, "the same for both halves of guidance", "others")
        rows = [
            self.model.factors(t.expand(self.batch), scales, windows, self.factors.dtype)
            for t in timesteps
        ]
        factors = torch.stack(rows).flatten(2)  # [rows, N, halves * B]
        self.factors[: len(rows)] = factors
        self._acts = [] if factors.is_meta else factors.any(2).tolist()
        self._sides = tuple(hints.shape[3:])
        hints = hints[: self.plan.batch]
        made: Any = hints
        if "control_hint" in self.plan.on:
            made = [self._made(i, hints) for i in range(len(self.controls))]
        self.made = self._kept.write(made)

    def _made(self, i: int, hints: Tensor) -> Any:
        """What network i makes of its hint alone."""
        control: Any = self.model.controls[i]
        return (control.embed_hint if isinstance(control, ControlNet) else control)(hints[:, i])

    @torch.no_grad()
    def __call__(self, x: Tensor, clock: Clock) -> Tensor:
        """The model's output [halves * B, out, H, W] for x [halves * B, C, H, W], equal halves.

        Raises:
            ValueError: another shape, dtype or device, or hints of another size.
        """
        self.model.unet.check_image(x)
        wanted = tuple(side * self.model.grain for side in x.shape[2:])
        if self._sides != wanted:
            checks.fail("hints", f"{wanted[0]} x {wanted[1]} pixels, as the images", self._sides)
        factors = clock.pick(self.factors)[..., None, None, None]  # [N, halves * B, 1, 1, 1]
        residuals: list[list[Residual]] = []
        features: list[list[Residual]] = []
        for i, control in enumerate(self.controls):
            if not clock.counts_on_device and self._acts and not self._acts[clock.row][i]:
                continue
            made = self.made[i] if "control_hint" in self.plan.on else self._made(i, self.made)
            if control is None:
                factor = factors[i, : self.plan.batch]
                features.append([(one, factor) for one in made])
            else:
                factor = factors[i] if self._one_half else factors[i, : self.plan.batch]
                own = self._residuals(control, x, clock, made)
                residuals.append([(one, factor) for one in own])
        if "control_residuals" in self.plan.on:
            return self.unet(x, clock, by_place(residuals), by_place(features))
        return self.unet(x, clock, _summed(residuals), by_place(features))

    def _residuals(
        self, control: PreparedNetwork[ControlNet], x: Tensor, clock: Clock, hint: Tensor
    ) -> list[Tensor]:
        if self._one_half:
            x = x[self.plan.batch :]
        x = control.seen(x[:, : control.model.config.in_channels])
        hint, guess = widened(hint, len(x)), self.model.guess_mode
        return control.run(x, *control.conditions(clock), hint, guess)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again what depends on the weights; then :meth:`prepare` the next run.

        Raises:
            ValueError: the model was moved or cast: that takes a new plan.
        """
        for network in (self.unet, *self.controls):
            if network is not None:
                network.refresh()

    @property
    def repeatable(self) -> bool:
        """See :class:`~diffusion_fast.engine.predictor.Predictor`."""
        return self.plan.repeatable

    def work(self, size: Sequence[int]) -> Work:
        """As :meth:`PreparedUNet.work <.prepare.PreparedUNet.work>`: of the U-Net alone, whose
        first half a ControlNet shares."""
        return self.unet.work(size)

    def explain(self) -> list[RewriteReport]:
        """As :meth:`PreparedUNet.explain <.prepare.PreparedUNet.explain>`."""
        key = self.unet.size, self.unet.tokens, self.unet.images_of
        if key not in self._explained:
            self._explained[key] = cost.explain(self.plan, self.model, PreparedControlled, *key)
        return self._explained[key]


def _like(context: Context | PerRow, contexts: Sequence[Context]) -> Context | PerRow:
    """Other contexts in the same order."""
    return PerRow(contexts, context.order) if isinstance(context, PerRow) else contexts[0]


def _last(value: Tensor | None, batch: int) -> Tensor | None:
    """The conditional half; a context of a batch of 1 serves both."""
    return value if value is None or len(value) == 1 else value[-batch:]


def _summed(networks: list[list[Residual]]) -> Residuals:
    """The sum of what all networks add in each place, scaled before."""
    return [[(_sum(terms), None)] for terms in by_place(networks)]


def _sum(terms: Sequence[Residual]) -> Tensor:
    total: Tensor | None = None
    for residual, scale in terms:
        batch = len(residual) if scale is None else max(len(residual), len(scale))
        residual = widened(residual, batch)
        residual = residual if scale is None else residual * widened(scale, batch)
        total = residual if total is None else widened(total, batch) + residual
    assert total is not None  # by_place has no empty place
    return total


def prepare(
    model: Rewritable,
    *,
    batch: int,
    halves: int,
    max_rows: int,
    rewrites: str | Iterable[str] = "all",
) -> PreparedUNet | PreparedControlled:
    """A U-Net as a sampling loop runs it, see :func:`make_plan` for arguments and errors."""
    plan = make_plan(model, batch=batch, halves=halves, max_rows=max_rows, rewrites=rewrites)
    if isinstance(model, UNet2DCondition):
        return PreparedUNet(model, plan)
    return PreparedControlled(model, plan)
