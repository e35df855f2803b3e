"""What a sampling loop keeps between steps, allocated once per shape: its clock and its tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ..conditioning import Context, PerRow, contexts_of
from ..ops import Philox, checks
from ..ops.sampler_step import COLUMNS

Generators = torch.Generator | Sequence[torch.Generator] | Philox | None


class Clock:
    """Counts rows: on the host, or on the device where a captured graph must count by itself.

    Attributes:
        row: the row, while the host counts.
        counter: int64 [1], the row, while the device counts.
        counts_on_device: which of them counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.row = 0
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.counts_on_device = False

    @property
    def step(self) -> int | Tensor:
        """The row as :func:`diffusion_fast.ops.sampler_step` takes it."""
        return self.counter if self.counts_on_device else self.row

    def pick(self, table: Tensor) -> Tensor:
        """The row of a table [R, ...]: a view, or copied by the device's counter."""
        return table.index_select(0, self.counter)[0] if self.counts_on_device else table[self.row]

    def start(self) -> None:
        self.row = 0
        self.counter.zero_()

    def advance(self) -> None:
        if self.counts_on_device:
            self.counter.add_(1)
        else:
            self.row += 1

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Count on the device inside the ``with`` block: what is captured there serves any row."""
        self.counts_on_device = True
        try:
            yield
        finally:
            self.counts_on_device = False


class Order:
    """The number of each row's context, at an address that captured graphs may read.

    Args:
        max_rows: the most rows of the tables to come.
        device: where the model runs.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._order: Sequence[int] = ()  # empty where all rows have the same
        self._on_device = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def take(self, context: Context | PerRow) -> None:
        """Know the order of a run's contexts."""
        several = len(contexts_of(context)) > 1
        self._order = context.order if several and isinstance(context, PerRow) else ()
        self._on_device[: len(self._order)] = torch.tensor(self._order, dtype=torch.int64)

    def join(self, made: Sequence[Any]) -> Any:
        """Nested tensors of each context as one, [contexts, ...] of each if there are several."""
        if not self._order:
            return made[0]
        return tree_map(lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0], *made)

    def pick(self, joined: Any, clock: Clock) -> Any:
        """Those of the clock's row: views, or copied by the device's counter."""
        if not self._order:
            return joined
        if clock.counts_on_device:
            number = self._on_device.index_select(0, clock.counter)
            return tree_map_only(Tensor, lambda x: x.index_select(0, number)[0], joined)
        row = self._order[clock.row]
        return tree_map_only(Tensor, lambda x: x[row], joined)


@dataclass(frozen=True)
class Layout:
    """Everything that the size and kind of a loop's tensors depends on.

    Attributes:
        shape: shape of the samples, [B, C, ...].
        extra: channels that the model's input has besides.
        halves: how many halves of guidance run, 1 or 2.
        rows: how many rows the tables may have.
        dtype, model_dtype: what the state and the model's input are kept in.
        device: where they are.
    """

    shape: tuple[int, ...]
    extra: int
    halves: int
    rows: int
    dtype: torch.dtype
    model_dtype: torch.dtype
    device: torch.device

    @property
    def input_shape(self) -> tuple[int, ...]:
        batch = self.halves * self.shape[0]
        if not self.extra:
            return (batch, *self.shape[1:])
        return (batch, self.shape[1] + self.extra, *self.shape[2:])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.halves * self.shape[0], *self.shape[1:])


