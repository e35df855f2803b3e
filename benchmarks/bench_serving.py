"""Mixed requests: one batch for all of them beside the usual ways to serve.

    python -m benchmarks.bench_serving           # some minutes
    python -m benchmarks.bench_serving --quick   # half a minute, to see that it runs
    python -m benchmarks.bench_serving --replicas 1 2    # the server on Ray, through HTTP

All ways serve the same requests with the U-Net of the emoji model that comes with the package, the
same rewrites and the same number of slots, in turn within one run:

- ``rows``: ours. One batch whatever the settings, a table row for each image; joins at every step.
- ``single``: one request after the other.
- ``equal``: batches of requests that wait with equal sampler, steps and guidance, run to the end.
- ``guidance``: batches made anew at every step of requests with equal guidance; each has a sampler
  step of its own.

The traffic: samplers of :data:`SAMPLERS`, steps of :data:`STEPS`, guidance of :data:`GUIDANCE`, all
at random, but ``--shared`` of the requests that have one usual setting. First all requests are
there at once (saturation); then they arrive at random (Poisson) at half of what ``single`` can do.
Latency is from arrival to the last step; prompts are encoded before, and pictures are not decoded,
which is the same for all. Time is that of one thread (:class:`Clock`). Last, the batch curve:
milliseconds of a step with 1 to ``--slots`` images, of which docs/ray.md reckons replicas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffusion_fast as df
from benchmarks.lib.environment import environment
from benchmarks.lib.replicas import throughput
from diffusion_fast import ops
from diffusion_fast.engine.batch import Batch
from diffusion_fast.engine.rewrites.rows import Rows, side_by_side
from diffusion_fast.engine.slots import Job, Seat, Slots
from diffusion_fast.samplers import make_table
from diffusion_fast.samplers.table import StepTable

SAMPLERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
STEPS = (4, 8, 12, 16, 20, 25, 30, 40, 50)
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5, 9.0)
USUAL = ("dpmpp_2m", 20, 7.5)
PROMPTS = ("a red apple", "a blue fish", "a green house", "a purple owl", "a yellow car", "a cat")
SHAPE = (8, 8, 8)  # of the model's latents
FIELDS = (
    *("load", "way", "requests", "images_per_s", "p50_s", "p95_s", "p99_s"),
    *("model_calls", "images_per_call"),
)


@dataclass(eq=False)
class Request:
    """One image to draw."""

    settings: tuple[str, int, float]
    seed: int
    arrives: float
    table: StepTable
    done: float = 0.0

    @property
    def prompt(self) -> str:
        return PROMPTS[self.seed % len(PROMPTS)]

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients send it."""
        settings = dict(zip(("sampler", "steps", "guidance_scale"), self.settings, strict=True))
        return {"prompt": self.prompt, "seed": self.seed, "response_format": "b64_json"} | settings

    @property
    def job(self) -> Job:
        generator = torch.Generator().manual_seed(self.seed)
        context = states(self.prompt)
        return Job(self.table, *context, torch.randn(1, *SHAPE, generator=generator), generator)


@lru_cache
def model() -> df.StableDiffusion:
    return df.StableDiffusion.from_pretrained("emoji")


@lru_cache
@torch.no_grad()
def states(prompt: str) -> tuple[Tensor, Tensor]:
    """What the text encoder makes of a prompt, and of none."""
    both = model().text.encode([prompt, ""]).context
    return both[:1], both[1:]


@dataclass
class Clock:
    """Seconds since the first request could arrive, and what the model was asked.

    They are those that this process computes, in one thread; where it would wait for the next
    arrival, the clock is put forward. So what else runs on the machine hardly matters.
    """

    start: float = field(default_factory=time.process_time)
    skipped: float = 0.0
    calls: int = 0
    images: int = 0

    @property
    def now(self) -> float:
        return time.process_time() - self.start + self.skipped

    def arrived(self, waiting: list[Request]) -> list[Request]:
        """Those that are there."""
        return [one for one in waiting if one.arrives <= self.now]

    def wait(self, waiting: list[Request]) -> None:
        """Go on with the next one."""
        self.skipped += max(0.0, min(one.arrives for one in waiting) - self.now)


