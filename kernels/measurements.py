"""What was measured on this machine, kept on disk: no Triton here, the ops for CPUs measure too.

Results live in one JSON file per machine and version of what was measured, under
``$DIFFUSION_FAST_CACHE`` or the platform's cache folder. A file of another machine has another
name; one that is damaged counts as missing.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

from .cache import cache_folder

known: dict[Path, dict[str, str]] = {}  # of each file, what was found here or earlier


@functools.cache
def _file_name(machine: str, version: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{machine}-{version}") + ".json"


def file_of(machine: str, version: str) -> Path:
    """The file for a machine's results with these versions."""
    return cache_folder() / "tuning" / _file_name(machine, version)


def _read(file: Path) -> dict[str, str]:
    """The file's entries; none if it is missing or damaged (then it is measured again)."""
    try:
        entries = json.loads(file.read_text())
    except OSError:
        return {}
    except ValueError:
        entries = None
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        told = f"{file}: expected tuning results, got something else; what lacks is measured again"
        warnings.warn(told, stacklevel=2)
    valid = entries.items() if isinstance(entries, dict) else ()
    return {k: v for k, v in valid if isinstance(v, str)}


def results(file: Path) -> dict[str, str]:
    """All that was found, by its key, in this process or an earlier one."""
    if file not in known:
        known[file] = _read(file)
    return known[file]


def adopt(file: Path, found: dict[str, str]) -> None:
    """Take these results in the place of a file's, which stays as it is, in this process."""
    known[file] = dict(found)


def remember(file: Path, key: str, config: str) -> None:
    """In memory, and on disk beside what other processes wrote meanwhile."""
    results(file)[key] = config
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(file) | {key: config}
        # A reader sees the old file or the new one, never half of it.
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as stream:
            json.dump(entries, stream, indent=1, sort_keys=True)
        os.replace(temporary, file)
    except OSError as error:
        warnings.warn(f"tuning results are not kept: {error}", stacklevel=2)
