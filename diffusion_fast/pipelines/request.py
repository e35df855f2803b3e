"""One image that is asked of a pipeline: checked at once, made into tensors and a result later."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..engine.slots import Job
from ..ops import checks
from ..samplers import SamplerOptions, table_of
from ..samplers.table import StepTable
from . import call, inputs
from .call import Told
from .result import Result
from .stable_diffusion import OUTPUTS, StableDiffusion


@dataclass(frozen=True)
class Request:
    """What was asked for, checked: see :func:`checked`."""

    prompt: str
    negative: str | None
    told: Told
    seed: int
    size: inputs.Size
    images: Tensor | None
    masks: Tensor | None
    strength: float | None
    scale: Any
    clip_skip: int
    output: str
    options: SamplerOptions
    table: StepTable

    @property
    def bytes(self) -> int:
        """What its pictures take."""
        return sum(one.nbytes for one in (self.images, self.masks) if one is not None)


def checked(
    pipe: StableDiffusion,
    max_steps: int,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    steps: int | None = None,
    guidance_scale: Any = None,
    sampler: str | None = None,
    seed: int = 0,
    size: Any = None,
    image: Any = None,
    mask: Any = None,
    strength: float | None = None,
    clip_skip: int = 0,
    output: str = "pil",
    **more: Any,
) -> Request:
    """A request, if it can be: all that needs no network is looked at.

    Args:
        pipe: the pipeline that will draw it.
        max_steps: the most model calls.
        prompt, negative_prompt: and the rest: as :class:`~diffusion_fast.StableDiffusion` takes
            them, for one image.

    Raises:
        TypeError, ValueError: an argument that can't be; the message names it.
    """
    for kind, names in (("controls", pipe.controls.names), ("IP-Adapters", pipe.ip_adapters.names)):
        if names:
            expected = f"one without {kind}, which requests of a batch can't have"
            checks.fail("pipe", expected, ", ".join(names))
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str) and (name == "prompt" or text is not None):
            raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        if text is not None:
            inputs.prompt_list(name, text, pipe.embeddings.names)
    checks.one_of("output", output, OUTPUTS)
    if more.get("denoising_start") is not None:
        expected = "None: a request of a batch starts from noise or an image"
        checks.fail("denoising_start", expected, more["denoising_start"])
    [number] = inputs.seed_list(inputs.plain(seed), 1)
    parts = pipe._parts()
    images, masks = call.pictures(parts, image, mask, inputs.plain(size), 1)
    options, strength, scale = call.options_of(
        parts,
        *(steps, guidance_scale, sampler, strength),
        *(images is not None, masks is not None, negative_prompt, more),
    )
    table = table_of(options, pipe.scheduler.schedule)
    if len(table) > max_steps:
        checks.fail("steps", f"at most {max_steps} model calls", len(table))
    negatives = None if negative_prompt is None else [negative_prompt]
    told = call.told(parts, [prompt], negatives, table.halves == "both", lambda: table.steps)
    pipe.text.check_clip_skip(clip_skip)
    if images is None:
        height, width = call.size_of(parts, inputs.plain(size))
    else:
        height, width = images.shape[2:]
    return Request(
        prompt,
        negative_prompt,
        told,
        number,
        (height, width),
        images,
        masks,
        strength,
        scale,
        clip_skip,
        output,
        options,
        table,
    )


def job(pipe: StableDiffusion, request: Request) -> tuple[Job, tuple[int, int]]:
    """The tensors of a request, as the pipeline makes them alone: text, image and noise.

    Returns:
        The image to sample; height and width of its latents.
    """
    options, parts = request.options, pipe._parts()
    beside = call.embedded_guidance(parts, request.scale)
    context, null_context = call.contexts(
        parts, request.told, request.clip_skip, 1, request.size, (beside, beside)
    )
    shape = call.latent_shape(parts, 1, *request.size)
    pictured = request.images, request.masks, options.strength
    start = call.start(parts, pipe._autoencoding(), shape, *pictured, [request.seed])
    made = Job(
        table=request.table,
        context=context,
        null_context=null_context,
        from_image=options.strength is not None,
        **start,
    )
    return made, (shape[2], shape[3])


def result(pipe: StableDiffusion, request: Request, latents: Tensor) -> Result:
    """The result of a request whose latents [1, C, h, w] are done."""
    vae = pipe._autoencoding()
    settings = {
        "prompt": [request.prompt],
        "negative_prompt": request.negative,
        "size": list(request.size),
        "batch": 1,
        "clip_skip": request.clip_skip,
        **{one.name: getattr(request.options, one.name) for one in fields(request.options)},
        "guidance_scale": request.scale,
        "strength": request.strength,
    }
    drawn, flagged = latents, None
    if request.output != "latent":
        drawn, flagged = pipe._decoded(vae, latents)
    pictures: Any = drawn
    if request.output == "pil":
        from ..images import to_pil  # imports Pillow

        pictures = to_pil(drawn)
    made = latents, [request.seed], settings, vae.how, flagged
    return Result(pictures, *made, random_weights=pipe.random_weights)
