"""The node itself: which of the patches to put on a clone of the model."""

from __future__ import annotations

import logging
from typing import Any

from ...ops import checks
from .attention import patch_attention
from .graphs import patch_graphs
from .norms import patch_norms
from .unet import patch_unet

log = logging.getLogger(__name__)


class DiffusionFastPatch:
    """Runs a U-Net by our forward, or its attention and norms on fused ops, or as CUDA graphs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/unet"
    DESCRIPTION = (
        "Runs the U-Net of SD 1.x, SD 2.x and SDXL on diffusion_fast: all of it (unet), or its"
        " attention and group norms where other nodes need the inside of its blocks."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "attention": ("BOOLEAN", {"default": True}),
                "norms": ("BOOLEAN", {"default": True}),
                "graphs": ("BOOLEAN", {"default": False}),
            },
            # Workflows from before there was this one don't name it.
            "optional": {"unet": ("BOOLEAN", {"default": True})},
        }

    def patch(
        self, model: Any, attention: bool, norms: bool, graphs: bool, unet: bool = False
    ) -> tuple[Any]:
        """A patched clone; the model itself stays as it is.

        Args:
            model: a ``ModelPatcher`` of a U-Net.
            attention, norms: put these on our ops where the U-Net runs ComfyUI's forward.
            graphs: replay the model's calls as CUDA graphs where they can't differ.
            unet: run the U-Net by our forward where no other node needs the inside of its blocks.

        Raises:
            ValueError: a model of another kind, such as a transformer without blocks of a U-Net.
        """
        theirs = model.get_model_object("diffusion_model")
        if not all(
            hasattr(theirs, name) for name in ("input_blocks", "middle_block", "output_blocks")
        ):
            expected = "a U-Net (SD 1.x, SD 2.x, SDXL)"
            checks.fail("model", expected, type(theirs).__name__)
        patched = model.clone()
        if attention:
            taken = patch_attention(patched, theirs)
            if taken:
                log.warning(
                    "diffusion_fast: other nodes keep the attention of %s", ", ".join(taken)
                )
        if norms:
            patch_norms(patched, theirs)
        if unet:
            patch_unet(patched, theirs)
        if graphs:
            patch_graphs(patched)
        return (patched,)
