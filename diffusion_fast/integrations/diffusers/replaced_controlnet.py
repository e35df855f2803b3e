"""A ControlNet of a diffusers pipeline by ours; its hint is embedded once per run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from ...edits import Watch
from ...models.controlnet import ControlNet
from ...models.controlnet_config import ControlNetConfig
from .replacement import Replacement


class ControlNetReplacement(Replacement):
    def __init__(self, theirs: Any) -> None:
        with torch.device("meta"):
            ours = ControlNet(ControlNetConfig.from_dict(theirs.config))
        super().__init__("ControlNet", theirs, ours)
        self._watch = Watch()
        self._hint: tuple[Any, int, Tensor] | None = None  # weakly, its writes, what was made of it

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """As ``ControlNetModel.forward``."""
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        pooled = self.ours.config.addition_embed_type is not None
        added = (added_cond_kwargs or {}) if pooled else {}
        reason = next(
            (
                f"the argument {name}"
                for name in ("class_labels", "timestep_cond", "attention_mask")
                if arguments[name] is not None
            ),
            "cross_attention_kwargs" if cross_attention_kwargs else None,
        )
        if pooled and set(added) != {"text_embeds", "time_ids"}:
            reason = reason or f"added_cond_kwargs {sorted(added)}"
        dtype = self.ours.conv_in.weight.dtype
        for name in ("sample", "encoder_hidden_states", "controlnet_cond"):
            if arguments[name].dtype != dtype:
                reason = reason or f"{name} of {arguments[name].dtype} for a model of {dtype}"

        def ours() -> Any:
            t = torch.as_tensor(timestep).to(sample.device).reshape(-1).expand(len(sample))
            conditions = dict(added)
            if conditions:
                conditions["text_embeds"] = conditions["text_embeds"].to(dtype)
            found = self.ours(
                *(sample, t, encoder_hidden_states, controlnet_cond),
                guess_mode=guess_mode,
                embedded=self._embedded(controlnet_cond),
                **conditions,
            )
            *down, mid = (one * conditioning_scale for one in found)
            if not return_dict:
                return down, mid
            parts: Any = tuple(down)  # of any number, other than its annotation says
            return ControlNetOutput(down_block_res_samples=parts, mid_block_res_sample=mid)

        return self.run(reason, ours, arguments)

    def _embedded(self, hint: Tensor) -> Tensor | None:
        """The embedding of a hint that is the same object at every step of a run, made once.

        None where it may carry gradients, or where writes to the hint can't be seen.
        """
        if torch.is_grad_enabled() or hint.is_inference():
            self._hint = None
            return None
        edit = self._watch.look(self.ours.controlnet_cond_embedding)
        kept, self._hint = self._hint, None
        if kept is None or edit or kept[0]() is not hint or kept[1] != hint._version:
            kept = weakref.ref(hint), hint._version, self.ours.embed_hint(hint)
        self._hint = kept
        return kept[2]
