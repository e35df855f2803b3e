"""The autoencoder: 64 x 64 pictures to 8 x 8 x 8 latents and back."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import COLORS, Picture, recolored
from precision import fast_autocast
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast.files import whole
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.training.ema import EMA

CONFIG = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
    mid_block_add_attention=False,
    force_upcast=False,
)
EDGE_WEIGHT = 0.5  # of the difference of neighbors, for the decoder alone
KL_WEIGHT = 3e-4  # per number of the latents, beside the mean error of the pixels
BATCH, RATE, WARMUP, DECAY = 8, 1.2e-3, 50, 0.998


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Pictures [N, H, W, 3] as [N, 3, H, W] in [-1, 1], channels_last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Run:
    """The state of a training run: weights, their averages, the optimizer, the step.

    Args:
        file: of the state; read if it is there, so that a run goes on where it was.
        device: where to compute.
        start: weights to begin with; then the decoder alone is trained, and latents stay.
    """

    def __init__(
        self, file: Path, device: str = "cpu", start: dict[str, Tensor] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.file, self.device, self.step = file, torch.device(device), 0
        self.vae = AutoencoderKL(CONFIG).to(self.device, memory_format=torch.channels_last)
        self.edge_weight = 0.0
        if start is not None:
            self.vae.load_state_dict(start)
            self.vae.requires_grad_(False)
            self.vae.decoder.requires_grad_(True)
            self.edge_weight = EDGE_WEIGHT
        self.average = EMA(self.vae, DECAY)
        trained = [one for one in self.vae.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, weight_decay=0.01, fused=True)
        if file.is_file():
            saved: dict[str, Any] = torch.load(file, map_location=self.device)
            self.vae.load_state_dict(saved["vae"])
            for name, value in self.average.state_dict().items():
                value.copy_(saved["average"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.average.updates = saved["step"], saved["updates"]

    def save(self) -> None:
        """Write the state; the file is whole at any moment."""
        state = {"vae": self.vae.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "updates": self.average.updates}
        with whole(self.file) as (temporary,):
            torch.save(state | {"step": self.step}, temporary)

    def advance(self, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """One step on pictures [B, 3, H, W] of ``steps`` in all; their mean square error and KL."""
        fade = 0.5 + 0.5 * math.cos(math.pi * self.step / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1, (self.step + 1) / WARMUP) * fade
        x = x.to(self.device)
        with fast_autocast(self.device.type):
            latents = self.vae.encode(x)
            mean, log_variance = latents.mean.float(), latents.log_variance.float()
            generator = torch.Generator().manual_seed(self.step)
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            y = self.vae.decode(mean + (0.5 * log_variance).exp() * noise)
        error = y.float() - x
        square = error.square().mean()
        coarse = F.avg_pool2d(error, 8).square().mean()  # colors come sooner with it
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        self.optimizer.zero_grad()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 2 * square + 8 * coarse + self.edge_weight * edges
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return square.detach(), kl.detach()


def train(
    pictures: list[Picture],
    pixels: np.ndarray,
    steps: int,
    file: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    start: dict[str, Tensor] | None = None,
) -> AutoencoderKL:
    """An autoencoder trained on pictures, half of them recolored, half mirrored.

    Args:
        pictures, pixels: the data set.
        steps: of batches of 8; the learning rate falls to zero by the last one.
        file: state of the run, saved every minute and at the end, even of an interrupted run; a run
            that finds it goes on from there.
        device: where to compute.
        seed: random seed of the batches.
        start: weights of an autoencoder whose decoder alone is trained on; None for all, from new.
    """
    run = Run(file, device, start)
    saved, started, first, squares = time.monotonic(), time.monotonic(), run.step, []
    try:
        while run.step < steps:
            batch = draw_batch(pictures, pixels, random.Random(seed * steps + run.step))
            square, kl = run.advance(batch, steps)
            squares.append(square)
            if run.step % 100 == 0:
                decibel = -10 * math.log10(torch.stack(squares).mean().item() / 4)
                left = (time.monotonic() - started) / (run.step - first) * (steps - run.step) / 60
                print(
                    f"{file.stem}: step {run.step} of {steps}, {decibel:.1f} dB,"
                    f" KL {kl.item():.2f}, {left:.0f} minutes left",
                    flush=True,
                )
                squares.clear()
            if time.monotonic() - saved > 60:
                run.save()
                saved = time.monotonic()
    finally:
        run.save()
    run.vae.load_state_dict(run.average.state_dict())
    return run.vae.eval()


def draw_batch(pictures: list[Picture], pixels: np.ndarray, rng: random.Random) -> Tensor:
    """Pictures [8, 3, 64, 64], half of them recolored and half mirrored."""
    batch = []
    for index in rng.sample(range(len(pictures)), BATCH):
        image, hue = pixels[index][:, :: rng.choice((1, -1))], pictures[index].hue
        if hue is not None and rng.random() < 0.5:
            image = recolored(image, hue, rng.choice(COLORS))
        batch.append(image)
    return as_tensor(np.stack(batch))
