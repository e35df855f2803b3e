"""The node itself: which of the patches to put on a clone of the model."""

from __future__ import annotations

import logging
from typing import Any

from ...ops import checks
from .attention import patch_attention
from .graphs import patch_graphs
from .norms import patch_norms

log = logging.getLogger(__name__)


class DiffusionFastPatch:
    """Puts a U-Net's attention and norms on fused ops, and its calls into CUDA graphs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/unet"
    DESCRIPTION = "Runs attention and group norms of SD 1.x, SD 2.x and SDXL on diffusion_fast."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "attention": ("BOOLEAN", {"default": True}),
                "norms": ("BOOLEAN", {"default": True}),
                "graphs": ("BOOLEAN", {"default": False}),
            }
        }

    def patch(self, model: Any, attention: bool, norms: bool, graphs: bool) -> tuple[Any]:
        """A patched clone; the model itself stays as it is.

        Args:
            model: a ``ModelPatcher`` of a U-Net.

        Raises:
            ValueError: a model of another kind, such as a transformer without blocks of a U-Net.
        """
        unet = model.get_model_object("diffusion_model")
        if not all(
            hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")
        ):
            expected = "a U-Net (SD 1.x, SD 2.x, SDXL)"
            checks.fail("model", expected, type(unet).__name__)
        patched = model.clone()
        if attention:
            taken = patch_attention(patched, unet)
            if taken:
                log.warning(
                    "diffusion_fast: other nodes keep the attention of %s", ", ".join(taken)
                )
        if norms:
            patch_norms(patched, unet)
        if graphs:
            patch_graphs(patched)
        return (patched,)
