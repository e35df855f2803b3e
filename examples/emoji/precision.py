"""What trains the fastest: bfloat16, but for CPUs that compute it by way of float32."""

from __future__ import annotations

import torch

from diffusion_fast import hardware


def fast_precision(device: str) -> str:
    """As a Trainer takes it, for a type of device."""
    slow = device == "cpu" and not hardware.bfloat16_products()
    return "float32" if slow else "bfloat16"


def fast_autocast(device: str) -> torch.autocast:
    """What a model's forward pass runs in, on a type of device."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_precision(device) == "bfloat16")
