"""A run of fine-tuning from its settings to its files."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import CheckpointError, read_json, staged
from ..images import read_picture
from ..ops import checks
from ..pipelines import StableDiffusion, inputs
from ..pipelines.call import said
from ..pipelines.loading import load
from ..schedule import DiffusionSchedule
from ..training import (
    P2,
    Checkpoints,
    CsvLog,
    Debiased,
    LossWeighting,
    MinSNR,
    TensorBoardLog,
    Trainer,
    local_device,
)
from ..training.checkpoint import STATE, read_checkpoint
from ..training.optimizers import check_optimizer
from ..training.options import TrainingOptions
from ..training.tensor_store import fingerprint
from ..training.watch import OnRead, show_progress
from . import lora_export
from .data import Data, Tell
from .methods import WORD, attach
from .network import Finetuned
from .previews import Previews
from .settings import Settings

BEST = "best"  # folder of the files with the lowest validation loss


class Finetuning:
    """Networks and data of a run, checked; nothing has been trained or written yet.

    Args:
        settings: what to do.
        tell: called with lines that say what is done.

    Raises:
        CheckpointError: the base can't be loaded, or is none that can be fine-tuned.
        ModuleNotFoundError: a package that the settings need is missing; names the command.
        ValueError: data or settings that can't be; the message names them.
    """

    def __init__(self, settings: Settings, tell: Tell = lambda line: None) -> None:
        self.settings, self.tell = settings, tell
        self.device = _device(settings.device)
        if settings.out.exists() and not settings.out.is_dir():
            checks.fail("out", "a folder to write to", f"{settings.out}, which is a file")
        check_optimizer(settings.optimizer, self.device)
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        frozen = torch.float32  # FSDP takes weights of one dtype only
        if settings.sharding == "ddp" and settings.method != "full":
            frozen = dtypes.get(settings.precision, torch.float32)
        self.parts = load(settings.model, dtype=frozen, device=self.device, safety_checker=False)
        if self.parts.inpainting:
            wanted = f"{settings.model}: expected a text-to-image model, got one for inpainting"
            raise CheckpointError(wanted)
        if self.parts.refines:
            wanted = f"{settings.model}: expected a text-to-image model, got SDXL's refiner"
            raise CheckpointError(wanted)
        self._schedule()
        self.data = Data(settings, self.parts, tell)
        self._check_drawn()
        text = self.parts.text
        networks = {"unet": self.parts.unet, "vae": self.parts.vae, **text.modules()}
        self.base = fingerprint(networks)
        self._check_checkpoints()
        self.kind = lora_export.family(self.parts.unet.config, self.prediction_type)
        torch.manual_seed(settings.seed)
        self.method = attach(self.parts, settings)
        self.network = Finetuned(
            self.parts.unet,
            text,
            vectors=self.method.vectors,
            control=self.method.control,
            clip_skip=settings.clip_skip,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts."""
        return str(self.parts.scheduler.config["prediction_type"])

    @property
    def newest(self) -> Path | None:
        """The checkpoint to go on from."""
        return self._checkpoints.newest() if self.settings.resume else None

    @property
    def _checkpoints(self) -> Checkpoints:
        settings = self.settings
        folder = settings.out / "checkpoints"
        return Checkpoints(folder, settings.checkpoint_every, settings.keep)

    def files(self) -> list[Path]:
        """What the run leaves in its folder, and of the best checkpoint in a folder in that."""
        folders = [self.settings.out]
        if self.settings.validation_data is not None:
            folders.append(self.settings.out / BEST)
        return [folder / name for folder in folders for name in self.method.files()]

    def train(self, on_read: Sequence[OnRead] = (), progress: bool = False) -> list[float]:
        """Cache, train, and write the files.

        Args:
            on_read: further functions as :meth:`~diffusion_fast.training.Trainer.fit` takes them.
            progress: show a progress bar, or lines where there is no terminal.

        Returns:
            The loss of every step.
        """
        settings = self.settings
        for line in self.data.notes(self.method):
            self.tell(line)
        trainer = self.trainer()
        done = trainer.resume() if settings.resume else 0
        callbacks = [*on_read, *self._callbacks(trainer, done)]
        first = trainer.processes.first
        with self._shown(progress and first, done) as shown:
            losses = trainer.fit(settings.steps, [*shown, *callbacks])
        weights = trainer.weights()  # by all processes
        if first:
            self.write(weights)
            best = self._checkpoints.best()
            if settings.validation_data is not None and best is not None:
                groups, state = read_checkpoint(best)
                self.write(groups.get("ema", groups["model"]), BEST, state["step"])
        return losses

    def trainer(self) -> Trainer:
        """The trainer of this run; computes what its cache lacks."""
        settings = self.settings
        self.data.draw_class_images(self.device)
        weightings: dict[str, LossWeighting | None] = {
            "none": None,
            "min_snr": MinSNR(settings.snr_gamma),
            "p2": P2(),
            "debiased": Debiased(),
        }
        about = {
            "base": self.base,
            "finetuning": settings.deciding(),
            "images": self.data.contents(),
        }
        ratio = (settings.text_learning_rate or settings.rate) / settings.rate
        return Trainer(
            self.network,
            self.data.batches(self.method),
            self.parts.scheduler.schedule,
            seed=settings.seed,
            checkpoints=self._checkpoints,
            validation=self.data.held_out(self.method),
            about=about,
            rate_of=lambda name: ratio if name.startswith("text_encoder") else 1.0,
            optimizer=settings.optimizer,
            learning_rate=settings.rate,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_steps,
            decay=settings.decay,
            gradient_clip=settings.gradient_clip or None,
            accumulate=settings.accumulate,
            ema_decay=settings.ema_decay,
            prediction_type=self.prediction_type,
            loss_weighting=weightings[settings.loss_weighting],
            noise_offset=settings.noise_offset,
            input_perturbation=settings.input_perturbation,
            precision=settings.precision,
            compile=settings.compile,
            sharding=settings.sharding,
            read_every=self._read_every(),
        )

    def _read_every(self) -> int:
        """Steps between two reads of the loss: pictures are drawn at some of them."""
        usual = TrainingOptions.read_every
        settings = self.settings
        return math.gcd(usual, settings.validation_every) if settings.validation_prompts else usual

    def write(
        self, weights: Mapping[str, torch.Tensor], folder: str = "", steps: int | None = None
    ) -> None:
        """Write the files of trained weights by the network's names, all or none.

        Args:
            weights: what was trained.
            folder: where in that of the run.
            steps: how long; None for all steps.

        Raises:
            OSError: they can't be written; what was there before still is.
        """
        settings = self.settings
        pictures = [example.picture for example in self.data.examples]
        steps = settings.steps if steps is None else steps
        about = lora_export.header(settings, self.kind, self.base, steps, pictures)
        with staged(settings.out / folder) as place:
            self.method.write(place, weights, about)

    def _schedule(self) -> None:
        """The noise schedule, with zero terminal SNR where it is asked for."""
        if not self.settings.zero_terminal_snr:
            return
        if self.prediction_type == "epsilon":
            wanted = "False, because the model predicts epsilon, which says nothing at zero SNR"
            checks.fail("zero_terminal_snr", wanted, True)
        scheduler = self.parts.scheduler
        # Such a model is sampled from the last timestep on (Lin et al. 2023, section 3.3).
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        config = scheduler.config | changes
        schedule = DiffusionSchedule.from_config(config)
        self.parts.scheduler = replace(scheduler, schedule=schedule, config=config)

    def _check_drawn(self) -> None:
        """Raise a ValueError if pictures can't be drawn as asked for: that would end the run."""
        settings = self.settings
        words = {*self.parts.text.embeddings.names, *filter(None, [settings.word])}
        for name, prompts in (
            ("validation_prompts", self._prompts()),
            ("class_prompt", [settings.class_prompt] if settings.class_prompt else []),
        ):
            if prompts:
                inputs.prompt_list(name, prompts, words)
                said(name, prompts, lambda: settings.validation_steps, words)
        most = self.parts.scheduler.schedule.timesteps
        if settings.validation_steps > most:
            checks.fail("validation_steps", f"at most {most}", settings.validation_steps)
        for file in settings.validation_conditioning:
            try:
                read_picture(file)
            except (ValueError, OSError) as error:
                checks.fail("validation_conditioning", "an image", f"{file}: {error}")

    def _prompts(self) -> list[str]:
        """The prompts of pictures that are drawn while it trains."""
        prompts = list(self.settings.validation_prompts)
        if self.settings.method != "embedding":
            return prompts
        return [one.replace(WORD, str(self.settings.word)) for one in prompts]

    def _check_checkpoints(self) -> None:
        """Raise a ValueError if there are checkpoints of another run, or of one on another base."""
        there = self._checkpoints.newest()
        if there is not None and not self.settings.resume:
            wanted = f"true, because {there} is there (or take another folder for out)"
            checks.fail("resume", wanted, "false")
        if self.newest is None:
            return
        there = read_json(self.newest / STATE).get("settings", {})
        precision, saved = there.get("precision"), there.get("base")
        if precision is not None and precision != self.settings.precision:
            wanted = f"{precision}, as {self.newest} was trained"
            checks.fail("precision", wanted, self.settings.precision)
        if saved is not None and saved != self.base:
            wanted = f"the base that {self.newest} was trained on (hash {saved[:12]})"
            checks.fail("model", wanted, f"{self.settings.model} (hash {self.base[:12]})")

    def _callbacks(self, trainer: Trainer, done: int) -> Iterator[OnRead]:
        settings = self.settings
        board = TensorBoardLog(settings.tensorboard, after=done) if settings.tensorboard else None
        if settings.log is not None:
            yield CsvLog(settings.log)
        if board is not None:
            yield board
        if settings.validation_prompts:
            yield self._previews(trainer, board)

    def _previews(self, trainer: Trainer, board: TensorBoardLog | None) -> Previews:
        """What draws pictures of the prompts, with networks as they are trained."""
        settings = self.settings
        sharded = settings.sharding == "fsdp" and trainer.processes.count > 1
        pipe = StableDiffusion(self.parts, rewrites="none" if sharded else "all")
        options: dict[str, Any] = {}
        refresh = None
        if self.method.vectors is not None:
            vectors = [one.detach() for one in self.method.vectors]  # which share their memory
            pipe.embeddings.put(str(settings.word), vectors)
        if self.method.control is not None:
            control = self.method.control
            dtype, trained = self.parts.unet.conv_in.weight.dtype, control
            if trained.conv_in.weight.dtype != dtype:
                control = copy.deepcopy(trained).to(dtype)
                refresh = partial(_copy, trained, control)
            pipe.controls.put("trained", control, self.parts.unet, self.parts.vae.downsampling)
            options["control_image"] = [[*map(read_picture, settings.validation_conditioning)]]
        return Previews(
            pipe,
            trainer,
            self._prompts(),
            settings.out / "samples",
            every=settings.validation_every,
            before=refresh,
            on_drawn=board.picture if board else None,
            steps=settings.validation_steps,
            clip_skip=settings.clip_skip,
            seed=settings.seed,
            size=self.data.resolution(),
            **options,
        )

    def _shown(self, progress: bool, done: int) -> contextlib.AbstractContextManager[list[OnRead]]:
        settings = self.settings

        @contextlib.contextmanager
        def shown() -> Iterator[list[OnRead]]:
            if not progress:
                yield []
                return
            with show_progress(settings.steps, settings.batch_size, done) as show:
                yield [show]

        return shown()


def _device(name: str) -> torch.device:
    """The device of this process. Raises ValueError: there is none of this name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        checks.fail("device", "one of PyTorch's, such as cpu or cuda", f"{name!r}: {error}")
    if device.type == "cuda" and not torch.cuda.is_available():
        checks.fail("device", "cpu, because PyTorch finds no GPU", repr(name))
    return local_device() if name == "cuda" else device


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Bring the weights of a network into another of its kind, whose dtype may differ."""
    target.load_state_dict(source.state_dict())
