"""Complete Stable Diffusion folders of a few megabytes, with random weights.

They have the real layout, so pipelines and other tools run in seconds; their pictures are noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import AnyPath, staged, write_json
from ..models import UNet2DCondition, UNetConfig
from ..models.clip_weights import save
from ..models.vae import AutoencoderKL
from ..models.vae_config import VAEConfig
from ..ops import checks
from .model_index import model_index
from .tiny_tokenizer import LENGTH, vocabulary, write_tokenizer

KINDS = ("sd15", "sd21", "sdxl", "refiner", "inpainting")
_WIDTH = 32  # of a text encoder
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 2,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": _UNET,
    "inpainting": {**_UNET, "in_channels": 9},
    "sd21": {**_UNET, "use_linear_projection": True, "attention_head_dim": (1, 2)},
    "sdxl": {
        **_UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 2 * _WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": _WIDTH + 6 * 8,
    },
}
_UNETS["refiner"] = {
    **_UNETS["sdxl"],
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": _WIDTH,
    "projection_class_embeddings_input_dim": _WIDTH + 5 * 8,
}
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_SCHEDULER: dict[str, Any] = {
    **_BETAS,
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd21": {
        **_SCHEDULER,
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "clip_sample": False,
    },
    **{xl: {**_SCHEDULER, "_class_name": "EulerDiscreteScheduler"} for xl in ("sdxl", "refiner")},
}


def make_tiny(folder: AnyPath, kind: str = "sd15", seed: int = 0) -> Path:
    """Write a tiny Stable Diffusion with random weights, for 64 x 64 pixels.

    Args:
        folder: the folder to write.
        kind: ``"sd15"``, ``"sd21"`` (v-prediction), ``"sdxl"`` (two text encoders),
            ``"refiner"`` (SDXL's) or ``"inpainting"`` (9 channels).
        seed: random seed of the weights; PyTorch's global generator is left as it is.

    Returns:
        The folder, which :meth:`StableDiffusion.from_pretrained` and diffusers load.

    Raises:
        ValueError: another kind; ImportError: ``transformers`` is not installed.
    """
    checks.one_of("kind", kind, KINDS)
    xl = kind in ("sdxl", "refiner")
    with torch.random.fork_rng(devices=[]), staged(folder) as part:
        torch.manual_seed(seed)
        UNet2DCondition(UNetConfig(**_UNETS[kind])).save_pretrained(part / "unet")
        factor = {"scaling_factor": 0.13025} if xl else {}
        vae = VAEConfig.preset("tiny", **factor)
        AutoencoderKL(vae).save_pretrained(part / "vae")
        _write_text(part, first=kind != "refiner", second=xl)
        scheduler = _SCHEDULERS.get(kind, _SCHEDULER)
        write_json(scheduler, part / "scheduler" / "scheduler_config.json")
        index = model_index(
            scheduler["_class_name"],
            xl=xl,
            refiner=kind == "refiner",
            zero_empty=kind != "refiner",
            inpainting=kind == "inpainting",
            random_weights=True,
        )
        write_json(index, part / "model_index.json")
    return Path(folder)


def _write_text(folder: Path, first: bool, second: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids, _ = vocabulary()
    shape: dict[str, Any] = {
        "vocab_size": len(ids),
        "hidden_size": _WIDTH,
        "projection_dim": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": len(ids) - 2,
        "eos_token_id": len(ids) - 1,
    }
    if first:
        write_tokenizer(folder / "tokenizer")
        save(CLIPTextModel(CLIPTextConfig(**shape)), folder / "text_encoder")
    if second:
        write_tokenizer(folder / "tokenizer_2", pad="!")
        config = CLIPTextConfig(**shape, hidden_act="gelu")
        save(CLIPTextModelWithProjection(config), folder / "text_encoder_2")
