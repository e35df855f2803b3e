"""The safety checker that comes with Stable Diffusion 1: images near some concepts turn black.

As in Rando et al. 2022 (arXiv:2210.04610), which describes it: the CLIP embedding of an image is
compared with the embeddings of concepts, each with a threshold of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import CheckpointError, read_json
from ..images import to_pil
from ..models.checkpoints import CONFIG
from ..models.clip_weights import assemble, read_states, save

CONCEPTS, SPECIAL = 17, 3
STRICTER = 0.01  # added to the scores of an image that is near a special concept


class SafetyChecker(nn.Module):
    """Which images are near a concept.

    Args:
        config: a ``transformers.CLIPConfig``.
        processor: an image processor of ``transformers``, which makes CLIP's input of PIL images.
    """

    def __init__(self, config: Any, processor: Any) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        self.config, self.processor = config, processor
        self.vision_model = CLIPVisionModel(config.vision_config)
        width, dim = config.vision_config.hidden_size, config.projection_dim
        self.visual_projection = nn.Linear(width, dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL, dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL), requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
    ) -> SafetyChecker:
        """The checker in a pipeline's folder, with the ``feature_extractor`` beside it.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        import transformers

        own, extractor = folder / "safety_checker", folder / "feature_extractor"
        for part in (own, extractor):
            if not part.is_dir():
                raise CheckpointError(
                    f"{folder}: its model_index.json names a safety checker, but there is no"
                    f" {part.name} folder; pass safety_checker=False to do without"
                )
        config = transformers.CLIPConfig.from_dict(read_json(own / CONFIG))
        name = "CLIPImageProcessorPil"  # newer transformers; their other one needs torchvision
        kind = getattr(transformers, name, None) or transformers.CLIPImageProcessor
        try:
            processor = kind.from_pretrained(extractor, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{extractor}: not an image processor: {error}") from error
        states = read_states(own, dtype, device, variant)
        checker = assemble(lambda: cls(config, processor), states, own)
        assert isinstance(checker, SafetyChecker)
        return checker

    def save_pretrained(self, folder: Path) -> None:
        """Write the two folders that :meth:`from_pretrained` reads."""
        save(self, folder / "safety_checker", prefix="vision_model.vision_model.")
        self.processor.save_pretrained(folder / "feature_extractor")

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[bool]:
        """Which of the images [B, 3, H, W] in [-1, 1] to hide."""
        weight = self.visual_projection.weight
        pixels = self.processor(to_pil(images), return_tensors="pt").pixel_values.to(weight)
        embedding = self.visual_projection(self.vision_model(pixels).pooler_output)
        special = _above(embedding, self.special_care_embeds, self.special_care_embeds_weights, 0)
        extra = STRICTER * (special > 0).any(dim=1, keepdim=True)
        scores = _above(embedding, self.concept_embeds, self.concept_embeds_weights, extra)
        return (scores > 0).any(dim=1).tolist()


def _above(embedding: Tensor, concepts: Tensor, threshold: Tensor, extra: Tensor | float) -> Tensor:
    """Cosines above their thresholds, to three decimals, [B, concepts]."""
    cosine = F.normalize(embedding) @ F.normalize(concepts).T
    return ((cosine.float() - threshold.float() + extra) * 1000).round() / 1000
