"""Tensors in files: their names and shapes first, the numbers only when all of these fit."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import CheckpointError

Rename = Callable[[str], str | None]  # a name in a file -> the model's name; None: not read

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_CHUNK = 2**22  # elements

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or a view of one, that has not been read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def through(self, view: Callable[[Tensor], Tensor]) -> Stored:
        """A view of this tensor, such as some of its rows."""
        shape = tuple(view(torch.empty(self.shape, device="meta")).shape)
        return dataclasses.replace(self, shape=shape, view=lambda x: view(self.view(x)))


@dataclass(frozen=True)
class Source(Generic[Config]):
    """A model that hasn't been built: its config, and its tensors in files.

    Attributes:
        path: what error messages name.
        config: of the model.
        tensors: by their names in the file, without a prefix that all share.
        file_name: that name for a name of the model's.
    """

    path: Path
    config: Config
    tensors: Mapping[str, Stored]
    file_name: Callable[[str], str] = str

    def build(
        self,
        make: Callable[[Config], Model],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Model:
        """The model in eval mode, made by ``make(config)`` on the meta device and then filled.

        Raises:
            CheckpointError: as :func:`fill`, or the config asks for tensors of impossible size.
        """
        try:
            with torch.device("meta"):
                model = make(self.config)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch counts in 64 bits
            message = f"{self.path}: can't be built from its config: {error}"
            raise CheckpointError(message) from error
        fill(model, self.tensors, self.path, dtype, device, self.file_name)
        return model.eval()


def stored(files: Sequence[Path], rename: Rename = str) -> dict[str, Stored]:
    """The tensors in some files, by name; nothing but the files' headers is read.

    Args:
        files: safetensors files, or pickles of tensors (``.ckpt``, ``.bin``, ``.pt``, ``.pth``).
            Pickles are opened with ``weights_only=True``, so that no code in them can run, and
            mapped like safetensors files unless they are of the format before torch 1.6.
        rename: what to call a tensor of a name, or None to leave it out.

    Raises:
        CheckpointError: a file can't be read, a pickle holds more than tensors, two tensors of the
            same name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with _open(file) as (shapes, _):
            for name, shape in shapes.items():
                new = rename(name)
                if new is None:
                    continue
                if new in found:
                    raise CheckpointError(f"{file}: repeated: {new}")
                found[new] = Stored(file, name, shape)
    return found


def read(
    tensors: Mapping[str, Stored],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors themselves. On the CPU those of the right dtype stay mapped from their file.

    A file is opened anew for each sixteenth of the numbers: what was mapped to convert or copy one
    part leaves the memory before the next. A pickle that can't be mapped is read whole.

    Raises:
        CheckpointError: a file can't be read.
    """
    state = {}
    for names in _chunks(tensors):
        with _open(tensors[names[0]].file) as (_, get):
            for name in names:
                value = tensors[name].view(get(tensors[name].name))
                state[name] = value.to(device=device, dtype=dtype).contiguous()
    return state


def fill(
    model: nn.Module,
    tensors: Mapping[str, Stored],
    source: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    file_name: Callable[[str], str] = str,
) -> None:
    """Give a model on the meta device its parameters, without a second copy of them.

    Names and shapes are compared before any tensor is read. A tensor [C, D] also fits where
    [C, D, 1, 1] is expected, and the other way round.

    Args:
        model: with all parameters and buffers on the meta device, left as it is on errors.
        tensors: by their names in the file.
        source: what error messages name.
        dtype: of the loaded model; None for that of the files.
        device: where to put it.
        file_name: the name in the file for a name of the model's; the same by default.

    Raises:
        CheckpointError: a damaged file, or missing, extra or misshapen tensors (listed).
    """
    names = {file_name(name): name for name in model.state_dict()}
    expected = {file_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    state = read(_fitted(expected, tensors, source), dtype, device)
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1 or not all(value.is_floating_point for value in dtypes):
        kinds = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"{source}: expected one floating dtype, got {kinds}; pass dtype=")
    own = {names[name]: value for name, value in state.items()}
    model.load_state_dict(own, strict=True, assign=True)


def _fitted(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored], source: Path
) -> dict[str, Stored]:
    problems = [f"missing: {n} {list(expected[n])}" for n in expected.keys() - tensors.keys()]
    fitted = {}
    for name, tensor in tensors.items():
        shape = expected.get(name)
        if shape is None:
            problems.append(f"extra: {name} {list(tensor.shape)}")
        elif tensor.shape == shape:
            fitted[name] = tensor
        elif _differ_by_ones(tensor.shape, shape):
            fitted[name] = tensor.through(partial(torch.reshape, shape=shape))
        else:
            got = list(tensor.shape)
            problems.append(f"misshapen: {name} expected {list(shape)}, got {got}")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        count = f"{len(problems)} of its tensors" if len(problems) > 1 else "one of its tensors"
        raise CheckpointError(f"{source}: not this model's weights, {count}:{lines}")
    return fitted


def _differ_by_ones(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """A matrix, once as the kernel of a 1x1 convolution."""
    short, long = sorted((first, second), key=len)
    return len(short) == 2 and long == short + (1,) * (len(long) - 2)


def _chunks(tensors: Mapping[str, Stored]) -> Iterator[list[str]]:
    """Names of tensors in one file, a sixteenth of all the numbers or _CHUNK of them at a time."""
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in tensors.items()}
    limit = max(_CHUNK, sum(sizes.values()) // 16)
    chunk: list[str] = []
    for name in sorted(tensors, key=lambda name: tensors[name].file):
        file = tensors[name].file
        other = chunk and tensors[chunk[0]].file != file
        full = sum(sizes[n] for n in chunk) + sizes[name] > limit and _mappable(file)
        if chunk and (other or full):
            yield chunk
            chunk = []
        chunk.append(name)
    if chunk:
        yield chunk


def _mappable(file: Path) -> bool:
    return file.suffix not in PICKLES or zipfile.is_zipfile(file)


Opened = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]  # shapes by name, reader


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Opened]:
    if file.suffix in PICKLES:
        state = _unpickle(file)
        yield {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__
        return
    try:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            yield shapes, handle.get_tensor
    except (SafetensorError, OSError) as error:
        message = f"{file}: truncated, or not a safetensors file: {error}"
        raise CheckpointError(message) from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, which training scripts put into another dict."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=_mappable(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, this pickle is damaged or holds more than tensors, and reading the"
            " rest could run any program hidden in it. Use a safetensors file of the same model:"
            f" {error}"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{file}: truncated, or not a file of torch.save: {error}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors, got {type(found).__name__}")
    return {
        name: value.detach()
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