def traffic(count: int, shared: float, rate: float | None, seed: int) -> list[Request]:
    """Requests with their times of arrival; None for all at once."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, count) if rate else np.zeros(count)
    made = []
    for i, arrives in enumerate(np.cumsum(gaps)):
        settings = USUAL
        if random.random() >= shared:
            settings = (
                str(random.choice(SAMPLERS)),
                int(random.choice(STEPS)),
                float(random.choice(GUIDANCE)),
            )
        sampler, steps, scale = settings
        table = make_table(sampler, model().scheduler.schedule, steps, guidance_scale=scale)
        made.append(Request(settings, i, float(arrives), table))
    return made


def rows(slots: Slots, requests: Sequence[Request], clock: Clock) -> None:
    """Ours."""
    batch, waiting = Batch(slots, SHAPE), list(requests)
    seats: dict[Seat, Request] = {}
    while waiting or seats:
        if not seats and not clock.arrived(waiting):
            clock.wait(waiting)
        there = clock.arrived(waiting)
        room = slots.free if all(seat.row == 0 for seat in seats) else min(1, slots.free)
        for one in there[:room]:
            waiting.remove(one)
            seat = slots.take(one.job)
            batch.join(seat)
            seats[seat] = one
        clock.calls += 1
        clock.images += len(batch)
        for seat in batch.step():
            batch.leave(seat)
            seat.check_finite()
            seats.pop(seat).done = clock.now


def batched(group: Callable[[list[Request]], list[Request]]) -> Callable[..., None]:
    """Batches that run to their end; ``group`` picks one of those that wait."""

    def run(slots: Slots, requests: Sequence[Request], clock: Clock) -> None:
        waiting = list(requests)
        while waiting:
            there = clock.arrived(waiting)
            if not there:
                clock.wait(waiting)
                continue
            chosen = group(there)[: slots.slots]
            batch = Batch(slots, SHAPE)
            seats = {}
            for one in chosen:
                waiting.remove(one)
                seat = slots.take(one.job)
                batch.join(seat)
                seats[seat] = one
            while len(batch):
                clock.calls += 1
                clock.images += len(batch)
                for seat in batch.step():
                    batch.leave(seat)
                    seat.check_finite()
                    seats[seat].done = clock.now

    return run


def equal(there: list[Request]) -> list[Request]:
    """The first that waits, and those with its settings."""
    return [one for one in there if one.settings == there[0].settings]


@dataclass(eq=False)
class Stepped:
    """A request whose sampler is stepped by itself."""

    request: Request
    seat: Seat
    x: Tensor
    state: dict[str, Any]
    generator: Any
    coefficients: list[list[float]]
    last: int = -1  # the step in which it took part last


@torch.no_grad()
def guidance(slots: Slots, requests: Sequence[Request], clock: Clock) -> None:
    """At every step the group of equal guidance that waited longest, a sampler step for each."""
    waiting, active = list(requests), list[Stepped]()
    number = 0
    while waiting or active:
        if not active and not clock.arrived(waiting):
            clock.wait(waiting)
        room = slots.free if all(a.seat.row == 0 for a in active) else min(1, slots.free)
        for one in clock.arrived(waiting)[:room]:
            waiting.remove(one)
            job = one.job
            seat = slots.take(job)
            x = job.x_T * one.table.initial_scale
            kept = {name: torch.zeros_like(x) for name in ("y", "h1", "h2", "noise")}
            made = Stepped(one, seat, x, kept, job.generator, seat.rows.coefficients, number)
            active.append(made)
        oldest = min(active, key=lambda a: a.last)
        group = [a for a in active if a.request.settings[2] == oldest.request.settings[2]]
        halves = len(group[0].seat.conditions)
        image = [i for half in range(halves) for i in range(len(group))]
        at = torch.tensor([a.seat.first + a.seat.row for a in group])
        conditions = [a.seat.conditions[half] for half in range(halves) for a in group]
        kv = side_by_side(conditions, len(image), conditions[0].length)
        given = Rows(torch.tensor(image), at, at.repeat(halves), kv, None)
        output = slots.network(torch.cat([a.x for a in group]), given)
        number += 1
        clock.calls += 1
        clock.images += len(group)
        for i, a in enumerate(group):
            a.last = number
            if a.seat.rows.draws[a.seat.row]:
                a.state["noise"].normal_(generator=a.generator)
            own = output[[i + half * len(group) for half in range(halves)]]
            ops.sampler_step(a.x, own, a.coefficients, a.seat.row, **a.state)
            a.seat.row += 1
            if a.seat.done:
                a.request.done = clock.now
                slots.give_back(a.seat)
        active = [a for a in active if not a.seat.done]


WAYS: dict[str, Callable[..., None]] = {
    "rows": rows,
    "single": batched(lambda there: there[:1]),
    "equal": batched(equal),
    "guidance": guidance,
}


def measured(
    slots: Slots, ways: Sequence[str], load: str, make: Callable[[int], list[Request]], runs: int
) -> Iterator[dict[str, Any]]:
    """A row for each way: the median of runs that take turns."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for run in range(runs):
        for way in ways:
            requests, clock = make(run), Clock()
            WAYS[way](slots, requests, clock)
            latency = sorted(one.done - one.arrives for one in requests)
            p50, p95, p99 = np.quantile(latency, (0.5, 0.95, 0.99))
            found[way].append(
                {
                    "requests": len(requests),
                    "images_per_s": len(requests) / max(one.done for one in requests),
                    **{"p50_s": p50, "p95_s": p95, "p99_s": p99},
                    "model_calls": clock.calls,
                    "images_per_call": clock.images / clock.calls,
                }
            )
    for way, rows in found.items():
        medians = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        yield {"load": load, "way": way} | {k: f"{v:.4g}" for k, v in medians.items()}


