"""Our sampling and training loops beside a tutorial's: same model, same process, interleaved.

The ratio (tutorial's median over ours, so above 1 is faster) stands in ``extra_info`` and in the
output: it should be at least 0.97, and ``host`` (a model that costs nothing, so that what is left
is the loop) above 1.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import tutorial
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import diffusion_fast as df

ROUNDS = 9
SHAPE = [16, 1, 8, 8]
SCHEDULE = df.DiffusionSchedule(timesteps=200)


class Unconditional(nn.Module):
    """The small U-Net with a fixed class, so that it is called as model(x, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = df.UNet2DCondition(df.UNetConfig.preset("digits"))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        label = torch.full((len(x),), self.unet.null_class, dtype=torch.int64)
        return self.unet(x, t, label)


class Free(nn.Module):
    """Costs nothing: what is timed is the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


def interleaved(
    benchmark: pytest.FixtureRequest, ours: Callable[[], object], theirs: Callable[[], object]
) -> None:
    """Time both in turn; pytest-benchmark stores ours, extra_info the tutorial's and the ratio."""
    times: list[float] = []

    def setup() -> None:
        start = time.perf_counter()
        theirs()
        times.append(time.perf_counter() - start)

    theirs(), ours()  # warm up
    benchmark.pedantic(ours, setup=setup, rounds=ROUNDS)
    baseline = statistics.median(times)
    ratio = baseline / benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info |= {"tutorial_s": baseline, "ratio": ratio, "device": "cpu"}
    print(f"\ntutorial {baseline:.4f} s, ratio {ratio:.3f}")


@pytest.mark.parametrize("model", [Unconditional, Free], ids=["unet", "host"])
def test_sampling(benchmark: pytest.FixtureRequest, model: type[nn.Module]) -> None:
    network = model().eval()
    interleaved(
        benchmark,
        lambda: df.sample(network, SCHEDULE, SHAPE),
        lambda: tutorial.sample(network, SCHEDULE, SHAPE),
    )


def test_training(benchmark: pytest.FixtureRequest) -> None:
    data = TensorDataset(torch.randn(512, *SHAPE[1:]))
    batches = BatchSampler(SequentialSampler(data), 64, drop_last=True)
    loader = DataLoader(data, sampler=batches, batch_size=None)
    ours, theirs = Unconditional(), Unconditional()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    interleaved(
        benchmark,
        lambda: df.train_diffusion(ours, loader, SCHEDULE, epochs=1),
        lambda: tutorial.train(theirs, loader, SCHEDULE, epochs=1),
    )
