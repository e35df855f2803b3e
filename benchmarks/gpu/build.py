"""Builds the attention kernels for every head dim and the GPUs that are here, all at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusion_fast.ops.cuda import build as extension


def main() -> int:
    start = time.perf_counter()
    names = [extension.architecture(capability) for capability in extension.local_capabilities()]
    if not names:
        print("error: expected a GPU of compute capability 8.0 or later, found none")
        return 2
    print(f"for {', '.join(f'sm_{name}' for name in names)}", flush=True)

    def build(head_dim: int) -> str:
        begin = time.perf_counter()
        try:
            # Found in the cache, or built and put there, which is where a first use looks.
            path: Path = extension._library_for(head_dim)
        except extension.BuildError as error:
            return str(error)
        print(f"head dim {head_dim}: {time.perf_counter() - begin:.1f} s, {path}", flush=True)
        return ""

    with ThreadPoolExecutor(len(extension.HEAD_DIMS)) as pool:
        failures = list(filter(None, pool.map(build, extension.HEAD_DIMS)))
    # Opening one registers its ops; the driver answers for the first time.
    if not failures:
        failures = [why for dim in extension.HEAD_DIMS for why in extension.load(dim)]
    print("\n".join(failures) or f"all in {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
