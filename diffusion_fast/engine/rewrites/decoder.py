"""The autoencoder's decoder with the rewrites that apply to it: an image costs one call of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...edits import Edit, Watch
from ...kernels.layout import channels_last
from ...models.autoencoder import Autoencoder
from ...ops.cpu import contest
from ...turns import Turns
from . import cost
from .plan import OpCall, asked_for, bypassed, check_placement
from .prepare import rewritten

DECODER_REWRITES = ("folded_upsample", "fused_qkv", "epilogues", "packed_weights", "removed_no_ops")


class PreparedDecoder:
    """Decodes as :meth:`Autoencoder.decode` does. Parameters are shared with the model.

    A float16 model that must compute in float32 (``force_upcast``) has its decoder copied to
    float32 once, not at each call.

    Args:
        vae: the autoencoder.
        rewrites: ``"all"``, ``"none"``, or names among this module's ``DECODER_REWRITES``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, vae: Autoencoder, rewrites: str | Iterable[str] = "all") -> None:
        self.vae = vae
        self.on = asked_for(rewrites, DECODER_REWRITES)
        self._placement = vae.weight.dtype, vae.weight.device
        self._decoder = copy.deepcopy(vae.decoder).float() if vae.upcasts else vae.decoder
        self.network, self._leaves = rewritten(self._decoder, self.on)
        self._measured: set[torch.Size] = set()  # shapes of latents

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, C, f h, f w] of latents [B, C', h, w], not scaled.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.vae.check_latents(latents)
        if latents.device.type == "cpu" and latents.shape not in self._measured:
            contest.prepare(self.work(latents.shape))
            self._measured.add(latents.shape)
        return self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        x = self.vae.decoder_input(latents).to(self._decoder.conv_in.weight.dtype)
        if "packed_weights" in self.on:
            x = channels_last(x)
        return self.network(x).to(latents.dtype)

    def work(self, shape: Sequence[int]) -> contest.Work:
        """The op calls for latents of a shape."""
        dtype, vae = self._decoder.conv_in.weight.dtype, type(self.vae)

        @torch.no_grad()
        def calls() -> list[OpCall]:
            watch = cost.Calls()
            with cost.DEVICE:
                decoder = PreparedDecoder(vae(self.vae.config).to(dtype).eval(), self.on)
                with watch:
                    decoder._decoded(torch.empty(tuple(shape), dtype=dtype))
            return watch.found

        pixels = shape[0] * shape[2] * shape[3] * self.vae.downsampling**2
        parts = vae.__name__, self.vae.config, self.on, dtype, tuple(shape)
        return cost.work_of(self._decoder, pixels, calls, *parts)

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive again, in place, what depends on the weights.

        Raises:
            ValueError: the model was moved or cast: that takes a new decoder.
        """
        check_placement("vae", self.vae.weight, *self._placement)
        if self._decoder is not self.vae.decoder:
            self._decoder.load_state_dict(self.vae.decoder.state_dict())
        for leaf in self._leaves:
            leaf.refresh()


class FreshDecoder:
    """Decodes with the rewrites and with the weights as they are at each call.

    What the rewrites derive is made at the first call and kept. Where hooks on blocks of the
    decoder would not run, the autoencoder decodes as it is. Several threads may share it.

    Args:
        vae: the autoencoder; it may be edited, moved and cast between two calls.
        rewrites: as :class:`~diffusion_fast.Engine` takes them, those that a decoder has not too.
    """

    def __init__(self, vae: Autoencoder, rewrites: str | Iterable[str] = "all") -> None:
        self.vae = vae
        names = [rewrites] if isinstance(rewrites, str) else list(rewrites)
        self.rewrites = (
            DECODER_REWRITES if "all" in names else [n for n in names if n in DECODER_REWRITES]
        )
        self._turns = Turns("FreshDecoder")
        self._prepared: PreparedDecoder | None = None
        self._watch = Watch()
        self._config: Any = None  # of what was prepared

    def __call__(self, latents: Tensor) -> Tensor:
        """As :meth:`PreparedDecoder.__call__`."""
        with self._turns:
            edit = self._watch.look(self.vae)
            if edit is Edit.MODEL or self.vae.config != self._config:
                self._prepared = self._config = None  # before the next one takes its memory
                if self.rewrites and bypassed(self.vae.decoder) is None:
                    self._prepared = PreparedDecoder(self.vae, self.rewrites)
                self._config = self.vae.config
            elif edit is Edit.VALUES and self._prepared is not None:
                self._config = None  # until it is done
                self._prepared.refresh()
                self._config = self.vae.config
            return (self._prepared or self.vae.decode)(latents)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.vae, self.rewrites)
