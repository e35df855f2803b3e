"""The networks: their configs, blocks and checkpoints."""

from .checkpoints import CheckpointError
from .config import UNetConfig
from .unet import UNet2DCondition

__all__ = ["CheckpointError", "UNet2DCondition", "UNetConfig"]
