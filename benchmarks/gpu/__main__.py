from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

from diffusion_fast.benchmarks.lib.environment import environment, folder_name

from .identity import ROOT, identity
from .parts import MINUTES, all_parts
from .runner import BAD, INTERRUPTED, run, table

# Everything that is compiled, so that it can be carried to another machine as one folder.
CACHES = {
    "DIFFUSION_FAST_CACHE": "",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
NO_GPU = "error: expected a CUDA device, and PyTorch {} finds none (nvidia-smi shows the driver's)"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 1 if a part failed, 2 if nothing can run, 130 after Ctrl-C."""
    options = _options(arguments)
    if options.list:
        print("\n".join(part.name for part in all_parts(Path())))
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU.format(torch.__version__), file=sys.stderr)
        return 2
    folder = (options.out or ROOT / "benchmarks" / "results" / folder_name()).absolute()
    os.chdir(ROOT)
    cache = (options.cache or ROOT / "build" / "gpu-cache").absolute()
    for name, inside in CACHES.items():
        os.environ.setdefault(name, str(cache / inside))
    parts = all_parts(folder)
    unknown = sorted(set(options.only) - {part.name for part in parts})
    if unknown:
        print(f"error: --only: no part {', '.join(unknown)}; --list shows all", file=sys.stderr)
        return 2
    chosen = [part for part in parts if part.name in options.only or not options.only]
    (folder / "ops").mkdir(parents=True, exist_ok=True)  # pytest-benchmark writes there at its end
    # A part is asked to stop, and killed, before this process is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    records = run(
        chosen,
        folder,
        identity(environment()),
        budget=60 * options.minutes,
        redo=options.redo,
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{table([part.name for part in chosen], records, folder)}", flush=True)
    if any(record.status == INTERRUPTED for record in records.values()):
        return 130
    return int(any(record.status in BAD for record in records.values()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Tests and benchmarks on this machine's GPU; started again, it goes on.",
    )
    parser.add_argument("--out", type=Path, help="benchmarks/results/ and the GPU's name")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for all parts together ({MINUTES:g})"
    )
    parser.add_argument("--cache", type=Path, help="of what is compiled; build/gpu-cache")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts")
    parser.add_argument("--redo", action="store_true", help="also what passed before")
    parser.add_argument("--list", action="store_true", help="show the names of the parts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
