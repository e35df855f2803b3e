"""The parts of a Stable Diffusion model, from a folder, a single file or a tiny one made here."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import AnyPath, CheckpointError, read_json
from ..models import UNet2DCondition
from ..models.autoencoder import Autoencoder
from ..models.checkpoints import CONFIG, STEM, has_weights
from ..models.hub import MODELS, resolve
from ..models.single_file import SUPPORTED, Kind, identify, scaling_factor
from ..models.text import TextEncoders
from ..models.tiny_autoencoder import AutoencoderTiny
from ..models.tiny_autoencoder_file import is_tiny
from ..models.vae import AutoencoderKL
from ..ops import checks
from . import card
from .model_index import LCM, RANDOM, read_index
from .parts import Parts
from .scheduler_config import SchedulerSettings, read_scheduler
from .tiny import KINDS, make_tiny

if TYPE_CHECKING:
    from .safety import SafetyChecker

CHECKER = "safety_checker"
TINY = {"tiny": "sd15"} | {f"tiny-{kind}": kind for kind in KINDS}
SHIPPED = {"emoji": Path(__file__).parent / "emoji"}  # trained by examples/emoji, in float16


def load(
    path: AnyPath,
    *,
    vae: Autoencoder | AnyPath | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    tokenizer: AnyPath | None = None,
    safety_checker: bool = True,
    prediction_type: str | None = None,
) -> Parts:
    """All parts, or an error before anything is kept. Arguments are those of
    :meth:`StableDiffusion.from_pretrained`.

    Raises:
        CheckpointError: no model, an unsupported one (named, with those supported), files that are
            missing or damaged.
        ValueError: parts that don't fit together.
    """
    if str(path) in SHIPPED:
        path, dtype = SHIPPED[str(path)], dtype or torch.float32
    placing = {"dtype": dtype, "device": device}
    if str(path) in TINY:
        with tempfile.TemporaryDirectory() as folder:  # CPU tensors keep their files mapped
            tiny = make_tiny(Path(folder) / "tiny", TINY[str(path)])
            parts = _from_folder(tiny, vae, None, tokenizer, False, prediction_type, placing)
    else:
        models = MODELS | ({CHECKER: "model"} if safety_checker else {})
        path = resolve(path, models=models, variant=variant)
        if path.is_dir():
            given = vae, variant, tokenizer, safety_checker
            parts = _from_folder(path, *given, prediction_type, placing)
        elif variant is None:
            parts = _from_file(path, vae, tokenizer, prediction_type, placing)
        else:
            checks.fail("variant", "None for a single file", repr(variant))
    parts.check_fit()
    return parts


def _from_folder(
    folder: Path,
    vae: Autoencoder | AnyPath | None,
    variant: str | None,
    tokenizer: AnyPath | None,
    safety_checker: bool,
    prediction_type: str | None,
    placing: dict[str, Any],
) -> Parts:
    index = read_index(folder)
    xl = "XL" in index["_class_name"]
    found = _variants(folder, variant)
    text = TextEncoders.from_pretrained(folder, variant=variant, tokenizer=tokenizer, **placing)
    if xl != text.projected:
        with_it = "text_encoder_2" if xl else "text_encoder"
        names = " and ".join(text.modules())
        raise CheckpointError(
            f"{folder}: expected a {with_it} for {index['_class_name']}, got {names}"
        )
    if vae is None:
        kind: Any = AutoencoderTiny if is_tiny(folder / "vae") else AutoencoderKL
        vae = kind.from_pretrained(folder, variant=found["vae"], **placing)
    unet = UNet2DCondition.from_pretrained(folder, variant=found["unet"], **placing)
    distilled = index["_class_name"] in LCM
    if distilled and unet.config.time_cond_proj_dim is None:
        # Neither guided as other models are, nor by an input.
        wanted = f"a U-Net that takes the guidance scale, as {index['_class_name']} has"
        raise CheckpointError(f"{folder}: unet: expected {wanted}, got no time_cond_proj_dim")
    return Parts(
        unet,
        _given_vae(vae, _own_scaling(folder, xl), placing),
        text,
        _scheduler(folder / "scheduler" / "scheduler_config.json", prediction_type),
        _safety_checker(folder, index, variant, placing) if safety_checker else None,
        zero_empty=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        random_weights=bool(index.get(RANDOM, False)),
        defaults=card.read_defaults(folder, card.LCM if distilled else None),
    )


def _variants(folder: Path, variant: str | None) -> dict[str, str | None]:
    """The variant of each model that has it; the plain files of the others are read."""
    found = {n: variant if has_weights(folder / n, variant, s) else None for n, s in MODELS.items()}
    if variant is not None and not any(found.values()):
        raise CheckpointError(f"{folder}: variant: no model in it has weights of {variant!r}")
    return found


def _from_file(
    file: Path,
    vae: Autoencoder | AnyPath | None,
    tokenizer: AnyPath | None,
    prediction_type: str | None,
    placing: dict[str, Any],
) -> Parts:
    kind = identify(file)
    if kind.unet is None:
        raise CheckpointError(f"{file}: expected {SUPPORTED}, got an autoencoder alone")
    text = TextEncoders.from_single_file(file, kind.text, tokenizer, **placing)
    xl = kind.name == "sdxl"
    config = {
        "_class_name": "EulerDiscreteScheduler" if xl else "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if kind.unet.config.time_cond_proj_dim is not None:
        config |= {"_class_name": "LCMScheduler"}
    told = prediction_type or kind.prediction_type
    config["prediction_type"] = told or _usual_prediction(file, kind)
    if kind.zero_terminal_snr and config["prediction_type"] != "epsilon":
        # Sampled from the last step on (Lin et al. 2023, arXiv:2305.08891), where epsilon says
        # nothing of the image.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    unet = UNet2DCondition.from_pretrained(file, **placing)
    if kind.name == "sd2" and config["prediction_type"] == "epsilon":
        unet.config = replace(unet.config, sample_size=64)  # those are for 512 x 512
    if vae is None:
        vae = AutoencoderKL.from_pretrained(file, **placing)
    vae = _given_vae(vae, scaling_factor(kind.name), placing)
    distilled = unet.config.time_cond_proj_dim is not None
    defaults = card.LCM if distilled else card.Defaults()
    zero_empty = len(text.encoders) == 2
    return Parts(unet, vae, text, read_scheduler(config), zero_empty=zero_empty, defaults=defaults)


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


def _scheduler(path: Path, prediction_type: str | None) -> SchedulerSettings:
    config = read_json(path)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    try:
        return read_scheduler(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own_scaling(folder: Path, xl: bool) -> float:
    """The scaling factor of the folder's VAE, whether that is loaded or not."""
    usual = scaling_factor("sdxl" if xl else "sd1")
    config = folder / "vae" / CONFIG
    return read_json(config).get("scaling_factor", usual) if config.is_file() else usual


def _given_vae(vae: Autoencoder | AnyPath, scaling: float, placing: dict[str, Any]) -> Autoencoder:
    """A VAE, loaded or to be loaded; ``scaling`` for a file that doesn't tell its own."""
    if isinstance(vae, Autoencoder):
        return vae.to(**placing).eval()
    path = resolve(vae, models={"vae": STEM, "": STEM}, others=())
    if is_tiny(path):
        return AutoencoderTiny.from_pretrained(path, **placing)
    return AutoencoderKL.from_pretrained(path, scaling_factor=scaling, **placing)


def _safety_checker(
    folder: Path, index: dict[str, Any], variant: str | None, placing: dict[str, Any]
) -> SafetyChecker | None:
    library, name = index.get(CHECKER) or (None, None)
    if name is None:
        return None
    if name != "StableDiffusionSafetyChecker":
        raise CheckpointError(
            f"{folder}: its safety checker {library}.{name} is not supported, only"
            " StableDiffusionSafetyChecker; pass safety_checker=False to do without"
        )
    from .safety import SafetyChecker  # imports Pillow

    return SafetyChecker.from_pretrained(folder, variant=variant, **placing)
