"""Folders of images with captions, as the usual tools of fine-tuning lay them out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import read_text, visible_files
from ..images import picture_size, read_picture
from ..ops import checks
from ..training.image_folder import METADATA, SUFFIXES, read_captions, read_entries, some
from .buckets import Fit, Size
from .settings import DataFolder, of_kohya

# Keys of a conditioning image's name: of the datasets library (whose column is then
# conditioning_image), and of fill50k.
_HINTS = ("conditioning_image_file_name", "conditioning_file_name", "conditioning_image")
_TABLES = (".csv", ".parquet", ".arrow", ".json", ".tar", ".zip")  # of other layouts
_BESIDE = (".txt", ".caption")  # suffixes of a caption's file, which has the image's name


@dataclass(frozen=True)
class Picture:
    """An image to train on; its pixels have not been read.

    Attributes:
        file: where it is.
        caption: what it shows.
        size: height and width, upright.
        repeats: how often it is read in a pass.
        prior: it is a class image of DreamBooth.
        mask: an image that is white where it counts; the picture itself for its transparency, None
            where all counts.
        hint: what a ControlNet reads, an image of the same shape; None for none.
        root: the data folder that it is in.
    """

    file: Path
    caption: str
    size: Size
    repeats: int = 1
    prior: bool = False
    mask: Path | None = None
    hint: Path | None = None
    root: Path = Path()

    def weights(self, how: Fit, corner: Size, flipped: bool, grain: int) -> Tensor:
        """What of it counts in the loss, [1, H / grain, W / grain] in [0, 1], by its mask.

        Raises:
            ValueError: the mask can't be read; names it.
        """
        if self.mask is None:
            whole = torch.ones(1, *how.shape, dtype=torch.float32)
        else:
            try:
                mask = _alpha(self.mask) if self.mask == self.file else read_picture(self.mask, "L")
            except (ValueError, OSError) as error:
                raise ValueError(f"{self.mask}: {error}") from error
            whole = torch.from_numpy(np.array(_cut(mask, how, corner))).float()[None] / 255
        small = torch.nn.functional.avg_pool2d(whole, grain)
        return small.flip(-1) if flipped else small

    def hint_pixels(self, how: Fit, corner: Size, flipped: bool) -> Tensor:
        """Its conditioning image, [3, H, W] in [0, 1], scaled, cut and mirrored as itself.

        Raises:
            ValueError: it can't be read; names it.
        """
        assert self.hint is not None  # checked when pictures were read
        return (replace(self, file=self.hint).pixels(how, corner, flipped) + 1) / 2

    def pixels(self, how: Fit, corner: Size, flipped: bool) -> Tensor:
        """Its pixels [3, H, W] in [-1, 1], scaled, cut and mirrored.

        Raises:
            ValueError: it can't be read; names it.
        """
        part = _cut(self._read(), how, corner)
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 127.5 - 1
        return pixels.flip(-1) if flipped else pixels

    def check(self) -> None:
        """Read it once, and its hint. Raises ValueError: one can't be read; names it."""
        self._read()
        if self.hint is not None:
            replace(self, file=self.hint)._read()

    def _read(self) -> Image.Image:
        try:
            return read_picture(self.file)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error


def _cut(picture: Image.Image, how: Fit, corner: Size) -> Image.Image:
    (height, width), (top, left) = how.shape, corner
    scaled = picture.resize(how.scaled[::-1], Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + width, top + height))


def _alpha(file: Path) -> Image.Image:
    """What is opaque in a picture, upright."""
    with Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def with_hints(
    pictures: Sequence[Picture], folder: Path | None, skip_broken: bool = False
) -> list[Picture]:
    """Pictures with the conditioning images in a folder, or those that they have.

    Raises:
        ValueError: a picture without one, or one of another shape; names it.
    """
    if folder is not None:
        if not folder.is_dir():
            checks.fail("conditioning", "a folder", f"{folder}, which is none")
        found = _named_alike("conditioning", pictures, folder)
        pictures = [replace(p, hint=found.get(p.file)) for p in pictures]
    bare = [p.file for p in pictures if p.hint is None]
    if bare:
        where = METADATA if folder is None else folder
        wanted = f"a conditioning image for each image, in {where}"
        checks.fail("conditioning", wanted, some(bare, "without"))
    kept = []
    for one in pictures:
        assert one.hint is not None
        if _is_of_its_shape(one.hint, one, skip_broken):
            kept.append(one)
    return kept


