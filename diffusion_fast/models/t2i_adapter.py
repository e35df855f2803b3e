"""T2I-Adapter (Mou et al. 2023, arXiv:2302.08453): features of a hint join the way down."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import AnyPath
from .blocks import Composite
from .layers import Conv2d
from .t2i_adapter_config import T2IAdapterConfig
from .t2i_adapter_file import find_t2i_adapter


class AdapterResBlock(Composite):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x))) + x


class AdapterLevel(Composite):
    """One level: half the size or the same, other channels, residual blocks."""

    def __init__(self, inner: tuple[int, int], out: int | None, blocks: int, halves: bool) -> None:
        super().__init__()
        wide, narrow = inner
        self.halves = halves
        self.in_conv = Conv2d(wide, narrow, 1) if out or wide != narrow else None
        kernel = 3 if out else 1
        self.resnets = nn.ModuleList(AdapterResBlock(narrow, kernel) for _ in range(blocks))
        self.out_conv = Conv2d(narrow, out, 1) if out else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halves else x
        x = x if self.in_conv is None else self.in_conv(x)
        for block in self.resnets:
            x = block(x)
        return x if self.out_conv is None else self.out_conv(x)


class AdapterBody(Composite):
    """Pixels in blocks as channels, then level by level."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.in_channels * config.downscale_factor**2
        self.conv_in = None if config.light else Conv2d(wide, config.channels[0], 3, padding=1)
        before = (wide if config.light else config.channels[0], *config.widths[:-1])
        self.body = nn.ModuleList(
            AdapterLevel(
                (width, out // 4 if config.light else out),
                out if config.light else None,
                config.num_res_blocks,
                config.halves(level),
            )
            for level, (width, out) in enumerate(zip(before, config.widths, strict=True))
        )

    def forward(self, hint: Tensor) -> list[Tensor]:
        x = F.pixel_unshuffle(hint, self.config.downscale_factor)
        x = x if self.conv_in is None else self.conv_in(x)
        features = []
        for level in self.body:
            x = level(x)
            features.append(x)
        return features


class T2IAdapter(Composite):
    """Features of a hint, for each level of a U-Net's way down; they depend on no step.

    Parameters have the names and shapes of diffusers' ``T2IAdapter``.

    Args:
        config: the shape, see :class:`~.t2i_adapter_config.T2IAdapterConfig`.
    """

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = AdapterBody(config)

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> T2IAdapter:
        """An adapter with the weights of a checkpoint, in eval mode.

        Args:
            path: the folder with ``config.json`` and the weights, a file of weights beside its
                ``config.json``, a single file in TencentARC's names, or a hub id ``owner/name``.
            variant: which files of a folder to read, such as ``"fp16"``.
            dtype: dtype of the parameters; None for that of the files.
            device: device of the parameters.

        Raises:
            CheckpointError: a missing or damaged file, or an unsupported config.
        """
        return find_t2i_adapter(path, variant).build(cls, dtype, device)

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Features [B, C, h, w] of a hint [B, 3, H, W] in [0, 1].

        An adapter for grey hints reads the first channel.
        """
        return self.adapter(hint[:, : self.config.in_channels])
