"""All that a run of fine-tuning can be told: the keywords of ``df.finetune``, the keys of a TOML
file and the options of the command line are the fields of one class."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import AnyPath, CheckpointError, read_text
from ..ops import checks
from ..training.optimizers import OPTIMIZERS, check_sharding
from ..training.options import PRECISIONS, SHARDINGS

METHODS = ("lora", "full", "embedding", "controlnet")
FORMATS = ("peft", "kohya", "both")
WEIGHTINGS = ("none", "min_snr", "p2", "debiased")
# Options of the command line, which may be repeated, by the field that has them all.
OPTIONS_OF = {"validation_prompt": "validation_prompts"}
MOST_LETTERS = 200  # of a word, whose file's name has a suffix too
TARGETS = ("attention", "transformer", "all")
_NEEDED = {
    "model": "a folder, a file or a hub id",
    "data": "at least one folder of images",
    "out": "a folder to write to",
}


@dataclass(frozen=True)
class DataFolder:
    """A folder of images to train on.

    Attributes:
        folder: where the images are, with their captions: ``metadata.jsonl``, or a ``.txt`` beside
            each. Subfolders named ``10_a cat`` are read ten times a pass, with that caption where
            an image has none.
        repeats: how often each image is read in a pass.
        prompt: caption of images that have none.
        prior: these are DreamBooth's class images, for prior preservation.
    """

    folder: Path
    repeats: int = 1
    prompt: str | None = None
    prior: bool = False

    def __post_init__(self) -> None:
        checks.positive_int("repeats", self.repeats)


def _option(default: Any, text: str, **rules: Any) -> Any:
    """A field: its default, what ``--help`` says, the values that it can have, and the one method
    that it is ``of``."""
    return dataclasses.field(default=default, metadata={"help": text, **rules})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run of fine-tuning. What each field means stands in its metadata, as ``--help`` says it.

    Raises:
        ValueError: a value that can't be, or values that don't fit together.
    """

    model: str = _option("", "Stable Diffusion 1.x, 2.x or SDXL: a folder, a file or a hub id.")
    data: tuple[DataFolder, ...] = _option(
        (), "Folder of images with captions (metadata.jsonl, or a .txt beside each); repeatable."
    )
    out: Path = _option(Path(), "Folder to write to.")
    method: str = _option("lora", "What is trained.", choices=METHODS)
    # data
    prompt: str | None = _option(None, "Caption of images that have none.")
    class_prompt: str | None = _option(
        None, "DreamBooth: prompt of class images, for prior preservation."
    )
    class_data: Path | None = _option(
        None, "DreamBooth: folder of class images, filled up by the model; OUT/class."
    )
    class_images: int = _option(100, "DreamBooth: class images to have.", least=1)
    prior_weight: float = _option(1.0, "DreamBooth: weight of the prior's loss.", least=0.0)
    masks: str | None = _option(
        None, "What counts in the loss: a folder of masks with the images' names, or alpha."
    )
    conditioning: Path | None = _option(
        None,
        "ControlNet: folder of conditioning images with the images' names; else metadata.jsonl"
        " names them (conditioning_image_file_name or conditioning_image).",
        of="controlnet",
    )
    validation_data: Path | None = _option(
        None,
        "Folder of images for a validation loss, at checkpoints; the best one's files: OUT/best.",
    )
    broken: str = _option("refuse", "Images that can't be read.", choices=("refuse", "skip"))
    resolution: int | None = _option(
        None, "Side of the square whose area images are scaled to; the model's own by default.",
        least=8,
    )  # fmt: skip
    buckets: bool = _option(
        True, "Keep aspect ratios: batches of images of a like shape. Else all are cut to a square."
    )
    bucket_step: int = _option(64, "Sides of the shapes are multiples of this.", least=8)
    extreme: str = _option(
        "crop", "Images longer than the shapes: crop (with a warning) or refuse.",
        choices=("crop", "refuse"),
    )  # fmt: skip
    random_crop: bool = _option(False, "Cut at random, not at the middle; latents aren't cached.")
    flip: bool = _option(False, "Mirror half of the images, chosen at random.")
    caption_dropout: float = _option(
        0.0, "Share of captions replaced by the empty one.", least=0.0, most=1.0
    )
    shuffle_captions: bool = _option(
        False, "Shuffle a caption's comma-separated parts; text states aren't cached."
    )
    keep_tokens: int = _option(0, "First parts of a caption that stay in place.", least=0)
    clip_skip: int = _option(0, "Layers to leave out at the text encoders' ends.", least=0)
    cache: Path | None = _option(None, "Folder of cached latents and text states; OUT/cache.")
    workers: int = _option(0, "Processes that read ahead.", least=0)
    # LoRA
    rank: int = _option(8, "LoRA: rank of the matrices.", least=1, of="lora")
    alpha: float | None = _option(
        None, "LoRA: the change is scaled by alpha / rank; the rank.", above=0.0, of="lora"
    )
    targets: tuple[str, ...] = _option(
        ("attention",),
        "LoRA: layers to adapt, by the end of their names, or attention (to_q, to_k, to_v,"
        " to_out.0), transformer (all of its linear layers), all (convolutions too); repeatable.",
        of="lora",
    )
    conv_rank: int | None = _option(
        None, "LoRA: rank of convolutions larger than 1 x 1; as the others.", least=1, of="lora"
    )
    conv_alpha: float | None = _option(
        None, "LoRA: alpha of these; as the others, or their rank.", above=0.0, of="lora"
    )
    lora_dropout: float = _option(
        0.0, "LoRA: dropout of what it reads.", least=0.0, most=1.0, open=True, of="lora"
    )
    dora: bool = _option(False, "LoRA: learn magnitude and direction apart (DoRA).", of="lora")
    train_text: bool = _option(False, "Train the text encoders too (LoRA and full).")
    # embedding
    word: str | None = _option(
        None, "Embedding: the new word; {} in captions stands for it.", of="embedding"
    )
    init_word: str = _option("*", "Embedding: what its vectors begin as.", of="embedding")
    vectors: int = _option(1, "Embedding: how many vectors stand for it.", least=1, of="embedding")
    format: str = _option("both", "LoRA: names of the tensors.", choices=FORMATS, of="lora")
    # loss
    loss_weighting: str = _option("none", "How much each noise level counts.", choices=WEIGHTINGS)
    snr_gamma: float = _option(5.0, "min_snr: where the weight stops growing.", above=0.0)
    noise_offset: float = _option(0.0, "Noise added to each channel as a whole.", least=0.0)
    input_perturbation: float = _option(
        0.0, "Noise in the input that the target knows nothing of.", least=0.0
    )
    zero_terminal_snr: bool = _option(
        False, "End the noise schedule at pure noise (models that predict v)."
    )
    # run
    steps: int = _option(1000, "Batches to train on.", least=1)
    batch_size: int = _option(1, "Images per batch, of all processes together.", least=1)
    accumulate: int = _option(1, "Parts to cut each batch into, to save memory.", least=1)
    learning_rate: float | None = _option(
        None, "Peak learning rate; 1e-4, with prodigy 1.", above=0.0
    )
    text_learning_rate: float | None = _option(
        None, "That of the text encoders; the same by default.", above=0.0
    )
    warmup_steps: int = _option(0, "Steps over which the rate rises from zero.", least=0)
    decay: str = _option("constant", "Of the rate.", choices=("constant", "cosine"))
    optimizer: str = _option("adamw", "How steps are taken.", choices=OPTIMIZERS)
    weight_decay: float = _option(1e-2, "Strength of weight decay.", least=0.0)
    gradient_clip: float = _option(1.0, "Largest norm of the gradient; 0 for no limit.", least=0.0)
    ema_decay: float | None = _option(
        None, "Share that averaged weights keep at each step; none by default.",
        least=0.0, most=1.0, open=True,
    )  # fmt: skip
    precision: str = _option("float32", "Of what is computed.", choices=PRECISIONS)
    gradient_checkpointing: bool = _option(
        False, "Compute activations again in the backward pass: less memory, more time."
    )
    compile: bool = _option(False, "Run the networks through torch.compile.")
    sharding: str = _option("ddp", "What processes under torchrun share.", choices=SHARDINGS)
    seed: int = _option(0, "Seed of all that is random.", least=0, most=2**63 - 1)
    device: str = _option("cpu", "Where to train: cpu, cuda, cuda:1 ...")
    # what is kept and shown
    checkpoint_every: int = _option(500, "Steps between checkpoints.", least=1)
    keep: int = _option(3, "Checkpoints to keep.", least=1)
    resume: bool = _option(False, "Go on from the newest checkpoint, if there is one.")
    validation_prompts: tuple[str, ...] = _option(
        (), "Prompt to draw while training, in OUT/samples; repeatable."
    )
    validation_conditioning: tuple[str, ...] = _option(
        (),
        "ControlNet: a conditioning image for each of these prompts; repeatable.",
        of="controlnet",
    )
    validation_every: int = _option(250, "Steps between these pictures.", least=1)
    validation_steps: int = _option(20, "Sampler's steps of these pictures.", least=1)
    tensorboard: Path | None = _option(None, "Folder of a TensorBoard log (needs that package).")
    log: Path | None = _option(None, "CSV file for the loss of every step.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, only = getattr(self, field.name), field.metadata.get("of", self.method)
            _check(field.name, value, field.metadata)
            if only != self.method and value != field.default:
                checks.fail(field.name, f"none, because the method is {self.method}", value)
        if not self.data:
            checks.fail("data", _NEEDED["data"], "none")
        if self.keep_tokens and not self.shuffle_captions:
            checks.fail("keep_tokens", "0, because captions aren't shuffled", self.keep_tokens)
        if self.method == "embedding" and self.train_text:
            checks.fail("train_text", "False, because only vectors are trained", True)
        if self.text_learning_rate is not None and not self.train_text:
            wanted = "none, because text encoders aren't trained (train_text)"
            checks.fail("text_learning_rate", wanted, self.text_learning_rate)
        if self.optimizer == "prodigy" and self.text_learning_rate not in (None, self.rate):
            wanted = f"{self.rate:g}, because prodigy has one rate for all"
            checks.fail("text_learning_rate", wanted, self.text_learning_rate)
        if self.class_images != 100 and self.class_prompt is None:
            checks.fail("class_prompt", "a prompt, because of class_images", None)
        if self.snr_gamma != 5 and self.loss_weighting != "min_snr":
            wanted = f"none, because the loss weighting is {self.loss_weighting}"
            checks.fail("snr_gamma", wanted, self.snr_gamma)
        if self.masks is not None and not self.masks.strip():
            checks.fail("masks", "a folder, or alpha", repr(self.masks))
        if self.word is not None:
            _check_word(self.word)
        self._check_controlnet()
        check_sharding(self.optimizer, self.sharding)
        if self.class_data is not None and self.class_prompt is None:
            checks.fail("class_prompt", "a prompt, because of class_data", None)
        if not self.targets:
            checks.fail("targets", f"names of layers, or {', '.join(TARGETS)}", "none")

    def _check_controlnet(self) -> None:
        if self.method != "controlnet":
            return
        if self.train_text:
            checks.fail("train_text", "False, because only a ControlNet is trained", True)
        if self.class_prompt is not None:
            wanted = "none, because class images have no conditioning images"
            checks.fail("class_prompt", wanted, repr(self.class_prompt))
        prompts, images = len(self.validation_prompts), len(self.validation_conditioning)
        if prompts != images:
            checks.fail("validation_conditioning", f"one for each of {prompts} prompts", images)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings of values as Python, TOML or the command line give them.

        Raises:
            ValueError: an unknown name (with the closest), a missing one, a value of another type.
        """
        hints = typing.get_type_hints(cls)
        for name in values:
            known(name, hints)
        for name, wanted in _NEEDED.items():
            if not values.get(name):
                checks.fail(name, wanted, "none")
        return cls(**{name: _typed(name, hints[name], value) for name, value in values.items()})

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "prodigy" else 1e-4

    def rank_and_alpha(self, large: bool = False) -> tuple[int, float]:
        """Those of a LoRA's layers, or of its convolutions larger than 1 x 1."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        if not large or (self.conv_rank is None and self.conv_alpha is None):
            return self.rank, alpha
        rank = self.conv_rank or self.rank
        return rank, float(rank) if self.conv_alpha is None else self.conv_alpha

    def deciding(self) -> dict[str, Any]:
        """Those fields that decide the numbers of a run and that the trainer doesn't know of."""
        names = (
            *("method", "resolution", "buckets", "bucket_step", "random_crop", "flip"),
            *("caption_dropout", "shuffle_captions", "keep_tokens", "clip_skip"),
            *("rank", "alpha", "targets", "conv_rank", "conv_alpha", "lora_dropout", "dora"),
            *("train_text", "text_learning_rate", "word", "init_word", "vectors"),
            *("prior_weight", "masks"),
        )
        values = {name: getattr(self, name) for name in names}
        return values | {"targets": list(self.targets)}


def _check_word(word: str) -> None:
    """Raise a ValueError unless a file can have a word's name, and prompts can have it in them."""
    if not word.strip() or set(word) & {"/", "\\", "\0"} or word.strip(".") == "":
        checks.fail("word", "a word without / or \\, after which a file is named", repr(word))
    if len(word.encode()) > MOST_LETTERS:
        checks.fail("word", f"at most {MOST_LETTERS} letters", len(word.encode()))


def read_toml(path: AnyPath) -> dict[str, Any]:
    """The settings in a TOML file. Names may have dashes, as options of the command line.

    Raises:
        CheckpointError: it can't be read.
        ValueError: a name that no setting has.
    """
    try:
        found = tomllib.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as TOML: {error}") from error
    values = {name.replace("-", "_"): value for name, value in found.items()}
    values = {OPTIONS_OF.get(name, name): value for name, value in values.items()}
    hints = typing.get_type_hints(Settings)
    for name in values:
        known(name, hints, f"{path}: ")
    return values


def known(name: str, names: Mapping[str, Any], where: str = "") -> None:
    """Raise a ValueError unless a setting has this name."""
    if name not in names:
        close = difflib.get_close_matches(name, names, 3, 0.4) or sorted(names)
        raise ValueError(
            f"{where}{name}: expected a setting such as {', '.join(close)}, got {name}"
        )


def _check(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if "choices" in rules:
        checks.one_of(name, value, rules["choices"])
    if value is None or not {"least", "above", "most"} & rules.keys():
        return
    low, above, high = rules.get("least"), rules.get("above"), rules.get("most")
    good = math.isfinite(value) and (low is None or value >= low)
    good = good and (above is None or value > above) and (high is None or value <= high)
    if not good or (rules.get("open") and value == high):
        wanted = f"a number above {above:g}" if above is not None else f"a number of at least {low}"
        if high is not None:
            wanted = f"a number in [{low:g}, {high:g}{')' if rules.get('open') else ']'}"
        checks.fail(name, wanted, value)


def _typed(name: str, hint: Any, value: Any) -> Any:
    """A value in the type of its field."""
    if name == "data":
        return _folders(value)
    if hint == tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)):
            checks.fail(name, "texts", f"{value!r} ({type(value).__name__})")
        return tuple(_typed(name, str, one) for one in values)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        got = f"{value!r} ({type(value).__name__})"
        checks.fail(name, words.get(hint, "a text"), got)
    return value


def _folders(value: Any) -> tuple[DataFolder, ...]:
    single = isinstance(value, (str, Path, Mapping, DataFolder))
    if not single and not isinstance(value, (list, tuple)):
        checks.fail("data", "folders, or tables with a folder", repr(value))
    values: Sequence[Any] = [value] if single else value
    return tuple(map(_folder, values))


def _folder(value: Any) -> DataFolder:
    if isinstance(value, DataFolder):
        return value
    if isinstance(value, (str, Path)):
        return DataFolder(Path(value))
    if not isinstance(value, Mapping):
        checks.fail("data", "folders, or tables with a folder", repr(value))
    hints = typing.get_type_hints(DataFolder)
    for name in value:
        known(name, hints, "data: ")
    if "folder" not in value:
        checks.fail("data", "a folder in each table", sorted(value))
    return DataFolder(**{name: _typed(name, hints[name], one) for name, one in value.items()})


def of_kohya(name: str) -> tuple[int, str] | None:
    """Repeats and caption in a folder's name, as kohya-ss has them: ``10_a cat``."""
    match = re.fullmatch(r"(\d+)_(.+)", name)
    return (int(match[1]), match[2]) if match and int(match[1]) else None
