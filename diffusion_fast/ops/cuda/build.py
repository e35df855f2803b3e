"""Builds, caches and loads the CUDA attention library.

A library made ahead of time (``DIFFUSION_FAST_CUDA=1 pip install``) lies in the package and holds
every head dim. Without one, the first call with a head dim compiles just that head dim for the
local GPU, and the result is kept in ``$DIFFUSION_FAST_CACHE`` or the user's cache folder, under a
name made of everything that went into it. A file lock and a rename keep the cache good when two
processes start together or a build is killed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ...kernels.cache import cache_folder
from ..building import PACKAGE, BuildError, build_once, key_of, print_version, run, sources

HEAD_DIMS = (32, 40, 48, 64, 80, 96, 128, 160)
OLDEST_CAPABILITY = (8, 0)
EMBEDDED = ((8, 7), (10, 1))  # Jetson: not binary compatible with cards of the same generation
OLDEST_TORCH = "0x020a000000000000"  # the stable ABI of 2.10
COMMON_FLAGS = ("-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden")
INSTALL_NVCC = (
    "install the CUDA toolkit (nvcc 12.0 or newer, matching the driver) and a C++17 compiler, and "
    "put nvcc on PATH or set CUDA_HOME"
)


@dataclass(frozen=True)
class Toolchain:
    """nvcc and the C++ compiler it uses; ``version`` is what both print about themselves."""

    nvcc: str
    cxx: str
    version: str


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for home in homes:
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@cache
def toolchain() -> Toolchain | str:
    """The compilers, or the reason why nothing can be built here and what to install."""
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc to build the kernels with: {INSTALL_NVCC}"
    version = print_version(nvcc)
    if version is None:
        return f"{nvcc} does not run: {INSTALL_NVCC}"
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    cxx_version = print_version(cxx) if cxx else None
    if cxx is None or cxx_version is None:
        return "no C++ compiler beside nvcc: install g++ or set CXX"
    if not sources().is_dir():
        return f"the sources of the kernels are missing: {sources()}"
    return Toolchain(nvcc, cxx, version + cxx_version)


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name for a compute capability: (8, 6) is ``86``, (9, 0) is ``90a``."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a" if number == "90" else number


def generate_code(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags for machine code of these architectures, and no PTX."""
    return [f"--generate-code=arch=compute_{name},code=sm_{name}" for name in sorted(architectures)]


def _key(*parts: object) -> str:
    environment = [os.environ.get(f"NVCC_{where}_FLAGS") for where in ("PREPEND", "APPEND")]
    files = (path for path in sources().rglob("*") if path.parent.name != "cpu")
    return key_of(files, parts, environment)


@cache
def version() -> str:
    """A name for the kernels' sources."""
    return _key()


def build_library(
    head_dims: Sequence[int], architectures: Sequence[str], jobs: int | None = None
) -> Path:
    """The library of these head dims for these architectures (``"90a"``), from the cache or built.

    Raises:
        BuildError: no compiler, or it failed.
    """
    tools = toolchain()
    if isinstance(tools, str):
        raise BuildError(tools)
    known = "".join(f"X({dim})" for dim in head_dims)
    flags = [*COMMON_FLAGS, f"-DDIFFUSION_FAST_HEAD_DIMS(X)={known}"]
    key = _key(flags, HOST_FLAGS, generate_code(architectures), tools.version, torch.__version__)
    names = "_".join(str(dim) for dim in head_dims)
    target = cache_folder() / f"attention_{names}_{key}.so"

    def build(scratch: Path) -> None:
        folder = sources()
        include = Path(torch.__file__).parent / "include"
        host = ["-Xcompiler", ",".join(HOST_FLAGS), "-ccbin", tools.cxx]
        device = [tools.nvcc, *flags, *generate_code(architectures), *host]
        files = [folder / "library.cu"]
        files += [folder / "instances" / f"attention_{dim}.cu" for dim in head_dims]
        objects = [scratch / f"{file.stem}.o" for file in files]
        commands = [
            [*device, "-c", str(file), "-o", str(made)]
            for file, made in zip(files, objects, strict=True)
        ]
        binding = scratch / "binding.o"
        compile_binding = [tools.cxx, *flags, *HOST_FLAGS, "-isystem", str(include)]
        commands.append([*compile_binding, "-c", str(folder / "binding.cpp"), "-o", str(binding)])
        with ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, 16)) as pool:
            list(pool.map(run, commands))
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        made = [str(path) for path in (*objects, binding)]
        run([*device, "-shared", "-o", str(scratch / target.name), *made, *libraries])

    return build_once(target, build)


