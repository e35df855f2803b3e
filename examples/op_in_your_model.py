"""One op in a model of your own: GroupNorm, the time embedding before it and SiLU after it."""

import torch
from torch import Tensor, nn

import diffusion_fast as df


class ResBlock(nn.Module):
    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, channels), nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(df.ops.group_norm_silu(x, 32, self.norm1.weight, self.norm1.bias))
        # h + time, then the norm, then SiLU: one pass where there is a kernel for it.
        add = self.time(time)
        h = df.ops.group_norm_silu(h, 32, self.norm2.weight, self.norm2.bias, add=add)
        return x + self.conv2(h)


def main() -> Tensor:
    torch.manual_seed(0)
    block = ResBlock(64, 128)
    x, time = torch.randn(2, 64, 16, 16), torch.randn(2, 128)
    y = block(x, time)
    y.square().mean().backward()  # the ops have gradients
    print(df.ops.explain("group_norm_silu"))
    with df.use_backend("reference"):  # the plain PyTorch definition, to compare with
        print("largest difference:", (block(x, time) - y).abs().max().item())
    return y


if __name__ == "__main__":
    main()
