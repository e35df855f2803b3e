"""The folder where everything that is built or measured is kept; no Triton, no other package."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """``$DIFFUSION_FAST_CACHE``, or ``diffusion_fast`` in the platform's cache folder."""
    if own := os.environ.get("DIFFUSION_FAST_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "diffusion_fast"
