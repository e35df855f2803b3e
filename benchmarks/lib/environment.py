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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import diffusion_fast
from diffusion_fast import hardware, kernels
from diffusion_fast.ops.cuda import build as extension

GPU = torch.cuda.is_available()
PACKAGE = Path(diffusion_fast.__file__).parent
# Results are comparable, and kept when a run goes on, only where all of these are the same.
IDENTITY = (
    *("source", "device", "threads", "torch", "triton", "diffusers", "openvino", "onnxruntime"),
    *("cuda", "driver"),
)
PEERS = ("openvino", "onnxruntime")  # packages that benchmarks alone meet


@functools.cache
def environment() -> dict[str, Any]:
    """The machine and the code; of a GPU its limits too."""
    facts: dict[str, Any] = {
        "commit": _commit(),
        "source": source(PACKAGE, Path(kernels.__file__).parent, extension.sources()),
        **hardware.versions(),
        **{name: hardware.package_version(name) for name in PEERS},
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
    return facts | hardware.gpus() | _read(_limits)


def identity(facts: Mapping[str, Any], names: Iterable[str] = IDENTITY) -> str:
    """A name for the code and machine of a row."""
    text = json.dumps([facts.get(name) for name in names])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def device_name() -> str:
    """The GPU; else the CPU and its vector instructions, as clouds hide which model it is."""
    if GPU:
        return torch.cuda.get_device_name(0)
    found = hardware.processor()
    return f"{found['processor']}, {found['instructions']}"


def synchronize() -> None:
    """Wait until the GPU is idle, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def free_memory() -> float:
    """Bytes that the system could still give to programs; infinite where it doesn't say."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # off Linux
        found = None
    return float("inf") if found is None else 1024.0 * int(found[1])


def folder_name() -> str:
    """Of this machine's results: ``nvidia_h200``, or ``cpu_avx2``."""
    name = device_name() if GPU else f"cpu {hardware.processor()['instructions']}"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _commit() -> str | None:
    """None for an installed package, whose version says it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def source(*folders: Path) -> str:
    """A name for the code in folders, which a commit is not where there are uncommitted edits."""
    digest = hashlib.sha256()
    for folder in folders:
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


def _read(read: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """What ``read(pynvml, handle)`` tells, or why NVML does not; never an exception of NVML's."""
    nvml = _nvml()
    if nvml is None:
        return {"nvml": "not read: pip install nvidia-ml-py"} if GPU else {}
    try:
        return read(*nvml)
    except nvml[0].NVMLError as why:
        return {"nvml": f"not read: {why}"}


def _limits(lib: Any, handle: Any) -> dict[str, Any]:
    return {
        "power_limit_W": lib.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "most_sm_clock_MHz": lib.nvmlDeviceGetMaxClockInfo(handle, lib.NVML_CLOCK_SM),
    }


def state_of_gpu(after: Callable[[], object]) -> dict[str, Any]:
    """Clocks, power, temperature and throttling while the call's work is on the GPU."""

    def read(lib: Any, handle: Any) -> dict[str, Any]:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            after()
            synchronize()
        after()
        reasons = lib.nvmlDeviceGetCurrentClocksEventReasons(handle)
        idle = lib.nvmlClocksEventReasonGpuIdle | lib.nvmlClocksEventReasonNone
        return {
            "sm_clock_MHz": lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM),
            "memory_clock_MHz": lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_MEM),
            "power_W": lib.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_C": lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU),
            "throttled": bool(reasons & ~idle),
        }

    state = _read(read)
    synchronize()
    return state


def energy_joules(call: Callable[[], object], seconds: float) -> float | None:
    """Joules of one call, from the GPU's counter over many; None where there is none."""

    def read(lib: Any, handle: Any) -> dict[str, Any]:
        before = lib.nvmlDeviceGetTotalEnergyConsumption(handle)
        calls, end = 0, time.perf_counter() + seconds
        while calls == 0 or time.perf_counter() < end:
            call()
            synchronize()
            calls += 1
        after = lib.nvmlDeviceGetTotalEnergyConsumption(handle)
        return {"joules": (after - before) / 1e3 / calls}

    return _read(read).get("joules")
