"""Images as prompts: the IP-Adapters of a pipeline, their scales and their image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import AnyPath, CheckpointError, read_json
from ..models import UNet2DCondition
from ..models.checkpoints import CONFIG
from ..models.clip_weights import assemble, read_states
from ..models.ip_adapter import IPAdapter, read_ip_adapter
from ..ops import checks

ENCODER = "image_encoder"
Scale = float | Sequence[float] | Mapping[str, Any]


class IPAdapters:
    """The IP-Adapters of a U-Net, each under a name and with a scale.

    Args:
        unet: the U-Net, which keeps the adapters' weights as ``unet.ip_adapters``.

    Attributes:
        encoder: CLIP's vision tower (``CLIPVisionModelWithProjection``), or None.
        scales: of each adapter, as :meth:`set` takes them.
    """

    def __init__(self, unet: UNet2DCondition) -> None:
        self.unet = unet
        self.encoder: Any = None
        self.scales: dict[str, Scale] = {}

    @property
    def names(self) -> list[str]:
        """Of all that are loaded, in the order of their images."""
        return list(self.scales)

    def load(
        self,
        path: AnyPath,
        name: str | None = None,
        scale: Scale = 1.0,
        *,
        image_encoder: AnyPath | None = None,
    ) -> str:
        """Read an adapter, plain, plus or full face, beside those that are loaded.

        Args:
            path: its file, ``.safetensors`` or ``.bin``.
            name: what to call it; the file's name by default.
            scale: as :meth:`set` takes it.
            image_encoder: folder of CLIP's vision tower in the form of ``transformers``; by default
                the folder ``image_encoder`` beside the file. Without one, images are given as
                embeddings.

        Returns:
            The name.

        Raises:
            CheckpointError: a damaged file, or an adapter for another model; nothing changes then.
            ValueError: a name that is taken, a scale that can't be.
        """
        file = Path(path)
        name = file.stem if name is None else name
        if not isinstance(name, str) or not name or name in self.scales:
            checks.fail("name", f"one that isn't taken ({', '.join(self.names)})", repr(name))
        places = self.unet.cross_attentions()
        self._expanded(name, scale, 1)
        weight = self.unet.conv_in.weight
        adapter = read_ip_adapter(
            file,
            self.unet.config.cross_attention_dim,
            [attention.to_k.out_features for _, attention in places],
            self._file_order(),
            weight.dtype,
            weight.device,
        )
        beside = file.parent / ENCODER
        if image_encoder is not None or (self.encoder is None and beside.is_dir()):
            self.encoder = _encoder(Path(image_encoder or beside), weight.dtype, weight.device)
        self.unet.ip_adapters.append(adapter)
        self.scales[name] = scale
        return name

    def set(self, scales: Mapping[str, Scale]) -> None:
        """Give adapters other scales; those that are not named keep theirs.

        A scale is a number; or a list with one for each image of the adapter, which then has
        masks; or a dict by blocks, as diffusers' ``set_ip_adapter_scale`` takes it, such as
        ``{"down": {"block_2": [0.0, 1.0]}, "up": 0.5}``, where what is not named is 0.

        Raises:
            ValueError: a name that isn't loaded, a scale that can't be; nothing changes then.
        """
        for name, scale in scales.items():
            checks.one_of("scales", name, self.scales)
            self._expanded(name, scale, len(scale) if isinstance(scale, (list, tuple)) else 1)
        self.scales |= scales

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises ValueError: it isn't loaded."""
        checks.one_of("name", name, self.scales)
        kept = [one for n, one in zip(self.names, self.unet.ip_adapters, strict=True) if n != name]
        self.unet.ip_adapters = nn.ModuleList(kept)
        del self.scales[name]

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Move or cast the image encoder; the adapters go with the U-Net."""
        if self.encoder is not None:
            self.encoder.to(*args, **kwargs)

    @torch.no_grad()
    def context(
        self,
        images: Any,
        embeds: Any,
        masks: Any,
        size: tuple[int, int],
        guided: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the U-Net takes for some images, for the conditional and the other half of guidance.

        Args:
            images: PIL images: one for a single adapter, else a list with one, or a list of
                several, for each adapter.
            embeds: in the place of images what the encoder says of them, as diffusers'
                ``ip_adapter_image_embeds``: for each adapter [2, n, ...] with guidance, the
                unconditional half first, or [1, n, ...] without.
            masks: where each image counts: PIL images or tensors [h, w] in [0, 1], one, or a list
                of one for each adapter or of lists with one for each of its images.
            size: height and width of the latents.
            guided: whether both halves of guidance run.

        Raises:
            ValueError: images or embeddings that are missing, or too many; the message names them.
            TypeError: no image.
        """
        if not self.scales:
            for name, value in (("", images), ("_embeds", embeds), ("_masks", masks)):
                if value is not None:
                    expected = "None: the model has no IP-Adapter (pipe.ip_adapters.load)"
                    checks.fail(f"ip_adapter_image{name}", expected, type(value).__name__)
            return {}, {}
        if (images is None) == (embeds is None):
            expected = (
                f"an image for each of {len(self.scales)} IP-Adapters ({', '.join(self.names)})"
            )
            got = "nothing" if images is None else "both images and ip_adapter_image_embeds"
            checks.fail("ip_adapter_image", expected, got)
        adapters = list(cast("list[IPAdapter]", self.unet.ip_adapters))
        halves = (
            self._embedded(adapters, images)
            if embeds is None
            else self._given(adapters, embeds, guided)
        )
        counts = [positive.shape[1] for _, positive in halves]
        weight = self.unet.conv_in.weight
        shown = None if masks is None else self._masks(masks, counts, size)
        tokens = []
        for half in (1, 0):
            made = []
            for adapter, pair in zip(adapters, halves, strict=True):
                given = pair[half].to(weight)
                own = adapter.projection(given.flatten(0, 1)).unflatten(0, given.shape[:2])
                # Without masks all images of an adapter share one softmax, as in diffusers.
                made.append(own if shown is not None else own.flatten(1, 2)[:, None])
            tokens.append(made)
        segments = counts if shown is not None else [1] * len(counts)
        columns = [
            self._expanded(name, scale, count)
            for (name, scale), count in zip(self.scales.items(), segments, strict=True)
        ]
        weights = torch.cat(columns, dim=1).to(weight)[None]  # [1, attentions, images]
        shared: dict[str, Any] = {"image_weights": weights}
        if shown is not None:
            shared["image_masks"] = [mask.to(weight) for mask in shown]
        positive, negative = ({"image_tokens": one, **shared} for one in tokens)
        return positive, negative

    def _file_order(self) -> list[int]:
        """Places of a file's cross-attentions: down, up, then the bottom."""
        counts = [
            sum(len(attention.transformer_blocks) for attention in block.attentions)
            for block in cast("list[Any]", self.unet.blocks())
        ]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        bottom = len(self.unet.down_blocks)
        order = [i for i in range(len(counts)) if i != bottom] + [bottom]
        return [starts[i] + j for i in order for j in range(counts[i])]

    def _expanded(self, name: str, scale: Scale, count: int) -> Tensor:
        """A scale for each cross-attention and image, [attentions, count]."""
        places = len(self.unet.cross_attentions())
        what = f"scale of {name!r}"
        if isinstance(scale, Mapping):
            return torch.tensor(self._by_block(what, scale), dtype=torch.float32)[:, None].expand(
                -1, count
            )
        several: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
        if len(several) != count:
            expected = f"a number, or with masks one for each of its {count} images"
            checks.fail(what, expected, f"{len(several)} numbers")
        for one in several:
            checks.finite(what, one)
        return torch.tensor([[float(one) for one in several]], dtype=torch.float32).expand(
            places, -1
        )

    def _by_block(self, what: str, scale: Mapping[str, Any]) -> list[float]:
        """The scale at each cross-attention of a dict by blocks."""
        down, up = len(self.unet.down_blocks), len(self.unet.up_blocks)
        blocks = cast("list[Any]", self.unet.blocks())
        for way in scale:
            checks.one_of(what, way, ("down", "mid", "up"))
        places: list[float] = []
        for i, block in enumerate(blocks):
            way = "down" if i < down else "mid" if i == down else "up"
            index = i if i < down else i - down - 1
            own = scale.get(way, 0.0)
            if isinstance(own, Mapping):
                count = down if way == "down" else up
                known = [f"block_{n}" for n in range(count) if len(self._block(way, n).attentions)]
                for key in own:
                    checks.one_of(f"{what}[{way!r}]", key, known)
                own = own.get(f"block_{index}", 0.0)
            several = own if isinstance(own, (list, tuple)) else [own] * len(block.attentions)
            if len(several) != len(block.attentions):
                expected = f"a number or {len(block.attentions)}, one for each of its transformers"
                checks.fail(f"{what} at {way} {index}", expected, len(several))
            for one, attention in zip(several, block.attentions, strict=True):
                checks.finite(what, one)
                places += [float(one)] * len(attention.transformer_blocks)
        return places

    def _block(self, way: str, index: int) -> Any:
        return (self.unet.down_blocks if way == "down" else self.unet.up_blocks)[index]

    def _embedded(self, adapters: list[IPAdapter], images: Any) -> list[tuple[Tensor, Tensor]]:
        """What the encoder says of each adapter's images, and of none: [1, n, ...] each."""
        if self.encoder is None:
            expected = "None without an image encoder (ip_adapters.load(image_encoder=)); give"
            checks.fail("ip_adapter_image", f"{expected} ip_adapter_image_embeds", "an image")
        lists = _lists("ip_adapter_image", images, len(adapters))
        found = []
        for adapter, own in zip(adapters, lists, strict=True):
            pixels = _pixels(own, self.encoder.config.image_size)
            pixels = pixels.to(next(self.encoder.parameters()))
            projection: Any = adapter.projection
            if projection.reads == "image_embeds":
                said = self.encoder(pixels).image_embeds
                none = torch.zeros_like(said)
            else:
                said, none = (
                    self.encoder(x, output_hidden_states=True).hidden_states[-2]
                    for x in (pixels, torch.zeros_like(pixels))
                )
            if said.shape[-1] != projection.features:
                expected = f"one of {projection.features} features, as the IP-Adapter reads"
                checks.fail("image_encoder", expected, said.shape[-1])
            found.append((none[None], said[None]))
        return found

    def _given(
        self, adapters: list[IPAdapter], embeds: Any, guided: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Embeddings as users give them, checked: the unconditional and the conditional half."""
        name = "ip_adapter_image_embeds"
        several = [embeds] if isinstance(embeds, Tensor) else embeds
        if not isinstance(several, (list, tuple)) or len(several) != len(adapters):
            got = len(several) if isinstance(several, (list, tuple)) else type(several).__name__
            checks.fail(name, f"a tensor for each of {len(adapters)} IP-Adapters", got)
        found = []
        for adapter, one in zip(adapters, several, strict=True):
            checks.floating(name, one)
            projection: Any = adapter.projection
            dims, features = 3 + (projection.reads != "image_embeds"), projection.features
            if one.dim() != dims or one.shape[-1] != features or len(one) not in (1, 2):
                shape = "[2, n, " + "L, " * (dims == 4) + f"{features}]"
                checks.fail(name, f"shape {shape}, the unconditional half first", list(one.shape))
            if guided and len(one) == 1:
                expected = "both halves of guidance, the unconditional one first, [2, n, ...]"
                checks.fail(name, expected, list(one.shape))
            found.append((one[:1], one[-1:]))
        return found

    def _masks(self, masks: Any, counts: list[int], size: tuple[int, int]) -> list[Tensor]:
        """Masks at each level's resolution, [1, images, h w]."""
        name = "ip_adapter_masks"
        lists = _lists(name, masks, len(counts))
        for own, count in zip(lists, counts, strict=True):
            if len(own) != count:
                checks.fail(name, f"one for each of the {count} images of an adapter", len(own))
        every = [_mask(name, one) for own in lists for one in own]
        shapes = {tuple(one.shape) for one in every}
        if len(shapes) != 1:
            checks.fail(name, "masks of one size", " and ".join(map(str, sorted(shapes))))
        stacked = torch.stack(every)[None]  # [1, images, H, W]
        return [
            F.interpolate(stacked, size=level, mode="bicubic").flatten(2)
            for level in self.unet.level_sizes(size)
        ]


def _lists(name: str, value: Any, adapters: int) -> list[list[Any]]:
    """A list for each adapter, of one or several."""
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(several) != adapters:
        checks.fail(
            name, f"one, or a list of them, for each of {adapters} IP-Adapters", len(several)
        )
    return [list(one) if isinstance(one, (list, tuple)) else [one] for one in several]


def _mask(name: str, mask: Any) -> Tensor:
    """[H, W] of zeros and ones; halves and more count as 1."""
    if isinstance(mask, Tensor):
        x = mask.detach().float()
        while x.dim() > 2 and len(x) == 1:
            x = x[0]
    else:
        x = _read(name, mask, "L")[0]
    if x.dim() != 2 or not x.numel():
        checks.fail(name, "shape [H, W]", list(x.shape))
    return (x >= 0.5).float()


def _read(name: str, image: Any, mode: str) -> Tensor:
    """A PIL image as [C, H, W] in [0, 1]."""
    import numpy as np
    from PIL import Image

    from ..images import read_picture

    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected PIL images, got {type(image).__name__}")
    try:
        array = np.array(read_picture(image, mode, "black" if mode == "L" else "white"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    x = torch.from_numpy(array.astype(np.float32) / 255)
    return x[None] if x.dim() == 2 else x.permute(2, 0, 1)


def _pixels(images: list[Any], side: int) -> Tensor:
    """Pixels as CLIP reads them, [n, 3, side, side]."""
    import transformers
    from PIL import Image

    from ..images import read_picture

    for image in images:
        if not isinstance(image, Image.Image):
            got = type(image).__name__
            raise TypeError(f"ip_adapter_image: expected PIL images, got {got}")
    name = "CLIPImageProcessorPil"  # newer transformers; their other one needs torchvision
    kind = getattr(transformers, name, None) or transformers.CLIPImageProcessor
    processor = kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pictures = [read_picture(image, "RGB", "white") for image in images]
    return processor(pictures, return_tensors="pt").pixel_values


def _encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """CLIP's vision tower in a folder.

    Raises:
        CheckpointError: there is none, or a damaged one.
    """
    import transformers

    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: image_encoder: expected a folder with {CONFIG}")
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "clip_vision_model":
        got = repr(config.get("model_type"))
        raise CheckpointError(f"{folder}: image_encoder: expected a clip_vision_model, got {got}")
    shape = transformers.CLIPVisionConfig.from_dict(config)
    states = read_states(folder, dtype, device)
    return assemble(lambda: transformers.CLIPVisionModelWithProjection(shape), states, folder)
