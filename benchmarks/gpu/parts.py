"""What there is to run on a GPU, the most valuable facts first."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .identity import ROOT
from .runner import GRACE, Part

PYTEST = ("pytest", "pytest_benchmark", "pytest_timeout")
TESTS = (*PYTEST, "hypothesis")
# The kernels that take most of a step's time come first.
OPS = (
    *("attention", "conv2d", "linear", "group_norm_silu", "layer_norm", "row_statistics", "geglu"),
    "decoupled_attention",
    *("residual", "sampler_step", "add_noise", "weighted_mse"),
)
# A checker of memory accesses sees PyTorch's allocations only if each of them is the driver's.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


# One start of the run. A part that takes longer could never pass, so none may.
MINUTES = 5.0
MOST = 60 * MINUTES - 2 * GRACE


def all_parts(folder: Path) -> list[Part]:
    """In the order in which they run; what they write goes to ``folder``."""
    return [
        Part("doctor", _module("diffusion_fast", "doctor"), limit=20, always=True),
        Part("build", _module("benchmarks.gpu.build"), limit=90, least=30),
        *_models(folder),
        *_ops(folder),
        *_tests(folder),
        *_sanitizers(),
        *_more_models(folder),
        Part("rows", _module("benchmarks.gpu.rows", str(folder)), least=0, always=True),
    ]


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _tests(folder: Path) -> Iterator[Part]:
    gpu, fast = ("-m", "gpu and not slow"), ("-m", "not slow")
    # What is compiled without a GPU is seen without one.
    skipped = ("on_gpu", "compile_kernels", "rehearsal")
    rest = [f"--ignore=tests/kernels/test_{name}.py" for name in skipped]
    attention = _marked("ops", "csrc")
    hopper = [path for path in attention if "hopper" in path]  # might hang: it never ran
    attention = [path for path in attention if path not in hopper]
    yield _pytest(folder, "attention", 150, *attention, *gpu, *_processes())
    yield _pytest(folder, "kernels-on-gpu", 90, "tests/kernels/test_on_gpu.py", *fast)
    yield _pytest(folder, "engine", 120, *_marked("engine"), *gpu)
    yield _pytest(folder, "models", 270, *_marked("models", "training"), *gpu)
    yield _pytest(folder, "kernels", 270, "tests/kernels", *rest, *fast, *_processes())
    yield _pytest(folder, "hopper", 200, *hopper, *gpu, "-x")


def _marked(*folders: str) -> list[str]:
    """The files with tests for a GPU: the others may need packages that aren't here."""
    files = (path for name in folders for path in (ROOT / "tests" / name).rglob("test_*.py"))
    found = [path for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(ROOT)) for path in sorted(found)]


def _pytest(folder: Path, name: str, limit: float, *selection: str) -> Part:
    """Tests, with their results as XML."""
    report = f"--junitxml={folder / 'tests' / name}.xml"
    command = _module("pytest", *selection, "-q", report)
    return Part(f"tests-{name}", command, limit=limit, packages=TESTS)


def _processes() -> tuple[str, ...]:
    """Several, where pytest-xdist is there, if cores and the GPU's memory are enough for them."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    return ("-n", str(max(1, min(8, (os.cpu_count() or 1) // 2, memory // 2**32))))


def _ops(folder: Path) -> Iterator[Part]:
    for op in OPS:
        store = f"--benchmark-json={folder / 'ops' / op}.json"
        options = ("-q", "--benchmark-enable", "--benchmark-only", store)
        command = _module("pytest", f"benchmarks/ops/bench_{op}.py", *options)
        limit = MOST if op in ("attention", "group_norm_silu") else 150
        yield Part(f"ops-{op}", command, limit=limit, least=30, packages=PYTEST)


def _bench(folder: Path, name: str, limit: float, *options: str) -> Part:
    """Whole models. What they measured is kept, so that it is worth starting with little time."""
    command = _module("diffusion_fast", "bench", "--out", str(folder), *options)
    return Part(name, command, limit=limit, least=45)


def _models(folder: Path) -> Iterator[Part]:
    """The numbers people ask for: one image with guidance."""
    for model in ("sd15", "sdxl"):
        compile_ahead = _module("diffusion_fast", "warm", "--model", model, "--no-attention")
        yield Part(f"warm-{model}", compile_ahead, limit=50)
        options = ("--model", model, "--what", "unet,loop", "--batch", "1", "--no-compile")
        yield _bench(folder, f"model-{model}", 120, *options)


def _more_models(folder: Path) -> Iterator[Part]:
    for model in ("sd15", "sdxl", "small"):
        one = ("--model", model, "--batch", "1")
        yield _bench(
            folder, f"pipeline-{model}", 200, *one, "--what", "pipeline,ladder", "--no-compile"
        )
    for model in ("sd15", "sdxl"):
        many = ("--model", model, "--batch", "4,16", "--what", "unet,loop", "--no-compile")
        yield _bench(folder, f"batches-{model}", 240, *many)
    for model in ("sd15", "sdxl", "small"):
        compiled = ("--model", model, "--batch", "1", "--what", "unet,loop", "--compile")
        yield _bench(folder, f"compiled-{model}", MOST, *compiled)
    ways = () if importlib.util.find_spec("diffusers") else ("--ways", "ours")
    for model in ("sd15", "sdxl"):
        out = str(folder / f"first_image_{model}.json")
        first = ("benchmarks/bench_first_image.py", "--model", model, "--out", out, *ways)
        yield Part(f"first-image-{model}", (sys.executable, *first), limit=MOST)
    store = f"--benchmark-json={folder / 'ops' / 'training'}.json"
    training = ("benchmarks/bench_training.py", "-q", "--benchmark-enable", store)
    yield Part("training", _module("pytest", *training), limit=240, packages=PYTEST)


def _sanitizers() -> Iterator[Part]:
    """compute-sanitizer on small shapes: first ours in Triton, then attention with all tools."""
    tools = ("compute-sanitizer",)
    for tool in ("memcheck", "racecheck"):
        checked = (tools[0], "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
        command = (*checked, *_module("benchmarks.gpu.small_calls"))
        yield Part(f"{tool}-kernels", command, limit=150, tools=tools, variables=UNCACHED)
    chosen = ("tests/ops/test_attention_cuda.py", "-k", "compute_sanitizer", "-m", "slow", "-q")
    yield Part(
        "sanitizer-attention", _module("pytest", *chosen), limit=240, packages=TESTS, tools=tools
    )
