"""Keys and values of the prompts of a run, kept from step to step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ...edits import Edit, Watch
from ...models import UNet2DCondition
from ...models.blocks import Attention
from ...models.unet_encoder import ContextProjections

LIMIT = 4  # batches of prompts; regions of other sizes come in batches of their own


class _Kept(NamedTuple):
    context: Tensor
    kv: ContextProjections


class KeptContexts:
    """The keys and values that a U-Net made of contexts.

    They are dropped when the layers that made them are edited, replaced or called otherwise.

    Args:
        unet: the U-Net.
    """

    def __init__(self, unet: UNet2DCondition) -> None:
        attentions: list[Attention] = [attention for _, attention in unet.cross_attentions()]
        self._layers = nn.ModuleList(
            layer for attention in attentions for layer in (attention.to_k, attention.to_v)
        )
        self._watch = Watch()
        self._kept: list[_Kept] = []  # the last used one last

    def __len__(self) -> int:
        return len(self._kept)

    def candidates(self, context: Tensor) -> list[tuple[Tensor, ContextProjections]]:
        """Contexts like this one, not yet compared, and what was made of them."""
        if self._watch.look(self._layers) is not Edit.NONE:
            self._kept.clear()
        like = (context.shape, context.dtype, context.device)
        return [
            (one.context, one.kv)
            for one in self._kept
            if (one.context.shape, one.context.dtype, one.context.device) == like
        ]

    def keep(self, context: Tensor, kv: ContextProjections) -> None:
        """Remember what was made of a context, as the last used one."""
        known = next((one for one in self._kept if one.kv is kv), None)
        others = [one for one in self._kept if one.kv is not kv][1 - LIMIT :]
        self._kept = [*others, known or _Kept(context.clone(), kv)]
