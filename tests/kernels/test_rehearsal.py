"""Every launch through triton's own JIT, driver and C launcher, over a stub of libcuda.

With an older triton installed, the same tests are those of its launcher: CI runs them with the
oldest one that is supported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler"
    ),
]

GROUPS = (
    ("linear", "conv2d"),
    ("group_norm_silu",),
    ("layer_norm", "row_statistics", "geglu", "residual"),
    ("add_noise", "weighted_mse", "sampler_step"),
    ("decoupled_attention",),
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one's triton may be the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = [sys.executable, *command]
    return subprocess.run(started, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow  # every program of every launcher is compiled: minutes for each group
@pytest.mark.parametrize("ops", GROUPS, ids="-".join)
def test_what_a_launcher_says_arrives(ops: tuple[str, ...]) -> None:
    done = run("-m", "benchmarks.tools.rehearse", "--only", *ops)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 failed" in done.stdout


BEGIN = """
import sys, tempfile
from pathlib import Path
from benchmarks.tools import rehearse
from benchmarks.tools.launch_cases import meta
from diffusion_fast.kernels import geglu

folder = tempfile.TemporaryDirectory()
stub = rehearse.Stub(Path(folder.name))
rehearsal = rehearse.begin(stub)
call = lambda: geglu.geglu(meta(8, 64))
"""


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("call_ = rehearse.nvidia.CudaLauncher.__call__; "
         "rehearse.nvidia.CudaLauncher.__call__ = "
         "lambda self, *a: call_(self, *a[:9], a[10], a[9], *a[11:])", "parameters: expected"),
        ("rehearse.nvidia.CudaLauncher.__call__ = lambda *a: None", "0 launches, expected 1"),
        ("call_ = rehearse.nvidia.CudaLauncher.__call__; "
         "rehearse.nvidia.CudaLauncher.__call__ = lambda self, x, *a: call_(self, x + 1, *a)",
         "grid: expected"),
        ("stub.limit_shared(16); "
         "from diffusion_fast.kernels import layer_norm; "
         "call = lambda: layer_norm.layer_norm(meta(64, 640), meta(640), meta(640), 1e-5)",
         "out of resource: shared memory"),
    ],
    ids=["order", "dropped", "grid", "small"],
)  # fmt: skip
def test_a_rehearsal_can_fail(change: str, error: str) -> None:
    """A launcher that swaps, drops or alters something, and a GPU that is too small."""
    done = run("-c", f"{BEGIN}\n{change}\ncall()")
    assert done.returncode
    assert error in done.stderr
