"""Your own network, trained and sampled: any ``nn.Module`` called as ``model(x, t)`` will do."""

import torch
from torch import Tensor, nn

import diffusion_fast as df


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t[:, None] / 1000), dim=1))


def main(epochs: int = 300) -> Tensor:
    torch.manual_seed(0)
    angle = torch.rand(2048) * 2 * torch.pi
    points = torch.stack((angle.cos(), angle.sin()), dim=1)  # a circle
    dataloader = torch.utils.data.DataLoader(points, batch_size=256, shuffle=True)

    model, schedule = Denoiser(), df.DiffusionSchedule(timesteps=1000)
    losses = df.train_diffusion(model, dataloader, schedule, epochs=epochs, learning_rate=2e-3)
    print(f"loss {sum(losses[:20]) / 20:.3f} -> {sum(losses[-20:]) / 20:.3f}")

    x = df.sample(model, schedule, (1000, 2), sampler="dpmpp_2m", steps=20)
    radius = x.norm(dim=1)
    print(f"radius of the samples: {radius.mean():.3f} +- {radius.std():.3f} (data: 1)")
    return x


if __name__ == "__main__":
    main()
