"""What a part's result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_fast.benchmarks.lib import environment

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("diffusion_fast", "kernels", "csrc", "tests", "benchmarks")
MACHINE = ("device", "driver", "cuda", "torch", "triton")


def identity(facts: Mapping[str, Any], root: Path = ROOT) -> str:
    """A name for the code and tests of a checkout, edits and all, on a machine."""
    source = environment.source(*(root / folder for folder in FOLDERS))
    return environment.identity({**facts, "source": source}, (*MACHINE, "source"))