def curve(slots: Slots, repeats: int) -> list[float]:
    """Milliseconds of a step of 1, 2, ... images with guidance, the median of some."""
    made = []
    for count in range(1, slots.slots + 1):
        batch = Batch(slots, SHAPE)
        table = make_table("ddim", model().scheduler.schedule, repeats + 5, guidance_scale=3.0)
        for i in range(count):
            batch.join(slots.take(Request(USUAL, i, 0.0, table).job))
        times = []
        while not batch.seats[0].done:
            begun = time.process_time()
            batch.step()
            times.append(1e3 * (time.process_time() - begun))
        for seat in list(batch.seats):
            batch.leave(seat)
        made.append(statistics.median(times[5:]))
    return made


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Throughput at saturation, and latency at half of what one at a time can do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    full = [row for row in results if row["load"] == "saturation"]
    half = [row for row in results if row["load"] != "saturation"]
    axes[0].bar([row["way"] for row in full], [float(row["images_per_s"]) for row in full])
    axes[0].set_title("saturation: images per second")
    for row in half:
        values = [1e3 * float(row[name]) for name in ("p50_s", "p95_s", "p99_s")]
        axes[1].plot(["p50", "p95", "p99"], values, marker="o", label=row["way"])
    axes[1].set_title("half of single's saturation: latency, ms")
    axes[1].set_ylim(bottom=0)
    axes[1].legend()
    figure.savefig(file, dpi=120)


def write(file: Path, options: argparse.Namespace, **found: Any) -> None:
    """What was found, with the machine, the date and the command's options."""
    facts = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        **found,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shared", type=float, default=0.4, help="part with the usual settings")
    parser.add_argument("--out", type=Path, help="a folder for results.json and serving.png")
    parser.add_argument("--replicas", type=int, nargs="*", help="numbers of replicas on Ray")
    options = parser.parse_args()
    count, runs = (16, 1) if options.quick else (options.requests, options.runs)
    if options.replicas:
        bodies = [one.body for one in traffic(count, options.shared, None, 0)]
        found = throughput(options.replicas, bodies, options.slots, runs)
        for row in found:
            print(row)
        if options.out:
            write(options.out / "replicas.json", options, results=found)
        return
    torch.set_num_threads(1)  # whose time the clock counts
    slots = Slots(model().unet, slots=options.slots, max_rows=120)

    def saturated(run: int) -> list[Request]:
        return traffic(count, options.shared, None, run)

    for way in WAYS:  # what is done once
        WAYS[way](slots, traffic(8, 0.5, None, 99), Clock())
    results = list(measured(slots, list(WAYS), "saturation", saturated, runs))
    rate = float(next(row for row in results if row["way"] == "single")["images_per_s"]) / 2
    results += measured(
        slots,
        ["rows", "single"],
        f"{rate:.3g} per s",
        lambda run: traffic(count, options.shared, rate, run),
        runs,
    )
    print(",".join(FIELDS))
    for row in results:
        print(",".join(str(row[name]) for name in FIELDS))
    speed = {row["way"]: float(row["images_per_s"]) for row in results[: len(WAYS)]}
    for way in ("single", "equal", "guidance"):
        print(f"rows / {way} at saturation: {speed['rows'] / speed[way]:.2f}")
    late = {row["way"]: float(row["p95_s"]) for row in results[len(WAYS) :]}
    print(f"p95 of rows / single at half load: {late['rows'] / late['single']:.2f}")
    batch_ms = curve(slots, 20 if options.quick else 100)
    print("ms of a step by images:", ", ".join(f"{ms:.3g}" for ms in batch_ms))
    if options.out:
        rounded = [round(ms, 3) for ms in batch_ms]
        write(options.out / "results.json", options, results=results, batch_curve_ms=rounded)
        plot(results, options.out / "serving.png")


if __name__ == "__main__":
    main()
