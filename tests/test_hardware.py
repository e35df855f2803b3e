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


def test_gpus_or_the_reason() -> None:
    found = hardware.gpus()
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in found["gpu 0"]
    else:
        assert found["gpu"].startswith("none: ")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert hardware.compilers()["nvcc"].startswith("not found: install the CUDA toolkit")
