"""What the node meets in ComfyUI: a ModelPatcher, and a U-Net in the CompVis layout.

Written from the behaviour of ComfyUI 0.3.64's hooks. ``benchmarks/bench_comfyui.py`` runs the node
inside ComfyUI itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def of_comfyui(module: str) -> Callable[[type], type]:
    """The class decorator that makes a class one of a module of ComfyUI."""

    def named(cls: type) -> type:
        cls.__module__ = module
        for value in vars(cls).values():
            if isinstance(value, FunctionType):
                value.__module__ = module
        return cls

    return named


class Casting:
    """A layer whose weight and bias may be cast, or changed by functions, on their way."""

    comfy_cast_weights = False
    weight_function: tuple[Callable[[Tensor], Tensor], ...] = ()
    bias_function: tuple[Callable[[Tensor], Tensor], ...] = ()

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.comfy_cast_weights or self.weight_function or self.bias_function):
            return super().forward(x)  # type: ignore[misc]
        weight, bias = self.weight.to(x), None if self.bias is None else self.bias.to(x)
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return self.compute(x, weight, bias)


class disable_weight_init:
    """The layers; the names are ComfyUI's."""

    @of_comfyui("comfy.ops")
    class Linear(Casting, nn.Linear):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias)

    @of_comfyui("comfy.ops")
    class Conv2d(Casting, nn.Conv2d):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(x, weight, bias)

    @of_comfyui("comfy.ops")
    class GroupNorm(Casting, nn.GroupNorm):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    @of_comfyui("comfy.ops")
    class LayerNorm(Casting, nn.LayerNorm):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


ops = disable_weight_init


@of_comfyui("comfy.ldm.modules.attention")
class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = ops.Linear(channels, channels, bias=False)
        self.to_k = ops.Linear(context, channels, bias=False)
        self.to_v = ops.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(ops.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor, replaced: Callable[..., Tensor] | None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if replaced is not None:
            return self.to_out(replaced(q, k, v, {"n_heads": self.heads}))
        split = [y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)]
        return self.to_out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


@of_comfyui("comfy.ldm.modules.attention")
class Gated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = ops.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


@of_comfyui("comfy.ldm.modules.attention")
class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        out = ops.Linear(4 * channels, channels)
        self.net = nn.Sequential(Gated(channels), nn.Dropout(0.0), out)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@of_comfyui("comfy.ldm.modules.attention")
class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context, heads)
        self.norm1, self.norm2, self.norm3 = (ops.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        replace = options.get("patches_replace", {})
        first, second = (replace.get(name, {}).get(options["block"]) for name in ("attn1", "attn2"))
        h = self.norm1(x)
        x = x + self.attn1(h, h, first)
        x = x + self.attn2(self.norm2(x), context, second)
        return x + self.ff(self.norm3(x))


@of_comfyui("comfy.ldm.modules.attention")
class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, depth: int, linear: bool) -> None:
        super().__init__()

        def projection() -> nn.Module:
            return ops.Linear(channels, channels) if linear else ops.Conv2d(channels, channels, 1)

        self.linear = linear
        self.norm = ops.GroupNorm(32, channels, 1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context, heads) for _ in range(depth)
        )
        self.proj_out = projection()

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        h, size = self.norm(x), x.shape[2:]
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, options)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, size)
        return x + (h if self.linear else self.proj_out(h))


@of_comfyui("comfy.ldm.modules.diffusionmodules.openaimodel")
class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        first, second = ops.Conv2d(channels, out, 3, padding=1), ops.Conv2d(out, out, 3, padding=1)
        self.in_layers = nn.Sequential(ops.GroupNorm(32, channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), ops.Linear(time, out))
        norm = ops.GroupNorm(32, out)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.0), second)
        same = channels == out
        self.skip_connection = nn.Identity() if same else ops.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


@of_comfyui("comfy.ldm.modules.diffusionmodules.openaimodel")
class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = ops.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@of_comfyui("comfy.ldm.modules.diffusionmodules.openaimodel")
class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


