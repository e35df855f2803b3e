"""The denoising loop over static tensors, on the host and in CUDA graphs alike.

Its types hold the order of the calls: a :class:`Loop` of a shape gives a :class:`Prepared` loop of
a table and a context, which gives a :class:`Run` from a starting noise, which is :func:`denoise`-d.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..conditioning import Context, PerRow
from ..ops import Philox, checks
from ..ops.cpu import contest, step_contest, threads
from ..samplers.table import StepTable
from .buffers import Buffers, Clock, Generators, Layout, Noise, noise_source
from .graphs.policy import Capturable, Way
from .predictor import PlainPredictor, Predictor, signature
from .rewrites.derived import Executor, eagerly


def denoise(run: Run, rows: Iterable[int], after: Callable[[int], None] | None = None) -> None:
    """Go from the run's noise to its sample, which is the buffers' ``x`` then.

    The host does each row by :func:`step`; or it replays a graph that was captured from that
    function; or one graph goes through all rows.

    Args:
        run: what was begun.
        rows: 0 to the last, such as with a progress bar around them.
        after: called with each row; it and ``rows`` have no part in a loop that is one graph.
    """
    graph, noise = run.way.graph, run.noise
    if run.way.noise == "table":
        noise.draw_all()
    if graph is not None and run.way.mode == "loop":
        graph.replay()
        return
    for row in rows:
        if graph is None:
            step(run.loop, run.given, noise)
        else:
            if run.way.noise == "row":
                noise.draw(row)
            graph.replay()
            run.loop.clock.row = row + 1
        if after is not None:
            after(row)


def step(loop: Loop, given: Given, noise: Noise | None = None) -> None:
    """One row of the table: the model's output, then the sampler's x, then what a mask keeps.

    Args:
        loop: its buffers and its clock, which knows the row, on the host or on the device.
        given: the table and the tensors that the row may read.
        noise: draws what the row reads; None if it is there already.
    """
    buffers, clock = loop.buffers, loop.clock
    output = loop.predicted()
    if given.predictions is not None:
        clean = buffers.clean
        clean.copy_(buffers.x)
        ops.sampler_step(clean, output, given.predictions, clock.step, **given.guidance)
    if noise is not None:
        noise.draw(clock.row)
    ops.sampler_step(buffers.x, output, given.coefficients, clock.step, **given.state)
    if given.masked and (given.ends is None or given.ends[clock.row]):
        buffers.keep_known(clock)
    clock.advance()


@dataclass(frozen=True)
class Given:
    """What a step reads beside the loop's ``x``.

    Attributes:
        coefficients: the rows of the table, on the host or on the device.
        state: keywords of :func:`~diffusion_fast.ops.sampler_step`.
        masked: whether an image is kept outside of a mask.
        ends: which rows end a step; None where the host doesn't know the row.
        predictions: the rows that lead to the buffers' ``clean``; None where nobody looks at it.
        guidance: keywords of :func:`~diffusion_fast.ops.sampler_step` for these.
    """

    coefficients: list[list[float]] | Tensor
    state: dict[str, Any]
    masked: bool
    ends: list[bool] | None = None
    predictions: list[list[float]] | Tensor | None = None
    guidance: dict[str, Any] = field(default_factory=dict)


class Rows:
    """A table as the loop reads it, row by row.

    Args:
        table: the sampler's table.
        device: where the model runs.

    Attributes:
        coefficients: floats of each row, with guidance and prediction type folded in.
        draws, ends: whether a row reads noise, and whether it ends a step: some samplers call the
            model twice in one.
        timesteps: [R] on the device; whole ones as integers, so that a model may index with t.
    """

    def __init__(self, table: StepTable, device: torch.device) -> None:
        self.table, self.folded = table, table.folded()
        self.coefficients: list[list[float]] = self.folded.tolist()
        self.draws: list[bool] = table.draws.tolist()
        self.ends: list[bool] = table.ends_step.tolist()
        dtype = torch.int64 if table.integer_timesteps else torch.float32
        self.timesteps = table.timesteps.to(device, dtype)

        self._steps: list[int] = table.step_of_row.tolist()
        self._t: list[float] = table.timesteps.tolist()

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def predictions(self) -> Tensor:
        """``folded`` of the rows that lead to x_0, for those who look at it."""
        return self.table.predictions()

    def step_of(self, row: int) -> tuple[int, float]:
        """The step that a row belongs to, counted from 0, and its first timestep."""
        step = self._steps[row]
        return step, self._t[self._steps.index(step)]

    def check_finite(self, peak: Tensor) -> None:
        """Raise FloatingPointError with the first step whose output was not finite.

        Args:
            peak: of each row, [R]; reading it is the one host read of a run, after its last step.
        """
        finite = peak.isfinite()
        if not finite.all():
            step, t = self.step_of(int((~finite).nonzero()[0]))
            raise FloatingPointError(
                f"model: expected finite outputs, got NaN or infinity first at step {step} (t ="
                f" {t:g}; steps count from 0 to {self._steps[-1]})"
            )


@dataclass(frozen=True)
class Start:
    """What a run starts from, see :meth:`Engine.sample <diffusion_fast.Engine.sample>`.

    Attributes:
        x_T, x_0, mask, generator: as there.
        from_image: whether x_0 is noised to the table's first level, in place of pure noise.
    """

    x_T: Tensor | None
    x_0: Tensor | None
    mask: Tensor | None
    generator: Generators
    from_image: bool

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for what doesn't fit samples [B, ...].

        x_0 is for image-to-image and inpainting, which both need it.
        """
        if self.x_0 is None and self.from_image:
            checks.fail("x_0", "an image to start from, because strength is given", None)
        if self.x_0 is None and self.mask is not None:
            checks.fail("x_0", "an image to keep, because mask is given", None)
        if self.x_0 is not None and self.mask is None and not self.from_image:
            checks.fail("strength", "how far to noise x_0, in (0, 1], or a mask", None)
        for name, given in (("x_T", self.x_T), ("x_0", self.x_0)):
            if given is not None:
                checks.floating(name, given)
                checks.shape(name, given, shape, "of the samples")
        if self.mask is not None:
            _check_beside("mask", self.mask, shape, (1, *shape[1:2]))
            if self.mask.is_floating_point():
                low, high = (value.item() for value in torch.aminmax(self.mask))
                if not (low >= 0 and high <= 1):
                    checks.fail("mask", "values in [0, 1]", f"values in [{low:g}, {high:g}]")
            elif self.mask.dtype != torch.bool:
                checks.fail("mask", "a floating point dtype or torch.bool", self.mask.dtype)


