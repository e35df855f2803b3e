"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721): an image beside the prompt.

An adapter has keys and values of its own for each cross-attention, made of a few tokens of an
image, and attends to them beside the text: attention(q, text) + scale * attention(q, image), each
with its own softmax (eq. 5). Where the tokens come from depends on its kind: the projection of an
image's CLIP embedding, or of all its states (full face), or a resampler of these (plus).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..files import AnyPath, CheckpointError
from . import contents
from .blocks import Attention, Composite, KeyValue
from .tensors import Stored, compare, read, stored

TOKENS = 4  # of an image's embedding
HEAD_DIM = 64  # of a resampler


class ImageProjection(nn.Module):
    """norm(W e), as tokens: e is the CLIP embedding of an image."""

    reads = "image_embeds"

    def __init__(self, features: int, channels: int, tokens: int = TOKENS) -> None:
        super().__init__()
        self.proj = nn.Linear(features, tokens * channels)
        self.norm = nn.LayerNorm(channels)

    @property
    def features(self) -> int:
        return self.proj.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[N, features] to tokens [N, L, channels]."""
        return self.norm(self.proj(x).unflatten(1, (-1, self.norm.normalized_shape[0])))


class FullProjection(nn.Module):
    """norm(W_2 gelu(W_1 h)) of each of an image's CLIP states (full face)."""

    reads = "hidden_states"

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        layers = nn.Linear(features, features), nn.GELU(), nn.Linear(features, channels)
        self.proj = nn.Sequential(*layers, nn.LayerNorm(channels))

    @property
    def features(self) -> int:
        return cast("nn.Linear", self.proj[0]).in_features

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, features] to tokens [N, L, channels]."""
        return self.proj(x)


class ResamplerLayer(nn.Module):
    """Attention of the latents to the states and themselves, and a feed-forward layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * HEAD_DIM
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)
        wide = nn.Linear(channels, 4 * channels, bias=False)
        narrow = nn.Linear(4 * channels, channels, bias=False)
        self.ff = nn.Sequential(nn.LayerNorm(channels), wide, nn.GELU(), narrow)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        own = self.norm2(latents)
        both = torch.cat((self.norm1(x), own), dim=1)
        q, (k, v) = self.to_q(own), self.to_kv(both).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).contiguous() for part in (q, k, v))
        latents = self.to_out(ops.attention(q, k, v).flatten(2)) + latents
        return self.ff(latents) + latents


class Resampler(nn.Module):
    """A few learned tokens that attend to an image's CLIP states (Alayrac et al. 2022, fig. 5)."""

    reads = "hidden_states"

    def __init__(
        self, features: int, width: int, channels: int, tokens: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(features, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, channels)
        self.norm_out = nn.LayerNorm(channels)

    @property
    def features(self) -> int:
        return self.proj_in.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, features] to tokens [N, L, channels]."""
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


Projection = ImageProjection | FullProjection | Resampler


class IPAdapter(Composite):
    """Keys and values of image tokens for each cross-attention of a U-Net.

    Args:
        projection: makes tokens of what an image encoder says.
        channels: of the tokens.
        widths: channels of each cross-attention, in the order of the computation.
    """

    def __init__(self, projection: nn.Module, channels: int, widths: list[int]) -> None:
        super().__init__()
        self.projection = projection
        self.to_k = nn.ModuleList(nn.Linear(channels, width, bias=False) for width in widths)
        self.to_v = nn.ModuleList(nn.Linear(channels, width, bias=False) for width in widths)

    def project_kv(self, layer: int, attention: Attention, tokens: Tensor) -> list[KeyValue]:
        """Keys and values [B, L, H, D] of each of n images, whose tokens are [B, n, L, C]."""
        k, v = self.to_k[layer](tokens), self.to_v[layer](tokens)
        images = zip(k.unbind(1), v.unbind(1), strict=True)
        return [(attention.split_heads(a), attention.split_heads(b)) for a, b in images]


def read_ip_adapter(
    path: AnyPath,
    channels: int,
    widths: list[int],
    order: list[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> IPAdapter:
    """The adapter in a file (``.safetensors`` or ``.bin``), as they are published.

    Args:
        path: the file.
        channels: of the U-Net's context.
        widths: channels of each of the U-Net's cross-attentions, in the order of the computation.
        order: for each cross-attention of the file its place among those; a file counts the way
            down, the way up, and then the bottom.
        dtype: dtype of the adapter; None for that of the file.
        device: where it is put.

    Raises:
        CheckpointError: a damaged file, another kind of file (named), an adapter for faces (FaceID)
            or for another model.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    found = _tensors(file)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    try:
        with torch.device("meta"):
            adapter = IPAdapter(_projection(file, shapes, channels), channels, widths)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: a damaged IP-Adapter: {error}") from error
    places = {
        f"ip_adapter.{2 * n + 1}.to_{x}_ip": f"to_{x}.{i}"
        for n, i in enumerate(order)
        for x in "kv"
    }
    named = {_own_name(name, places): tensor for name, tensor in found.items()}
    expected = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    compare(file, expected, {name: tensor.shape for name, tensor in named.items()})
    state = read({n: named[n] for n in expected}, dtype, device)
    adapter.load_state_dict(state, assign=True)
    return adapter.eval().requires_grad_(False)


