"""What the doctor reads from the machine."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

import diffusion_fast as df
from diffusion_fast import hardware


def test_versions() -> None:
    found = hardware.versions()
    assert found["diffusion_fast"] == df.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert hardware.package_version("no-such-package") == "not installed"


def test_processor() -> None:
    found = hardware.processor()
    assert found["processor"]
    assert f"{torch.get_num_threads()} threads" in found["cores"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fma", "avx512_bf16", "amx_bf16"}, "fast: AMX"),
        ({"avx512_bf16"}, "fast: AVX512-BF16"),
        ({"fma", "avx512f"}, "not fast: the CPU has no products in it"),
        (set(), "unknown: this system does not list its CPU's instructions"),
    ],
)
def test_whether_bfloat16_is_fast_here(
    flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    assert hardware.processor()["bfloat16"] == expected


def test_gpus_or_the_reason() -> None:
    found = hardware.gpus()
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in found["gpu 0"]
    else:
        assert found["gpu"].startswith("none: ")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert hardware.compilers()["nvcc"].startswith("not found: install the CUDA toolkit")
