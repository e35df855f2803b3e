"""What is trained, and how it is written: a LoRA, whole networks, the vectors of a new word, or a
ControlNet."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..files import save_tensors
from ..models import UNet2DCondition
from ..models.checkpoints import CONFIG, WEIGHTS
from ..models.controlnet import ControlNet
from ..models.embeddings import MOST_VECTORS, PAIR
from ..models.text import TextEncoders
from ..ops import checks
from ..pipelines.parts import Parts
from ..pipelines.saving import save
from ..pipelines.single_file import save_single_file
from . import lora, lora_export
from .settings import Settings

# Of Gal et al. 2022 (arXiv:2208.01618), appendix: neutral texts around the word.
TEMPLATES = (
    *("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}"),
    *("a photo of a clean {}", "a photo of my {}", "a close-up photo of a {}", "a photo of the {}"),
    *("a bright photo of the {}", "a good photo of a {}", "a rendition of the {}"),
)
WORD = "{}"  # in a caption: the word that is trained


class Method(Protocol):
    """What is trained.

    Attributes:
        vectors: vectors of a new word for each text encoder, where that is what is trained.
        control: the ControlNet, where that is what is trained.
        text: whether states of captions change while it trains.
    """

    vectors: nn.ParameterList | None
    control: ControlNet | None
    text: bool

    def files(self) -> list[str]:
        """Names of what :meth:`write` leaves in a folder."""
        ...

    def write(self, folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Write trained weights, by the names of :class:`~.network.Finetuned`.

        Raises:
            OSError: they can't be written.
        """
        ...


class Lora:
    """Low-rank changes of layers, see :mod:`.lora`."""

    vectors = control = None

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts, self.settings, self.text = parts, settings, settings.train_text
        self.configs = lora.add_lora(_networks(parts, settings), settings)

    def files(self) -> list[str]:
        kohya = f"{self.settings.out.absolute().name}.safetensors"
        named = {"peft": [lora_export.PEFT_FILE], "kohya": [kohya]}
        return named.get(self.settings.format) or [*named["peft"], *named["kohya"]]

    def write(self, folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        layers = lora.parts(weights)
        for name in self.files():
            if name == lora_export.PEFT_FILE:
                lora_export.save_peft(layers, self.configs, folder / name, about)
            else:
                alphas = lora_export.alphas(layers, self.settings)
                config = self.parts.unet.config
                lora_export.save_kohya(layers, alphas, folder / name, config, about)


class Full:
    """All weights of the U-Net, and with ``train_text`` of the text encoders."""

    vectors = control = None

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts, self.settings, self.text = parts, settings, settings.train_text
        for network in _networks(parts, settings).values():
            network.requires_grad_(True)

    def files(self) -> list[str]:
        return ["model_index.json", f"{self.settings.out.absolute().name}.safetensors"]

    def write(self, folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        own: dict[str, dict[str, Tensor]] = {}
        for name, value in weights.items():
            component, _, rest = name.partition(".")
            own.setdefault(component, {})[rest] = value.detach().cpu()
        with torch.device("meta"):  # those in the trainer may be spread over processes
            unet = UNet2DCondition(self.parts.unet.config)
        unet.load_state_dict(own["unet"], assign=True)
        encoders = []
        for component, encoder in self.parts.text.modules().items():
            if component in own:
                with torch.device("meta"):
                    fresh = type(encoder)(encoder.config)
                fresh.load_state_dict(own[component], assign=True)
                encoder = fresh
            encoders.append(encoder)
        text = TextEncoders(self.parts.text.tokenizers, encoders)
        made = dataclasses.replace(self.parts, unet=unet.eval(), text=text, random_weights=False)
        save(made, folder)
        save_single_file(made, folder / self.files()[1], about)


class Embedding:
    """Vectors that stand for a new word (textual inversion; Gal et al. 2022, arXiv:2208.01618)."""

    control = None
    text = True

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts, self.settings = parts, settings
        if settings.word is None:
            checks.fail("word", "the word to train, because the method is embedding", None)
        count = settings.vectors
        if count > MOST_VECTORS:
            checks.fail("vectors", f"at most {MOST_VECTORS}", count)
        self.vectors = nn.ParameterList()
        for tokenizer, encoder in zip(parts.text.tokenizers, parts.text.encoders, strict=True):
            table: Any = encoder.get_input_embeddings().weight  # type: ignore[operator]
            ids = tokenizer(settings.init_word, add_special_tokens=False).input_ids
            if not ids:
                checks.fail("init_word", "at least one token", repr(settings.init_word))
            start = table[[ids[i % len(ids)] for i in range(count)]]  # [n, C]
            self.vectors.append(nn.Parameter(start.detach().float().clone()))

    def files(self) -> list[str]:
        name = self.settings.word
        if len(self.vectors) == 2:
            return [
                f"{name}.safetensors",
                "learned_embeds.safetensors",
                "learned_embeds_2.safetensors",
            ]
        return [f"{name}.pt", "learned_embeds.safetensors"]

    def write(self, folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        word = str(self.settings.word)
        values = [weights[f"vectors.{i}"].detach().cpu() for i in range(len(self.vectors))]
        webui, *others = self.files()
        if len(values) == 2:
            save_tensors(dict(zip(PAIR, values, strict=True)), folder / webui, about)
        else:
            file = {"string_to_token": {"*": 265}, "string_to_param": {"*": values[0]}}
            more = {"name": word, "step": self.settings.steps, "sd_checkpoint_name": None}
            content = io.BytesIO()  # torch says of a full disk that its own file failed
            torch.save({**file, **more, "sd_checkpoint": None}, content)
            (folder / webui).write_bytes(content.getvalue())
        for name, value in zip(others, values, strict=True):
            save_tensors({word: value}, folder / name, about)


class Control:
    """A ControlNet that begins as the U-Net's first half (Zhang et al. 2023, arXiv:2302.05543)."""

    vectors = None
    text = False

    def __init__(self, parts: Parts, settings: Settings) -> None:
        control = ControlNet.from_unet(parts.unet).float()
        grain = control.control_config.grain
        if parts.vae.downsampling != grain:
            wanted = f"a base whose latents are {grain} times smaller than its images"
            checks.fail("model", wanted, f"{settings.model} ({parts.vae.downsampling} times)")
        self.control = control

    def files(self) -> list[str]:
        return [CONFIG, WEIGHTS]

    def write(self, folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        own = {name.partition(".")[2]: value.detach().cpu() for name, value in weights.items()}
        with torch.device("meta"):  # that in the trainer may be spread over processes
            made = ControlNet(self.control.control_config)
        made.load_state_dict(own, assign=True)
        made.save_pretrained(folder)


def attach(parts: Parts, settings: Settings) -> Method:
    """Freeze the networks but for what the settings' method trains.

    Raises:
        ModuleNotFoundError: peft is not installed, which LoRAs need.
        ValueError: settings that don't fit the networks.
    """
    for network in (parts.unet, parts.vae, *parts.text.encoders):
        network.requires_grad_(False)
    kinds: dict[str, Any] = {"lora": Lora, "full": Full, "embedding": Embedding}
    kinds["controlnet"] = Control
    made: Method = kinds[settings.method](parts, settings)
    return made


def _networks(parts: Parts, settings: Settings) -> dict[str, nn.Module]:
    """The networks that may change."""
    return {"unet": parts.unet, **(parts.text.modules() if settings.train_text else {})}
