"""Images of one size in one batch, each of which joins and leaves between any two steps.

Their samplers, numbers of steps, prompts and seeds are their own: see :mod:`.slots`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .buffers import noise_source
from .graphs import policy
from .graphs.capture import Graph
from .rewrites.derived import Kept
from .rewrites.rows import Rows, side_by_side
from .slots import Seat, Slots


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
