"""``model_index.json``: which class of which library each subfolder of a pipeline is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import CheckpointError, read_json
from ..models.single_file import SUPPORTED as FILES

INDEX = "model_index.json"
RANDOM = "_random_weights"  # a key of ours: the weights were never trained
LAYOUT = "0.35.0"  # the version of diffusers that these folders are written for
_KINDS = ("", "Img2Img", "Inpaint")
LCM = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SUPPORTED = (
    *(f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in _KINDS),
    *LCM,
)


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of a folder's ``model_index.json``.

    Raises:
        CheckpointError: there is none, or it is of an unsupported pipeline (named).
    """
    if not (folder / INDEX).is_file():
        hint = "; it holds one U-Net" if (folder / "unet").is_dir() else ""
        raise CheckpointError(f"{folder}: not a Stable Diffusion model, it has no {INDEX}{hint}")
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"{folder}: {kind} is not supported, only {', '.join(SUPPORTED)}; and single files of"
            f" {FILES}"
        )
    return index


def model_index(
    scheduler: str,
    *,
    xl: bool = False,
    refiner: bool = False,
    inpainting: bool = False,
    safety_checker: bool = False,
    zero_empty: bool = True,
    random_weights: bool = False,
    vae: str = "AutoencoderKL",
) -> dict[str, Any]:
    """The contents of ``model_index.json`` for a scheduler of this class and these parts."""
    kind = "Inpaint" if inpainting else "Img2Img" if refiner else ""
    name = "StableDiffusion" + "XL" * xl + kind + "Pipeline"
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": LAYOUT,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if random_weights:
        index[RANDOM] = True
    if refiner:
        index |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
        index |= {"requires_aesthetics_score": True}
    if xl:
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
