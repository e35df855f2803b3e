"""What compiling on first use takes: sources, a compiler, and a cache of what was made."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """A compiler failed; the message holds its command and what it printed."""


def sources() -> Path:
    """The folder csrc: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def key_of(files: Iterable[Path], *parts: object) -> str:
    """A name made of what goes into a build: files below :func:`sources`, and flags or versions."""
    digest = hashlib.sha256(repr(parts).encode())
    folder = sources()
    for path in sorted(files):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def print_version(command: str) -> str | None:
    """What a compiler says about itself; None if it does not run."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, made by ``build(folder) -> folder / target.name`` where it doesn't exist.

    Of many processes one builds and the others wait; a target is complete or absent.
    """
    from filelock import FileLock

    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        scratch = target.with_name(f"{target.name}.building")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a build that was killed
        scratch.mkdir()
        try:
            build(scratch)
            os.replace(scratch / target.name, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def run(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".strip())
