"""Our autoencoder and diffusers', with the same random weights."""

from __future__ import annotations

import diffusers
import torch
from numerics import error
from torch import Tensor
from unet_parity import random_weights

from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig


def twins(
    config: VAEConfig, dtype: torch.dtype = torch.float32
) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Our model and diffusers', sharing their weights, in eval mode."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config.to_dict())
        ours = AutoencoderKL(config)
    weights = {name: value.to(dtype) for name, value in random_weights(theirs).items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def pictures(
    config: VAEConfig, size: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float32
) -> Tensor:
    return (torch.rand(batch, config.in_channels, *size) * 2 - 1).to(dtype)


def moments(vae: AutoencoderKL | diffusers.AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents."""
    if isinstance(vae, AutoencoderKL):
        found = vae.encode(images)
        return found.mean, found.log_variance
    theirs = vae.encode(images).latent_dist
    return theirs.mean, theirs.logvar


@torch.no_grad()
def differences(
    ours: AutoencoderKL, theirs: diffusers.AutoencoderKL, images: Tensor
) -> dict[str, float]:
    """max|ours - theirs| / max|theirs| of what images encode to and random latents decode to."""
    mean, log_variance = moments(ours, images)
    expected_mean, expected_log_variance = moments(theirs, images)
    latents = torch.randn_like(mean)
    decoded, expected = ours.decode(latents), theirs.decode(latents).sample
    assert mean.shape == expected_mean.shape
    assert decoded.shape == expected.shape
    assert decoded.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    return {
        "mean": error(mean, expected_mean),
        "log_variance": error(log_variance, expected_log_variance),
        "decoded": error(decoded, expected),
    }
