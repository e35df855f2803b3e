"""What several commands check before any work, and how messages name their options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEDULER = Path("scheduler") / "scheduler_config.json"  # in a model's folder
_RENAMED = {  # arguments of Python by the option's name
    "guidance": "guidance_scale",
    "spacing": "timestep_spacing",
    "negative": "negative_prompt",
    "zero_snr": "zero_terminal_snr",
}
_LOADING = {
    "pipe.loras.load(file, name, scale)": "--lora FILE=SCALE",
    "pipe.embeddings.load(file, name)": "--embedding FILE=NAME",
}


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


def options_of(group: Any, arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What switches each argument of Python on, and off, in the command that is called.

    Args:
        group: the ``click.Group`` of all commands.
        arguments: arguments of the process.
    """
    command = next((group.commands[one] for one in arguments if one in group.commands), group)
    found = {}
    for one in command.params:
        on = one.opts[0] if one.opts[0].startswith("-") else one.name.upper()
        off = one.secondary_opts[0] if one.secondary_opts else f"no {on}"
        found[_RENAMED.get(one.name, one.name)] = on, off
    return found


def in_options(message: str, options: Mapping[str, tuple[str, str]]) -> str:
    """A message that names options, as in ``--no-safety-checker``, not ``safety_checker=False``.

    Args:
        message: a text for users of Python, which names an argument first, or with a ``=``.
        options: see :func:`options_of`.
    """
    name = "|".join(map(re.escape, options)) or "(?!)"
    found = (
        rf"\A({name})(?=: )|(?<![\w./-])({name})=(?:'([^']*)'|(True)|(False|None)|(?=[\s,)]|\Z))"
    )

    def option(match: re.Match[str]) -> str:
        start, named, text, _, off = match.groups()
        if text is not None:
            return f"{options[named][0]} {text}"
        return options[start or named][1 if off else 0]

    for python, option_text in _LOADING.items():
        message = message.replace(python, option_text)
    return re.sub(found, option, message)
