"""What a step predicts, shown after it: the clean sample, from the host's loop and from a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from tape import TapeCapturer, tape
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast.samplers import SAMPLERS

__all__ = ["tape"]  # a fixture

SCHEDULE = df.DiffusionSchedule(timesteps=100)
SHAPE = (2, 3, 4, 4)


class Certain(nn.Module):
    """Knows the sample: x_0 of whatever it is given is the context."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # whose dtype is the run's

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        signal, low = SCHEDULE.alphas_cumprod.double().sqrt(), t.long()
        part, high = t.double() - low, (low + 1).clamp(max=len(signal) - 1)
        a = torch.lerp(signal[low], signal[high], part)[:, None, None, None]
        return (x - a * context) / (1 - a**2).sqrt()


def seen_by(engine: df.Engine, **asked: Any) -> tuple[list[Tensor], Tensor]:
    shown: list[Tensor] = []
    generator = torch.Generator().manual_seed(1)
    context = torch.full(SHAPE, 0.5, dtype=torch.float64)
    asked = {"context": context, "null_context": 0.5 * context, **asked}
    x = engine.sample(SHAPE, generator=generator, preview=lambda *a: shown.append(a[2]), **asked)
    return shown, x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_clean_sample_that_is_predicted(tape: TapeCapturer, sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "steps": 6, "guidance_scale": 2.0}
    engine = df.Engine(Certain(), SCHEDULE, graph="off", **options)
    shown, x = seen_by(engine)
    assert len(shown) == engine.table.steps
    scale = 2.0 / SAMPLERS[sampler].guidance_divisor
    for one in shown:
        assert error(one, torch.full(SHAPE, 0.25 + scale * 0.25).double()) < 0.02
    replayed, again = seen_by(df.Engine(Certain(), SCHEDULE, graph="step", **options))
    assert error(torch.stack(replayed), torch.stack(shown)) < 1e-9
    assert error(again, x) < 1e-9


def test_what_a_mask_keeps_is_in_it_and_nothing_else_changes() -> None:
    engine = df.Engine(
        Certain(), SCHEDULE, sampler="ddim", steps=4, graph="off", guidance_scale=2.0
    )
    mask, x_0 = torch.zeros(1, 1, 4, 4), torch.randn(SHAPE)
    mask[..., :2] = 1
    shown, x = seen_by(engine, mask=mask, x_0=x_0)
    for one in shown:
        assert error(one[..., 2:], x_0[..., 2:].double()) < 1e-6
        assert error(one[..., :2], torch.full_like(one[..., :2], 0.75)) < 0.02
    asked: dict[str, Any] = {"mask": mask, "x_0": x_0}
    half = torch.full(SHAPE, 0.5, dtype=torch.float64)
    seed = torch.Generator().manual_seed(1)
    assert torch.equal(engine.sample(SHAPE, half, 0.5 * half, generator=seed, **asked), x)


def test_it_comes_before_the_callback_and_needs_the_steps(tape: TapeCapturer) -> None:
    engine = df.Engine(Certain(), SCHEDULE, sampler="heun", steps=3, graph="off")
    seen: list[tuple[str, int, float]] = []
    half = torch.full(SHAPE, 0.5, dtype=torch.float64)
    engine.sample(
        SHAPE,
        half,
        preview=lambda step, t, x: seen.append(("preview", step, t)),
        callback=lambda step, t, x: seen.append(("callback", step, t)),
    )
    assert [name for name, *_ in seen] == ["preview", "callback"] * 3
    assert [one[1:] for one in seen[::2]] == [one[1:] for one in seen[1::2]]
    with pytest.raises(ValueError, match="preview: expected None, because graph='loop' hides"):
        df.Engine(Certain(), SCHEDULE, graph="loop").sample(SHAPE, half, preview=print)
