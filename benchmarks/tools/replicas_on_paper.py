"""What replicas of a server would do, reckoned from the measured milliseconds of a step.

    python -m benchmarks.tools.replicas_on_paper benchmarks/results/serving/results.json

Requests arrive at random (Poisson), with the steps and guidance of benchmarks/bench_serving.py, and
go to the shorter queue of two replicas chosen at random. A replica steps all its images at once:
between two steps at most one joins. How long a step takes is read off the batch curve; an image
without guidance counts half. Nothing else takes time: no network, no text encoder, no decoder.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.bench_serving import traffic


@dataclass(eq=False)
class Image:
    """One on its way.

    Attributes:
        arrives: seconds.
        calls: of the model, that are left.
        weight: 1 with guidance, half without.
    """

    arrives: float
    calls: int
    weight: float


@dataclass(eq=False)
class Replica:
    """A batch and its queue."""

    waiting: deque[Image] = field(default_factory=deque)
    batch: list[Image] = field(default_factory=list)
    steps: bool = False  # whether it is in a step

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.batch)


def reckoned(
    curve: Sequence[float], images: Sequence[Image], replicas: int, seed: int = 0
) -> tuple[float, float, float]:
    """Median and 95th percentile of the latency in seconds; images in a step, on average.

    Args:
        curve: milliseconds of a step with 1, 2, ... images; as many as there are slots.
        images: by their arrival.
        replicas: how many.
        seed: of who is asked.
    """
    chance = np.random.default_rng(seed)
    made = [Replica() for _ in range(replicas)]
    latency: list[float] = []
    together: list[int] = []
    # what happens when: an arrival, or the end of a replica's step
    events: list[tuple[float, int, int]] = [(one.arrives, i, -1) for i, one in enumerate(images)]
    heapq.heapify(events)
    number = len(images)

    def step(at: float, which: int) -> None:
        nonlocal number
        replica = made[which]
        fresh = not replica.batch
        while replica.waiting and len(replica.batch) < len(curve):
            replica.batch.append(replica.waiting.popleft())
            if not fresh:
                break
        replica.steps = bool(replica.batch)
        if not replica.steps:
            return
        together.append(len(replica.batch))
        size = sum(one.weight for one in replica.batch)
        ms = float(np.interp(size, range(1, len(curve) + 1), curve))
        heapq.heappush(events, (at + ms / 1e3, number, which))
        number += 1

    while events:
        at, i, which = heapq.heappop(events)
        if which < 0:
            two = chance.choice(replicas, min(2, replicas), replace=False)
            which = int(min(two, key=lambda one: made[one].load))
            made[which].waiting.append(images[i])
            if not made[which].steps:
                step(at, which)
            continue
        replica = made[which]
        for one in list(replica.batch):
            one.calls -= 1
            if not one.calls:
                replica.batch.remove(one)
                latency.append(at - one.arrives)
        step(at, which)
    p50, p95 = np.quantile(latency, (0.5, 0.95))
    return float(p50), float(p95), float(np.mean(together))


def arrivals(count: int, shared: float, rate: float, seed: int) -> list[Image]:
    """Those of the benchmark's traffic."""
    return [
        Image(one.arrives, len(one.table), 1.0 if one.table.halves == "both" else 0.5)
        for one in traffic(count, shared, rate, seed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results.json of the benchmark")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="*", help="images a second")
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4])
    options = parser.parse_args()
    facts = json.loads(options.results.read_text(encoding="utf-8"))
    curve, shared = facts["batch_curve_ms"], facts["options"]["shared"]
    full = next(float(one["images_per_s"]) for one in facts["results"] if one["way"] == "rows")
    rates = options.rates or [round(full * part, 1) for part in (0.25, 0.5, 0.9, 1.8, 3.6)]
    print("| images/s | replicas | images in a step | p50, s | p95, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for rate in rates:
        for count in options.replicas:
            images = arrivals(options.requests, shared, rate, seed=1)
            p50, p95, together = reckoned(curve, images, count)
            print(f"| {rate:g} | {count} | {together:.2f} | {p50:.2f} | {p95:.2f} |")


if __name__ == "__main__":
    main()