class Loop:
    """A predictor on the buffers of one layout."""

    def __init__(self, layout: Layout, predictor: Predictor) -> None:
        self.buffers, self.predictor = Buffers(layout), predictor
        self.clock = Clock(layout.device)
        self._rows: Rows | None = None  # of the last table
        self._shared_by: dict[int, int] = {}  # threads of a step, by how many PyTorch has

    def prepare(
        self,
        table: StepTable,
        context: Context | PerRow,
        extra_channels: Tensor | None,
        execute: Executor = eagerly,
    ) -> Prepared:
        """Write everything that does not depend on the noise."""
        buffers, rows = self.buffers, self._rows
        if rows is None or rows.table is not table:
            rows = self._rows = Rows(table, buffers.layout.device)
            buffers.table[: len(rows)] = rows.folded.to(buffers.layout.device)
            buffers.count.fill_(len(rows))
        buffers.write_extra(extra_channels)
        self.predictor.prepare(context, rows.timesteps, execute)
        whole = isinstance(self.predictor, PlainPredictor) and rows.timesteps.dtype
        return Prepared(self, rows, context, (signature(context), whole))

    def threads(self) -> contextlib.AbstractContextManager[None]:
        """On a CPU as many threads as its steps are the fastest with, measured at the first run.

        The loop has to be prepared.
        """
        most, layout = threads.most(), self.buffers.layout
        if layout.device.type != "cpu" or not self.predictor.repeatable:
            return contextlib.nullcontext()
        if most not in self._shared_by:
            work = self.predictor.work(layout.shape[2:])
            contest.prepare(work)  # another number of threads is another machine
            self.clock.start()
            self.buffers.x.zero_()
            self.buffers.write_input()
            self._shared_by[most] = step_contest.threads_for(work, self.predicted)
        return threads.using(self._shared_by[most])

    def shared_by(self, most: int) -> int:
        """How many of so many threads share a step on a CPU; all of them until it was measured."""
        return self._shared_by.get(most, most)

    def predicted(self) -> Tensor:
        """The model's output [halves * B, C, ...] at the clock's row, checked."""
        buffers = self.buffers
        output = self.predictor(buffers.model_input, self.clock)
        if not isinstance(output, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}")
        if output.shape != buffers.layout.output_shape:
            but = " without the extra channels" if buffers.layout.extra else ""
            expected = f"an output of the shape of its input{but} {[*buffers.layout.output_shape]}"
            checks.fail("model", expected, list(output.shape))
        if output.data_ptr() == buffers.x.data_ptr():
            output = output.clone()  # a model that returns its input: x changes in place
        return output


