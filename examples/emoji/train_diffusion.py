"""Training of the U-Net and the text encoder on cached latents, with this project's trainer."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import (
    COLORS,
    Picture,
    captions_of,
    colored_caption,
    composed,
    dominant_color,
    recolored,
)
from precision import fast_precision
from text import make_encoder, token_ids, train_tokenizer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from train_vae import as_tensor
from transformers import CLIPTokenizer

import diffusion_fast as df
from diffusion_fast.files import whole
from diffusion_fast.models.text import TextEncoders
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.pipelines import StableDiffusion
from diffusion_fast.pipelines.parts import Parts
from diffusion_fast.pipelines.scheduler_config import read_scheduler
from diffusion_fast.training import Batches, Checkpoints

WIDTH = 128  # of the text encoder
CAPTIONS = 8  # for each picture as it is; copies in another color have one each
BATCH = 64
UNET = df.UNetConfig(
    sample_size=8,
    in_channels=8,
    out_channels=8,
    block_out_channels=(96, 160),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=16,
    cross_attention_dim=WIDTH,
    attention_head_dim=(3, 5),  # heads of 32 channels
)
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # without effect on trailing; diffusers asks for it
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "final_sigmas_type": "zero",
}


class Captioned(nn.Module):
    """A U-Net and its text encoder as one network, ``model(x_t, t, ids)``, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = df.UNet2DCondition(UNET)
        self.text = make_encoder(tokenizer, WIDTH, layers=3, heads=4)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids).last_hidden_state)


def copies(
    pictures: list[Picture], pixels: np.ndarray
) -> tuple[list[np.ndarray], list[int], list[str]]:
    """All pictures that are trained on with their captions: each as it is, and in other colors.

    A copy is kept if its dominant color is now the one that its caption says. What is judged as
    composed is left out.

    Returns:
        Pictures, and for each caption the number of its picture and its words.
    """
    rng = random.Random(0)
    held_out = set(composed(pictures))
    images, numbers, words = list(pixels), [], []
    for i, picture in enumerate(pictures):
        found = captions_of(picture, CAPTIONS, rng)
        numbers += [i] * len(found)
        words += found
    for picture, image in zip(pictures, pixels, strict=True):
        for color in COLORS if picture.hue is not None else ():
            if color == picture.color or (color, picture.name) in held_out:
                continue
            copy = recolored(image, picture.hue, color)
            if dominant_color(copy)[0] == color:
                numbers.append(len(images))
                words.append(colored_caption(color, picture, rng))
                images.append(copy)
    return images, numbers, words


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[np.ndarray], batch: int = 32) -> Tensor:
    """Latents [N, 8, 8, 8] of pictures, not scaled."""
    parts, device = [], next(vae.parameters()).device
    for start in range(0, len(images), batch):
        x = as_tensor(np.stack(images[start : start + batch])).to(device)
        parts.append(vae.encode(x).mode().cpu())
    return torch.cat(parts)


Data = dict[str, Any]


def make_dataset(
    pictures: list[Picture], pixels: np.ndarray, vae: AutoencoderKL, out: Path
) -> Data:
    """Latents, tokens and the scale of the latents; made once, then read from ``latents.pt``."""
    file = out / "latents.pt"
    if not file.is_file():
        images, numbers, words = copies(pictures, pixels)
        tokenizer = train_tokenizer(words, out / "tokenizer")
        latents = encode(vae, images)
        data = {
            "latents": latents,
            "pictures": torch.tensor(numbers),
            "ids": token_ids(tokenizer, words),
            "scale": 1 / latents.std().item(),
        }
        with whole(file) as (temporary,):
            torch.save(data, temporary)
    return torch.load(file)


def make_trainer(data: Data, out: Path, device: str = "cpu", **options: Any) -> df.Trainer:
    """The trainer of a run, with its checkpoints in ``out/run``."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    latents = data["latents"][data["pictures"]] * data["scale"]
    latents = latents.contiguous(memory_format=torch.channels_last)
    return df.Trainer(
        Captioned(tokenizer).to(device),
        Batches(TensorDataset(latents, data["ids"]), BATCH, seed=0),
        read_scheduler(SCHEDULER).schedule,
        null_context=token_ids(tokenizer, [""]),
        seed=0,
        checkpoints=Checkpoints(out / "run", every=250, keep=2),
        prediction_type="v_prediction",
        condition_dropout=0.1,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=200,
        gradient_clip=1.0,
        ema_decay=0.999,
        precision=fast_precision(torch.device(device).type),
        channels_last=True,
        **options,
    )


def export(trainer: df.Trainer, vae: AutoencoderKL, data: Data, out: Path) -> Path:
    """Write the averaged weights as a diffusers folder in float16, ``out/model``."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = Captioned(tokenizer)
    weights = trainer.weights()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    vae.config = dataclasses.replace(vae.config, scaling_factor=data["scale"])
    text = TextEncoders([tokenizer], [model.text])
    pipe = StableDiffusion(Parts(model.unet, vae, text, read_scheduler(SCHEDULER)))
    pipe.to(torch.float16).save_pretrained(out / "model")
    return out / "model"
