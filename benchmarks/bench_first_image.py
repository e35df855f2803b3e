"""Time to the first image, from the start of a process to pixels on the host.

    python benchmarks/bench_first_image.py                                   # the small model
    python benchmarks/bench_first_image.py --model sd15 --out first_image.json   # with a GPU

Each row is a fresh process that imports, loads a folder with random weights, and makes an image and
then another one; what the first costs beyond the second is planning, compiling and capturing. Cold:
every cache of kernels and compiled code is empty; warm: the cold process has filled it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAYS = {
    "ours": "our pipeline",
    "diffusers": "diffusers, eager",
    "compiled": "diffusers, channels_last, torch.compile(mode='max-autotune')",
}
CACHES = (
    "DIFFUSION_FAST_CACHE",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
)
STAGES = ("imported", "loaded", "first", "second")
COLUMNS = ("import_s", "load_s", "first_s", "second_s")
PROMPT = "a photo of a cat"
DTYPES = ("float32", "bfloat16", "float16")


def write(model: str, dtype: str, folder: Path) -> None:
    """A diffusers folder with random weights."""
    import torch

    from diffusion_fast import StableDiffusion
    from diffusion_fast.benchmarks.models.networks import KINDS, SETTINGS, Networks
    from diffusion_fast.pipelines.parts import Parts

    networks = Networks(KINDS[model], getattr(torch, dtype), torch.device("cpu"))
    two = len(networks.kind.text) == 2
    three = (networks.unet, networks.vae, networks.text)
    parts = Parts(*three, SETTINGS, zero_empty=two, random_weights=True)
    StableDiffusion(parts).save_pretrained(folder)


def child(way: str, folder: str, dtype: str, steps: int) -> dict[str, float]:
    """Two images; when each stage was reached, in seconds of the machine's clock."""
    import torch

    reached: dict[str, float] = {}

    def now(stage: str) -> None:
        reached[stage] = time.time()

    device, of = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    if way == "ours":
        from diffusion_fast import StableDiffusion

        now("imported")
        pipe: Any = StableDiffusion.from_pretrained(folder, dtype=of, device=device)
        given: dict[str, Any] = {"steps": steps, "output": "pil"}
    else:
        from diffusers import DiffusionPipeline

        now("imported")
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=of).to(device)
        pipe.set_progress_bar_config(disable=True)
        if way == "compiled":
            unet = pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet = torch.compile(unet, mode="max-autotune", dynamic=False)
        given = {"num_inference_steps": steps, "output_type": "pil"}
    now("loaded")
    for stage in STAGES[2:]:
        with torch.no_grad():
            pipe(PROMPT, **given)
        now(stage)
    return reached


def measure(way: str, folder: Path, dtype: str, steps: int, caches: Path) -> dict[str, float]:
    """Seconds of each stage of a fresh process, and from its start to the first image."""
    environment = os.environ | {name: str(caches / name) for name in CACHES}
    command = [sys.executable, __file__, "--child", way, "--dtype", dtype, "--steps", str(steps)]
    start = time.time()
    done = subprocess.run(
        [*command, "--folder", str(folder)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{way}: {said[-1]}")
    reached = json.loads(done.stdout.splitlines()[-1])
    ends = [start, *(reached[stage] for stage in STAGES)]
    row = {name: ends[i + 1] - ends[i] for i, name in enumerate(COLUMNS)}
    return row | {"to_first_image_s": reached["first"] - start}


def rows(model: str, dtype: str, steps: int, ways: list[str]) -> Iterator[dict[str, Any]]:
    """Every way, cold and then warm; one that fails has a reason."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write(model, dtype, folder)
        for way in ways:
            for caches in ("cold", "warm"):
                about = {"model": model, "dtype": dtype, "steps": steps, "way": way}
                row: dict[str, Any]
                about |= {"caches": caches, "title": WAYS[way], "weights": "random"}
                try:
                    row = measure(way, folder, dtype, steps, Path(place) / f"caches of {way}")
                except RuntimeError as error:
                    row = {"reason": str(error)}
                yield about | row


def line(row: dict[str, Any]) -> str:
    name = f"{row['way']:>10}, {row['caches']}:"
    if "reason" in row:
        return f"{name} did not run: {row['reason']}"
    stages = ", ".join(f"{column[:-2]} {row[column]:6.2f}" for column in COLUMNS)
    return f"{name} {row['to_first_image_s']:7.2f} s to the first image ({stages})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="small, sd15 or sdxl")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of " + ", ".join(WAYS))
    parser.add_argument("--out", type=Path, help="a JSON file for the rows and the environment")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.folder, given.dtype, given.steps)))
        return
    from diffusion_fast.benchmarks.lib.environment import GPU, environment
    from diffusion_fast.benchmarks.models.networks import KINDS
    from diffusion_fast.files import write_json

    ways = given.ways.split(",")
    for option, values, known in (("--model", [given.model], KINDS), ("--ways", ways, WAYS)):
        if unknown := [value for value in values if value not in known]:
            parser.error(f"{option}: expected {', '.join(known)}, got {unknown[0]!r}")
    found: list[dict[str, Any]] = []
    dtype = given.dtype or ("bfloat16" if GPU else "float32")
    for row in rows(given.model, dtype, given.steps, ways):
        found.append(row)
        print(line(row), flush=True)
        if given.out:  # at once: the next row may take minutes
            write_json({"environment": environment(), "rows": found}, given.out)
    sys.exit(any("reason" in row for row in found))


if __name__ == "__main__":
    main()
