"""What a Stable Diffusion pipeline is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..models import UNet2DCondition
from ..models.autoencoder import Autoencoder
from ..models.text import TextEncoders
from ..ops import checks
from .card import Defaults
from .scheduler_config import SchedulerSettings

if TYPE_CHECKING:
    from .safety import SafetyChecker  # imports Pillow


# Models that are told from SD 1.x and 2.x by the input channels of their U-Nets alone.
OTHERS = {5: "SD 2.x depth", 7: "upscaler x4", 8: "instruct-pix2pix"}


@dataclass
class Parts:
    """The networks, the noise schedule and what else a model says of itself.

    Attributes:
        unet, vae, text: the networks.
        scheduler: the noise schedule, and how to sample on it.
        safety_checker: None for none.
        zero_empty: an absent negative prompt means states of zero, not those of "" (SDXL).
        random_weights: they were never trained.
        defaults: steps and guidance of a call that is not told, as the model's card has them.
    """

    unet: UNet2DCondition
    vae: Autoencoder
    text: TextEncoders
    scheduler: SchedulerSettings
    safety_checker: SafetyChecker | None = None
    zero_empty: bool = False
    random_weights: bool = False
    defaults: Defaults = field(default_factory=Defaults)

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net reads a mask and the masked image beside the noisy latents."""
        return self.unet.config.in_channels != self.unet.config.out_channels

    @property
    def refines(self) -> bool:
        """Whether it is SDXL's refiner: an aesthetic score is among its U-Net's conditions."""
        return self._time_ids == 5

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input (LCM)."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def _time_ids(self) -> int | None:
        """How many numbers join the time embedding beside pooled text; None for none of it."""
        unet = self.unet.config
        if unet.addition_embed_type is None or not self.text.projected:
            return None
        pooled: int = self.text.encoders[-1].config.projection_dim  # type: ignore
        rest = (unet.projection_class_embeddings_input_dim or 0) - pooled
        return rest // (unet.addition_time_embed_dim or 1)

    def check_fit(self) -> None:
        """Raise ValueError if the networks don't fit together."""
        unet, latents = self.unet.config, self.vae.config.latent_channels
        if unet.out_channels != latents:
            checks.fail("vae", f"one of {unet.out_channels} latent channels, as the U-Net", latents)
        if unet.in_channels not in (latents, 2 * latents + 1):
            expected = f"one of {latents} input channels, or {2 * latents + 1} for inpainting"
            kind = OTHERS.get(unet.in_channels)
            got = (
                f"{unet.in_channels} ({kind}, which is not supported)" if kind else unet.in_channels
            )
            checks.fail("unet", expected, got)
        width = sum(one.config.hidden_size for one in self.text.encoders)  # type: ignore
        if width != unet.cross_attention_dim:
            expected = f"states of {unet.cross_attention_dim} channels, as the U-Net"
            checks.fail("text_encoder", expected, width)
        if (unet.addition_embed_type is not None) != self.text.projected:
            expected = "one with a projection" if not self.text.projected else "one without"
            checks.fail("text_encoder", f"{expected}, as the U-Net", "another")
        if self._time_ids not in (None, 5, 6):
            expected = "six sizes and crops (SDXL), or four and a score (its refiner)"
            checks.fail("unet", f"{expected} beside pooled text", self._time_ids)
