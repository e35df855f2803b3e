"""The one folder for what is built or measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_fast.kernels import cache, measurements
from diffusion_fast.ops.cuda import build


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", Path("/somewhere")),
        ("linux", None, Path.home() / ".cache"),
        ("darwin", "XDG_CACHE_HOME", Path.home() / "Library" / "Caches"),
        ("win32", "LOCALAPPDATA", Path("/somewhere")),
        ("win32", None, Path.home() / "AppData" / "Local"),
    ],
)
def test_the_cache_folder_of_the_platform(
    monkeypatch: pytest.MonkeyPatch, platform: str, variable: str | None, expected: Path
) -> None:
    for name in ("DIFFUSION_FAST_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.sys, "platform", platform)
    if variable is not None:
        monkeypatch.setenv(variable, "/somewhere")
    assert cache.cache_folder() == expected / "diffusion_fast"
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", "/chosen")
    assert cache.cache_folder() == Path("/chosen")
    assert build.cache_folder is measurements.cache_folder is cache.cache_folder


def test_building_needs_no_package_for_the_folder() -> None:
    """The image of a GPU machine need not have platformdirs."""
    code = (
        "import sys; sys.modules['platformdirs'] = None\n"
        "from diffusion_fast.ops.cuda import build; print(build.cache_folder())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip()
