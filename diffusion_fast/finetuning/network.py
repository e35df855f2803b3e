"""What a trainer trains: a U-Net with its text encoders, of which only a part changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models import UNet2DCondition
from ..models.blocks import ResBlock, Transformer2D
from ..models.controlnet import ControlNet
from ..models.text import TextEncoders
from ..ops import checks


class Finetuned(nn.Module):
    """A U-Net and its text encoders as one network, called with latents and captions.

    To those who ask, its parameters are those that are trained, and it has no buffers: so gradients
    are clipped and exchanged, averages kept and checkpoints written of these alone.

    Args:
        unet: the U-Net.
        text: its text encoders.
        vectors: vectors [n, C] of a new word for each encoder, whose ids come behind those of the
            vocabulary; None for none.
        control: a ControlNet that steers the U-Net; None for none.
        clip_skip: layers to leave out at the text encoders' ends.
        gradient_checkpointing: keep the inputs of blocks alone, and compute the rest again in the
            backward pass (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(
        self,
        unet: UNet2DCondition,
        text: TextEncoders,
        *,
        vectors: nn.ParameterList | None = None,
        control: ControlNet | None = None,
        clip_skip: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet
        for name, encoder in text.modules().items():
            self.add_module(name, encoder)
        self.vectors, self.controlnet = vectors, control
        self._text, self.clip_skip = [text], clip_skip  # in a list: its modules are ours already
        self._units: list[nn.Module] = []
        if gradient_checkpointing:
            self._units = [m for m in self.modules() if isinstance(m, (ResBlock, Transformer2D))]
            for encoder in text.encoders:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def named_parameters(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        found = super().named_parameters(*args, **keywords)
        return ((name, one) for name, one in found if one.requires_grad)

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        text_embeds: Tensor | None = None,
        tokens: Tensor | None = None,
        time_ids: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> Tensor:
        """The U-Net's output.

        Args:
            x: noisy latents [B, C, h, w].
            t: timesteps, int64 [B].
            context: text states [B, L, C].
            text_embeds: pooled text [B, P] (SDXL).
            tokens: token ids int64 [B, E, L] in the place of both, for the E text encoders.
            time_ids: sizes and crops [B, 6] (SDXL).
            hint: what the ControlNet reads, [B, 3, f h, f w] in [0, 1].
        """
        if tokens is not None:
            with self._word_in_place(tokens) as ids:
                states = self._text[0].states(ids, self.clip_skip)
            context, text_embeds = states.context, states.pooled
        given = {"context": context, "text_embeds": text_embeds}
        words = {name: one for name, one in given.items() if one is not None}
        sizes = {} if time_ids is None else {"time_ids": time_ids}

        def call(network: Any, **more: Tensor) -> Any:
            dtype = network.conv_in.weight.dtype
            in_dtype = {name: one.to(dtype) for name, one in (words | more).items()}
            return network(x.to(dtype), t, **in_dtype, **sizes, **steering)

        steering: dict[str, Any] = {}
        with _recomputed(self._units if torch.is_grad_enabled() else ()):
            if self.controlnet is not None:
                if hint is None:
                    checks.fail("hint", "an image, because a ControlNet reads it", None)
                dtype = self.unet.conv_in.weight.dtype
                added = call(self.controlnet, hint=hint)
                steering["residuals"] = [[(one.to(dtype), None)] for one in added]
            output: Tensor = call(self.unet)
        return output

    @contextlib.contextmanager
    def _word_in_place(self, tokens: Tensor) -> Iterator[list[Tensor]]:
        """The ids [B, L] for each encoder; while it lasts, vectors stand for those of the word."""
        rows = list(tokens.unbind(1))
        if self.vectors is None:
            yield rows
            return
        with contextlib.ExitStack() as stack:
            for i, (encoder, vectors) in enumerate(
                zip(self._text[0].encoders, self.vectors, strict=True)
            ):
                table: Any = encoder.get_input_embeddings()  # type: ignore[operator]
                places = rows[i] - table.num_embeddings  # [B, L], negative for other words
                rows[i] = torch.where(places < 0, rows[i], 0)
                handle = table.register_forward_hook(partial(_put, places, vectors))
                stack.callback(handle.remove)
            yield rows


def _put(places: Tensor, vectors: Tensor, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    """The embeddings of tokens [B, L, C] with vectors [n, C] at the places that are not below 0."""
    places = places.reshape(output.shape[:-1])  # chunks one by one
    own = vectors[places.clamp(min=0)].to(output)
    return torch.where((places >= 0)[..., None], own, output)


@contextlib.contextmanager
def _recomputed(units: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, modules keep their inputs alone for the backward pass."""
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    try:
        yield
    finally:
        for unit in units:
            del unit.forward
