"""The networks: their configs, blocks and checkpoints."""

from ..files import CheckpointError
from .config import UNetConfig
from .unet import UNet2DCondition
from .vae import AutoencoderKL
from .vae_config import VAEConfig

__all__ = ["AutoencoderKL", "CheckpointError", "UNet2DCondition", "UNetConfig", "VAEConfig"]
