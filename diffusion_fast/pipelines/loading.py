"""The parts of a Stable Diffusion model, from a folder, a single file or a tiny one made here."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import AnyPath, CheckpointError, read_json
from ..models import UNet2DCondition
from ..models.checkpoints import CONFIG, STEM, has_weights
from ..models.hub import MODELS, resolve
from ..models.single_file import SUPPORTED as FILES
from ..models.single_file import Kind, identify, scaling_factor
from ..models.text import TextEncoders
from ..models.vae import AutoencoderKL
from ..ops import checks
from .model_index import RANDOM
from .scheduler_config import SchedulerSettings, read_scheduler
from .tiny import KINDS, make_tiny

if TYPE_CHECKING:
    from .safety import SafetyChecker

INDEX = "model_index.json"
CHECKER = "safety_checker"
SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
TINY = {"tiny": "sd15"} | {f"tiny-{kind}": kind for kind in KINDS}


@dataclass
class Parts:
    """What a pipeline is made of.

    Attributes:
        scheduler: the noise schedule, and how to sample on it.
        zero_empty: an absent negative prompt means states of zero, not those of "" (SDXL).
        random_weights: they were never trained.
    """

    unet: UNet2DCondition
    vae: AutoencoderKL
    text: TextEncoders
    scheduler: SchedulerSettings
    safety_checker: SafetyChecker | None = None
    zero_empty: bool = False
    random_weights: bool = False

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net reads a mask and the masked image beside the noisy latents."""
        return self.unet.config.in_channels != self.unet.config.out_channels


@dataclass(frozen=True)
class Options:
    """How to load; see :meth:`StableDiffusion.from_pretrained`."""

    vae: AutoencoderKL | AnyPath | None
    dtype: torch.dtype | None
    device: torch.device | str
    variant: str | None
    tokenizer: AnyPath | None
    safety_checker: bool
    prediction_type: str | None

    @property
    def placing(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}


def load(path: AnyPath, options: Options) -> Parts:
    """All parts, or an error before anything is kept.

    Raises:
        CheckpointError: no model, an unsupported one (named, with those supported), files that are
            missing or damaged; ValueError: parts that don't fit together.
    """
    if str(path) in TINY:
        with tempfile.TemporaryDirectory() as folder:  # CPU tensors keep their files mapped
            return _load(make_tiny(Path(folder) / "tiny", TINY[str(path)]), options)
    models = MODELS | ({CHECKER: "model"} if options.safety_checker else {})
    return _load(resolve(path, models=models, variant=options.variant), options)


def _load(path: Path, options: Options) -> Parts:
    parts = _from_file(path, options) if path.is_file() else _from_folder(path, options)
    _check_fit(parts)
    return parts


def _from_folder(folder: Path, options: Options) -> Parts:
    index = _index(folder)
    two = "XL" in index["_class_name"]
    found = _variants(folder, options.variant)
    text = TextEncoders.from_pretrained(
        folder, variant=options.variant, tokenizer=options.tokenizer, **options.placing
    )
    if two != (len(text.encoders) == 2):
        raise CheckpointError(
            f"{folder}: expected {1 + two} text encoders for {index['_class_name']},"
            f" got {len(text.encoders)} (the SDXL refiner is not supported)"
        )
    unet = UNet2DCondition.from_pretrained(folder, variant=found["unet"], **options.placing)
    return Parts(
        unet,
        _vae(folder, options, _own_scaling(folder, two), found["vae"]),
        text,
        _scheduler(folder / "scheduler" / "scheduler_config.json", options),
        _safety_checker(folder, index, options),
        zero_empty=two and bool(index.get("force_zeros_for_empty_prompt", True)),
        random_weights=bool(index.get(RANDOM, False)),
    )


def _variants(folder: Path, variant: str | None) -> dict[str, str | None]:
    """The variant of each model that has it; the plain files of the others are read."""
    found = {n: variant if has_weights(folder / n, variant, s) else None for n, s in MODELS.items()}
    if variant is not None and not any(found.values()):
        raise CheckpointError(f"{folder}: variant: no model in it has weights of {variant!r}")
    return found


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        hint = "; it holds one U-Net" if (folder / "unet").is_dir() else ""
        raise CheckpointError(f"{folder}: not a Stable Diffusion model, it has no {INDEX}{hint}")
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"{folder}: {kind} is not supported, only {', '.join(SUPPORTED)}; and single files of"
            f" {FILES}"
        )
    return index