@of_comfyui("comfy.ldm.modules.diffusionmodules.openaimodel")
class UNetModel(nn.Module):
    """A U-Net of two levels.

    Args:
        depths: transformers of each level; 0 for none.
        linear: projections are linear and heads have 64 channels (SD 2.x, SDXL); else there are 8.
        pooled: width of the pooled text (SDXL), or None.
    """

    def __init__(
        self,
        widths: tuple[int, int] = (64, 128),
        depths: tuple[int, int] = (1, 0),
        linear: bool = False,
        pooled: int | None = None,
        in_channels: int = 4,
        context: int = 12,
    ) -> None:
        super().__init__()
        self.width, self.pooled = widths[0], pooled
        time = 4 * widths[0]

        def embedding(channels: int) -> nn.Sequential:
            return nn.Sequential(ops.Linear(channels, time), nn.SiLU(), ops.Linear(time, time))

        def transformer(channels: int, depth: int) -> nn.Module:
            heads = channels // 64 if linear else 8
            return SpatialTransformer(channels, context, heads, depth, linear)

        self.time_embed = embedding(widths[0])
        if pooled is not None:
            self.label_emb = nn.Sequential(embedding(pooled))
        first = nn.Sequential(ops.Conv2d(in_channels, widths[0], 3, padding=1))
        self.input_blocks, self.output_blocks = nn.ModuleList([first]), nn.ModuleList()
        skips, channels = [widths[0]], widths[0]
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(2):
                block = nn.Sequential(ResBlock(channels, width, time))
                if depth:
                    block.append(transformer(width, depth))
                self.input_blocks.append(block)
                channels = width
                skips.append(channels)
            if level + 1 < len(widths):
                self.input_blocks.append(nn.Sequential(Downsample(channels)))
                skips.append(channels)
        bottom = ResBlock(channels, channels, time), ResBlock(channels, channels, time)
        middle = transformer(channels, max(depths[-1], 1))
        self.middle_block = nn.Sequential(bottom[0], middle, bottom[1])
        for level, (width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            for i in range(3):
                block = nn.Sequential(ResBlock(channels + skips.pop(), width, time))
                channels = width
                if depth:
                    block.append(transformer(width, depth))
                if level and i == 2:
                    block.append(Upsample(channels))
                self.output_blocks.append(block)
        out = ops.Conv2d(channels, 4, 3, padding=1)
        self.out = nn.Sequential(ops.GroupNorm(32, channels), nn.SiLU(), out)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI has wrappers of other nodes here."""
        return self._forward(*args, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: Any = None,
        **others: Any,
    ) -> Tensor:
        options = transformer_options
        patches = options.get("patches", {})
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for i, block in enumerate(self.input_blocks):
            x = self._block(block, ("input", i), x, emb, context, options)
            x = _added(x, control, "input")
            for patch in patches.get("input_block_patch", []):
                x = patch(x, options)
            skips.append(x)
        x = self._block(self.middle_block, ("middle", 0), x, emb, context, options)
        x = _added(x, control, "middle")
        for i, block in enumerate(self.output_blocks):
            skip = _added(skips.pop(), control, "output")
            for patch in patches.get("output_block_patch", []):
                x, skip = patch(x, skip, options)
            size = skips[-1].shape[2:] if skips else None
            x = torch.cat([x, skip], dim=1)
            x = self._block(block, ("output", i), x, emb, context, options, size)
        return self.out(x)

    def _block(
        self,
        block: Any,
        place: tuple[str, int],
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        options: Any,
        size: Any = None,
    ) -> Tensor:
        options["block"] = place
        for layer in block:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, options)
            else:
                x = layer(x, size) if isinstance(layer, Upsample) else layer(x)
        return x


def _added(x: Tensor, control: Any, name: str) -> Tensor:
    """x and what is at the end of a list, which is taken out of it."""
    if control and control.get(name):
        one = control[name].pop()
        x = x if one is None else x + one
    return x


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep the size of what passes; no layer starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)
                parameter.add_(name.endswith("weight"))
    return model.eval().requires_grad_(False)


class Model(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Any = None,
        **extra: Any,
    ) -> Tensor:
        """x_0 of noisy x at the noise t, as a model that predicts noise."""
        sigma = t[:, None, None, None]
        scaled = x / (sigma**2 + 1).sqrt()
        scaled = scaled if c_concat is None else torch.cat([scaled, c_concat], dim=1)
        out = self.diffusion_model(
            scaled,
            100 * t,
            context=c_crossattn,
            control=control,
            transformer_options=transformer_options,
            **extra,
        )
        return x - sigma * out


class ModelPatcher:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        self.callbacks: dict[str, list[Callable[..., object]]] = {}
        self.patches: dict[str, tuple[float, Tensor]] = {}  # of weights

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.object_patches = dict(self.object_patches)
        other.patches = dict(self.patches)
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

    def set_model_input_block_patch(self, patch: Any) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["input_block_patch"] = [*patches.get("input_block_patch", []), patch]

    def load(self) -> None:
        """Put the object patches and LoRAs on the model, as ComfyUI does before it samples."""
        for name, value in self.object_patches.items():
            owner, attribute = self._owner(name)
            self.backup[name] = getattr(owner, attribute)
            setattr(owner, attribute, value)
        for name, (strength, change) in self.patches.items():
            owner, attribute = self._owner(name)
            self.backup[name] = before = getattr(owner, attribute)
            setattr(owner, attribute, nn.Parameter(before + strength * change, False))
        self._call_back("on_load_after", "cpu", 0, False, True)

    def detach(self) -> None:
        for name, value in self.backup.items():
            owner, attribute = self._owner(name)
            setattr(owner, attribute, value)
        self.backup.clear()
        self._call_back("on_detach_after", True)

    def pre_run(self) -> None:
        self._call_back("on_pre_run")

    def cleanup(self) -> None:
        self._call_back("on_cleanup")

    def _call_back(self, when: str, *args: Any) -> None:
        for callback in self.callbacks.get(when, []):
            callback(self, *args)

    def _owner(self, name: str) -> tuple[Any, str]:
        owner: Any = self.model
        *path, attribute = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute

    def sample(self, x: Tensor, t: Tensor, context: Tensor, **conditions: Any) -> Tensor:
        """One call of the model as a sampler makes it.

        Args:
            x, t, context: of the prompts or regions that are computed in one batch, one behind the
                other.
            conditions: what else the model is conditioned on; ``parts``, how many these are.
        """
        parts = list(range(conditions.pop("parts", 1)))
        c = {"c_crossattn": context, **conditions}
        options = {**self.model_options["transformer_options"], "cond_or_uncond": parts}
        c["transformer_options"] = options
        wrapper = self.model_options.get("model_function_wrapper")
        with torch.no_grad():
            if wrapper is None:
                return self.model.apply_model(x, t, **c)
            call = {"input": x, "timestep": t, "c": c, "cond_or_uncond": parts}
            return wrapper(self.model.apply_model, call)