class Prepared:
    """A loop with a table and a context; nothing of it depends on the noise.

    Args:
        loop: what was prepared.
        rows: the table's.
        context: what the halves that run are conditioned on.
        baked: what a captured step depends on beside the buffers' layout.
    """

    def __init__(self, loop: Loop, rows: Rows, context: Context | PerRow, baked: Any) -> None:
        self.loop, self.rows, self.baked = loop, rows, baked
        self._context = context

    def renew(self) -> None:
        """Compute again what was made from weights that have other values now."""
        self.loop.predictor.prepare(self._context, self.rows.timesteps)

    def capturable(self, masked: bool, previewed: bool = False) -> Capturable:
        """Its step with nothing that depends on the row or on the host.

        A CUDA graph of that step serves every row of every table.

        Args:
            masked: whether an image is kept outside of a mask.
            previewed: whether it also writes the x_0 that is predicted.
        """
        loop, buffers, table = self.loop, self.loop.buffers, self.rows.table
        predictions: Tensor | None = None
        if previewed:
            predictions = buffers.predictions
            predictions[: len(table)] = self.rows.predictions.to(buffers.layout.device)
        rescales, unconditional = table.rescales, table.reads_unconditional
        h3 = buffers.h3 if table.needs_h3 else None
        guidance = {"rescale": rescales, "unconditional": False}

        def captured(noise: str) -> None:
            state = {
                "noise": buffers.source(noise),
                "y": buffers.y,
                "h1": buffers.h1,
                "h2": buffers.h2,
                "h3": h3,
                "model_input": buffers.next_input,
                "peak": buffers.peak,
                "rescale": rescales,
                "unconditional": unconditional,
            }
            with loop.clock.on_device():
                step(loop, Given(buffers.table, state, masked, None, predictions, guidance))

        return Capturable(
            owner=loop,
            baked=(self.baked, masked, previewed, rescales, unconditional, h3 is None),
            device=buffers.layout.device,
            rows=len(self.rows),
            draws=any(self.rows.draws),
            noise_bytes=buffers.layout.rows * buffers.x.nbytes,
            counter=loop.clock.counter,
            count=buffers.count,
            step=captured,
        )

    def begin(self, way: Way, start: Start, previewed: bool = False) -> Run:
        """Make the noise, or an image noised to the table's first level, the loop's state.

        Args:
            way: how the run goes through the rows; finding it may have overwritten the state.
            start: what to begin with.
            previewed: whether each row also writes the x_0 that is predicted.
        """
        buffers, table, generator = self.loop.buffers, self.rows.table, start.generator
        x = buffers.x
        if start.x_T is not None:
            x.copy_(start.x_T)
        else:
            noise_source(x, generator)()
        if start.mask is not None:
            assert start.x_0 is not None  # checked
            buffers.keep(start.x_0, start.mask, known_levels(table))
        if start.from_image:
            assert start.x_0 is not None  # checked
            x.mul_(table.noise).add_(start.x_0.to(x), alpha=table.signal)
        else:
            x.mul_(table.initial_scale)
        buffers.start()
        self.loop.clock.start()
        if isinstance(generator, Philox):
            buffers.philox.state.copy_(generator.state)
            buffers.philox.state[1:].add_(1)  # it began with the noise of the offset itself
        return Run(self, way, start, previewed)


class Run:
    """A run that has begun: its rows, its noise and its mask.

    Args:
        prepared: the loop that it runs in.
        way: how it goes through the rows.
        start: what it began with.
        previewed: see :meth:`Prepared.begin`.
    """

    def __init__(self, prepared: Prepared, way: Way, start: Start, previewed: bool) -> None:
        self.prepared, self.way = prepared, way
        self.loop, self.rows = prepared.loop, prepared.rows
        buffers, rows, table = self.loop.buffers, self.rows, self.rows.table
        self.noise = Noise(buffers, rows.draws, start.generator)
        drawn = buffers.noise if any(rows.draws) else None
        state: dict[str, Any] = {
            "noise": buffers.philox if isinstance(start.generator, Philox) else drawn,
            **{name: getattr(buffers, name) for name in table.kept},
            "model_input": buffers.next_input,
            "peak": buffers.peak[: len(rows)],
            "scratch": buffers.scratch,
        }
        self._masked = start.mask is not None
        predictions = rows.predictions.tolist() if previewed else None
        self.given = Given(
            rows.coefficients,
            state,
            self._masked,
            rows.ends,
            predictions,
            {"scratch": buffers.scratch},
        )

    def prediction(self) -> Tensor:
        """A copy of the x_0 that the last row predicted, with what a mask keeps."""
        buffers = self.loop.buffers
        if not self._masked:
            return buffers.clean.clone()
        return torch.lerp(buffers.clean, buffers.known.image, buffers.known.weight)

    def result(self) -> Tensor:
        """A copy of the sample.

        Raises:
            FloatingPointError: the model's output was not finite.
        """
        result = self.loop.buffers.x.clone()
        # Reads the device: after it, nothing uses the buffers any more.
        self.rows.check_finite(self.loop.buffers.peak[: len(self.rows)])
        return result


def known_levels(table: StepTable) -> Tensor:
    """A and S after each row, the image itself at the end; and whether it ends a step."""
    levels = table.next_levels.clone()
    if table.ends:
        levels[table.step_of_row == table.step_of_row[-1]] = torch.tensor([1.0, 0.0]).to(levels)
    return torch.cat((levels, table.ends_step[:, None].to(levels)), dim=1)


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        checks.fail("shape", "positive sizes [B, ...]", repr(shape))
    if not sizes or min(sizes) < 1:
        checks.fail("shape", "positive sizes [B, ...]", list(sizes))
    return sizes


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
