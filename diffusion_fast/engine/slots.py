"""Places for images of every kind on their way, which share one network and one table of rows.

A sampler is a table of rows (:mod:`~diffusion_fast.samplers.table`), and
:func:`~diffusion_fast.ops.sampler_step` lets each image read its own. So one call of the model
serves images of several samplers, numbers of steps, guidance scales, prompts and seeds. Nothing
here depends on the size of the images: those that share one are a :class:`~.batch.Batch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import Context, PerStep, by_row
from ..models import UNet2DCondition
from ..ops import checks
from ..ops.cpu import library as cpu_kernels
from ..ops.sampler_step import COLUMNS
from ..samplers.table import INDEX, StepTable
from .buffers import Generators
from .graphs import policy
from .loop import Rows as TableRows
from .loop import known_levels
from .rewrites.rows import Condition, RowsUNet

CHUNK = 77  # tokens of a text encoder's chunk, in whose multiples contexts grow


@dataclass(frozen=True)
class Job:
    """One image to sample.

    Attributes:
        table: the sampler's table.
        context, null_context: as :meth:`Engine.sample <diffusion_fast.Engine.sample>` takes them,
            for one image; those of halves that don't run are not looked at.
        x_T, generator, x_0, mask, extra_channels: as there, for one image [1, ...].
        from_image: whether x_0 is noised to the table's first level, in place of pure noise.
    """

    table: StepTable
    context: Context | PerStep
    null_context: Context | PerStep
    x_T: Tensor
    generator: Generators
    x_0: Tensor | None = None
    mask: Tensor | None = None
    extra_channels: Tensor | None = None
    from_image: bool = False


@dataclass(eq=False)
class Seat:
    """An image on its way.

    Attributes:
        job: what it is.
        rows: its table.
        slot: its part of the shared tables.
        first: the first row of that part.
        halves: of the unconditional half and the conditional one, or of the one that runs: what
            each row of the table is conditioned on.
        offsets: what is to be added to the row for the place of each half's times.
        row: the row that comes next, counted from 0.
        predicted: the row that came next when a step last wrote what it predicts; 0 before that.
        peak: when it has left, what :func:`~diffusion_fast.ops.sampler_step` found at each row.
    """

    job: Job
    rows: TableRows
    slot: int
    first: int
    halves: list[list[Condition]]
    offsets: list[int]
    row: int = 0
    predicted: int = 0
    peak: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.row == len(self.rows)

    @property
    def conditions(self) -> list[Condition]:
        """Those of the row that comes next, one for each half."""
        return [half[self.row] for half in self.halves]

    @property
    def changes(self) -> bool:
        """Whether the row that comes next is conditioned on something else than the one before."""
        return any(half[self.row] is not half[self.row - 1] for half in self.halves)

    def check_finite(self) -> None:
        """Raise FloatingPointError with the first step that was not finite, of an image that left.

        It reads the device.
        """
        assert self.peak is not None
        self.rows.check_finite(self.peak)

    @property
    def step(self) -> int:
        """How many steps are done."""
        ends = self.rows.ends
        return sum(ends[: self.row])


class Slots:
    """What images of all sizes share: the network and the tables, a part for each slot.

    Args:
        model: a U-Net. Its weights must not change while images are on their way.
        slots: the most images on their way.
        max_rows: the most model calls of an image.
        rewrites: as :class:`~diffusion_fast.Engine` takes them.
        graph: ``"auto"`` for CUDA graphs where there can be any, or ``"off"``.
        sizes: the numbers of rows of the model's batch that are used: others are filled up. None
            for powers of two and the steps half way between them where graphs are captured, and
            for all numbers elsewhere.
    """

    def __init__(
        self,
        model: UNet2DCondition,
        *,
        slots: int,
        max_rows: int,
        rewrites: str | Iterable[str] = "all",
        graph: str = "auto",
        sizes: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_rows", max_rows)):
            checks.positive_int(name, value)
        checks.one_of("graph", graph, ("auto", "off"))
        self.model, self.slots, self.max_rows = model, slots, max_rows
        weight = model.conv_in.weight
        self.device, self.model_dtype = weight.device, weight.dtype
        if self.device.type == "cpu":
            cpu_kernels.settle()  # before the first step, none of which waits
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.idle = slots * max_rows  # the row that changes nothing
        pooled = model.config.addition_embed_type is not None
        self._second = self.idle + 1 if pooled else 0  # where times of the conditional half begin
        times = (2 if pooled else 1) * (self.idle + 1)
        self.network = RowsUNet(model, images=slots, times=times, rewrites=rewrites)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.table = zeros(self.idle + 1, len(COLUMNS), dtype=torch.float64)
        self.table[:, INDEX["c_x"]], self.table[:, INDEX["clip"]] = 1.0, float("inf")
        self.predictions = self.table.clone()  # the rows that lead to x_0, for previews
        self.levels = zeros(self.idle + 1, 3, dtype=self.dtype)
        self.peak = zeros(self.idle + 1, dtype=self.dtype)
        self._free = list(range(slots))[::-1]
        self.capturer = policy.CudaCapturer()
        why = "as asked" if graph == "off" else self.capturer.unavailable(self.device)
        self.graphs = policy.GraphCache(policy.GRAPH_BYTES) if why is None else None
        self.sizes = None if sizes is None else sorted(sizes)
        if self.sizes is not None and self.sizes[-1] < 2 * slots:
            checks.fail("sizes", f"one of at least {2 * slots}, two for each slot", self.sizes)
        if self.sizes is None and self.graphs is not None:
            between = (size for k in range(1, 20) for size in (2**k, 3 * 2 ** (k - 1)))
            self.sizes = [1, *itertools.takewhile(lambda n: n < 2 * slots, between), 2 * slots]

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    @torch.no_grad()
    def take(self, job: Job) -> Seat:
        """Give a slot to an image: write its rows, its times, its keys and values.

        Raises:
            ValueError: a job that doesn't fit; no slot is taken then.
        """
        rows = TableRows(job.table, self.device)
        if len(rows) > self.max_rows:
            checks.fail("steps", f"at most {self.max_rows} model calls", len(rows))
        steps = job.table.step_of_row.tolist()
        halves = []
        if job.table.halves != "conditional":
            halves.append(("null_context", by_row("null_context", job.null_context, steps), 0))
        if job.table.halves != "unconditional":
            halves.append(("context", by_row("context", job.context, steps), self._second))
        conditions = [self._conditions(name, contexts) for name, contexts, _ in halves]
        slot = self._free[-1]
        first = slot * self.max_rows
        timesteps = job.table.timesteps.to(self.device, torch.float32)
        for _, contexts, offset in halves if self._second else halves[:1]:
            row = 0
            for _, group in itertools.groupby(contexts, id):  # neighbours with the same
                [context, *more] = group
                times = timesteps[row : row + 1 + len(more)]
                self.network.write_times(times, offset + first + row, context)
                row += len(times)
        part = slice(first, first + len(rows))
        self.table[part] = rows.folded.to(self.device)
        self.predictions[part] = rows.predictions.to(self.device)
        self.levels[part] = known_levels(job.table).to(self.levels)
        self.peak[part] = 0
        self._free.pop()
        return Seat(job, rows, slot, first, conditions, [offset for _, _, offset in halves])

    def _conditions(self, name: str, contexts: Sequence[Context]) -> list[Condition]:
        """Of each row's context, made once for those that are one and the same."""
        made: dict[int, Condition] = {}
        for context in contexts:
            if id(context) not in made:
                found = self.network.condition(context)
                if len(found) != 1:
                    checks.fail(name, "that of one image", f"a batch of {len(found)}")
                made[id(context)] = found[0]
        return [made[id(context)] for context in contexts]

    def give_back(self, seat: Seat) -> None:
        self._free.append(seat.slot)

    def places(self, seats: Sequence[Seat]) -> tuple[list[int], list[int], list[int]]:
        """The image of each row of the model's batch; the rows of the outputs of each image."""
        image: list[int] = []
        cond, uncond = [], []
        for i, seat in enumerate(seats):
            uncond.append(len(image))
            image += [i] * len(seat.conditions)
            cond.append(len(image) - 1)
        return image, cond, uncond

    def rounded(self, count: int) -> int:
        """The number of rows of a batch that has at least ``count``."""
        return count if self.sizes is None else next(n for n in self.sizes if n >= count)

    def rounded_length(self, length: int) -> int:
        """The number of tokens of a batch whose longest context has ``length``."""
        if self.graphs is None or length == 1:
            return length
        chunks = -(-length // CHUNK)
        return CHUNK * (1 << (chunks - 1).bit_length())
