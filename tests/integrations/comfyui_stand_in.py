"""What the node meets in ComfyUI: a ModelPatcher, and a U-Net in the CompVis layout.

Written from the documented behaviour of ComfyUI's hooks; the node has not run inside ComfyUI.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.heads = 2
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, replaced: Callable[..., Tensor] | None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if replaced is not None:
            return self.to_out(replaced(q, k, v, {"n_heads": self.heads, "dim_head": 8}))
        split = [y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)]
        return self.to_out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn1, self.attn2 = Attention(channels, channels), Attention(channels, 12)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        replace = options.get("patches_replace", {})
        first, second = (replace.get(name, {}).get(options["block"]) for name in ("attn1", "attn2"))
        h = self.norm1(x)
        x = x + self.attn1(h, h, first)
        return x + self.attn2(self.norm2(x), context, second)


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, 1e-6)
        self.transformer_blocks = nn.ModuleList([Layer(channels)])

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context, options)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(1, channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.in_layers(x) + self.emb_layers(t[:, None])[..., None, None]


class UNet(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        c = channels
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv2d(4, c, 1)]),
                nn.ModuleList([ResBlock(c), SpatialTransformer(c)]),
            ]
        )
        self.middle_block = nn.ModuleList([ResBlock(c), SpatialTransformer(c)])
        self.output_blocks = nn.ModuleList(
            nn.ModuleList(block) for block in ([ResBlock(c)], [ResBlock(c), SpatialTransformer(c)])
        )
        self.out = nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), nn.Conv2d(c, 4, 1))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]
    ) -> Tensor:
        blocks = [("input", i, b) for i, b in enumerate(self.input_blocks)]
        blocks += [("middle", 0, self.middle_block)]
        blocks += [("output", i, b) for i, b in enumerate(self.output_blocks)]
        for name, number, block in blocks:
            options = {**transformer_options, "block": (name, number)}
            for module in block:
                if isinstance(module, ResBlock):
                    x = module(x, t)
                elif isinstance(module, SpatialTransformer):
                    x = module(x, context, options)
                else:
                    x = module(x)
        return self.out(x)


class Model(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor, control: Any = None, **kwargs: Any
    ) -> Tensor:
        out = self.diffusion_model(x, t, c_crossattn, kwargs["transformer_options"])
        return out if control is None else out + control


class ModelPatcher:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        self.callbacks: dict[str, list[Callable[..., object]]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.object_patches = dict(self.object_patches)
        other.callbacks = {name: list(calls) for name, calls in self.callbacks.items()}
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def _replace(self, patch: Any, name: str, *block: Any) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault(name, {})[block] = patch

    def set_model_attn1_replace(self, patch: Any, block_name: str, number: int) -> None:
        self._replace(patch, "attn1", block_name, number)

    def set_model_attn2_replace(self, patch: Any, block_name: str, number: int) -> None:
        self._replace(patch, "attn2", block_name, number)

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def add_callback(self, when: str, callback: Callable[..., object]) -> None:
        self.callbacks.setdefault(when, []).append(callback)

    def load(self) -> None:
        """Put the object patches on the model, as ComfyUI does before it samples."""
        for name, value in self.object_patches.items():
            owner, attribute = self._owner(name)
            self.backup[name] = getattr(owner, attribute)
            setattr(owner, attribute, value)
        for callback in self.callbacks.get("on_load_after", []):
            callback(self, "cpu", 0, False, True)

    def detach(self) -> None:
        for name, value in self.backup.items():
            owner, attribute = self._owner(name)
            setattr(owner, attribute, value)
        self.backup.clear()
        for callback in self.callbacks.get("on_detach_after", []):
            callback(self, True)

    def _owner(self, name: str) -> tuple[Any, str]:
        owner: Any = self.model
        *path, attribute = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute

    def sample(self, x: Tensor, t: Tensor, context: Tensor, **conditions: Any) -> Tensor:
        """One call of the model as a sampler makes it."""
        c = {"c_crossattn": context, **conditions}
        c["transformer_options"] = self.model_options["transformer_options"]
        wrapper = self.model_options.get("model_function_wrapper")
        with torch.no_grad():
            if wrapper is None:
                return self.model.apply_model(x, t, **c)
            call = {"input": x, "timestep": t, "c": c, "cond_or_uncond": [0]}
            return wrapper(self.model.apply_model, call)
