"""Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752; SDXL: Podell et al. 2023,
arXiv:2307.01952): a prompt in, images out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..engine.engine import Callback
from ..engine.rewrites.decoder import FreshDecoder
from ..files import AnyPath
from ..models import UNet2DCondition
from ..models.autoencoder import Autoencoder
from ..models.controlled import ControlledUNet
from ..models.embeddings import Embeddings
from ..models.lora import LoRAs
from ..models.vae_memory import Autoencoding
from ..ops import checks
from ..prediction import PREDICTION_TYPES
from ..samplers import SamplerOptions, reads_unconditional, table_of
from ..schedule import DiffusionSchedule
from . import call, inputs
from .controls import Controls, Steering
from .ip_adapters import IPAdapters
from .loading import load
from .parts import Parts
from .previews import Previews
from .result import Result
from .saving import save

OUTPUTS = ("pil", "tensor", "latent")


class StableDiffusion:
    """Text-to-image, image-to-image and inpainting with SD 1.x, SD 2.x or SDXL,
    its refiner too.

    Make one with :meth:`from_pretrained` and call it. ``unet``, ``vae`` and ``text`` are the
    networks (``text.modules()`` the text encoders under their names), ``loras`` switches LoRAs on
    them (:class:`~diffusion_fast.models.lora.LoRAs`), ``ip_adapters`` lets images be prompts
    (:class:`~.ip_adapters.IPAdapters`), ``defaults`` are its card's steps and
    guidance, ``embeddings`` gives prompts new words
    (:class:`~diffusion_fast.models.embeddings.Embeddings`), ``controls`` are the ControlNets and
    T2I-Adapters that :meth:`load_control` read, ``previews`` decodes a preview's latents fast
    (:class:`~.previews.Previews`). One engine is kept between calls, so
    that prompts, seeds, samplers and guidance change without new buffers or graphs.

    Args:
        parts: the networks and the schedule.
        graph: how to capture CUDA graphs, see :class:`~diffusion_fast.Engine`.
        rewrites: which rewrites of the U-Net to use, see there.

    Examples:
        >>> pipe = df.StableDiffusion.from_pretrained("tiny")  # random weights
        >>> pipe("a cat", steps=2, size=64, seed=3).images[0].size
        (64, 64)
    """

    def __init__(self, parts: Parts, graph: str = "auto", rewrites: Any = "all") -> None:
        self.unet, self.vae, self.text = parts.unet, parts.vae, parts.text
        self.loras = LoRAs({"unet": self.unet, **self.text.modules()})
        self.ip_adapters = IPAdapters(self.unet)
        self.safety_checker = parts.safety_checker
        self.zero_empty, self.random_weights = parts.zero_empty, parts.random_weights
        self.defaults = parts.defaults
        self.scheduler = parts.scheduler
        self.controls = Controls()
        self._graph, self._rewrites = graph, rewrites
        self._engine: Engine | None = None
        self._decode = FreshDecoder(self.vae, rewrites)
        self.previews = Previews(self.unet, self.vae.downsampling, rewrites)

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        vae: Autoencoder | AnyPath | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        tokenizer: AnyPath | None = None,
        safety_checker: bool = True,
        prediction_type: str | None = None,
        zero_terminal_snr: bool | None = None,
        graph: str = "auto",
        rewrites: str | Sequence[str] = "all",
    ) -> StableDiffusion:
        """Load a model.

        Args:
            path: a diffusers folder, a single CompVis file, or the id of a model on the Hugging
                Face hub. ``"emoji"`` is the small trained model that comes with the package (in
                float32 unless ``dtype`` says another). ``"tiny"`` is one with random weights, made
                on the fly; so are ``"tiny-sd21"``, ``"tiny-sdxl"`` and ``"tiny-inpainting"``.
            vae: another autoencoder in place of the model's: one loaded before, or a path, also of
                a tiny one (TAESD) that decodes fast. A file that doesn't tell its scaling factor
                takes that of the model.
            dtype: dtype of all parameters; None for that of the files. A VAE that may overflow in
                float16 computes in float32 all the same
                (:class:`~diffusion_fast.models.AutoencoderKL` says when, and how to change it).
            device: where all parameters are.
            variant: which weights of a folder, such as ``"fp16"``.
            tokenizer: a folder with the tokenizer; a single file holds none.
            safety_checker: use the checker that some SD 1.x folders have: images that it finds
                unsafe turn black, and the result says which. False leaves it out.
            prediction_type: ``"epsilon"`` or ``"v_prediction"``, where a single file doesn't say:
                one of SD 2.x is either, and None warns and takes epsilon.
            zero_terminal_snr: scale the noise schedule so that its last timestep is pure noise (Lin
                et al. 2023, arXiv:2305.08891), or don't; None for what the model says.
            graph: how to capture CUDA graphs, see :class:`~diffusion_fast.Engine`.
            rewrites: which rewrites of the U-Net to use, see there; the VAE's decoder uses
                those of them that apply to it.

        Raises:
            CheckpointError: no model there, or an unsupported or damaged one.
            ValueError: parts that don't fit together.
        """
        if prediction_type is not None:
            checks.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        parts = load(
            path,
            vae=vae,
            dtype=dtype,
            device=device,
            variant=variant,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            prediction_type=prediction_type,
        )
        if zero_terminal_snr is not None:
            config = parts.scheduler.config | {"rescale_betas_zero_snr": zero_terminal_snr}
            schedule = DiffusionSchedule.from_config(config)
            parts.scheduler = replace(parts.scheduler, schedule=schedule, config=config)
        return cls(parts, graph, rewrites)

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write a folder that :meth:`from_pretrained` and diffusers load.

        Embeddings and IP-Adapters have no place in such a folder: they are not written, and a
        warning names them. They are loaded again from their own files.

        Raises:
            OSError: it can't be written; what was there before still is.
        """
        save(self._parts(), folder)
        for kind, names in (
            ("embeddings", self.embeddings.names),
            ("IP-Adapters", self.ip_adapters.names),
        ):
            if names:
                warnings.warn(
                    f"{folder}: {kind} are not written, load them again from their files:"
                    f" {', '.join(names)}",
                    stacklevel=2,
                )

    @property
    def embeddings(self) -> Embeddings:
        """Textual inversion: words that stand for trained vectors."""
        return self.text.embeddings

    def load_control(
        self, path: AnyPath, name: str | None = None, *, variant: str | None = None
    ) -> str:
        """Read a ControlNet or T2I-Adapter; from then on calls take a ``control_image`` for it.

        Several act together; ``controls.unload(name)`` takes one off.

        Args:
            path: a diffusers folder or hub id of either kind, or a single file of one.
            name: what to call it; by default the path.
            variant: which weights of a folder, such as ``"fp16"``.

        Returns:
            The name.

        Raises:
            CheckpointError: a damaged file, another kind of model (named), or one for another base;
                nothing changes then.
            ValueError: a name that is taken.
        """
        name = str(path) if name is None else name
        self.controls.load(path, self.unet, self.vae.downsampling, name, variant)
        return name

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def to(self, *args: Any, **kwargs: Any) -> StableDiffusion:
        """Move or cast all networks, as ``nn.Module.to``."""
        networks = *self.controls.networks, self.unet, self.vae
        for part in (*networks, self.text, self.safety_checker, self.ip_adapters, self.previews):
            if part is not None:
                part.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        batch: int = 1,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        aesthetic_scores: tuple[float, float] | None = None,
        control_image: Any = None,
        control_scale: float | Sequence[float] = 1.0,
        control_start: float | Sequence[float] = 0.0,
        control_end: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        ip_adapter_masks: Any = None,
        clip_skip: int = 0,
        output: str = "pil",
        callback: Callback | None = None,
        preview: Callback | None = None,
        progress: bool = False,
        **more: Any,
    ) -> Result:
        """Draw images: ``batch`` of them for each prompt.

        Image i has its own generator, on the CPU, with its own seed. So its noise is bit for bit
        what it would be if it were made alone, and on any device.

        Args:
            prompt: one or several. ``(word:1.3)``, ``(word)`` and ``[word]`` change weights,
                ``BREAK`` begins a new chunk (see :func:`diffusion_fast.models.prompt.parse`); any
                length. ``[a:b:0.5]`` and ``[a|b]`` say something else at some of the steps that
                are run (see :mod:`diffusion_fast.models.prompt_edits`).
            negative_prompt: what to guide away from, one for all or one for each prompt.
            steps: number of the sampler's steps; None for what the model's card says, else 20, or
                for those of ``timesteps=`` or ``sigmas=``.
            guidance_scale: how closely to follow the prompt. 1 and less (SDXL Turbo's 0) is the
                plain conditional model, at about half the cost; the negative prompt is not used.
                None for what the model's card says, else 7.5. A distilled model that has the
                scale embedded (LCM) runs once a step whatever it is, without negative prompt.
            sampler: see :func:`diffusion_fast.sample`; None for the model's own scheduler.
            seed: random seed of the first image, the next ones have ``seed + 1`` and so on; or one
                for each.
            size: (height, width) or one number for both, multiples of 8; by default what the model
                was trained at, or the size of ``image`` or of the first ``control_image``.
            image: image-to-image: start from this image (PIL, or a tensor [3, H, W] or
                [B, 3, H, W] in [-1, 1]); one for all, or a list with one for each.
            mask: inpainting: where to draw (white, or 1) in ``image``, and what to keep.
            strength: how much of the image's noise schedule to run, in (0, 1]; 0.8 by default, and
                1 with a mask, 0.3 for the refiner. ``int(steps * strength)`` steps are run.
            aesthetic_scores: SDXL's refiner only: of what the prompt asks for, 1 to 10, and of what
                it is guided away from; 6 and 2.5 by default.
            control_image: what the loaded controls read (see :meth:`load_control`): an image for
                one, a list with an image for each of several, in the order of loading. PIL images
                are scaled; a tensor [3, H, W] or [B, 3, H, W], with one for each image, is in
                [0, 1].
            control_scale: how strongly each control acts; a number, or a list with one for each.
            control_start, control_end: between which parts of all steps each control acts, in
                [0, 1].
            guess_mode: ControlNets act on the conditional half of guidance alone, and less on fine
                detail.
            ip_adapter_image: what the images shall be like, for ``ip_adapters`` that are loaded:
                one for a single adapter, else a list with one, or a list of several, for each.
            ip_adapter_image_embeds: in its place what an image encoder says of them, for each
                adapter [2, n, ...] with guidance, the unconditional half first, else [1, n, ...].
            ip_adapter_masks: where in the picture each of them counts, in the form of the images.
            clip_skip: layers to leave out at the text encoders' ends, for both prompts.
            output: ``"pil"``, ``"tensor"`` or ``"latent"``.
            callback: ``callback(step, t, latents)`` after each step, with a copy of the latents,
                noise and all.
            preview: ``preview(step, t, latents)`` after each step, with those without noise that
                the step predicts: ``pipe.previews(latents)`` makes pictures of them.
            progress: show a progress bar.
            more: what else :class:`~diffusion_fast.Engine` takes, such as ``eta``,
                ``timestep_spacing``, ``guidance_rescale`` or ``guidance_interval``. With
                ``denoising_end=0.8, output="latent"`` a model leaves its latents with the noise of
                the last fifth, and another (the refiner) goes on with ``image=result.latents,
                denoising_start=0.8``.

        Raises:
            TypeError: a prompt that is no string, an image that is none.
            ValueError: an argument that can't be; the message names it.
            FloatingPointError: the U-Net's output was not finite.
        """
        batch, seed, size, clip_skip = inputs.plain((batch, seed, size, clip_skip))
        prompts = inputs.prompt_list("prompt", prompt, self.embeddings.names)
        negatives = inputs.negative_list(negative_prompt, prompts, self.embeddings.names)
        checks.positive_int("batch", batch)
        checks.one_of("output", output, OUTPUTS)
        seeds = inputs.seed_list(seed, len(prompts) * batch)
        parts = self._parts()
        scores = inputs.scores(aesthetic_scores, parts.refines)
        steering = Steering(
            self.controls, control_image, control_scale, control_start, control_end, guess_mode
        )
        unfinished = None
        if more.get("denoising_start") is not None:  # latents that another model began
            unfinished = inputs.unfinished(image, len(seeds), self.unet.config.out_channels, mask)
            image = None
        begun = unfinished is not None
        images, masks = call.pictures(parts, image, mask, size, len(seeds), begun)
        if images is not None:
            height, width = images.shape[2:]
        else:
            if size is None and not begun:
                size = steering.size(self.vae.downsampling)
            height, width = call.size_of(parts, size, unfinished)
        options, strength, scale = call.options_of(
            parts,
            *(steps, guidance_scale, sampler, strength),
            *(images is not None, masks is not None, negative_prompt, more),
        )
        table = {one.name: getattr(options, one.name) for one in fields(options)}
        both = reads_unconditional(options) or inputs.guided(options.guidance_scale)
        schedule = self.scheduler.schedule
        told = call.told(parts, prompts, negatives, both, lambda: table_of(options, schedule).steps)
        shape = call.latent_shape(parts, len(seeds), height, width)
        both = inputs.guided(options.guidance_scale)
        latent_size = shape[2], shape[3]
        pictured, blank = self.ip_adapters.context(
            ip_adapter_image, ip_adapter_image_embeds, ip_adapter_masks, latent_size, both
        )
        model, halves = self._steered(steering, options, (height, width), len(seeds))
        embedded = call.embedded_guidance(parts, scale)
        seen = zip(halves, (pictured, blank), strict=True)
        beside = [{**embedded, **half, **shown} for half, shown in seen]
        vae = self._autoencoding()
        latents = self._engine_now(model, table, progress).sample(
            shape,
            *call.contexts(parts, told, clip_skip, batch, (height, width), beside, scores),
            callback=callback,
            preview=preview,
            table=table,
            **call.start(parts, vae, shape, images, masks, options.strength, seeds, unfinished),
        )
        drawn, flagged = (latents, None) if output == "latent" else self._decoded(vae, latents)
        settings = {
            "prompt": prompts,
            "negative_prompt": negative_prompt,
            "size": [height, width],
            "batch": batch,
            "clip_skip": clip_skip,
            **table,
            "guidance_scale": scale,
            "strength": strength,
            **({"aesthetic_scores": list(scores)} if parts.refines else {}),
            **steering.settings(),
        }
        from ..images import to_pil  # imports Pillow

        pictures = to_pil(drawn) if output == "pil" else drawn
        made = latents, seeds, settings, vae.how, flagged
        return Result(pictures, *made, random_weights=self.random_weights)

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net reads a mask and the masked image beside the noisy latents."""
        return self._parts().inpainting

    @property
    def refines(self) -> bool:
        """Whether it is SDXL's refiner, which is given an image or another model's latents."""
        return self._parts().refines

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input (LCM)."""
        return self._parts().embeds_guidance

    def _parts(self) -> Parts:
        """The networks and the schedule as they are now."""
        made = self.unet, self.vae, self.text, self.scheduler, self.safety_checker
        return Parts(*made, self.zero_empty, self.random_weights, self.defaults)

    def _steered(
        self, steering: Steering, options: SamplerOptions, size: inputs.Size, count: int
    ) -> tuple[UNet2DCondition | ControlledUNet, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The model that is sampled, and what steers both halves of its guidance."""
        model = self.controls.over(self.unet, steering.guess_mode)
        if model is self.unet:
            return model, ({}, {})
        timesteps = table_of(options, self.scheduler.schedule).timesteps
        return model, steering.contexts(size, count, timesteps, self.unet.conv_in.weight)

    def _engine_now(
        self, model: UNet2DCondition | ControlledUNet, table: dict[str, Any], progress: bool
    ) -> Engine:
        """The engine of the model as it is now."""
        if self._engine is None or self._engine.model is not model:
            schedule = self.scheduler.schedule
            self._engine = Engine(model, schedule, self._graph, rewrites=self._rewrites, **table)
        self._engine.progress = progress
        return self._engine

    def _autoencoding(self) -> Autoencoding:
        if self._decode.vae is not self.vae:
            self._decode = FreshDecoder(self.vae, self._rewrites)
        return Autoencoding(self.vae, self._decode)

    def _decoded(self, vae: Autoencoding, latents: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Images in [-1, 1], and which of them the safety checker made black."""
        images = vae.decode(latents)
        if self.safety_checker is None:
            return images, None
        flagged = self.safety_checker(images)
        images[torch.tensor(flagged)] = -1
        return images, flagged
