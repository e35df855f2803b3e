"""Peak memory of loading a U-Net, over the model's own bytes, for every kind of checkpoint.

    python benchmarks/bench_loading.py           # SD 1.5 at three tenths of its width
    python benchmarks/bench_loading.py --full    # SD 1.5 itself, 3.4 GB in float32

Each row is a fresh process. Peak is the strictest number there is: the most resident memory at any
moment (VmHWM, which the kernel counts, so none is missed) from the call until one element of every
page of every parameter was read, less what was resident before the call. Pages of mapped files
count in full, although the kernel could take them back at any time. Exit status 1 if a row is above
1.2 times the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_fast.files import write_json
from diffusion_fast.models import UNet2DCondition, UNetConfig
from diffusion_fast.models.checkpoints import CONFIG, INDEX, WEIGHTS
from diffusion_fast.models.compvis_unet import unet_name

LIMIT = 1.2  # times the model
SHARDS = 4
REDUCED = (96, 192, 384, 384)
TINY = (32, 32, 32, 32)
PAGE = 4096


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint, the dtype in it and the dtype asked for (None: the same)."""

    kind: str
    stored: str = "float32"
    loaded: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.stored}" + (f" to {self.loaded}" if self.loaded else "")


CASES = (
    Case("folder"),
    Case("folder", "float16"),
    Case("folder", "float16", "float32"),
    Case("folder", "float32", "float16"),
    Case("sharded"),
    Case("sharded", "float16", "float32"),
    Case("single file"),
    Case("single file", "float16", "float32"),
    Case("ckpt"),
    Case("ckpt", "float16", "float32"),
)


def write(case: Case, folder: Path, widths: tuple[int, ...]) -> Path:
    """A checkpoint with random weights."""
    config = UNetConfig.preset("sd15", block_out_channels=widths)
    with torch.device("meta"):
        shapes = {n: v.shape for n, v in UNet2DCondition(config).state_dict().items()}
    dtype = getattr(torch, case.stored)
    pool = torch.randn(max(shape.numel() for shape in shapes.values()) + len(shapes)).to(dtype)
    state = {
        name: pool[i : i + shape.numel()].view(shape).clone()
        for i, (name, shape) in enumerate(shapes.items())
    }
    if case.kind in ("single file", "ckpt"):
        state = {f"model.diffusion_model.{unet_name(n, config)}": v for n, v in state.items()}
        if case.kind == "ckpt":
            torch.save({"state_dict": state}, folder / "model.ckpt")
            return folder / "model.ckpt"
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    write_json(config.to_dict(), folder / CONFIG)
    if case.kind == "folder":
        save_file(state, folder / WEIGHTS)
        return folder
    names = list(state)
    files = {name: f"part-{i * SHARDS // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n] for n in names if files[n] == file}, folder / file)
    write_json({"weight_map": files}, folder / INDEX)
    return folder


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measure(path: str, warm_up: str, dtype: str | None) -> dict[str, float]:
    """Load once, in this process."""
    wanted = getattr(torch, dtype) if dtype else None
    UNet2DCondition.from_pretrained(warm_up, dtype=wanted)  # modules that are imported when used
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident("VmRSS"), time.perf_counter()
    model = UNet2DCondition.from_pretrained(path, dtype=wanted)
    for parameter in model.parameters():
        parameter.detach().flatten()[:: PAGE // parameter.element_size()].sum()
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"model": size, "peak": resident("VmHWM") - before, "seconds": seconds}


def child(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(case: Case, widths: tuple[int, ...]) -> dict[str, float]:
    """Write and measure a case, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, channels in (("model", widths), ("tiny", TINY)):
            (Path(folder) / name).mkdir()
            job = json.dumps([case.kind, case.stored, f"{folder}/{name}", channels])
            paths.append(child("--write", job).strip())
        return json.loads(child("--measure", json.dumps([*paths, case.loaded])))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="SD 1.5 at its full width")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        kind, stored, folder, widths = json.loads(options.write)
        print(write(Case(kind, stored), Path(folder), tuple(widths)))
        return 0
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return 0
    widths = UNetConfig.preset("sd15").block_out_channels if options.full else REDUCED
    failed = False
    print(f"{'checkpoint':34} {'model MB':>9} {'peak MB':>9} {'ratio':>6} {'s':>6}")
    for case in CASES:
        row = run(case, widths)
        ratio = row["peak"] / row["model"]
        failed |= ratio > LIMIT
        sizes = f"{row['model'] / 1e6:9.0f} {row['peak'] / 1e6:9.0f}"
        mark = " above the limit" if ratio > LIMIT else ""
        print(f"{case.name:34} {sizes} {ratio:6.2f} {row['seconds']:6.2f}{mark}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