def _is_of_its_shape(beside: Path, picture: Picture, skip_broken: bool) -> bool:
    """Whether a mask or a conditioning image can be read; it must have the picture's shape."""
    try:
        height, width = picture_size(beside)
    except ValueError as error:
        report(f"{beside}: {error}", skip_broken)
        return False
    ratio = height * picture.size[1] / (width * picture.size[0])
    if not 0.98 < ratio < 1.02:
        wanted = f"the shape of {picture.file} ({picture.size[1]} x {picture.size[0]})"
        checks.fail(str(beside), wanted, f"{width} x {height}")
    return True


def _named_alike(name: str, pictures: Sequence[Picture], folder: Path) -> dict[Path, Path]:
    """The file in a folder for each picture that has one.

    It lies there as the picture lies in its data folder (or below the name of that). Where a
    picture's own name occurs once in both, folders don't matter.

    Args:
        name: the setting, for errors.
        pictures: the pictures.
        folder: of masks, or of conditioning images.
    """
    files = visible_files(folder, SUFFIXES)
    there = {file.relative_to(folder).with_suffix(""): file for file in files}
    if len(there) < len(files):
        twice = [file for file in files if file not in there.values()]
        checks.fail(name, "one file of a name", some(twice, "whose name another one has"))
    places = {p.file: p.file.relative_to(p.root).with_suffix("") for p in pictures}
    same_place, own = Counter(places.values()), Counter(place.name for place in places.values())
    theirs = Counter(place.name for place in there)
    alone = {place.name: file for place, file in there.items() if theirs[place.name] == 1}
    found = {}
    for one in pictures:
        place = places[one.file]
        file = there.get(one.root.absolute().name / place)
        if file is None and same_place[place] == 1:
            file = there.get(place) or (alone.get(place.name) if own[place.name] == 1 else None)
        if file is not None:
            found[one.file] = file
    return found


def with_masks(pictures: Sequence[Picture], masks: str, skip_broken: bool) -> list[Picture]:
    """Pictures with the masks in a folder, or with ``"alpha"`` their own; class images have none.

    Raises:
        ValueError: a picture without one, or one of another shape; names it.
    """
    if masks == "alpha":
        return [p if p.prior else replace(p, mask=p.file) for p in pictures]
    root = Path(masks)
    if not root.is_dir():
        checks.fail("masks", "a folder, or alpha", masks)
    own = [p for p in pictures if not p.prior]
    found = _named_alike("masks", own, root)
    bare = [p.file for p in own if p.file not in found]
    if bare:
        checks.fail("masks", f"one of its name in {root} for each image", some(bare, "without"))
    return [
        p if p.prior else replace(p, mask=found[p.file])
        for p in pictures
        if p.prior or _is_of_its_shape(found[p.file], p, skip_broken)
    ]


def read_pictures(
    folders: Sequence[DataFolder],
    prompt: str | None = None,
    skip_broken: bool = False,
    beside: Sequence[Path] = (),
) -> list[Picture]:
    """The images of some folders, in the order of folders and names.

    Args:
        folders: what :class:`DataFolder` says.
        prompt: caption of images that have none, and whose folder has none.
        skip_broken: leave out what can't be read, with one warning for each.
        beside: folders that are not trained on where they lie among the images: of masks, of
            conditioning or validation images, of what a run writes.

    Raises:
        ValueError: a folder that is none or holds no images, captions that are missing or without
            an image, an image that can't be read; names it.
    """
    return [
        picture for folder in folders for picture in _of_folder(folder, prompt, skip_broken, beside)
    ]