def built_architectures(library: Path | str) -> list[int]:
    """What a library was compiled for: 800 for sm_80.

    Read from the file. Opening a library registers its ops, and a second one with the same ops,
    built because this one doesn't serve, would end the process.
    """
    found = re.search(rb"diffusion_fast architectures: ([\d, ]+);", Path(library).read_bytes())
    return [int(number) for number in found[1].split(b",")] if found else []


def prebuilt() -> Path | None:
    """The library made ahead of time, if this installation has one."""
    return next(iter(sorted(PACKAGE.glob("_attention*.so"))), None)


def serves(architectures: Sequence[int], capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures runs on a GPU: same major, minor not newer.

    Embedded GPUs run their own code only.
    """
    major, minor = capability
    if capability in EMBEDDED:
        return 100 * major + 10 * minor in architectures
    return any(number // 100 == major and number % 100 <= 10 * minor for number in architectures)


def local_capabilities() -> list[tuple[int, int]]:
    """Of the GPUs of this machine that can run the kernels, each once."""
    count = torch.cuda.device_count()
    found = {torch.cuda.get_device_capability(device) for device in range(count)}
    return sorted(capability for capability in found if capability >= OLDEST_CAPABILITY)


def _library_for(head_dim: int) -> Path:
    capabilities = local_capabilities()
    made = prebuilt()
    if made is not None:
        architectures = built_architectures(made)
        if all(serves(architectures, capability) for capability in capabilities):
            return made
    return build_library([head_dim], [architecture(capability) for capability in capabilities])


failures: dict[int, list[str]] = {}  # head dim -> why it can't be loaded; empty if it is
_loading = threading.Lock()


def load(head_dim: int) -> list[str]:
    """Makes the ops of one head dim known to torch, building them on first use.

    Returns:
        Why it is impossible; empty if it is done. The answer is remembered: a failed build is
        warned of once and isn't tried again.
    """
    with _loading:
        if head_dim not in failures:
            try:
                torch.ops.load_library(str(_library_for(head_dim)))
                _probe(head_dim)
                failures[head_dim] = []
            except (ImportError, OSError, RuntimeError) as error:
                why = f"the kernels could not be built or loaded: {error}"
                # There was a compiler, so the user counts on the kernels that now don't run.
                warnings.warn(f"attention, head dim {head_dim}: {why}", stacklevel=2)
                failures[head_dim] = [why]
        return failures[head_dim]


def _probe(head_dim: int) -> None:
    """Raises RuntimeError where the driver is too old for the toolkit that built the library."""
    getattr(torch.ops.diffusion_fast_cuda, f"attention_splits_{head_dim}")(1, 1, 1, 0)


def info() -> ModuleType:
    """The module ``_info``: what a built library holds. Built on first use, needs pybind11.

    Raises:
        BuildError: no compiler or no pybind11.
    """
    name = "diffusion_fast._info"
    if name in sys.modules:
        return sys.modules[name]
    made = next(iter(sorted(PACKAGE.glob("_info*.so"))), None) or _build_info()
    spec = importlib.util.spec_from_file_location(name, made)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _build_info() -> Path:
    tools = toolchain()
    if isinstance(tools, str):
        raise BuildError(tools)
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing: pip install diffusion-fast[cuda]") from None
    suffix = re.sub(r"\W", "_", sys.implementation.cache_tag)
    flags = ["-std=c++17", "-O2", "-shared", *HOST_FLAGS]
    key = _key(flags, tools.version, pybind11.__version__, suffix)
    target = cache_folder() / f"_info_{suffix}_{key}.so"

    def build(scratch: Path) -> None:
        import sysconfig

        include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        made = str(scratch / target.name)
        run([tools.cxx, *flags, *include, str(sources() / "info.cpp"), "-o", made, "-ldl"])

    return build_once(target, build)
