"""What a row needs to be believed: commit, versions, machine, and the GPU's state."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffusion_fast
from diffusion_fast import hardware, kernels
from diffusion_fast.ops import extension

GPU = torch.cuda.is_available()
PACKAGE = Path(diffusion_fast.__file__).parent
# Results are comparable, and kept when a run goes on, only where all of these are the same.
IDENTITY = ("source", "device", "threads", "torch", "triton", "diffusers", "cuda", "driver")


@functools.cache
def environment() -> dict[str, Any]:
    """The machine and the code; of a GPU its limits too."""
    facts: dict[str, Any] = {
        "commit": _commit(),
        "source": _source(),
        **hardware.versions(),
        "system": platform.platform(),
        "device": device_name(),
        **hardware.processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "driver": None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if not GPU:
        facts["load"] = [round(value, 1) for value in os.getloadavg()]
        return facts
    return facts | hardware.gpus() | _limits_of_gpu()


def identity(facts: dict[str, Any]) -> str:
    """A name for the code and machine of a row."""
    text = json.dumps([facts.get(name) for name in IDENTITY])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def device_name() -> str:
    return torch.cuda.get_device_name(0) if GPU else hardware.processor()["processor"]


def synchronize() -> None:
    """Wait until the GPU is idle, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def folder_name() -> str:
    """Of this machine's results: ``nvidia_h200``, or ``cpu``."""
    return re.sub(r"[^a-z0-9]+", "_", device_name().lower()).strip("_") if GPU else "cpu"


def _commit() -> str | None:
    """None for an installed package, whose version says it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _source() -> str:
    """Of the code itself: two trees with uncommitted edits have one commit and differ."""
    digest = hashlib.sha256()
    # In a checkout the kernels lie beside the package.
    for folder in (PACKAGE, Path(kernels.__file__).parent, extension.sources()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# NVML ------------------------------------------------------------------------------------------


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    """The library and this process's GPU; by its identity, as NVML counts all GPUs."""
    if not GPU:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # not installed, or no access: the environment says so
        return None


def _limits_of_gpu() -> dict[str, Any]:
    nvml = _nvml()
    if nvml is None:
        return {"nvml": "not read: pip install nvidia-ml-py"}
    lib, handle = nvml
    return {
        "power_limit_W": lib.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "most_sm_clock_MHz": lib.nvmlDeviceGetMaxClockInfo(handle, lib.NVML_CLOCK_SM),
    }


def state_of_gpu(after: Callable[[], object]) -> dict[str, Any]:
    """Clocks, power, temperature and throttling while the call's work is on the GPU."""
    nvml = _nvml()
    if nvml is None:
        return {}
    lib, handle = nvml
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        after()
        synchronize()
    after()
    reasons = lib.nvmlDeviceGetCurrentClocksEventReasons(handle)
    idle = lib.nvmlClocksEventReasonGpuIdle | lib.nvmlClocksEventReasonNone
    state = {
        "sm_clock_MHz": lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM),
        "memory_clock_MHz": lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_MEM),
        "power_W": lib.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_C": lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU),
        "throttled": bool(reasons & ~idle),
    }
    synchronize()
    return state


def energy_joules(call: Callable[[], object], seconds: float) -> float | None:
    """Of one call, from the GPU's counter over many; None where there is none."""
    nvml = _nvml()
    if nvml is None:
        return None
    lib, handle = nvml
    try:
        before = lib.nvmlDeviceGetTotalEnergyConsumption(handle)
    except lib.NVMLError:
        return None
    calls, end = 0, time.perf_counter() + seconds
    while calls == 0 or time.perf_counter() < end:
        call()
        synchronize()
        calls += 1
    after = lib.nvmlDeviceGetTotalEnergyConsumption(handle)
    return (after - before) / 1e3 / calls
