"""A run of fine-tuning from its settings to its files."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..files import CheckpointError, read_json, staged, visible_files
from ..images import save_picture
from ..models.embeddings import pattern
from ..ops import checks
from ..pipelines import StableDiffusion
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
from ..training.checkpoint import STATE
from ..training.distributed import Processes
from ..training.image_folder import SUFFIXES
from ..training.tensor_store import fingerprint
from ..training.watch import OnRead, show_progress
from . import lora_export
from .bucket_batches import BucketBatches
from .buckets import best_fit, fit, shapes
from .captions import Captions, Word, is_cut
from .examples import Encoding, Example, Examples, cache_latents, cache_states
from .methods import TEMPLATES, WORD, Embedding, attach
from .network import Finetuned
from .pictures import checked, read_pictures, with_masks
from .previews import Previews
from .settings import DataFolder, Settings

Tell = Callable[[str], object]
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOMENTS = {"adamw": 8, "adam": 8, "adafactor": 0, "adamw8bit": 2, "prodigy": 16}  # bytes


class Finetuning:
    """Networks and data of a run, checked; nothing has been trained or written yet.

    Args:
        settings: what to do.
        tell: called with lines that say what is done.

    Raises:
        CheckpointError: the base can't be loaded, or is none that can be fine-tuned.
        ValueError: data or settings that can't be; the message names them.
    """

    def __init__(self, settings: Settings, tell: Tell = lambda line: None) -> None:
        self.settings, self.tell = settings, tell
        self.device = local_device() if settings.device == "cuda" else torch.device(settings.device)
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        frozen = torch.float32  # FSDP takes weights of one dtype only
        if settings.sharding == "ddp" and settings.method != "full":
            frozen = dtypes.get(settings.precision, torch.float32)
        self.parts = load(settings.model, dtype=frozen, device=self.device, safety_checker=False)
        if self.parts.inpainting:
            wanted = f"{settings.model}: expected a text-to-image model, got one for inpainting"
            raise CheckpointError(wanted)
        self._schedule()
        self.examples = self._examples()
        text = self.parts.text
        self.base = fingerprint({"unet": self.parts.unet, **text.modules()})
        self._check_base()
        self.kind = lora_export.family(self.parts.unet.config, self.prediction_type)
        torch.manual_seed(settings.seed)
        self.method = attach(self.parts, settings)
        self.caches_text = not self.method.text and not settings.shuffle_captions
        self.network = Finetuned(
            self.parts.unet,
            text,
            vectors=self.method.vectors,
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

    def plan(self) -> list[str]:
        """What the run would do, in lines."""
        settings, lines = self.settings, []
        trained = sum(parameter.numel() for parameter in self.network.parameters())
        networks = (self.parts.unet, self.parts.vae, *self.parts.text.encoders)
        weights = sum(p.numel() * p.element_size() for one in networks for p in one.parameters())
        per_weight = 4 + _MOMENTS[settings.optimizer] + (4 if settings.ema_decay is not None else 0)
        items, batches = self._count()
        lines.append(f"base: {settings.model} ({self.kind}, predicts {self.prediction_type})")
        lines.append(f"method: {settings.method}, {trained:,} parameters to train")
        lines.append(f"images: {len(self.examples)}, {items} read in a pass of {batches} batches")
        shapes_found: dict[tuple[int, int], int] = {}
        for example in self.examples:
            shape = example.fit.shape
            shapes_found[shape] = shapes_found.get(shape, 0) + example.picture.repeats
        listed = [f"{w} x {h}: {n}" for (h, w), n in sorted(shapes_found.items())]
        lines.append("shapes: " + ", ".join(listed))
        passes = settings.steps / batches
        lines.append(
            f"steps: {settings.steps} of {settings.batch_size} images, {passes:.1f} passes"
        )
        lines.append(
            f"memory: {weights / 2**30:.2f} GiB of weights,"
            f" {trained * per_weight / 2**30:.2f} GiB of gradients, moments and averages; and"
            " activations"
        )
        if settings.class_prompt is not None:
            there = sum(example.picture.prior for example in self.examples)
            missing = max(0, settings.class_images - there)
            lines.append(f"class images: {there}, {missing} more to be drawn")
        lines += self._notes()
        lines.append(f"writes: {', '.join(map(str, self.files()))}")
        return lines

    def files(self) -> list[Path]:
        """What the run leaves in its folder."""
        return [self.settings.out / name for name in self.method.files()]

    def train(self, on_read: Sequence[OnRead] = (), progress: bool = False) -> list[float]:
        """Cache, train, and write the files.

        Args:
            on_read: further functions as :meth:`~diffusion_fast.training.Trainer.fit` takes them.
            progress: show a progress bar, or lines where there is no terminal.

        Returns:
            The loss of every step.
        """
        settings = self.settings
        for line in self._notes():
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
        return losses

    def trainer(self) -> Trainer:
        """The trainer of this run; computes what its cache lacks."""
        settings = self.settings
        self._draw_class_images()
        weightings: dict[str, LossWeighting | None] = {
            "none": None,
            "min_snr": MinSNR(settings.snr_gamma),
            "p2": P2(),
            "debiased": Debiased(),
        }
        about = {"base": self.base, "finetuning": settings.deciding(), "images": self._contents()}
        ratio = (settings.text_learning_rate or settings.rate) / settings.rate
        validation = None
        if settings.validation_data is not None:
            held_out = self._examples((DataFolder(settings.validation_data),))
            validation = self._batches(held_out, validation=True)
        return Trainer(
            self.network,
            self._batches(self.examples),
            self.parts.scheduler.schedule,
            seed=settings.seed,
            checkpoints=self._checkpoints,
            validation=validation,
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
        )

    def write(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the files of trained weights by the network's names, all or none.

        Raises:
            OSError: they can't be written; what was there before still is.
        """
        settings = self.settings
        pictures = [example.picture for example in self.examples]
        about = lora_export.header(settings, self.kind, self.base, settings.steps, pictures)
        with staged(settings.out) as folder:
            self.method.write(folder, weights, about)

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

    @property
    def _class_folder(self) -> Path:
        return self.settings.class_data or self.settings.out / "class"

    def _draw_class_images(self) -> None:
        """Fill the folder of class images up (Ruiz et al. 2022, arXiv:2208.12242, section 3.2).

        What is trained changes nothing yet, so that they are the base's own.
        """
        settings, prompt = self.settings, self.settings.class_prompt
        if prompt is None:
            return
        processes = Processes.join(self.device)
        folder = self._class_folder
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            there = len(visible_files(folder, SUFFIXES))
            pipe, size = StableDiffusion(self.parts), self._resolution()
            for number in range(there, settings.class_images):
                (picture,) = pipe(prompt, size=size, seed=settings.seed + number).images
                save_picture(picture, folder / f"{number:05d}.png", {"prompt": prompt})
                self._counter("class images")(number + 1, settings.class_images)
        processes.wait()
        self.examples = self._examples()

    def _examples(self, folders: Sequence[DataFolder] | None = None) -> list[Example]:
        """The pictures of folders, by default of the run's, and the shapes they are trained in."""
        settings = self.settings
        if folders is None:
            folders = settings.data
            prior = self._class_folder
            if settings.class_prompt and prior.is_dir() and visible_files(prior, SUFFIXES):
                folders = [*folders, DataFolder(prior, 1, settings.class_prompt, prior=True)]
        prompt = settings.prompt
        if prompt is None and settings.method == "embedding":
            prompt = WORD
        pictures = read_pictures(folders, prompt, settings.broken == "skip")
        if settings.word is not None and settings.method == "embedding":
            word = pattern([settings.word])
            for one in pictures:
                if not one.prior and WORD not in one.caption and not word.search(one.caption):
                    wanted = f"the word {settings.word} (or {WORD}) in each caption"
                    checks.fail("data", wanted, f"{one.caption!r} of {one.file}")
        if settings.masks is not None:
            pictures = with_masks(pictures, settings.masks)
        resolution, step = self._resolution(), settings.bucket_step
        if not settings.buckets:
            return [Example(one, fit(one.size, (resolution, resolution))) for one in pictures]
        known = shapes(resolution, step)
        found = [Example(one, best_fit(one.size, known)) for one in pictures]
        for example in found:
            if example.fit.cut > step:
                (h, w), name = example.picture.size, example.picture.file
                what = f"{w} x {h} is longer than all shapes, {example.fit.cut} pixels are cut off"
                if settings.extreme == "refuse":
                    checks.fail(str(name), "an image of a ratio from 1:4 to 4:1", f"{w} x {h}")
                warnings.warn(f"{name}: {what}", stacklevel=2)
        return found

    def _resolution(self) -> int:
        """Side of the square of the area that images are scaled to."""
        grain = self.parts.vae.downsampling
        trained = self.parts.unet.config.sample_size or 64
        side = max(trained) if isinstance(trained, tuple) else trained
        resolution = self.settings.resolution or side * grain
        for name, value in (("resolution", resolution), ("bucket_step", self.settings.bucket_step)):
            if value % grain:
                checks.fail(name, f"a multiple of {grain}", value)
        return resolution

    def _weights(self, examples: Sequence[Example]) -> tuple[float, float] | None:
        """Factors of the losses of instance and of class images, so that the mean over a pass is

        L = mean over instances + prior_weight * mean over class images (Ruiz et al. 2022, eq. 2),
        however many there are of each.
        """
        counts = [0, 0]
        for example in examples:
            counts[example.picture.prior] += example.picture.repeats
        if not all(counts):
            return None
        return sum(counts) / counts[0], self.settings.prior_weight * sum(counts) / counts[1]

    def _batches(self, examples: list[Example], validation: bool = False) -> BucketBatches:
        """The batches of some pictures; computes what their cache lacks.

        Args:
            examples: the pictures.
            validation: nothing of them is random, and all of them count alike.
        """
        settings, text = self.settings, self.parts.text
        cache = settings.cache or settings.out / "cache"
        skip, latents, states = settings.broken == "skip", None, None
        if settings.random_crop and not validation:
            examples = self._all_read(examples)
        else:
            report = self._counter("latents")
            examples, latents = cache_latents(
                cache,
                self.parts.vae,
                examples,
                flip=settings.flip,
                skip_broken=skip,
                on_made=report,
            )
        if not examples:
            checks.fail("data", "an image that can be read", "none")
        word = None
        if isinstance(self.method, Embedding):
            tables: Any = [one.get_input_embeddings() for one in text.encoders]
            first = tuple(table.num_embeddings for table in tables)
            word = Word(str(settings.word), settings.vectors, first)
        captions = Captions(
            0.0 if validation else settings.caption_dropout,
            settings.shuffle_captions and not validation,
            settings.keep_tokens,
            None if word is None else word.text,
            TEMPLATES[:1] if validation else TEMPLATES,
        )
        texts = list(dict.fromkeys(["", *(example.picture.caption for example in examples)]))
        if self.caches_text:
            report = self._counter("text states")
            clip_skip = settings.clip_skip
            states = cache_states(cache, text, texts, clip_skip=clip_skip, on_made=report)
        data = Examples(
            examples,
            captions,
            text.tokenizers,
            latents=latents,
            states=states,
            sizes=self.parts.unet.config.addition_embed_type is not None,
            flip=settings.flip and not validation,
            weights=None if validation else self._weights(examples),
            grain=None if validation or not settings.masks else self.parts.vae.downsampling,
            word=word,
        )
        known = sorted({example.fit.shape for example in examples})
        return BucketBatches(
            data,
            settings.batch_size,
            [known.index(examples[number].fit.shape) for number in data.order],
            seed=settings.seed,
            workers=settings.workers,
            prepare=Encoding(
                self.parts.vae if latents is None else None,
                text if states is None and not self.method.text else None,
                settings.clip_skip,
            ),
        )

    def _all_read(self, examples: list[Example]) -> list[Example]:
        """Those whose pictures can be read to the end, which a run finds out before it begins."""
        skip = self.settings.broken == "skip"
        good = {one.file for one in checked([e.picture for e in examples], skip)}
        return [example for example in examples if example.picture.file in good]

    def _notes(self) -> list[str]:
        """What the settings switch off, and what is cut."""
        settings, notes = self.settings, []
        if settings.random_crop:
            notes.append("latents are not cached, because crops are random")
        if not self.caches_text:
            why = "what they say is trained" if self.method.text else "captions are shuffled"
            notes.append(f"text states are not cached, because {why}")
        tokenizer = self.parts.text.tokenizers[0]
        long = [e.picture for e in self.examples if is_cut(tokenizer, e.picture.caption)]
        if long:
            most = tokenizer.model_max_length - 2
            name = long[0].file.name
            notes.append(f"captions cut to {most} tokens: {len(long)}, the first that of {name}")
        return notes

    def _count(self) -> tuple[int, int]:
        """Items and batches of a pass."""
        counts: dict[tuple[int, int], int] = {}
        for example in self.examples:
            shape = example.fit.shape
            counts[shape] = counts.get(shape, 0) + example.picture.repeats
        size = self.settings.batch_size
        return sum(counts.values()), sum(-(-count // size) for count in counts.values())

    def _contents(self) -> str:
        """A hash of what is trained on: names, captions, shapes and repeats."""
        return fingerprint(
            {},
            [
                [p.file.name, p.caption, p.size, p.repeats, p.prior, e.fit.shape]
                for e in self.examples
                for p in (e.picture,)
            ],
        )

    def _check_base(self) -> None:
        """Raise a ValueError if the run to go on with has another base."""
        if self.newest is None:
            return
        saved = read_json(self.newest / STATE).get("settings", {}).get("base")
        if saved is not None and saved != self.base:
            wanted = f"the base that {self.newest} was trained on (hash {saved[:12]})"
            checks.fail("model", wanted, f"{self.settings.model} (hash {self.base[:12]})")

    def _counter(self, what: str) -> Callable[[int, int], None]:
        """Tells of the first, every hundredth and the last that is made."""

        def report(done: int, count: int) -> None:
            if done == count or done % 100 == 0:
                self.tell(f"caching {what}: {done}/{count}")

        return report

    def _callbacks(self, trainer: Trainer, done: int) -> Iterator[OnRead]:
        settings = self.settings
        board = TensorBoardLog(settings.tensorboard, after=done) if settings.tensorboard else None
        if settings.log is not None:
            yield CsvLog(settings.log)
        if board is not None:
            yield board
        if settings.validation_prompts:
            if self.method.vectors is not None:
                vectors = [one.detach() for one in self.method.vectors]  # which share their memory
                self.parts.text.embeddings.put(str(settings.word), vectors)
            sharded = settings.sharding == "fsdp" and trainer.processes.count > 1
            yield Previews(
                StableDiffusion(self.parts, rewrites="none" if sharded else "all"),
                trainer,
                settings.validation_prompts,
                settings.out / "samples",
                every=settings.validation_every,
                on_drawn=board.picture if board else None,
                steps=settings.validation_steps,
                clip_skip=settings.clip_skip,
                seed=settings.seed,
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
