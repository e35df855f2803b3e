"""Images of every kind in one batch, each of which joins and leaves between any two steps.

A sampler is a table of rows (:mod:`~diffusion_fast.samplers.table`), and
:func:`~diffusion_fast.ops.sampler_step` lets each image read its own. So one call of the model
serves images of several samplers, numbers of steps, guidance scales, prompts and seeds.

:class:`Slots` keeps what does not depend on the size of the images: the tables, a part of them for
each slot. A :class:`Batch` has the state of those images that share a size.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..conditioning import Context, PerStep, by_row
from ..models import UNet2DCondition
from ..ops import checks
from ..ops.sampler_step import COLUMNS
from ..samplers.table import INDEX, StepTable
from .buffers import Generators, noise_source
from .graphs import policy
from .graphs.capture import Graph
from .loop import Rows as TableRows
from .loop import known_levels
from .rewrites.derived import Kept
from .rewrites.rows import Condition, Rows, RowsUNet, side_by_side

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


@dataclass
class _Arrangement:
    """A batch as the model sees it, until an image joins or leaves.

    Attributes:
        images, rows: their numbers, filled up.
        network: what the network is told of its rows, but for the times.
        offsets: int64 [R], those of the seats.
        cond, uncond: int64 [B], see :func:`~diffusion_fast.ops.sampler_step`.
        masked: whether any image is kept outside of a mask.
        rescales, unconditional: whether any image's table rescales guidance, or reads the
            unconditional output by itself.
        surroundings: what else a captured step depends on.
    """

    images: int
    rows: int
    image: Tensor
    offsets: Tensor
    cond: Tensor
    uncond: Tensor
    kv: Any
    kv_length: int
    lengths: Tensor | None
    masked: bool
    rescales: bool
    unconditional: bool
    surroundings: Hashable

    @property
    def key(self) -> tuple[Hashable, ...]:
        """All that a captured step of one batch depends on."""
        lengths = self.kv_length, self.lengths is None
        kinds = self.masked, self.rescales, self.unconditional
        return self.rows, *lengths, *kinds, self.surroundings


class Batch:
    """Those images on their way that have one size.

    Their states lie side by side without gaps: where an image leaves, the last one takes its place.

    Args:
        slots: the shared tables.
        shape: of one image's latents, [C, h, w].
    """

    def __init__(self, slots: Slots, shape: tuple[int, int, int]) -> None:
        self.slots, self.shape = slots, shape
        self.seats: list[Seat] = []
        count, device = slots.slots, slots.device
        extra = slots.model.config.in_channels - shape[0]

        def empty(*size: int, dtype: torch.dtype = slots.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self._input = empty(count, shape[0] + extra, *shape[1:], dtype=slots.model_dtype)
        # x, y, h1 to h3, noise, the x_0 that previews show; and what a mask keeps: an image, its
        # noise, how much of it
        kept = ("image", "start", "weight")
        names = ("x", "y", "h1", "h2", "h3", "noise", "clean", *kept)
        self._state = {name: empty(count, *shape) for name in names}
        self._row = torch.full((count,), slots.idle, dtype=torch.int64, device=device)
        self._advance = torch.zeros_like(self._row)
        self._places: dict[str, Tensor] = {}
        self._kept = Kept()
        self._arranged: _Arrangement | None = None

    def __len__(self) -> int:
        return len(self.seats)

    @torch.no_grad()
    def join(self, seat: Seat) -> None:
        """Take an image in; it starts with the next step.

        Raises:
            ValueError: tensors of another shape; the seat is not taken in then.
        """
        job, table, at = seat.job, seat.job.table, len(self.seats)
        state = {name: value[at] for name, value in self._state.items()}
        x = state["x"].copy_(job.x_T[0])
        for name in state.keys() - {"x"}:
            state[name].zero_()
        if job.mask is not None and job.x_0 is not None:
            state["image"].copy_(job.x_0[0])
            state["start"].copy_(x)
            state["weight"].copy_(1 - job.mask[0].to(x))
        if job.from_image and job.x_0 is not None:
            x.mul_(table.noise).add_(job.x_0[0].to(x), alpha=table.signal)
        else:
            x.mul_(table.initial_scale)
        self._input[at, : self.shape[0]] = x
        if job.extra_channels is not None:
            self._input[at, self.shape[0] :] = job.extra_channels[0]
        self._row[at] = seat.first
        self.seats.append(seat)
        self._arranged = None

    @torch.no_grad()
    def leave(self, seat: Seat) -> Tensor:
        """Take an image out, done or not, and free its slot.

        Returns:
            Its state [1, C, h, w], a copy.
        """
        at, last = self.seats.index(seat), len(self.seats) - 1
        result = self._state["x"][at : at + 1].clone()
        seat.peak = self.slots.peak[seat.first : seat.first + len(seat.rows)].clone()
        for value in (*self._state.values(), self._input, self._row):
            value[at] = value[last]
        self._row[last] = self.slots.idle
        for value in (*self._state.values(), self._input):
            value[last] = 0  # what stays behind is finite
        self.seats[at] = self.seats[last]
        self.seats.pop()
        self.slots.give_back(seat)
        self._arranged = None
        return result

    @torch.no_grad()
    def estimate(self, seat: Seat) -> Tensor | None:
        """What an image is to be, [1, C, h, w]: a copy of the x_0 that the last step predicted for
        it, with what a mask keeps; None where that step was not asked to write it.
        """
        if not 0 < seat.predicted == seat.row:
            return None
        at = self.seats.index(seat)
        clean, image, weight = (self._state[n][at : at + 1] for n in ("clean", "image", "weight"))
        return torch.lerp(clean, image, weight)

    @torch.no_grad()
    def step(self, predicted: bool = False) -> list[Seat]:
        """One row of every image: one call of the model.

        Args:
            predicted: whether it also writes the x_0 that is predicted, for :meth:`estimate`.

        Returns:
            The images that are done now; they are to leave.
        """
        if self._arranged is None:
            self._arranged = self._arrange()
        arranged, noise = self._arranged, self._state["noise"]
        for i, seat in enumerate(self.seats):
            if seat.rows.draws[seat.row]:
                noise_source(noise[i : i + 1], seat.job.generator)()
        graph = self._graph(arranged, predicted)
        if graph is None:
            self._step(arranged, predicted)
        else:
            graph.replay()
        for seat in self.seats:
            seat.row += 1
            seat.predicted = seat.row if predicted else seat.predicted
            if not seat.done and seat.changes:
                self._arranged = None  # its keys and values are to be laid beside the others'
        return [seat for seat in self.seats if seat.done]

    def _arrange(self) -> _Arrangement:
        slots, seats = self.slots, self.seats
        image, cond, uncond = slots.places(seats)
        count = slots.rounded(len(image))
        # As many images as a batch of so many rows can have, so that the rows decide it.
        images = len(seats) if slots.sizes is None else min(slots.slots, count)
        offsets = [one for seat in seats for one in seat.offsets]
        conditions = [one for seat in seats for one in seat.conditions]
        length = slots.rounded_length(max(one.length for one in conditions))
        lengths = [one.length for one in conditions]
        kv = side_by_side(conditions, count, length)
        padding = count - len(image)
        seen = None
        if any(n != length for n in lengths):
            seen = self._place(f"lengths {count}", [*lengths, *[length] * padding])
        if slots.graphs is not None:
            kv = self._kept.write(kv)
        idle = [0] * (images - len(seats))
        self._advance.zero_()
        self._advance[: len(seats)] = 1
        tables = [seat.job.table for seat in seats]
        return _Arrangement(
            images=images,
            rows=count,
            image=self._place(f"image {count}", image + [0] * padding),
            offsets=self._place(f"offsets {count}", offsets + [0] * padding),
            cond=self._place(f"cond {images}", cond + idle),
            uncond=self._place(f"uncond {images}", uncond + idle),
            kv=kv,
            kv_length=length,
            lengths=seen,
            masked=any(seat.job.mask is not None for seat in seats),
            rescales=any(table.rescales for table in tables),
            unconditional=any(table.reads_unconditional for table in tables),
            surroundings=policy.surroundings(slots.device),
        )

    def _place(self, name: str, values: list[int]) -> Tensor:
        """Numbers on the device, under one name always at one address."""
        made = torch.tensor(values, dtype=torch.int64)
        if name not in self._places:
            self._places[name] = made.to(self.slots.device)
        return self._places[name].copy_(made)

    def _step(self, arranged: _Arrangement, predicted: bool) -> None:
        """The model's call, the sampler's step, what masks keep, and the rows that come next."""
        slots, n = self.slots, arranged.images
        row = self._row[:n]
        of_row = row.index_select(0, arranged.image) + arranged.offsets
        network = Rows(arranged.image, row, of_row, arranged.kv, arranged.lengths)
        output = slots.network(self._input[:n], network)
        state = {name: value[:n] for name, value in self._state.items()}
        latents = self._input[:n, : self.shape[0]]
        guidance: dict[str, Any] = {
            "rescale": arranged.rescales,
            "cond": arranged.cond,
            "uncond": arranged.uncond,
        }
        if predicted:
            state["clean"].copy_(state["x"])
            ops.sampler_step(state["clean"], output, slots.predictions, row, **guidance)
        ops.sampler_step(
            state["x"],
            output,
            slots.table,
            row,
            noise=state["noise"],
            y=state["y"],
            h1=state["h1"],
            h2=state["h2"],
            h3=state["h3"],
            model_input=latents,
            peak=slots.peak,
            unconditional=arranged.unconditional,
            **guidance,
        )
        if arranged.masked:
            x, weight = state["x"], state["weight"]
            signal, noise, ends = slots.levels.index_select(0, row)[..., None, None, None].unbind(1)
            known = state["image"] * signal + state["start"] * noise
            torch.lerp(x, known, weight * ends, out=x)
            latents.copy_(x)
        row.add_(self._advance[:n])

    def _graph(self, arranged: _Arrangement, predicted: bool) -> Graph | None:
        """The captured step of an arrangement; None where there is none."""
        slots = self.slots
        if slots.graphs is None:
            return None
        state = *self._state.values(), self._input, self._row, slots.peak

        def capture() -> Graph:
            before = [value.clone() for value in state]
            try:
                one = functools.partial(self._step, arranged, predicted)
                return slots.capturer.capture(slots.device, one, one)
            finally:  # it changes the tensors
                for value, old in zip(state, before, strict=True):
                    value.copy_(old)

        try:
            return slots.graphs.get((self, *arranged.key, predicted), "step", capture)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"graph: capture failed, so the batch runs eagerly: {why}", RuntimeWarning, 2
            )
            slots.graphs = None
            return None
