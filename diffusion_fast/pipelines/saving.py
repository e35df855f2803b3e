"""Writing a pipeline as a folder that diffusers loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..files import AnyPath, staged, write_json
from .scheduler_config import write_scheduler

if TYPE_CHECKING:
    from .stable_diffusion import StableDiffusion

RANDOM = "_random_weights"  # in model_index.json: the weights were never trained
LAYOUT = "0.35.0"  # the version of diffusers that these folders are written for


def save(pipe: StableDiffusion, folder: AnyPath) -> None:
    """Write all parts of a pipeline; see :meth:`StableDiffusion.save_pretrained`."""
    scheduler = write_scheduler(pipe.scheduler)
    with staged(folder) as part:
        pipe.unet.save_pretrained(part / "unet")
        pipe.vae.save_pretrained(part / "vae")
        pipe.text.save_pretrained(part)
        if pipe.safety_checker is not None:
            pipe.safety_checker.save_pretrained(part)
        index = model_index(
            scheduler["_class_name"],
            two_encoders=len(pipe.text.encoders) == 2,
            inpainting=pipe.inpainting,
            safety_checker=pipe.safety_checker is not None,
            zero_empty=pipe.zero_empty,
            random_weights=pipe.random_weights,
        )
        write_json(scheduler, part / "scheduler" / "scheduler_config.json")
        write_json(index, part / "model_index.json")


def model_index(
    scheduler: str,
    *,
    two_encoders: bool = False,
    inpainting: bool = False,
    safety_checker: bool = False,
    zero_empty: bool = True,
    random_weights: bool = False,
) -> dict[str, Any]:
    """model_index.json: which class of which library each subfolder is of."""
    name = "StableDiffusion" + "XL" * two_encoders + "Inpaint" * inpainting + "Pipeline"
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": LAYOUT,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if random_weights:
        index[RANDOM] = True
    if two_encoders:
        return index | {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": zero_empty,
        }
    checker: list[str | None] = [None, None]
    if safety_checker:
        checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    return index | {"safety_checker": checker, "requires_safety_checker": safety_checker}
