"""What this machine has for tests: compilers, what they made, oneDNN's dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusion_fast.ops import onednn
from diffusion_fast.ops.cpu import library as cpu
from diffusion_fast.ops.cuda import build as extension

needs_cpu_kernels = pytest.mark.skipif(
    bool(cpu.machine()), reason=f"needs the kernels for CPUs: {'; '.join(cpu.machine())}"
)

ONEDNN_DTYPES = [  # not every CPU has it in bfloat16
    dtype for dtype in (torch.float32, torch.bfloat16) if onednn.supports("cpu", dtype)
]


def needs_nvcc(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that builds with nvcc; it is skipped where there is none."""
    absent = extension.find_nvcc() is None
    skip = pytest.mark.skipif(absent, reason="needs nvcc (the CUDA toolkit)")
    return pytest.mark.compiles(skip(test))
