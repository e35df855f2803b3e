"""Writing a pipeline as a folder that diffusers loads."""

from __future__ import annotations

from ..files import AnyPath, staged, write_json
from .card import write_defaults
from .model_index import INDEX, model_index
from .parts import Parts
from .scheduler_config import write_scheduler


def save(parts: Parts, folder: AnyPath) -> None:
    """Write all parts.

    Raises:
        OSError: the folder can't be written; what was there before still is.
    """
    scheduler = write_scheduler(parts.scheduler)
    index = model_index(
        scheduler["_class_name"],
        xl=parts.text.projected,
        refiner=parts.refines,
        inpainting=parts.inpainting,
        safety_checker=parts.safety_checker is not None,
        zero_empty=parts.zero_empty,
        random_weights=parts.random_weights,
        vae=type(parts.vae).__name__,
    )
    with staged(folder) as place:
        parts.unet.save_pretrained(place / "unet")
        parts.vae.save_pretrained(place / "vae")
        parts.text.save_pretrained(place)
        if parts.safety_checker is not None:
            parts.safety_checker.save_pretrained(place)
        write_json(scheduler, place / "scheduler" / "scheduler_config.json")
        write_json(index, place / INDEX)
        write_defaults(parts.defaults, place)
