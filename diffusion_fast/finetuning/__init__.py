"""Fine-tuning of Stable Diffusion: what it never saw, taught to a checkpoint by a few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import AnyPath
from .settings import DataFolder, Settings, read_toml

__all__ = ["DataFolder", "Settings", "finetune", "read_toml"]


def finetune(
    model: AnyPath | None = None,
    data: Any = None,
    out: AnyPath | None = None,
    method: str | None = None,
    *,
    config: AnyPath | None = None,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Fine-tune a Stable Diffusion and write what was trained.

    Args:
        model: the base: a folder, a single file or a hub id.
        data: a folder of images with captions, several of them, or :class:`DataFolder` s.
        out: folder to write to.
        method: what is trained; ``"lora"`` by default.
        config: a TOML file with settings, which keywords replace.
        progress: show a progress bar.
        settings: other fields of :class:`Settings`.

    Returns:
        ``out``, whose files :class:`~diffusion_fast.StableDiffusion` and diffusers load.

    Raises:
        CheckpointError: the base can't be loaded.
        ValueError: a setting or data that can't be; the message names it.
        OSError: something can't be written.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> Path("photos").mkdir()
        >>> Image.new("RGB", (64, 64), "red").save("photos/square.png")
        >>> _ = Path("photos/square.txt").write_text("a red square")
        >>> df.finetune("tiny", "photos", "square-lora", steps=1, resolution=64).name
        'square-lora'
    """
    from .run import Finetuning  # imports Pillow

    given = {"model": model, "data": data, "out": out, "method": method}
    values = {} if config is None else read_toml(config)
    values |= {name: value for name, value in given.items() if value is not None} | settings
    run = Finetuning(Settings.of(values))
    run.train(progress=progress)
    return run.settings.out