class Buffers:
    """The state of a sampler (see :mod:`diffusion_fast.ops.sampler_step`) and the model's input.

    Attributes:
        x, y, h1, h2, h3, noise: the state, [B, ...]; ``scratch`` four tensors more of that shape.
        model_input: [halves * B, C + extra, ...] in the model's dtype. It is ``x`` itself where
            the model takes one half of guidance in the state's dtype.
        next_input: where a step writes x for the model; None if ``model_input`` is ``x``.
        peak: [rows].
        table: float64 [rows, columns] and ``count``, int64 [1], its rows in use: what a captured
            step reads on the device.
        philox: the noise's stream, on the device.
    """

    def __init__(self, layout: Layout) -> None:
        empty = functools.partial(torch.empty, dtype=layout.dtype, device=layout.device)
        shape = layout.shape
        self.layout = layout
        self.x, self.y, self.noise = (empty(*shape) for _ in range(3))
        self.h1, self.h2, self.h3 = (empty(*shape) for _ in range(3))
        self.scratch = tuple(empty(*shape) for _ in range(4))
        self.model_input, self.next_input = self.x, None
        if layout.halves > 1 or layout.extra or layout.dtype != layout.model_dtype:
            self.model_input = empty(*layout.input_shape, dtype=layout.model_dtype)
            self.next_input = self.model_input
            if layout.extra:
                self.next_input = self.model_input[:, : shape[1]]
        self.peak = empty(layout.rows)
        self.table = empty(layout.rows, len(COLUMNS), dtype=torch.float64)
        self.count = empty(1, dtype=torch.int64)
        self.philox = Philox(0, device=layout.device)

    @functools.cached_property
    def noise_table(self) -> Tensor:
        """Noise of every row, [rows, B, ...], for steps that the host does not see."""
        return self.x.new_empty(self.layout.rows, *self.x.shape)

    @functools.cached_property
    def clean(self) -> Tensor:
        """The x_0 that a step's model call predicted, for those who look at it."""
        return torch.empty_like(self.x)

    @functools.cached_property
    def predictions(self) -> Tensor:
        """``table`` of the rows that lead there."""
        return torch.empty_like(self.table)

    @functools.cached_property
    def known(self) -> Known:
        """What inpainting keeps."""
        image, start, weight = (torch.empty_like(self.x) for _ in range(3))
        return Known(image, start, weight, self.x.new_empty(self.layout.rows, 3))

    def source(self, noise: str) -> Tensor | Philox:
        """Where a captured step finds its noise."""
        if noise == "philox":
            return self.philox
        return self.noise_table if noise == "table" else self.noise

    def keep(self, image: Tensor, mask: Tensor, levels: Tensor) -> None:
        """Before ``start``, with the starting noise in ``x``: what inpainting keeps."""
        known = self.known
        known.image.copy_(image)
        known.start.copy_(self.x)
        known.weight.copy_(mask)
        torch.sub(1, known.weight, out=known.weight)
        known.levels[: len(levels)] = levels.to(known.levels)

    def keep_known(self, clock: Clock) -> None:
        """x <- mask x + (1 - mask) (A x_0 + S z) at the clock's row, if that ends a step."""
        known = self.known
        signal, noise, ends = clock.pick(known.levels).unbind()
        image, weight, *_ = self.scratch
        torch.mul(known.image, signal, out=image)
        image.addcmul_(known.start, noise)
        torch.mul(known.weight, ends, out=weight)
        torch.lerp(self.x, image, weight, out=self.x)
        self.write_input()

    def start(self) -> None:
        """Begin a run from ``x``: the kept tensors start at zero."""
        for kept in (self.y, self.h1, self.h2, self.h3, self.peak):
            kept.zero_()
        self.write_input()

    def write_input(self) -> None:
        """x becomes the model's next input, in both halves."""
        if self.next_input is not None:
            for half in self.next_input.split(len(self.x)):
                half.copy_(self.x)

    def write_extra(self, channels: Tensor | None) -> None:
        """Fill the channels beside x, [B or 1, extra, ...], in both halves."""
        if channels is not None:
            for half in self.model_input[:, self.x.shape[1] :].split(len(self.x)):
                half.copy_(channels)


@dataclass
class Known:
    """An image that inpainting keeps where it doesn't draw.

    Attributes:
        image: x_0, [B, ...].
        start: z, the noise it is given, [B, ...].
        weight: 1 - mask, [B, ...]: how much of the image is kept.
        levels: [rows, 3]: A and S after each row; and 1 for rows that end a step, 0 for others.
    """

    image: Tensor
    start: Tensor
    weight: Tensor
    levels: Tensor


class Noise:
    """The noise that rows read, drawn by the host into the buffers.

    Args:
        buffers: the loop's.
        draws: whether a row reads any.
        generator: where it comes from; a Philox stream is read in the steps themselves.
    """

    def __init__(self, buffers: Buffers, draws: list[bool], generator: Generators) -> None:
        self._buffers = buffers
        self._draws = [] if isinstance(generator, Philox) else draws
        self._source = noise_source(buffers.noise, generator) if any(self._draws) else None

    def draw(self, row: int) -> None:
        """The noise of a row, if it reads any."""
        if self._source is not None and self._draws[row]:
            self._source()

    def draw_all(self) -> None:
        """The noise of all rows, before a loop that the host doesn't see."""
        for row, reads in enumerate(self._draws):
            if reads:
                self.draw(row)
                self._buffers.noise_table[row] = self._buffers.noise


def noise_source(out: Tensor, generator: Generators) -> Callable[[], object]:
    """A function that fills ``out`` with standard normal noise, in the order of torch.randn.

    With one generator per image, image i has the noise that it would have if made alone. A
    generator on another device draws there, so that a seed means the same image everywhere. A
    Philox stream gives its own numbers, the same at every call.
    """
    if generator is None:
        return out.normal_
    if isinstance(generator, Philox):
        return lambda: out.copy_(generator.normal(out.shape, out.dtype, out.device))
    if not isinstance(generator, torch.Generator):
        if not isinstance(generator, (list, tuple)) or not all(
            isinstance(one, torch.Generator) for one in generator
        ):
            checks.fail("generator", "a torch.Generator or a list of them", repr(generator)[:60])
        if len(generator) != len(out):
            checks.fail("generator", f"one or {len(out)} generators (the batch)", len(generator))
        pairs = zip(out.split(1), generator, strict=True)
        sources = [noise_source(image, one) for image, one in pairs]
        return lambda: [source() for source in sources]
    if generator.device == out.device:
        return functools.partial(out.normal_, generator=generator)
    staged = torch.empty(out.shape, dtype=out.dtype, device=generator.device)
    return lambda: out.copy_(staged.normal_(generator=generator))
