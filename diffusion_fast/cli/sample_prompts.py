"""Drawing prompts with Stable Diffusion: text-to-image, image-to-image, inpainting, sweeps."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import typer
from PIL.Image import Image

from .._version import __version__
from ..images import PARAMETERS, grid, read_picture, to_pil
from ..ops import checks
from ..pipelines import Result, StableDiffusion
from ..pipelines.infotext import infotext
from ..pipelines.loading import SHIPPED, TINY
from .common import check_device
from .previews import preview_file, previewing
from .sample_many import many_prompts


@dataclass(frozen=True)
class PromptDrawing:
    """Settings of a picture: everything that decides its pixels.

    ``steps`` and ``guidance`` are texts, of one number or of a list, or None for the model's own
    (a picture's settings hold the numbers), ``control_scale`` and so on those of one number or of
    one for each control; ``digests`` are those of the files ``image``, ``mask``, ``control``,
    ``control_image``, ``lora`` and ``embedding`` when the picture was first made.
    """

    KIND: ClassVar[str] = "prompts"

    model: str
    prompt: list[str] = dataclasses.field(default_factory=list)
    negative: str | None = None
    seed: int = 0
    batch: int = 1
    size: str | None = None
    sampler: str | None = None
    steps: str | None = None
    guidance: str | None = None
    eta: float | None = None
    spacing: str | None = None
    timesteps: str | None = None
    sigmas: str | None = None
    s_noise: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    order: int | None = None
    steps_offset: int | None = None
    final_alpha: str | None = None
    guidance_interval: str | None = None
    guidance_rescale: float | None = None
    clip_skip: int = 0
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    control: list[str] = dataclasses.field(default_factory=list)
    control_image: list[str] = dataclasses.field(default_factory=list)
    control_scale: str | None = None
    control_start: str | None = None
    control_end: str | None = None
    guess_mode: bool = False
    lora: list[str] = dataclasses.field(default_factory=list)
    embedding: list[str] = dataclasses.field(default_factory=list)
    ip_adapter: list[str] = dataclasses.field(default_factory=list)
    ip_adapter_image: list[str] = dataclasses.field(default_factory=list)
    ip_adapter_mask: list[str] = dataclasses.field(default_factory=list)
    image_encoder: str | None = None
    refiner: str | None = None
    refiner_start: float | None = None
    vae: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    variant: str | None = None
    dtype: str | None = None
    safety_checker: bool = True
    zero_snr: bool | None = None
    graph: str = "auto"
    rewrites: str = "all"
    device: str = "cpu"
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def draw(
        self, out: Path | None = None, preview: str | None = None
    ) -> tuple[Image, dict[str, Any], str]:
        """The picture, its settings, and what was done in words.

        Args:
            out: the file that it is for.
            preview: a tiny autoencoder that draws it beside ``out`` after each step.
        """
        steps, guidance, size, pictures = self._checked()
        digests = self._digests()
        pipe = self._pipeline()
        if preview is not None and out is not None:
            try:
                pipe.previews.load(preview)
            except ValueError as error:
                raise ValueError(f"--preview: {error}") from error
            pictures["preview"] = previewing(pipe, preview_file(out))
        refiner = self._refiner()
        results = [self._run(pipe, n, g, size, pictures, refiner) for n in steps for g in guidance]
        if pipe.random_weights:
            typer.echo(f"{self.model}: random weights, so the picture shows nothing", err=True)
        images = torch.stack([result.images for result in results], dim=1)  # type: ignore
        columns = len(results)
        headings = _headings(steps, guidance)
        if columns == 1:
            columns = self.batch if self.batch > 1 else len(self.prompt)
        flat = images.flatten(0, 1)  # rows are images, columns the values of a sweep
        picture = to_pil(flat)[0] if len(flat) == 1 else grid(flat, columns, headings=headings)
        picture.info[PARAMETERS] = self._text(results[0])
        settings = dataclasses.asdict(self) | {
            "steps": self.steps or str(results[0].settings["steps"]),
            "guidance": self.guidance or str(results[0].settings["guidance_scale"]),
            "digests": digests,
            "seeds": results[0].seeds,
            "resolved": results[0].settings,
            "weights": "random" if pipe.random_weights else "trained",
            "vae_decoding": [result.vae for result in results],
            "flagged": [result.flagged for result in results],
            "version": __version__,
        }
        return picture, settings, _summary(len(flat), results)

    def draw_many(self, folder: Path) -> None:
        """One file for each image, by all processes of torchrun."""
        steps, guidance, size, pictures = self._checked()
        if len(steps) + len(guidance) > 2:
            checks.fail("--steps, --guidance", "one number each with --out-dir", "a list")
        settings = dataclasses.asdict(self) | {"kind": self.KIND, "digests": self._digests()}
        settings = {n: v for n, v in settings.items() if n not in ("prompt", "seed", "batch")}
        pipe, refiner = self._pipeline(), self._refiner()

        def one(prompt: str, seed: int) -> Image:
            single = dataclasses.replace(self, prompt=[prompt], seed=seed, batch=1)
            result = single._run(pipe, steps[0], guidance[0], size, pictures, refiner, "pil")
            assert isinstance(result.images, list)
            result.images[0].info[PARAMETERS] = single._text(result)
            return result.images[0]

        prompts = [prompt for prompt in self.prompt for _ in range(self.batch)]
        if pipe.random_weights:
            typer.echo(f"{self.model}: random weights, so the images show nothing", err=True)
        many_prompts(one, prompts, folder, seed=self.seed, settings=settings)

    def _checked(
        self,
    ) -> tuple[Sequence[int | None], Sequence[float | None], Any, dict[str, Any]]:
        """What can be refused before the model is loaded; None is the model's own."""
        check_device(self.device)
        if not (self.model in (*SHIPPED, *TINY) or "/" in self.model or Path(self.model).exists()):
            raise ValueError(f"{self.model}: no such file or folder")
        if not self.prompt:
            checks.fail("PROMPT", 'what to draw, such as "a cat"', "none")
        steps: Sequence[int | None] = [None]
        if self.steps is not None:
            steps = [int(n) for n in _numbers("--steps", self.steps, whole=True)]
        guidance: Sequence[float | None] = [None]
        if self.guidance is not None:
            guidance = _numbers("--guidance", self.guidance)
        if len(steps) > 1 and len(guidance) > 1:
            checks.fail("--steps, --guidance", "a list for one of them", "two lists")
        pictures: dict[str, Any] = {
            name: _open(f"--{name}", path, *reading)
            for name, path, *reading in (
                ("image", self.image, "RGB"),
                ("mask", self.mask, "L", "black"),
            )
            if path
        }
        if self.refiner is None and self.refiner_start is not None:
            checks.fail("--refiner-start", "--refiner beside it", self.refiner_start)
        if len(self.control) != len(self.control_image):
            expected = f"one for each --control ({len(self.control)})"
            checks.fail("--control-image", expected, len(self.control_image))
        if self.control:
            hints = [_open("--control-image", path) for path in self.control_image]
            pictures |= {"control_image": hints, "guess_mode": self.guess_mode}
        for name in ("control_scale", "control_start", "control_end"):
            text = getattr(self, name)
            if text is not None:
                numbers = _numbers(f"--{name.replace('_', '-')}", text)
                pictures[name] = numbers[0] if len(numbers) == 1 else numbers
        for option, paths, *reading in (
            ("image", self.ip_adapter_image, "RGB"),
            ("masks", self.ip_adapter_mask, "L", "black"),
        ):
            if paths:
                name = f"--ip-adapter-{option.rstrip('s')}"
                pictures[f"ip_adapter_{option}"] = [_open(name, one, *reading) for one in paths]
        return steps, guidance, None if self.size is None else _size(self.size), pictures

    def _digests(self) -> dict[str, str]:
        """SHA-256 of the files that are read; another one than before is an error."""
        found = {}
        added = [(f"lora {path}", path) for path, _ in map(lora_of, self.lora)]
        added += [(f"embedding {path}", path) for path, _ in map(_named, self.embedding)]
        added += [(f"control-image {path}", path) for path in self.control_image]
        added += [(f"control {path}", path) for path in self.control if Path(path).is_file()]
        added += [(f"ip-adapter {path}", path) for path, _ in map(_adapter, self.ip_adapter)]
        added += [(f"ip-adapter-image {path}", path) for path in self.ip_adapter_image]
        added += [(f"ip-adapter-mask {path}", path) for path in self.ip_adapter_mask]
        for name, path in (("image", self.image), ("mask", self.mask), *added):
            if path is not None and not Path(path).is_dir():
                try:
                    found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                except OSError as error:
                    checks.fail(f"--{name.split()[0]}", "a file", f"{path}: {error.strerror}")
                if self.digests.get(name, found[name]) != found[name]:
                    checks.fail(f"--{name}", f"{path} as it was (SHA-256)", "another file")
        return found

    def _loaded(self, model: str) -> StableDiffusion:
        return StableDiffusion.from_pretrained(
            model,
            vae=self.vae,
            tokenizer=self.tokenizer,
            prediction_type=self.prediction_type,
            safety_checker=self.safety_checker,
            zero_terminal_snr=self.zero_snr,
            graph=self.graph,
            rewrites=_words(self.rewrites),
            variant=self.variant,
            dtype=None if self.dtype is None else _dtype(self.dtype),
            device=self.device,
        )

    def _refiner(self) -> StableDiffusion | None:
        if self.refiner is None:
            return None
        try:
            refiner = self._loaded(self.refiner)
        except ValueError as error:
            raise ValueError(f"--refiner: {error}") from error
        if not refiner.refines:
            checks.fail("--refiner", "SDXL's refiner", self.refiner)
        return refiner

    def _pipeline(self) -> StableDiffusion:

        loras = [lora_of(text) for text in self.lora]
        pipe = self._loaded(self.model)
        option = "--lora"
        try:
            for path, scale in loras:
                pipe.loras.load(path, path, scale)
            option = "--ip-adapter"
            for path, scale in map(_adapter, self.ip_adapter):
                pipe.ip_adapters.load(path, path, scale, image_encoder=self.image_encoder)
            option = "--embedding"
            for path, name in map(_named, self.embedding):
                pipe.embeddings.load(path, name or None)
            option = "--control"
            for i, path in enumerate(self.control):
                pipe.load_control(path, f"{path} ({i + 1})")
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        return pipe

    def _run(
        self,
        pipe: StableDiffusion,
        steps: int | None,
        guidance: float | None,
        size: Any,
        pictures: dict[str, Any],
        refiner: StableDiffusion | None,
        output: str = "tensor",
    ) -> Result:
        interval = self.guidance_interval
        table: dict[str, Any] = {
            "eta": self.eta,
            "timestep_spacing": self.spacing,
            "timesteps": self.timesteps and _numbers("--timesteps", self.timesteps),
            "sigmas": self.sigmas and _numbers("--sigmas", self.sigmas),
            "s_noise": self.s_noise,
            "s_churn": self.s_churn,
            "s_tmin": self.s_tmin,
            "s_tmax": self.s_tmax,
            "order": self.order,
            "steps_offset": self.steps_offset,
            "final_alpha": self.final_alpha,
            "guidance_interval": interval and tuple(_numbers("--guidance-interval", interval)),
            "guidance_rescale": self.guidance_rescale,
        }
        asked = {
            "guidance_scale": guidance,
            "sampler": self.sampler,
            "seed": self.seed,
            "batch": self.batch,
            "clip_skip": self.clip_skip,
            "progress": sys.stderr.isatty(),
            **{name: value for name, value in table.items() if value is not None},
        }
        given = {**asked, **pictures, "size": size, "strength": self.strength}
        if refiner is None:
            return pipe(self.prompt, self.negative, steps=steps, output=output, **given)
        part = 0.8 if self.refiner_start is None else self.refiner_start
        begun = pipe(
            self.prompt, self.negative, steps=steps, output="latent", denoising_end=part, **given
        )
        again = {name: begun.settings[name] for name in ("steps", "sampler", "guidance_scale")}
        asked |= again | {"image": begun.latents, "denoising_start": part}
        asked |= {"preview": pictures.get("preview")}
        return refiner(self.prompt, self.negative, output=output, **asked)

    def _text(self, result: Result) -> str:
        """Settings of the first image as other programs read them."""
        return infotext(
            result.settings,
            result.seeds[0],
            self.prompt[0],
            self.negative,
            model=self.model,
            loras=dict(map(lora_of, self.lora)),
        )


def _headings(steps: Sequence[int | None], guidance: Sequence[float | None]) -> list[str]:
    """Over the columns of a sweep."""
    if len(steps) > 1:
        return [f"{n} steps" for n in steps]
    return [f"guidance {g:g}" for g in guidance] if len(guidance) > 1 else []


def _summary(count: int, results: list[Result]) -> str:
    words = f"{count} image" + "s" * (count > 1)
    ways = sorted({result.vae for result in results if result.vae not in (None, "whole")})
    if ways:
        words += f", decoded {' and '.join(map(str, ways))} because memory was short"
    flagged = sum(sum(result.flagged or []) for result in results)
    return words + (f", {flagged} of them black (safety checker)" if flagged else "")


def _numbers(option: str, text: str, whole: bool = False) -> list[float]:
    """``5,10,20`` as a list."""
    try:
        return [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        checks.fail(option, f"{kind} such as 5 or 5,10,20", repr(text))


def _size(text: str) -> int | tuple[int, int]:
    """``512`` or ``WIDTHxHEIGHT`` as the pipeline takes it: height first."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        checks.fail("--size", "WIDTHxHEIGHT or one number, such as 512x768", repr(text))
    width, height = int(sides[0]), int(sides[-1])
    return height, width


def _adapter(text: str) -> tuple[str, float]:
    return lora_of(text, "--ip-adapter")


def lora_of(text: str, option: str = "--lora") -> tuple[str, float]:
    """``file.safetensors`` or ``file.safetensors=0.8`` as a path and a scale."""
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():  # names of files may have a = too
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        checks.fail(option, "a file, or FILE=SCALE such as style.safetensors=0.8", repr(text))


def _named(text: str) -> tuple[str, str]:
    """``file.pt`` or ``file.pt=word`` as a path and a word."""
    path, equals, word = text.rpartition("=")
    return (path, word) if equals and not Path(text).exists() else (text, "")


def _words(text: str) -> str | list[str]:
    """``all``, ``none``, or names such as ``fused_qkv,cached_context``."""
    return text if text in ("all", "none") else text.split(",")


def _dtype(name: str) -> torch.dtype:

    checks.one_of("--dtype", name, ("float32", "bfloat16", "float16"))
    return getattr(torch, name)


def _open(option: str, path: str, *reading: str) -> Image:

    try:
        return read_picture(path, *reading)
    except ValueError as error:
        raise ValueError(f"{option}: expected an image, got {path}, which {error}") from error
