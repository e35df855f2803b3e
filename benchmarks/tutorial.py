"""The loops that a tutorial would write, as baselines: plain PyTorch, tables indexed by t."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import diffusion_fast as df


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor], schedule: df.DiffusionSchedule, shape: list[int]
) -> Tensor:
    """DDPM ancestral sampling (Ho et al. 2020, algorithm 2), all steps."""
    betas, alphas, alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    x = torch.randn(shape)
    for i in reversed(range(len(betas))):
        t = torch.full((shape[0],), i, dtype=torch.long)
        epsilon = model(x, t)
        alpha = alphas[t].view(-1, 1, 1, 1)
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        beta = betas[t].view(-1, 1, 1, 1)
        z = torch.randn_like(x) if i > 0 else torch.zeros_like(x)
        mean = (x - beta / torch.sqrt(1 - alpha_bar) * epsilon) / torch.sqrt(alpha)
        x = mean + torch.sqrt(beta) * z
    return x


def train(
    model: nn.Module,
    dataloader: Iterable[list[Tensor]],
    schedule: df.DiffusionSchedule,
    epochs: int,
) -> list[float]:
    """DDPM training (Ho et al. 2020, algorithm 1) with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    losses = []
    for _ in range(epochs):
        for (x_0,) in dataloader:
            t = torch.randint(0, schedule.timesteps, (x_0.shape[0],))
            noise = torch.randn_like(x_0)
            signal = schedule.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
            sigma = schedule.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
            loss = nn.functional.mse_loss(model(signal * x_0 + sigma * noise, t), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