def _from_file(file: Path, options: Options) -> Parts:
    if options.variant is not None:
        checks.fail("variant", "None for a single file", repr(options.variant))
    kind = identify(file)
    if kind.unet is None:
        raise CheckpointError(f"{file}: expected {FILES}, got an autoencoder alone")
    text = TextEncoders.from_single_file(file, kind.text, options.tokenizer, **options.placing)
    two = kind.name == "sdxl"
    config = {
        "_class_name": "EulerDiscreteScheduler" if two else "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    told = options.prediction_type or kind.prediction_type
    config["prediction_type"] = told or _usual_prediction(file, kind)
    if kind.zero_terminal_snr:  # sampled from the last step on (Lin et al. 2023, arXiv:2305.08891)
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    unet = UNet2DCondition.from_pretrained(file, **options.placing)
    if kind.name == "sd2" and config["prediction_type"] == "epsilon":
        unet.config = replace(unet.config, sample_size=64)  # those are for 512 x 512
    vae = _vae(file, options, scaling_factor(kind.name))
    return Parts(unet, vae, text, read_scheduler(config), zero_empty=two)


def _usual_prediction(file: Path, kind: Kind) -> str:
    """Epsilon; SD 2.x for 768 x 768 predicts v, and its tensors look the same."""
    if kind.name == "sd2" and not kind.inpainting:
        warnings.warn(
            f"{file}: a single file of SD 2.x doesn't tell what it predicts: epsilon is taken, as"
            " in SD 2.x base (512 x 512). If pictures are grey or noise, pass"
            " prediction_type='v_prediction', that of SD 2.x for 768 x 768",
            stacklevel=2,
        )
    return "epsilon"


def _scheduler(path: Path, options: Options) -> SchedulerSettings:
    config = read_json(path)
    if options.prediction_type is not None:
        config["prediction_type"] = options.prediction_type
    try:
        return read_scheduler(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own_scaling(folder: Path, two: bool) -> float:
    """The scaling factor of the folder's VAE, whether that is loaded or not."""
    usual = scaling_factor("sdxl" if two else "sd1")
    config = folder / "vae" / CONFIG
    return read_json(config).get("scaling_factor", usual) if config.is_file() else usual


def _vae(path: Path, options: Options, scaling: float, variant: str | None = None) -> AutoencoderKL:
    """The VAE in a model, or that in its place; ``scaling`` for one that doesn't tell its own."""
    if isinstance(options.vae, AutoencoderKL):
        return options.vae.to(device=options.device, dtype=options.dtype).eval()
    if options.vae is not None:
        path = resolve(options.vae, models={"vae": STEM, "": STEM}, others=())
        return AutoencoderKL.from_pretrained(path, scaling_factor=scaling, **options.placing)
    return AutoencoderKL.from_pretrained(path, variant=variant, **options.placing)


def _safety_checker(folder: Path, index: dict[str, Any], options: Options) -> SafetyChecker | None:
    library, name = index.get("safety_checker") or (None, None)
    if name is None or not options.safety_checker:
        return None
    if name != "StableDiffusionSafetyChecker":
        raise CheckpointError(
            f"{folder}: its safety checker {library}.{name} is not supported, only"
            " StableDiffusionSafetyChecker; pass safety_checker=False to do without"
        )
    from .safety import SafetyChecker

    return SafetyChecker.from_pretrained(folder, variant=options.variant, **options.placing)


def _check_fit(parts: Parts) -> None:
    unet, latents = parts.unet.config, parts.vae.config.latent_channels
    if unet.out_channels != latents:
        checks.fail("vae", f"one of {unet.out_channels} latent channels, as the U-Net", latents)
    if unet.in_channels not in (latents, 2 * latents + 1):
        expected = f"one of {latents} input channels, or {2 * latents + 1} for inpainting"
        checks.fail("unet", expected, unet.in_channels)
    width = sum(encoder.config.hidden_size for encoder in parts.text.encoders)  # type: ignore
    if width != unet.cross_attention_dim:
        expected = f"states of {unet.cross_attention_dim} channels, as the U-Net"
        checks.fail("text_encoder", expected, width)
