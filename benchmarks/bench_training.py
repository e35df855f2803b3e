"""A Trainer's steps beside a plain PyTorch loop with the same features on: same model and data.

    pytest benchmarks/bench_training.py --benchmark-enable --benchmark-json=training.json

The plain loop is what one writes without this library: condition dropout, closed-form noising,
min-SNR weights, fused AdamW with warm-up, clipping, an average of the weights. Both train in turns
in one process. ``ratio`` in ``extra_info`` is the plain loop's median over ours, above 1 is faster;
it should be at least 0.97 with the U-Net. ``host`` is a model that costs nothing, so that what is
left is the loop; ``sd15`` is Stable Diffusion 1.5's U-Net on 64x64 latents, with a GPU.
``data_share`` is the part of our time that the Trainer waited for its data.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffusion_fast as df
from diffusion_fast.benchmarks.lib.environment import environment
from diffusion_fast.training import Batches, MinSNR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, STEPS = (30, 20) if DEVICE == "cuda" else (12, 5)
SCHEDULE = df.DiffusionSchedule()


class Free(nn.Module):
    """Costs nothing; what is timed is the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(1, 1, 8, 8))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.output.expand(x.shape)


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        build: the model.
        image: shape of a sample, [C, H, W].
        contexts: random conditions of N samples.
        null: [1, ...], the condition where it is dropped.
        batch: samples of a step.
    """

    build: Callable[[], nn.Module]
    image: tuple[int, int, int]
    contexts: Callable[[int], Tensor]
    null: Tensor
    batch: int = 64

    def data(self) -> TensorDataset:
        count = 20 * self.batch
        return TensorDataset(torch.randn(count, *self.image), self.contexts(count))


def labels(count: int) -> Tensor:
    return torch.randint(10, (count,))


def states(count: int) -> Tensor:
    return torch.randn(1, 77, 768).expand(count, -1, -1)


def unet(preset: str) -> Callable[[], nn.Module]:
    return lambda: df.UNet2DCondition(df.UNetConfig.preset(preset))


DIGIT = (1, 8, 8)
TASKS = {
    "unet": Task(unet("digits"), DIGIT, labels, torch.tensor([10])),
    "host": Task(Free, DIGIT, labels, torch.tensor([10])),
    "sd15": Task(unet("sd15"), (4, 64, 64), states, torch.zeros(1, 77, 768), batch=8),
}


def plain(task: Task, model: nn.Module, compiled: bool, precision: str) -> Callable[[], object]:
    """STEPS steps of the loop that one writes."""
    loader = DataLoader(task.data(), batch_size=task.batch, shuffle=True, drop_last=True)
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, fused=True)
    null = task.null.to(DEVICE)
    average = [p.detach().clone() for p in model.parameters()]
    signal = SCHEDULE.sqrt_alphas_cumprod.to(DEVICE)
    sigma = SCHEDULE.sqrt_one_minus_alphas_cumprod.to(DEVICE)
    snr = (signal / sigma) ** 2
    weights = snr.clamp(max=5) / snr

    def forever() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches, step = forever(), 0

    def run() -> None:
        nonlocal step
        losses = []
        for _ in range(STEPS):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = 2e-4 * min(1, step / 100)
            x_0, context = (value.to(DEVICE, non_blocking=True) for value in next(batches))
            dropped = torch.rand(len(context), device=DEVICE) < 0.1
            context = torch.where(dropped.view(-1, *[1] * (context.dim() - 1)), null, context)
            t = torch.randint(0, 1000, (len(x_0),), device=DEVICE)
            noise = torch.randn_like(x_0)
            a, s = (table[t].view(-1, 1, 1, 1) for table in (signal, sigma))
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
                prediction = network(a * x_0 + s * noise, t, context)
            square = (prediction.float() - noise).square().mean((1, 2, 3))
            loss = (square * weights[t]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, list(model.parameters()), 0.001)
            losses.append(loss.detach())
        torch.stack(losses).tolist()

    return run


def ours(task: Task, model: nn.Module, compiled: bool, precision: str) -> df.Trainer:
    return df.Trainer(
        model,
        Batches(task.data(), task.batch),
        SCHEDULE,
        null_context=task.null,
        condition_dropout=0.1,
        loss_weighting=MinSNR(),
        warmup_steps=100,
        gradient_clip=1.0,
        ema_decay=0.999,
        read_every=STEPS,
        compile=compiled,
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TASKS)
def test_steps(benchmark: Any, name: str, mode: str, precision: str) -> None:
    if name == "sd15" and DEVICE == "cpu":
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    task = TASKS[name]
    theirs = task.build().to(DEVICE)
    trainer = ours(task, copy.deepcopy(theirs), mode == "compile", precision)
    baseline = plain(task, theirs, mode == "compile", precision)
    times: list[float] = []
    waiting: list[float] = []
    peaks = {"plain_peak_bytes": 0, "peak_bytes": 0}

    def timed(name: str, run: Callable[[], object]) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if DEVICE == "cuda":
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
        return seconds

    def step() -> None:
        timed("peak_bytes", lambda: trainer.fit(STEPS, lambda p: waiting.append(p.waiting)))

    baseline()  # warm up, and compile
    step()
    waiting.clear()
    benchmark.pedantic(
        step, setup=lambda: times.append(timed("plain_peak_bytes", baseline)), rounds=ROUNDS
    )
    if not benchmark.stats:
        return
    reference, mine = statistics.median(times), benchmark.stats.stats.median
    benchmark.extra_info |= environment() | {
        "mode": f"{mode}, {precision}",
        "images_per_s": STEPS * task.batch / mine,
        "plain_images_per_s": STEPS * task.batch / reference,
        "ratio": reference / mine,
        "data_share": statistics.mean(waiting),
    }
    if DEVICE == "cuda":
        benchmark.extra_info |= peaks
    print(
        f"\n{name}: {STEPS * task.batch / mine:.0f} images/s,"
        f" plain {STEPS * task.batch / reference:.0f},"
        f" ratio {reference / mine:.3f},"
        f" waiting for data {benchmark.extra_info['data_share']:.1%} of the time"
    )
