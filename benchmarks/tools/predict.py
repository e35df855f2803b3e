"""A prediction of what a step takes on a GPU, by a model of time. Nothing here is measured.

    python -m benchmarks.tools.predict --model sd15 --gpu H200
    python -m benchmarks.tools.predict --model sdxl --measured 30.1   # ms a step, by a benchmark

The ops of a prepared step are recorded on the meta device, with their shapes. Each takes the longer
of two times: its multiply-adds at the rate of tiles that reach a stated share of the GPU's peak, in
waves of whole blocks; and its bytes at the rate of the memory that they lie in. A gap follows each
launch. Peaks and bandwidths are those of NVIDIA's data sheets (dense, bf16 with float32 sums);
shares are assumptions, which a measured step corrects by one factor. Latencies, tails and falling
clocks are not in it, so a real step takes longer. No figure of this file belongs into a table of
results.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from diffusion_fast.engine.rewrites.cost import Cost

from ..models.limits import step_cost
from ..models.networks import KINDS


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        tflops: bf16 products with float32 sums, dense, at the boost clock, in TFLOP/s.
        memory: bandwidth in TB/s.
        cache: of the L2 cache, in MB.
        blocks: number of multiprocessors.
        hopper: whether it has wgmma and TMA.
    """

    tflops: float
    memory: float
    cache: float
    blocks: int
    hopper: bool = False