def _of_folder(
    folder: DataFolder, prompt: str | None, skip_broken: bool, beside: Sequence[Path]
) -> list[Picture]:
    root = folder.folder
    if not root.is_dir():
        checks.fail("data", "a folder", f"{root}, which is none")
    files = visible_files(root, SUFFIXES)
    listed = [file for file in visible_files(root, (".jsonl",)) if file.name == METADATA]
    hints: dict[Path, Path] = {}
    for metadata in listed:
        hints |= _hints(metadata)
    steering = {file.resolve() for file in hints.values()}
    within = root.resolve()
    inner = [one.resolve() for one in beside]
    folders = [one for one in inner if one != within and one.is_relative_to(within)]
    files = [
        file
        for file in files
        if file.resolve() not in steering
        and not any(file.resolve().is_relative_to(one) for one in folders)
    ]
    if not files:
        others = visible_files(root, _TABLES)
        got = f"{others[0]}, whose layout is not read" if others else "none"
        checks.fail("data", f"images ({' '.join(SUFFIXES)}) in {root}", got)
    _check_names(files)
    captions: dict[Path, str] = {}
    for metadata in listed:
        captions |= read_captions(metadata, files)
    found, bare = [], []
    for file in files:
        repeats, caption = folder.repeats, captions.get(file) or _beside(file)
        below = [of_kohya(part) for part in file.relative_to(root).parts[:-1]]
        named = of_kohya(root.name) if folder.repeats == 1 and not any(below) else None
        for repeated in filter(None, [named, *below]):
            repeats, caption = repeats * repeated[0], caption or folder.prompt or repeated[1]
        caption = caption or folder.prompt or prompt
        if caption is None:
            bare.append(file)
            continue
        try:
            size = picture_size(file)
        except ValueError as error:
            report(f"{file}: {error}", skip_broken)
            continue
        hint = hints.get(file.resolve())
        found.append(Picture(file, caption, size, repeats, folder.prior, hint=hint, root=root))
    if bare:
        wanted = f"a caption for each image ({METADATA}, a .txt beside it, or a prompt for all)"
        others = visible_files(root, _TABLES)
        more = f" ({others[0].name} is not read)" if others else ""
        checks.fail("data", wanted, some(bare, "images without") + more)
    if not found:
        checks.fail("data", f"an image that can be read in {root}", "none")
    return found


def _hints(metadata: Path) -> dict[Path, Path]:
    """The conditioning images in a ``metadata.jsonl``, by image, whose path is resolved.

    Raises:
        ValueError: a line that can't be read, or one that is not there; names it.
    """
    found = {}
    for number, entry in read_entries(metadata):
        named = [entry[key] for key in _HINTS if key in entry]
        if not named:
            continue
        where = f"{metadata}, line {number}"
        if not isinstance(named[0], str) or not (metadata.parent / named[0]).is_file():
            checks.fail(where, "a conditioning image that is there", repr(named[0]))
        found[(metadata.parent / entry["file_name"]).resolve()] = metadata.parent / named[0]
    return found


def checked(pictures: Iterable[Picture], skip_broken: bool) -> list[Picture]:
    """Those that can be read to the end.

    Raises:
        ValueError: one can't be, and is not to be skipped; names it.
    """
    found = []
    for picture in pictures:
        try:
            picture.check()
        except ValueError as error:
            report(str(error), skip_broken)
        else:
            found.append(picture)
    return found


def report(message: str, skip: bool) -> None:
    """Raise a ValueError, or warn of what is skipped."""
    if not skip:
        raise ValueError(message)
    warnings.warn(f"{message}; skipped", stacklevel=2)


def _beside(file: Path) -> str | None:
    """The caption in the file of the image's name; None for none."""
    for suffix in _BESIDE:
        text = file.with_suffix(suffix)
        if text.is_file():
            return " ".join(read_text(text).split())
    return None


def _check_names(files: Sequence[Path]) -> None:
    """Two images that would share one caption are a mistake of the folder."""
    stems = Counter(file.with_suffix("") for file in files)
    twice = [file for file in files if stems[file.with_suffix("")] > 1 and _beside(file)]
    if twice:
        checks.fail("data", "a name of its own for each image", some(twice, "that share a caption"))
