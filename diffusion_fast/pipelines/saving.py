"""Writing a pipeline as a folder that diffusers loads."""

from __future__ import annotations

from ..files import AnyPath, staged, write_json
from .loading import Parts
from .model_index import model_index
from .scheduler_config import write_scheduler


def save(parts: Parts, folder: AnyPath) -> None:
    """Write all parts of a pipeline; see :meth:`StableDiffusion.save_pretrained`."""
    scheduler = write_scheduler(parts.scheduler)
    with staged(folder) as part:
        parts.unet.save_pretrained(part / "unet")
        parts.vae.save_pretrained(part / "vae")
        parts.text.save_pretrained(part)
        if parts.safety_checker is not None:
            parts.safety_checker.save_pretrained(part)
        index = model_index(
            scheduler["_class_name"],
            two_encoders=len(parts.text.encoders) == 2,
            inpainting=parts.inpainting,
            safety_checker=parts.safety_checker is not None,
            zero_empty=parts.zero_empty,
            random_weights=parts.random_weights,
        )
        write_json(scheduler, part / "scheduler" / "scheduler_config.json")
        write_json(index, part / "model_index.json")
