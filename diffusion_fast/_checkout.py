"""Finds ``kernels/``, ``csrc/`` and ``benchmarks/`` in a checkout that was not installed.

Installation gives these folders names inside the package; beside it they lie under their own.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sys.modules[__package__]

if (ROOT / "pyproject.toml").is_file() and find_spec("diffusion_fast.kernels") is None:
    PACKAGE.__path__.append(str(ROOT))
