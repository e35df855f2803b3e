"""Every sampler with every schedule that fits: on the host, in a graph, and each image alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from tape import TapeCapturer, tape
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast.samplers import SAMPLERS
from diffusion_fast.samplers.schedules import NAMES

__all__ = ["tape"]  # a fixture

SCHEDULE = df.DiffusionSchedule(1000, 0.00085, 0.012, "scaled_linear")
SCHEDULES = [name for name in NAMES if not name.startswith("gits_")]  # "gits" is one of them
STEPS = 5


class Model(nn.Module):
    """Smooth, and different in each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.sin(self.scale * x + context) + t[:, None].double() / 1e4


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_schedule(tape: TapeCapturer, sampler: str) -> None:
    own = SAMPLERS[sampler].own_grid  # no schedule fits it but its own
    settings: list[dict[str, Any]] = [
        {"timestep_spacing": name, "convention": "comfyui"} for name in SCHEDULES
    ]
    settings = [{}] if own else settings
    context = {"context": torch.ones(1, 3), "null_context": torch.zeros(1, 3)}
    context = {name: value.double() for name, value in context.items()}
    options: dict[str, Any] = {"sampler": sampler, "steps": STEPS, "guidance_scale": 3.0}
    model = Model()
    host = df.Engine(model, SCHEDULE, graph="off", **options, **settings[0])
    graph = df.Engine(model, SCHEDULE, graph="loop", **options, **settings[0])
    for chosen in settings:
        for engine in (host, graph):
            engine.configure(**chosen)
        truth = host.sample((2, 3), generator=generators(), **context)
        assert truth.isfinite().all(), chosen
        assert torch.equal(host.sample((2, 3), generator=generators(), **context), truth)
        assert error(graph.sample((2, 3), generator=generators(), **context), truth) < 1e-9, chosen
        for i, generator in enumerate(generators()):
            alone = host.sample((1, 3), generator=generator, **context)
            assert error(alone, truth[i : i + 1]) < 1e-9, chosen
    assert tape.captures <= 2  # one for whole timesteps, one for others
