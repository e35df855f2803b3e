"""What products in int8 cost and save on this CPU: a U-Net's step, and pictures beside exact ones.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_int8 --out int8.json --picture int8.png

Steps are those of an engine with ``rewrites="all"`` and with ``["all", "int8"]``, in turn, of one
image with guidance and random weights: the median over the rounds, and by how much of its norm the
way from noise to the result differs after a single step. Layers are those of SD1.5 for such an
image, with the way of the exact one that an engine measured on this machine, if one did: the least
of the rounds. Pictures are those of the emoji model, which is trained: exact ones above, the same
seeds in int8 below, with the peak signal-to-noise ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.images import grid
from diffusion_fast.ops import int8

from .lib.environment import environment
from .models.networks import KINDS, Networks
from .models.variants import engine_loop

WAYS: dict[str, Any] = {"exact": "all", "int8": ["all", "int8"]}
STEPS = 2  # of a run that is timed
# Images, tokens or height and width, channels in and out, and whether a gate follows.
Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = (
    *((2, 4096, 320, n, geglu) for n, geglu in ((320, False), (960, False), (2560, True))),
    (2, 4096, 1280, 320, False),
    *((2, 1024, 640, n, geglu) for n, geglu in ((640, False), (5120, True))),
    (2, 1024, 2560, 640, False),
    *((2, 256, 1280, n, geglu) for n, geglu in ((1280, False), (10240, True))),
    (2, 256, 5120, 1280, False),
    *((2, side, side, n, n, False) for side, n in ((64, 320), (32, 640), (16, 1280), (8, 1280))),
)
PROMPTS = (
    "a red apple",
    "tiger face, 3d style",
    "a yellow rose, flat style",
    "rocket, noto style",
    "a purple heart",
    "cactus, noto style",
    "penguin, 3d style",
    "birthday cake, flat style",
)


def step(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a model's step each way, and how far off a run of one step is in int8."""
    networks = Networks(KINDS[name], torch.float32, torch.device("cpu"))
    inputs = networks.inputs(1)
    first = [engine_loop(networks, inputs, 1, how)[1]() - inputs.x_T for how in WAYS.values()]
    runs = {way: engine_loop(networks, inputs, STEPS, how)[1] for way, how in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first packs the weights
                seconds[way].append((time.perf_counter() - start) / STEPS)
    row: dict[str, Any] = {way: statistics.median(times) for way, times in seconds.items()}
    exact, rounded = first
    error = ((rounded - exact).norm() / exact.norm()).item()
    return {"model": name, **row, "speedup": row["exact"] / row["int8"], "error": error}


def layers(rounds: int, shapes: Sequence[Shape] = SHAPES) -> list[dict[str, Any]]:
    """Milliseconds of layers each way, a residual added to what is not gated, and the error."""
    rows = []
    for batch, *sides, channels, out, geglu in shapes:
        ways: dict[str, Any] = {"exact": ops, "int8": int8}
        if len(sides) == 2:  # a convolution
            x = torch.randn(batch, channels, *sides).contiguous(memory_format=torch.channels_last)
            weight, what = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5, {"padding": 1}
            packs = {w: m.pack_conv2d(weight, tuple(x.shape), padding=1) for w, m in ways.items()}
        else:
            x, what = torch.randn(batch, *sides, channels), {"geglu": geglu}
            weight, count = torch.randn(out, channels) / channels**0.5, batch * sides[0]
            packs = {w: m.pack_linear(weight, count, geglu=geglu) for w, m in ways.items()}
        name = "linear" if len(sides) == 1 else "conv2d"
        bias, results, seconds = torch.randn(out), {}, dict.fromkeys(ways, float("inf"))
        residual = None if geglu else torch.randn_like(getattr(ops, name)(x, weight, **what))
        for _ in range(rounds + 1):
            for way, module in ways.items():
                start, run = time.perf_counter(), getattr(module, name)
                results[way] = run(x, weight, bias, residual=residual, packed=packs[way], **what)
                seconds[way] = min(seconds[way], time.perf_counter() - start)
        error = (results["int8"] - results["exact"]).norm() / results["exact"].norm()
        times = {way: 1000 * value for way, value in seconds.items()}
        row = {"x": list(x.shape), "weight": list(weight.shape), "geglu": geglu, **times}
        rows.append({**row, "speedup": times["exact"] / times["int8"], "error": error.item()})
    return rows


def pictures(prompts: Sequence[str] = PROMPTS, **options: Any) -> tuple[Tensor, list[float]]:
    """The emoji model's pictures [2, N, 3, H, W], exact and in int8, and dB of each pair."""
    drawn = []
    for how in WAYS.values():
        pipe = df.StableDiffusion.from_pretrained("emoji", rewrites=how, dtype=torch.float32)
        images = pipe(list(prompts), seed=1, output="tensor", **options).images
        assert isinstance(images, Tensor)
        drawn.append(images)
    both = torch.stack(drawn)
    error = (both[1] - both[0]).square().mean((1, 2, 3))
    return both, (10 * torch.log10(4 / error)).tolist()  # they reach from -1 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["emoji", "sd15"], choices=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("int8.json"))
    parser.add_argument("--picture", type=Path, help="where to draw; nothing is drawn without")
    given = parser.parse_args()
    found: dict[str, Any] = {"steps": [], "environment": environment()}
    for name in given.models:
        found["steps"].append(row := step(name, given.rounds))
        print(row, flush=True)
    found["layers"] = layers(given.rounds)
    for row in found["layers"]:
        print(row, flush=True)
    if given.picture is not None:
        both, decibels = pictures()
        grid(both.flatten(0, 1), both.shape[1], 2).save(given.picture, optimize=True)
        found["decibels"] = dict(zip(PROMPTS, decibels, strict=True))
        print(found["decibels"])
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