GPUS = {
    "H100": Gpu(989.4, 3.35, 50, 132, True),
    "H200": Gpu(989.4, 4.8, 50, 132, True),
    "A100": Gpu(312, 2.039, 40, 108),
    "L40S": Gpu(362, 0.864, 96, 142),
    "RTX4090": Gpu(165.2, 1.008, 72, 128),
    "RTX5090": Gpu(209.5, 1.792, 96, 170),
}


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted.

    Attributes:
        tiles: of products and convolutions, (rows, columns, share of the peak in a full wave).
        splits: numbers of parts into which the sum of a product may be cut.
        attention: share of the peak in attention.
        memory: share of the data sheet's bandwidth.
        cache: how many times the memory's bandwidth the L2 cache has.
        passes: how often a norm goes over its image, of the bytes read and written once.
        gap: microseconds between two launches.
    """

    tiles: tuple[tuple[int, int, float], ...] = ((128, 128, 0.62), (128, 64, 0.55), (64, 64, 0.5))
    splits: tuple[int, ...] = (1, 2, 3, 4, 6)
    attention: float = 0.35
    memory: float = 0.8
    cache: float = 1.8
    passes: float = 1.5
    gap: float = 1.0


HOPPER = "products by wgmma with 128 x 256 tiles and TMA"
# What would be gained, each over the assumptions above; those for Hopper are for such GPUs alone.
LEVERS: dict[str, Callable[[Assumptions], Assumptions]] = {
    HOPPER: lambda a: replace(a, tiles=(*a.tiles, (128, 256, 0.75))),
    "the fastest attention of a contest": lambda a: replace(a, attention=0.5),
    "statistics of norms from the op before": lambda a: replace(a, passes=a.passes * 2 / 3),
    "dependent launch": lambda a: replace(a, gap=a.gap / 2),
}
CLASSES = {
    "conv2d": "convolutions",
    "linear": "linear layers",
    "attention": "attention",
    "decoupled_attention": "attention",
    "group_norm_silu": "group norms",
    "layer_norm": "layer norms",
    "row_statistics": "layer norms",
}


def product_us(m: int, n: int, k: int, gpu: Gpu, given: Assumptions) -> float:
    """The least time of an [m, k] by [k, n] product over tiles and cuts of the sum."""
    flops = 2 * m * n * k / (gpu.tflops * 1e6)  # us at the peak

    def time(rows: int, columns: int, share: float, parts: int) -> float:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        computed = tiles * rows * columns / (m * n)  # past the edges too
        waves = math.ceil(tiles * parts / gpu.blocks) * gpu.blocks / (tiles * parts)
        sums = 0 if parts == 1 else (parts + 1) * m * n * 4  # partial sums, written and read
        return flops * computed * waves / share + sums / (gpu.memory * given.memory * 1e6)

    return min(time(*tile, parts) for tile in given.tiles for parts in given.splits)


def memory_us(cost: Cost, weights: int, gpu: Gpu, given: Assumptions) -> float:
    """Weights come from memory at each step; what the op before wrote may still be in the cache."""
    rate = gpu.memory * given.memory * 1e6  # bytes a microsecond
    rest = cost.bytes - weights
    return weights / rate + rest / (rate * (given.cache if rest < gpu.cache * 5e5 else 1))


def call_us(name: str, args: Sequence[Any], cost: Cost, gpu: Gpu, given: Assumptions) -> float:
    """One launch."""
    weights, arithmetic = 0, cost.flops / (gpu.tflops * 1e6) / 0.5
    if name in ("linear", "conv2d"):
        weight = args[1]
        weights = weight.numel() * weight.element_size()
        n, k = weight.shape[0], weight[0].numel()
        arithmetic = product_us(cost.flops // (2 * n * k), n, k, gpu, given)
    elif name in ("attention", "decoupled_attention"):
        arithmetic = cost.flops / (gpu.tflops * 1e6 * given.attention)
    elif name in ("group_norm_silu", "layer_norm", "row_statistics"):
        cost = replace(cost, bytes=int(cost.bytes * given.passes))
    return max(arithmetic, memory_us(cost, weights, gpu, given)) + given.gap


def by_class(calls: Sequence[Any], gpu: Gpu, given: Assumptions) -> dict[str, float]:
    """Milliseconds of a step for each class of ops."""
    found: dict[str, float] = {}
    for name, args, cost in calls:
        kind = CLASSES.get(name, "rest")
        found[kind] = found.get(kind, 0.0) + call_us(name, args, cost, gpu, given) / 1e3
    return found


def predict(calls: Sequence[Any], gpu: Gpu) -> dict[str, Any]:
    """Milliseconds by class, their sum, and what each lever would save alone and all together."""
    plain = Assumptions()
    classes = by_class(calls, gpu, plain)
    total, every, saved = sum(classes.values()), plain, {}
    for name, pull in LEVERS.items():
        if name != HOPPER or gpu.hopper:
            saved[name] = total - sum(by_class(calls, gpu, pull(plain)).values())
            every = pull(every)
    saved["all of these"] = total - sum(by_class(calls, gpu, every).values())
    return {
        "a prediction, not a measurement": True,
        "launches": len(calls),
        "ms": classes,
        "ms_sum": total,
        "ms_saved": saved,
        "assumptions": asdict(plain),
    }


def table(model: str, name: str, found: dict[str, Any], measured: float | None) -> str:
    """The prediction as text; beside it the measured step and the factor between them."""
    title = f"PREDICTION, not measured: {KINDS[model].title}, {name}, bf16, one guided image"
    lines = [title, f"{'class':42}{'ms a step':>10}"]
    lines += [f"{kind:42}{ms:10.2f}" for kind, ms in found["ms"].items()]
    total = found["ms_sum"]
    lines.append(f"{'sum of ' + str(found['launches']) + ' launches':42}{total:10.2f}")
    if measured is not None:
        factor = measured / total
        lines.append(f"{'measured, beside it':42}{measured:10.2f}")
        lines.append(f"{'measured over predicted':42}{factor:10.2f}")
        fitted = (f"{kind} {ms * factor:.2f}" for kind, ms in found["ms"].items())
        lines.append("fitted by that factor: " + ", ".join(fitted))
    lines.append(f"{'lever, alone':42}{'ms less':>10}")
    lines += [f"{lever:42}{ms:10.2f}" for lever, ms in found["ms_saved"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*KINDS], default="sd15", help="whose step it is")
    parser.add_argument("--gpu", choices=[*GPUS], help="one GPU; all where it is not given")
    parser.add_argument("--measured", type=float, help="milliseconds that a step took on that GPU")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    given = parser.parse_args(arguments)
    if given.measured is not None and (given.gpu is None or not given.measured > 0):
        parser.error("--measured: expected a positive number of milliseconds, and --gpu beside it")
    calls = step_cost(KINDS[given.model], torch.bfloat16, batch=1).calls
    names = [given.gpu] if given.gpu else [*GPUS]
    found = {name: predict(calls, GPUS[name]) for name in names}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print("\n\n".join(table(given.model, n, one, given.measured) for n, one in found.items()))


if __name__ == "__main__":
    main()
