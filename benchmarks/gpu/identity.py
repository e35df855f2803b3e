"""What a part's result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("diffusion_fast", "kernels", "csrc", "tests", "benchmarks")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")
MACHINE = ("device", "driver", "cuda", "torch", "triton")


def identity(facts: Mapping[str, Any], root: Path = ROOT) -> str:
    """A name for the code and tests of a checkout, edits and all, on a machine."""
    digest = hashlib.sha256(json.dumps([facts.get(name) for name in MACHINE]).encode())
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
