"""What this machine has: versions, processors, GPU, driver and compilers."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from ._version import __version__
from .cores import core_limit

FLAGS = ("flags", "Features")  # lines of /proc/cpuinfo, on x86 and on Arm
PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers")
# What builds the CUDA extension, and what to install where it is missing.
COMPILERS = {
    "nvcc": "install the CUDA toolkit, 12.0 or newer, to build the attention kernels",
    "c++": "install a C++17 compiler such as g++, to build kernels for GPUs and CPUs",
    "ninja": "pip install ninja, for builds ahead of time",
}


def package_version(name: str) -> str:
    """The installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """This package, Python, and the packages it builds on or meets."""
    found = {"diffusion_fast": __version__, "python": platform.python_version()}
    found |= {name: package_version(name) for name in PACKAGES}
    # Only PyTorch itself says for which CUDA it was built, wherever its wheel came from.
    return found | {"torch": str(torch.__version__)}


def processor() -> dict[str, str]:
    """The CPU and how many of its cores PyTorch uses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = core_limit()
    limited = "" if limit is None else f" ({limit} at once, by the control group's quota)"
    return {
        "processor": _processor_name(),
        "cores": f"{cores}{limited}, PyTorch uses {torch.get_num_threads()} threads",
        "instructions": str(torch.backends.cpu.get_cpu_capability()),
        "bfloat16": _bfloat16(),
    }


# What multiplies in bfloat16, as Linux names it, fastest first.
BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}


def bfloat16_products() -> list[str]:
    """What this CPU multiplies in bfloat16 with, fastest first; empty where float32 is faster.

    Empty as well on systems that don't list the CPU's instructions.
    """
    return [name for flag, name in BFLOAT16.items() if flag in cpu_flags()]


def _bfloat16() -> str:
    if not cpu_flags():
        return "unknown: this system does not list its CPU's instructions"
    found = bfloat16_products()
    return f"fast: {found[0]}" if found else "not fast: the CPU has no products in it"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instructions that Linux found, by its names; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            lines = (line.partition(":") for line in info)
            flags = next((text for name, _, text in lines if name.strip() in FLAGS), "")
    except OSError:
        flags = ""
    return frozenset(flags.split())


@functools.cache
def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpus() -> dict[str, str]:
    """Every CUDA device and the driver, or the reason why there is none."""
    if torch.version.cuda is None:
        return {"gpu": "none: this PyTorch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"gpu": "none: PyTorch finds no CUDA device"}
    found = {}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB,"
            f" {p.multi_processor_count} SMs"
        )
    return found | {"driver": _driver(), "cuda": torch.version.cuda}


def _driver() -> str:
    try:
        import pynvml
    except ModuleNotFoundError:
        return "unknown: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        return f"unknown: {error}"


def compilers() -> dict[str, str]:
    """Path and version of what builds the CUDA extension."""
    return {name: _compiler(name, remedy) for name, remedy in COMPILERS.items()}


def _compiler(name: str, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        return f"not found: {remedy}"
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if any(c.isdigit() for c in line)]
    # nvcc states its version in the line that says "release"; the others in their first.
    line = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{line.strip() or 'unknown version'} ({path})"
