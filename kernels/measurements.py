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

chosen: dict[tuple[Path, str], str] = {}
loaded: set[Path] = set()


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
    known = entries.items() if isinstance(entries, dict) else ()
    return {k: v for k, v in known if isinstance(v, str)}


def lookup(file: Path, key: str) -> str | None:
    """What was found, in this process or an earlier one; None: nothing."""
    if file not in loaded:
        loaded.add(file)
        for name, config in _read(file).items():
            chosen.setdefault((file, name), config)
    return chosen.get((file, key))


def results(file: Path) -> dict[str, str]:
    """All that was found, in this process or an earlier one."""
    lookup(file, "")  # reads the file
    return {key: config for (of, key), config in chosen.items() if of == file}


def adopt(file: Path, found: dict[str, str]) -> None:
    """Take these results in the place of a file's, which stays as it is, in this process."""
    loaded.add(file)
    for key in results(file):
        del chosen[file, key]
    chosen.update({(file, key): config for key, config in found.items()})


def remember(file: Path, key: str, config: str) -> None:
    """In memory, and on disk beside what other processes wrote meanwhile."""
    chosen[file, key] = config
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
