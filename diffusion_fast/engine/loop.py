"""The sampling loop over static tensors: one row of the table after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..conditioning import Context
from ..ops import Philox, checks
from ..samplers.table import StepTable
from .buffers import Buffers, Generators, Layout, noise_source
from .capture import Graph
from .clock import Clock
from .predictor import PlainPredictor, Predictor, signature


class Loop:
    """A predictor on buffers: ``prepare``, ``start``, then ``step`` for each row of the table.

    ``step`` is the loop on the host. ``captured_step`` is the same with nothing that depends on the
    row or on the host: a CUDA graph of it serves every step of every table.

    Attributes:
        table: the table that was prepared last, and ``timesteps``, its grid on the device.
        baked: what a captured step depends on beside the buffers' layout.
    """

    def __init__(self, layout: Layout, predictor: Predictor) -> None:
        self.buffers, self.predictor = Buffers(layout), predictor
        self.clock = Clock(layout.device)
        self.table: StepTable | None = None
        self._output_shape = torch.Size(layout.output_shape)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def draws(self) -> bool:
        """Whether any row of the table reads noise."""
        return any(self._draws)

    def prepare(self, table: StepTable, context: Context, extra_channels: Tensor | None) -> None:
        """Everything that does not depend on the noise."""
        buffers, device = self.buffers, self.buffers.layout.device
        if table is not self.table:
            rows = table.folded()
            buffers.table[: len(table)] = rows.to(device)
            buffers.count.fill_(len(table))
            self._rows: list[list[float]] = rows.tolist()
            self._draws: list[bool] = table.draws.tolist()
            self._ends: list[bool] = table.ends_step.tolist()
            self.timesteps = table.timesteps.to(device, timesteps_dtype(table))
            self.table = table
        buffers.write_extra(extra_channels)
        self.predictor.prepare(context, self.timesteps)
        whole = isinstance(self.predictor, PlainPredictor) and self.timesteps.dtype
        self.baked = signature(context), whole

    def start(
        self,
        x_T: Tensor | None,
        x_0: Tensor | None,
        mask: Tensor | None,
        generator: Generators,
        *,
        from_image: bool,
    ) -> None:
        """Noise, or an image noised to the table's first level, becomes the state."""
        buffers, table = self.buffers, self.table
        assert table is not None
        x = buffers.x
        if x_T is not None:
            x.copy_(x_T)
        else:
            noise_source(x, generator)()
        self._masked = mask is not None
        if mask is not None:
            assert x_0 is not None
            buffers.keep(x_0, mask, _known_levels(table))
        if from_image:
            assert x_0 is not None
            x.mul_(table.noise).add_(x_0.to(x), alpha=table.signal)
        else:
            x.mul_(table.initial_scale)
        buffers.start()
        self.clock.start()
        self._start_noise(table, generator)

    def _start_noise(self, table: StepTable, generator: Generators) -> None:
        buffers = self.buffers
        self._draw: Callable[[], object] | None = None
        noise: Tensor | Philox | None = None
        if isinstance(generator, Philox):
            noise = buffers.philox
            noise.state.copy_(generator.state)
            noise.state[1:].add_(1)  # the state began with the noise of the offset itself
        elif self.draws:
            noise = buffers.noise
            self._draw = noise_source(noise, generator)
        self._host_state: dict[str, Any] = {
            "noise": noise,
            "y": buffers.y if table.needs_y else None,
            "h1": buffers.h1 if table.needs_h1 else None,
            "h2": buffers.h2 if table.needs_h2 else None,
            "model_input": buffers.next_input,
            "peak": buffers.peak[: len(table)],
            "scratch": buffers.scratch,
        }

    def step(self) -> None:
        """One row, which the host knows."""
        row = self.clock.row
        output = self._predicted()
        if self._draw is not None:
            self.draw()
        ops.sampler_step(self.buffers.x, output, self._rows, row, **self._host_state)
        if self._masked and self._ends[row]:
            self._keep_known()
        self.clock.row = row + 1

    def replay(self, graph: Graph, *, draw: bool) -> None:
        """One row by a graph of ``captured_step``, with noise drawn for it or there already."""
        if draw:
            self.draw()
        graph.replay()
        self.clock.row += 1

    def draw(self) -> None:
        """The noise of the row that comes next, if it reads any."""
        if self._draw is not None and self._draws[self.clock.row]:
            self._draw()

    def draw_all(self) -> None:
        """The same for all rows, before the loop."""
        if self._draw is not None:
            for row, wanted in enumerate(self._draws):
                if wanted:
                    self._draw()
                    self.buffers.noise_table[row] = self.buffers.noise

    def captured_step(self, noise: str, *, masked: bool, rescale: bool) -> None:
        """One row, which only the device knows.

        Args:
            noise: where a row's noise is: ``"row"`` (drawn before it), ``"table"``, ``"philox"``.
            masked: whether to keep an image outside of a mask.
            rescale: whether any row may rescale guidance.
        """
        buffers = self.buffers
        with self.clock.on_device():
            ops.sampler_step(
                buffers.x,
                self._predicted(),
                buffers.table,
                self.clock.step,
                noise=buffers.source(noise),
                y=buffers.y,
                h1=buffers.h1,
                h2=buffers.h2,
                model_input=buffers.next_input,
                peak=buffers.peak,
                rescale=rescale,
            )
            if masked:
                self._keep_known()
            self.clock.advance()

    def _predicted(self) -> Tensor:
        buffers = self.buffers
        output = self.predictor(buffers.model_input, self.clock)
        if not isinstance(output, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}")
        if output.shape != self._output_shape:
            but = " without the extra channels" if buffers.layout.extra else ""
            expected = f"an output of the shape of its input{but} {list(self._output_shape)}"
            checks.fail("model", expected, list(output.shape))
        if output.data_ptr() == buffers.x.data_ptr():
            output = output.clone()  # a model that returns its input: x changes in place
        return output

    def _keep_known(self) -> None:
        """x <- mask x + (1 - mask) (A x_0 + S z), where the row ends a step."""
        buffers, known = self.buffers, self.buffers.known
        signal, noise, ends = self.clock.pick(known.levels).unbind()
        image, weight, _ = buffers.scratch
        torch.mul(known.image, signal, out=image)
        image.addcmul_(known.start, noise)
        torch.mul(known.weight, ends, out=weight)
        torch.lerp(buffers.x, image, weight, out=buffers.x)
        buffers.write_input()


def timesteps_dtype(table: StepTable) -> torch.dtype:
    """Whole timesteps stay integers, so that a model may index tables with t."""
    return torch.int64 if table.integer_timesteps else torch.float32


def _known_levels(table: StepTable) -> Tensor:
    """A and S after each row, the image itself after the last step; and whether it ends a step."""
    levels = table.next_levels.clone()
    levels[table.step_of_row == table.step_of_row[-1]] = torch.tensor([1.0, 0.0]).to(levels)
    return torch.cat((levels, table.ends_step[:, None].to(levels)), dim=1)
