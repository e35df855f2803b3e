"""The models that are measured, with random weights; diffusers' share them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_fast.files import read_json
from diffusion_fast.models import AutoencoderKL, UNet2DCondition, UNetConfig, VAEConfig
from diffusion_fast.models.controlnet import ControlNet
from diffusion_fast.models.controlnet_config import ControlNetConfig
from diffusion_fast.models.ip_adapter import ImageProjection, IPAdapter
from diffusion_fast.models.text import SUBFOLDERS, TextEncoders, load_tokenizers
from diffusion_fast.pipelines.loading import SHIPPED
from diffusion_fast.pipelines.scheduler_config import read_scheduler
from diffusion_fast.pipelines.tiny_tokenizer import vocabulary, write_tokenizer

from ..lib.environment import free_memory
from .weights import fill_in_file, widened

LARGE = 0.25  # of the free memory, for the weights of a network
TOKENS = 77
FEATURES = 1024  # of the CLIP embedding that an IP-Adapter reads
GUIDANCE = 7.5
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SETTINGS = read_scheduler(SCHEDULER)


@dataclass(frozen=True)
class Kind:
    """A model's shape.

    Attributes:
        title: for people.
        unet, vae: their configs.
        text: what :class:`transformers.CLIPTextConfig` takes, for each text encoder.
        steering: what steers the U-Net, ``"controlnet"`` or ``"ip-adapter"``; empty for nothing.
    """

    title: str
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[Mapping[str, Any], ...]
    steering: str = ""

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        side = self.unet.sample_size
        assert isinstance(side, int)
        return side

    @property
    def pixels(self) -> int:
        return self.side * 8


def _text(width: int, layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * width, "projection_dim": width, **changes}


_CLIP_L = _text(768, 12, 12)
KINDS = {
    "small": Kind(
        "the digits' U-Net on 8x8 latents with a prompt, tiny VAE and text encoder",
        UNetConfig.preset("digits", in_channels=4, out_channels=4, num_classes=None),
        VAEConfig.preset("tiny"),
        (_text(64, 3, 2),),
    ),
    "emoji": Kind(
        "the emoji model on 8x8 latents",
        UNetConfig.from_dict(read_json(SHIPPED["emoji"] / "unet" / "config.json")),
        VAEConfig.from_dict(read_json(SHIPPED["emoji"] / "vae" / "config.json")),
        (_text(128, 3, 4),),
    ),
    "sd15": Kind(
        "Stable Diffusion 1.5 at 512x512",
        UNetConfig.preset("sd15"),
        VAEConfig.preset("sd"),
        (_CLIP_L,),
    ),
    "sdxl": Kind(
        "Stable Diffusion XL at 1024x1024",
        UNetConfig.preset("sdxl"),
        VAEConfig.preset("sdxl"),
        (_CLIP_L, _text(1280, 32, 20, hidden_act="gelu")),
    ),
}

KINDS |= {
    "sdxl-512": dataclasses.replace(
        KINDS["sdxl"],
        title="Stable Diffusion XL at 512x512",
        unet=dataclasses.replace(KINDS["sdxl"].unet, sample_size=64),
    )
}
KINDS |= {
    f"{name}-{steering}": dataclasses.replace(
        KINDS[name], title=f"{KINDS[name].title} with {added}", steering=steering
    )
    for name in ("small", "sd15")
    for steering, added in (("controlnet", "a ControlNet"), ("ip-adapter", "an IP-Adapter"))
}


@dataclass(frozen=True)
class Inputs:
    """What the loop of B images takes.

    Attributes:
        x_T: noise, [B, C, h, w] float32.
        positive, negative: keywords of the U-Net, for either half of guidance.
    """

    x_T: Tensor
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    @property
    def joined(self) -> dict[str, Tensor]:
        """Both halves, the unconditional one first."""
        return {k: torch.cat((self.negative[k], self.positive[k])) for k in self.positive}


class Networks:
    """One model's networks, each made when it is first asked for.

    Args:
        kind: its shape.
        dtype, device: of all networks.

    Attributes:
        in_files: bytes of weights that lie in files, see :func:`.weights.fill_in_file`.
    """

    in_files = 0

    def __init__(self, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.dtype, self.device = kind, dtype, device

    @functools.cached_property
    def unet(self) -> UNet2DCondition:
        with torch.device("meta"):
            model = UNet2DCondition(self.kind.unet)
        return self._filled(model)

    @functools.cached_property
    def vae(self) -> AutoencoderKL:
        with torch.device("meta"):
            model = AutoencoderKL(self.kind.vae)
        return self._filled(model)

    @functools.cached_property
    def controlnet(self) -> ControlNet:
        with torch.device("meta"):
            model = ControlNet(ControlNetConfig(self.kind.unet))
        return self._filled(model)

    @functools.cached_property
    def ip_adapter(self) -> IPAdapter:
        channels = self.kind.unet.cross_attention_dim
        widths = [one.to_k.out_features for _, one in self.unet.cross_attentions()]
        with torch.device("meta"):
            model = IPAdapter(ImageProjection(FEATURES, channels), channels, widths)
        return self._filled(model)

    @functools.cached_property
    def text(self) -> TextEncoders:
        """Raises ImportError without ``transformers``."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        count, encoders = len(vocabulary()[0]), []
        for sizes, build in zip(
            self.kind.text, (CLIPTextModel, CLIPTextModelWithProjection), strict=False
        ):
            ends: dict[str, Any] = {"bos_token_id": count - 2, "eos_token_id": count - 1}
            torch.manual_seed(0)
            encoder: Any = build(CLIPTextConfig(vocab_size=49408, **ends, **sizes))
            encoders.append(encoder.to(self.device, self.dtype))
        with tempfile.TemporaryDirectory() as folder:
            for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
                write_tokenizer(Path(folder) / name, pad)
            return TextEncoders(load_tokenizers(folder, SUBFOLDERS[: len(encoders)]), encoders)

    def exact(self, *names: str) -> Networks:
        """The networks of these names in the dtype that errors are measured against.

        They share these weights, each of which is widened where it is read.
        """
        wide = Networks(self.kind, truth_dtype(self.dtype), self.device)
        for name in names:
            own = {id(one): widened(one, wide.dtype) for one in self._weights(name)}
            setattr(wide, name, copy.deepcopy(getattr(self, name), own))
        return wide

    def nbytes(self, *names: str) -> int:
        """Bytes of the weights of the networks of these names."""
        return sum(one.nbytes for name in names for one in self._weights(name))

    def _weights(self, name: str) -> Iterator[Tensor]:
        parts = self.text.encoders if name == "text" else [getattr(self, name)]
        for part in parts:
            yield from (*part.parameters(), *part.buffers())

    def inputs(self, batch: int) -> Inputs:
        """Random prompts and noise for ``batch`` images."""
        config, generator = self.kind.unet, torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, dtype)

        def half() -> dict[str, Tensor]:
            given = {"context": random(batch, TOKENS, config.cross_attention_dim)}
            if config.addition_embed_type is not None:
                sides = torch.tensor([[self.kind.pixels] * 2 + [0, 0] + [self.kind.pixels] * 2])
                given["text_embeds"] = random(batch, self.kind.text[-1]["projection_dim"])
                given["time_ids"] = sides.expand(batch, -1).to(self.device)
            return given

        x_T = random(batch, config.out_channels, *[self.kind.side] * 2, dtype=torch.float32)
        return Inputs(x_T, half(), half())

    def _filled(self, model: Any) -> Any:
        model = model.to(self.dtype)
        size = sum(one.nbytes for one in model.parameters())
        if self.device.type == "cpu" and size > LARGE * free_memory():
            fill_in_file(model)
            self.in_files += size
        else:
            model.to_empty(device=self.device)
        model.eval().requires_grad_(False)
        randomize(model, torch.Generator(self.device).manual_seed(0))
        return model


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float32, float32 for half precision."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Random data everywhere, at scales that keep activations near 1."""
    for name, value in module.named_parameters():
        if value.dim() > 1:
            value.normal_(std=value[0].numel() ** -0.5, generator=generator)
        else:
            value.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value.add_(1)
