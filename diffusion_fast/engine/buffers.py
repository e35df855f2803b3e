"""What a sampling loop keeps between steps, allocated once per shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from ..samplers.table import StepTable

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class Buffers:
    """The state of a sampler (see :mod:`diffusion_fast.ops.sampler_step`) and the model's input.

    ``model_input`` is ``x`` itself where the model takes one half of guidance in the state's dtype.
    """

    x: Tensor  # [B, ...]
    model_input: Tensor  # [B or 2B, ...], in the model's dtype
    timesteps: list[Tensor]  # one [B or 2B] per row
    noise: Tensor | None
    y: Tensor | None
    h1: Tensor | None
    h2: Tensor | None
    scratch: tuple[Tensor, Tensor, Tensor]
    peak: Tensor  # [N]

    @classmethod
    def allocate(
        cls,
        table: StepTable,
        shape: Sequence[int],
        halves: int,
        dtype: torch.dtype,
        model_dtype: torch.dtype,
        device: torch.device,
    ) -> Buffers:
        def empty() -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        x = empty()
        own_input = halves > 1 or dtype != model_dtype
        # Integer grids stay integers, so that a model may index tables with t.
        t_dtype = torch.int64 if table.integer_timesteps else torch.float32
        t = table.timesteps.to(device, t_dtype)
        batch = halves * shape[0]
        return cls(
            x=x,
            model_input=torch.empty(batch, *shape[1:], dtype=model_dtype, device=device)
            if own_input
            else x,
            timesteps=list(t[:, None].repeat(1, batch).unbind()),
            noise=empty() if table.draws.any() else None,
            y=empty() if table.needs_y else None,
            h1=empty() if table.needs_h1 else None,
            h2=empty() if table.needs_h2 else None,
            scratch=(empty(), empty(), empty()),
            peak=torch.empty(len(table), dtype=dtype, device=device),
        )

    def start(self, x: Tensor) -> None:
        """Begin a run from ``x``: the kept tensors start at zero."""
        self.x.copy_(x)
        for kept in (self.y, self.h1, self.h2, self.peak):
            if kept is not None:
                kept.zero_()
        if self.model_input is not self.x:
            for half in self.model_input.split(len(self.x)):
                half.copy_(x)


def noise_source(out: Tensor, generator: Generators) -> Callable[[], object]:
    """A function that fills ``out`` with standard normal noise, in the order of torch.randn.

    With one generator per image, image i has the noise that it would have if made alone. A
    generator on another device draws there, so that a seed means the same image everywhere.
    """
    if generator is None:
        return out.normal_
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
