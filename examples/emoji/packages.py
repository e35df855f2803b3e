"""The npm packages that pictures and names come from: fetched once, checked by hash, unpacked."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path

# Name: version, SHA-256 of the archive, licence of its contents.
PACKAGES = {
    "emoji-datasource-google": (
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Apache-2.0 (Noto Emoji, Google); the list of emoji: MIT (Cal Henderson)",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT (Fluent Emoji, Microsoft)",
    ),
    "@iconify-json/noto-v1": (  # for style_lora.py alone
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0 (Noto Emoji of before 2017, Google)",
    ),
    "@lobehub/fluent-emoji-3d": (
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT (Fluent Emoji, Microsoft; packed by LobeHub)",
    ),
    "cldr-annotations-full": (
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
        "Unicode-3.0",
    ),
    "cldr-annotations-derived-full": (
        "48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
        "Unicode-3.0",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """The unpacked package; fetched with npm unless its archive is there already.

    Args:
        name: a key of ``PACKAGES``.
        folder: for archives and unpacked packages.

    Raises:
        ValueError: the archive is not the one that the data set was made from.
        RuntimeError: npm is not installed, or can't fetch it.
    """
    version, expected, _ = PACKAGES[name]
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    archive, unpacked = folder / f"{stem}.tgz", folder / stem
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        _pack(f"{name}@{version}", folder)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{archive}: expected SHA-256 {expected}, got {found}; remove it to retry")
    done = unpacked / ".done"
    if not done.is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        done.touch()
    return unpacked / "package"


def _pack(package: str, folder: Path) -> None:
    command = ["npm", "pack", package, "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("npm: not found; install Node.js, which has it") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or 'failed'}")
