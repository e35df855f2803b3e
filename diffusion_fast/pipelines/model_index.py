"""The ``model_index.json`` of a pipeline's folder: its parts, by library and class."""

from __future__ import annotations

from typing import Any

RANDOM = "_random_weights"  # the weights were never trained
LAYOUT = "0.35.0"  # the version of diffusers that these folders are written for


def model_index(
    scheduler: str,
    *,
    two_encoders: bool = False,
    inpainting: bool = False,
    safety_checker: bool = False,
    zero_empty: bool = True,
    random_weights: bool = False,
) -> dict[str, Any]:
    """The contents of the file: which class of which library each subfolder is of."""
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
