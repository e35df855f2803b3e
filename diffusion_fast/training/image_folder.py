"""A folder of images as a data set: with classes, with captions, or plain."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..files import AnyPath, is_visible, read_lines, visible_files
from ..ops import checks

METADATA = "metadata.jsonl"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SHOWN = 5  # names in an error message


class ImageFolder(Dataset[Any]):
    """Images of one size in [-1, 1], read when they are asked for.

    What is in the folder decides what an item is:

    - ``metadata.jsonl``, lines ``{"file_name": "a.png", "text": "a caption"}`` (the convention of
      the datasets library): (image, encode(caption));
    - subfolders with images, one for each class: (image, number of the class);
    - only images: the image.

    Hidden files and folders (``.ipynb_checkpoints``, ``._a.png``) are no data.

    Args:
        root: the folder.
        size: height and width of an item, or one number for both. Images are scaled until they
            cover it (Lanczos) and cut at the middle.
        channels: 3 for colour, 1 for grey.
        encode: makes a tensor, what the model is conditioned on, of a caption.
        caption: the key of the caption.
        broken: what to do with a file that can't be read: ``"refuse"``, or ``"skip"`` to warn and
            take the next image in its place, so that batches keep their size.

    Attributes:
        files: paths of the images, sorted.
        classes: names of the classes, sorted; None without classes.
        labels: numbers of the classes, by image; None without classes.
        captions: by image; None without captions.

    Raises:
        ValueError: an empty folder, an empty class, captions without images, images without
            captions, a line that can't be read; names it.
    """

    def __init__(
        self,
        root: AnyPath,
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        encode: Callable[[str], Tensor] | None = None,
        caption: str = "text",
        broken: str = "refuse",
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            checks.fail("root", "a folder", f"{self.root}, which is none")
        self.size = (size, size) if isinstance(size, int) else size
        for length in self.size:
            checks.positive_int("size", length)
        if channels not in (1, 3):
            checks.fail("channels", "1 or 3", channels)
        checks.one_of("broken", broken, ("refuse", "skip"))
        self.channels, self.encode, self.broken = channels, encode, broken
        self.files = visible_files(self.root, SUFFIXES)
        if not self.files:
            checks.fail("root", f"images ({' '.join(SUFFIXES)}) in {self.root}", "none")
        self.classes: list[str] | None = None
        self.captions: list[str] | None = None
        self.labels: list[int] | None = None
        if (self.root / METADATA).is_file():
            self._read_captions(self.root / METADATA, caption)
        elif folders := self._folders():
            self._find_classes(folders)
        self._reported: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        """The item of image ``index``, or with ``broken="skip"`` of the next that can be read.

        Raises:
            IndexError: there is no such image, which ends a loop over the data set.
            ValueError: it can't be read, or no image can.
        """
        index = range(len(self))[index]
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            image = self.pixels(i)
            if image is None:
                continue
            if self.captions is not None:
                assert self.encode is not None
                return image, self.encode(self.captions[i])
            return (image, self.labels[i]) if self.labels is not None else image
        checks.fail("root", "an image that can be read", f"none in {self.root}")

    def pixels(self, index: int) -> Tensor | None:
        """Image ``index`` [C, H, W] in [-1, 1]; None for one that can't be read, to be skipped.

        Raises:
            ValueError: it can't be read, and is not to be skipped.
        """
        try:
            return self._read(self.files[index])
        except ValueError as error:
            self._report(self.files[index], error)
            return None

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps  # needed here only: importing the package stays light

        from ..images import read_picture

        height, width = self.size
        picture = read_picture(path, "RGB" if self.channels == 3 else "L")
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(fitted)).view(height, width, self.channels)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1  # [C, H, W]

    def _report(self, path: Path, error: BaseException) -> None:
        message = f"{path}: {error}"
        if self.broken == "refuse":
            raise ValueError(message) from error
        if path not in self._reported:
            self._reported.add(path)
            warnings.warn(f"{message}; skipped", stacklevel=3)

    def _folders(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and is_visible(p.name))

    def _find_classes(self, folders: list[str]) -> None:
        beside = [path for path in self.files if path.parent == self.root]
        if beside:
            checks.fail("root", "images in class folders only", some(beside, "images beside them"))
        self.classes = folders
        names = [path.relative_to(self.root).parts[0] for path in self.files]
        empty = [self.root / name for name in self.classes if name not in set(names)]
        if empty:
            checks.fail("root", "images in each class folder", some(empty, "empty ones"))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[name] for name in names]

    def _read_captions(self, path: Path, key: str) -> None:
        if self.encode is None:
            checks.fail("encode", f"a function of a caption, because there is {path}", None)
        captions = read_captions(path, self.files, key)
        bare = [file for file in self.files if file not in captions]
        if bare:
            checks.fail(METADATA, "a caption for each image", some(bare, "images without"))
        self.captions = [captions[file] for file in self.files]


def read_captions(path: Path, files: Iterable[Path], key: str = "text") -> dict[Path, str]:
    """The captions in a ``metadata.jsonl``, by image.

    Args:
        path: the file; names in it are relative to its folder.
        files: images that may have a caption.
        key: the key of the caption.

    Raises:
        ValueError: a line that can't be read, a second caption of an image, or captions of images
            that are not there; names them.
    """
    captions: dict[Path, str] = {}
    known = {file.resolve(): file for file in files}
    lost = []
    for number, entry in read_entries(path):
        name, text = entry["file_name"], entry.get(key)
        if not isinstance(text, str):
            checks.fail(f"{path}, line {number}", f"a text {key!r}", text)
        file = known.get((path.parent / name).resolve())
        if file is None:
            lost.append(path.parent / name)
            continue
        if file in captions:
            raise ValueError(f"{path}, line {number}: a second caption for {name}")
        captions[file] = text
    if lost:
        checks.fail(METADATA, "an image for each caption", some(lost, "captions without"))
    return captions


def read_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a ``metadata.jsonl`` by number; each has a ``file_name``.

    Raises:
        ValueError: a line that can't be read; names it.
    """
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: can't be read as JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        if not isinstance(entry.get("file_name"), str):
            checks.fail(where, "a text 'file_name'", entry.get("file_name"))
        yield number, entry


def some(paths: list[Path], what: str) -> str:
    """How many there are of ``what``, and the first of their names."""
    names = ", ".join(str(path) for path in paths[:_SHOWN])
    return f"{len(paths)} {what}: {names}{' ...' if len(paths) > _SHOWN else ''}"
