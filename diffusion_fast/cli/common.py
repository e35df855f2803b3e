"""What several commands check before any work."""

from __future__ import annotations

from pathlib import Path

SCHEDULER = Path("scheduler") / "scheduler_config.json"  # in a model's folder


def check_device(name: str) -> None:
    """Fail before any work if PyTorch can't use the device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected one that works, got {name!r}: {reason}") from error


def check_folder(option: str, folder: Path) -> None:
    """Fail before any work if files can't be written to a folder that may not exist yet."""
    import tempfile

    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        expected = f"{option}: expected a folder that can be written, got {folder}"
        raise ValueError(f"{expected}: {error.strerror}") from error