def _tensors(file: Path) -> dict[str, Stored]:
    """The file's tensors by their names, ``image_proj.`` or ``ip_adapter.`` in front."""
    found = stored([file])
    if not any(name.startswith("ip_adapter.") for name in found):
        kind = contents.by_names(found) or f"tensors {', '.join(sorted(found)[:3])}"
        raise CheckpointError(f"{file}: expected an IP-Adapter, got {kind}")
    return found


def _projection(file: Path, shapes: Mapping[str, tuple[int, ...]], channels: int) -> nn.Module:
    """What makes the tokens, on the device that is set."""
    own = {
        n.removeprefix("image_proj."): s for n, s in shapes.items() if n.startswith("image_proj.")
    }
    lora = any(".to_q_lora." in name or ".to_k_lora." in name for name in shapes)
    if (
        lora
        or "perceiver_resampler.proj_in.weight" in own
        or ("norm.weight" in own and "proj.0.weight" in own)
    ):
        raise CheckpointError(
            f"{file}: IP-Adapter FaceID is not supported, only plain, plus and full face"
        )
    if "proj.weight" in own:
        made: Projection = ImageProjection(
            own["proj.weight"][1],
            own["norm.weight"][0],
            own["proj.weight"][0] // own["norm.weight"][0],
        )
        out = own["norm.weight"][0]
    elif "proj.3.weight" in own:
        out = own["proj.3.weight"][0]
        made = FullProjection(own["proj.0.weight"][0], out)
    else:
        out, (_, tokens, width) = own["proj_out.weight"][0], own["latents"]
        inner = next(shape for name, shape in own.items() if re.search(r"to_q\.weight$", name))[0]
        depth = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("layers."))
        made = Resampler(own["proj_in.weight"][1], width, out, tokens, inner // HEAD_DIM, depth)
    if out != channels:
        wanted = f"an IP-Adapter of {channels} channels, as the U-Net's context"
        raise CheckpointError(
            f"{file}: expected {wanted}, got one of {out}: it is for another model"
        )
    return made


_RESAMPLER = re.compile(r"layers\.(\d+)\.([01])\.(.+)")


def _own_name(name: str, places: Mapping[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in places:
        return f"{places[stem]}.{kind}"
    rest = name.removeprefix("image_proj.")
    if (match := _RESAMPLER.fullmatch(rest)) is not None:
        # There an attention and its norms are the first part of a layer, the other the second one.
        rest = f"layers.{match[1]}.{'ff.' * (match[2] == '1')}{match[3]}"
    return f"projection.{rest}" if name.startswith("image_proj.") else name
