"""What a run is trained on: pictures in their shapes, class images, and the batches of them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import visible_files
from ..images import save_picture
from ..models.embeddings import pattern
from ..ops import checks
from ..pipelines import StableDiffusion
from ..pipelines.parts import Parts
from ..training.distributed import Processes
from ..training.image_folder import SUFFIXES, some
from ..training.tensor_store import fingerprint
from .bucket_batches import BucketBatches
from .buckets import Size, best_fit, fit, shapes
from .captions import Captions, Word, chunks_of
from .examples import Encoding, Example, Examples, cache_latents, cache_states
from .methods import TEMPLATES, WORD, Method
from .pictures import checked, read_pictures, with_hints, with_masks
from .settings import DataFolder, Settings

Tell = Callable[[str], object]


class Data:
    """The pictures of a run, checked; nothing has been computed or written yet.

    Args:
        settings: those of the run.
        parts: the base.
        tell: called with lines that say what is done.

    Attributes:
        examples: the pictures and the shapes that they are trained in.
        steered: whether each has a conditioning image.
        word: the word whose vectors are trained; None for none.

    Raises:
        ValueError: data that can't be; the message names it.
    """

    def __init__(self, settings: Settings, parts: Parts, tell: Tell) -> None:
        self.settings, self.parts, self.tell = settings, parts, tell
        self.steered = settings.method == "controlnet"
        self.word: Word | None = None
        if settings.method == "embedding" and settings.word is not None:
            encoders: list[Any] = parts.text.encoders
            first = tuple(one.get_input_embeddings().num_embeddings for one in encoders)
            self.word = Word(settings.word, settings.vectors, first)
        self.examples = self._examples()
        self._held_out = self._validation_examples()

    @property
    def _class_folder(self) -> Path:
        return self.settings.class_data or self.settings.out / "class"

    def draw_class_images(self, device: torch.device) -> None:
        """Fill the folder of class images up (Ruiz et al. 2022, arXiv:2208.12242, section 3.2).

        What is trained changes nothing yet, so that they are the base's own.
        """
        settings, prompt = self.settings, self.settings.class_prompt
        if prompt is None:
            return
        processes = Processes.join(device)
        folder = self._class_folder
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            there = len(visible_files(folder, SUFFIXES))
            numbers = [int(one.stem) for one in folder.iterdir() if one.stem.isdecimal()]
            first = max(there, 1 + max(numbers, default=-1))  # a name, and a seed, of its own
            pipe, size = StableDiffusion(self.parts), self.resolution()
            for number in range(settings.class_images - there):
                (picture,) = pipe(prompt, size=size, seed=settings.seed + first + number).images
                save_picture(picture, folder / f"{first + number:05d}.png", {"prompt": prompt})
                self._counter("class images")(there + number + 1, settings.class_images)
        processes.wait()
        self.examples = self._examples()

    def _examples(self, folders: Sequence[DataFolder] | None = None) -> list[Example]:
        """The pictures of folders, by default of the run's, and the shapes they are trained in."""
        settings, trains = self.settings, folders is None
        prior = self._class_folder
        if folders is None:
            folders = settings.data
            if settings.class_prompt and prior.is_dir() and visible_files(prior, SUFFIXES):
                folders = [*folders, DataFolder(prior, 1, settings.class_prompt, prior=True)]
        prompt = settings.prompt
        if prompt is None and settings.method == "embedding":
            prompt = WORD
        masks = None if settings.masks == "alpha" else settings.masks
        apart = (settings.conditioning, masks, settings.validation_data, settings.out, prior)
        beside = [Path(one) for one in apart if one]
        pictures = read_pictures(folders, prompt, settings.broken == "skip", beside)
        if settings.word is not None and settings.method == "embedding":
            word = pattern([settings.word])
            for one in pictures:
                if not one.prior and WORD not in one.caption and not word.search(one.caption):
                    wanted = f"the word {settings.word} (or {WORD}) in each caption"
                    checks.fail("data", wanted, f"{one.caption!r} of {one.file}")
        if self.steered:
            skip = settings.broken == "skip"
            pictures = with_hints(pictures, settings.conditioning, skip)
        if settings.masks is not None and trains:
            pictures = with_masks(pictures, settings.masks, settings.broken == "skip")
        resolution, step = self.resolution(), settings.bucket_step
        chunks = [self._chunks(one.caption) for one in pictures]
        if not settings.buckets:
            square = resolution, resolution
            fits = [fit(one.size, square) for one in pictures]
            return list(map(Example, pictures, fits, chunks))
        known = shapes(resolution, step)
        fits = [best_fit(one.size, known) for one in pictures]
        found = list(map(Example, pictures, fits, chunks))
        for example in found:
            if example.fit.cut > step:
                (h, w), name = example.picture.size, example.picture.file
                what = f"{w} x {h} is longer than all shapes, {example.fit.cut} pixels are cut off"
                if settings.extreme == "refuse":
                    checks.fail(str(name), "an image of a ratio from 1:4 to 4:1", f"{w} x {h}")
                warnings.warn(f"{name}: {what}", stacklevel=2)
        return found

    def _validation_examples(self) -> list[Example] | None:
        """Those of the validation loss, None for none; errors name the setting they come from."""
        folder = self.settings.validation_data
        if folder is None:
            return None
        try:
            return self._examples((DataFolder(folder),))
        except ValueError as error:
            raise ValueError(re.sub("^data:", "validation_data:", str(error))) from error

    def _captions(self, validation: bool = False) -> Captions:
        """How captions are drawn; nothing is random for a validation loss."""
        settings = self.settings
        return Captions(
            0.0 if validation else settings.caption_dropout,
            settings.shuffle_captions and not validation,
            settings.keep_tokens,
            None if self.word is None else self.word.text,
            TEMPLATES[:1] if validation else TEMPLATES,
        )

    def _chunks(self, caption: str) -> int:
        """How many chunks a caption needs at most, whatever is drawn of it."""
        captions, tokenizers = self._captions(), self.parts.text.tokenizers
        return max(
            chunks_of(tokenizers, text, self.word, captions.shuffle)
            for text in captions.texts(caption)
        )

    def resolution(self) -> int:
        """Side of the square of the area that images are scaled to."""
        grain = self.parts.vae.downsampling
        trained = self.parts.unet.config.sample_size or 64
        side = max(trained) if isinstance(trained, tuple) else trained
        resolution = self.settings.resolution or side * grain
        for name, value in (("resolution", resolution), ("bucket_step", self.settings.bucket_step)):
            if value % grain:
                checks.fail(name, f"a multiple of {grain}", value)
        if self.settings.buckets and self.settings.bucket_step > resolution:
            step = self.settings.bucket_step
            checks.fail("bucket_step", f"at most the resolution ({resolution})", step)
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

    def batches(self, method: Method) -> BucketBatches:
        """The batches to train on; computes what their cache lacks."""
        return self._batches(method, self.examples)

    def held_out(self, method: Method) -> BucketBatches | None:
        """The batches of the validation loss, None for none; computes what their cache lacks."""
        if self._held_out is None:
            return None
        return self._batches(method, self._held_out, validation=True)

    def caches_text(self, method: Method) -> bool:
        """Whether text states are kept on the disk."""
        return not method.text and not self.settings.shuffle_captions

    def _batches(
        self, method: Method, examples: list[Example], validation: bool = False
    ) -> BucketBatches:
        """The batches of some pictures; computes what their cache lacks.

        Args:
            method: what is trained.
            examples: the pictures.
            validation: nothing of them is random, and all of them count alike.
        """
        settings, text = self.settings, self.parts.text
        cache = settings.cache or settings.out / "cache"
        skip, latents, states = settings.broken == "skip", None, None
        crops = settings.random_crop and not validation
        if crops or self.steered:  # else the cache finds out
            examples = self._all_read(examples)
        if not crops:
            examples, latents = cache_latents(
                cache,
                self.parts.vae,
                examples,
                flip=settings.flip,
                skip_broken=skip,
                on_made=self._counter("latents"),
            )
        if not examples:
            checks.fail("data", "an image that can be read", "none")
        texts = list(dict.fromkeys(["", *(example.picture.caption for example in examples)]))
        if self.caches_text(method):
            report = self._counter("text states")
            clip_skip = settings.clip_skip
            states = cache_states(cache, text, texts, clip_skip=clip_skip, on_made=report)
        data = Examples(
            examples,
            self._captions(validation),
            text.tokenizers,
            latents=latents,
            states=states,
            sizes=self.parts.unet.config.addition_embed_type is not None,
            flip=settings.flip and not validation,
            weights=None if validation else self._weights(examples),
            grain=None if validation or not settings.masks else self.parts.vae.downsampling,
            hints=self.steered,
            word=self.word,
        )
        known = sorted({(example.fit.shape, example.chunks) for example in examples})
        drawn = [examples[number] for number in data.order]
        return BucketBatches(
            data,
            settings.batch_size,
            [known.index((one.fit.shape, one.chunks)) for one in drawn],
            seed=settings.seed,
            workers=settings.workers,
            prepare=Encoding(
                self.parts.vae if latents is None else None,
                text if states is None and not method.text else None,
                settings.clip_skip,
            ),
        )

    def _all_read(self, examples: list[Example]) -> list[Example]:
        """Those whose pictures can be read to the end, which a run finds out before it begins."""
        skip = self.settings.broken == "skip"
        good = {one.file for one in checked([e.picture for e in examples], skip)}
        return [example for example in examples if example.picture.file in good]

    def notes(self, method: Method) -> list[str]:
        """What the settings switch off, and what is cut."""
        settings, notes = self.settings, []
        if settings.random_crop:
            notes.append("latents are not cached, because crops are random")
        if not self.caches_text(method):
            why = "what they say is trained" if method.text else "captions are shuffled"
            notes.append(f"text states are not cached, because {why}")
        long = [example.picture.file for example in self.examples if example.chunks > 1]
        if long:
            most = self.parts.text.tokenizers[0].model_max_length - 2
            who = some(long, "captions that are longer than one")
            notes.append(f"captions are read in chunks of {most} tokens; {who}")
        return notes

    def shapes(self) -> dict[tuple[Size, int], int]:
        """How many items of a pass have each shape and number of chunks; a batch has one each."""
        found: Counter[tuple[Size, int]] = Counter()
        for example in self.examples:
            found[example.fit.shape, example.chunks] += example.picture.repeats
        return dict(found)

    def contents(self) -> str:
        """A hash of what is trained on: names, captions, shapes and repeats."""
        return fingerprint(
            {},
            [
                [p.file.name, p.caption, p.size, p.repeats, p.prior, e.fit.shape]
                + ([p.hint.name] if p.hint is not None and self.steered else [])
                for e in self.examples
                for p in (e.picture,)
            ],
        )

    def _counter(self, what: str) -> Callable[[int, int], None]:
        """Tells of the first, every hundredth and the last that is made."""

        def report(done: int, count: int) -> None:
            if done == count or done % 100 == 0:
                self.tell(f"caching {what}: {done}/{count}")

        return report
