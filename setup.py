"""Metadata lives in pyproject.toml; this file builds the CUDA extension when asked to.

``DIFFUSION_FAST_CUDA=1 pip install --no-build-isolation .`` compiles the attention kernels ahead of
time, for TORCH_CUDA_ARCH_LIST or all supported architectures. Without it nothing is compiled here,
neither nvcc nor torch is needed, and kernels are built on first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ARCHITECTURES = ("80", "90a", "100", "120")


def cuda_build() -> dict[str, Any]:
    if os.environ.get("DIFFUSION_FAST_CUDA") != "1":
        return {}
    import pybind11
    import torch
    from torch.utils import cpp_extension

    root = Path(__file__).resolve().parent
    sys.path.insert(0, str(root))
    # Which has this name only once it is installed.
    where = importlib.util.spec_from_file_location(
        "diffusion_fast.kernels", root / "kernels" / "__init__.py"
    )
    sys.modules["diffusion_fast.kernels"] = importlib.util.module_from_spec(where)
    from diffusion_fast.ops.cuda import build as extension

    tools = extension.toolchain()
    if isinstance(tools, str):
        raise SystemExit(f"DIFFUSION_FAST_CUDA=1: {tools}")
    home = str(Path(tools.nvcc).resolve().parents[1])
    # A CPU build of torch doesn't look for a toolkit; the stable ABI works with it all the same.
    cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or home
    sources = ["csrc/binding.cpp", "csrc/library.cu"]
    sources += [f"csrc/instances/attention_{dim}.cu" for dim in extension.HEAD_DIMS]
    listed = "TORCH_CUDA_ARCH_LIST" in os.environ
    generate = [] if listed else extension.generate_code(ARCHITECTURES)
    kernels = Extension(
        "diffusion_fast._attention",
        sources,
        include_dirs=[*cpp_extension.include_paths(), f"{home}/include"],
        library_dirs=[str(Path(torch.__file__).parent / "lib"), f"{home}/lib64"],
        libraries=["torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"],
        language="c++",
        extra_compile_args={
            "cxx": [*extension.COMMON_FLAGS, *extension.HOST_FLAGS],
            "nvcc": [*extension.COMMON_FLAGS, "-Xcompiler", "-fvisibility=hidden", *generate],
        },
    )
    info = Extension(
        "diffusion_fast._info",
        ["csrc/info.cpp"],
        include_dirs=[pybind11.get_include()],
        libraries=["dl"],
        language="c++",
        extra_compile_args={"cxx": ["-std=c++17", "-O2", "-fvisibility=hidden"]},
    )
    build = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)
    return {"ext_modules": [kernels, info], "cmdclass": {"build_ext": build}}


setup(**cuda_build())
