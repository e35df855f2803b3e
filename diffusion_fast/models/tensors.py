"""Tensors in files: their names and shapes first, the numbers only when all of these fit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import CheckpointError
from . import contents

Rename = Callable[[str], str | None]  # a name in a file -> the model's name; None: not read

PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # what a file that can't be told otherwise is
_CHUNK = 2**22  # elements
# Classes that training scripts leave beside the weights. An inert object takes their place: their
# own code is neither needed nor run.
_HARMLESS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics|omegaconf"
    r"|numpy|pathlib|typing|datetime)\..*|argparse\.Namespace|collections\.(defaultdict|deque)"
    r"|uuid\.UUID|builtins\.(int|float|str|bool|dict|list|tuple)"
)
_NESTED = ("state_dict", "model", "module")  # where training scripts put the weights

Shape = tuple[int, ...]
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
        config: the model's config.
        tensors: its tensors by their names in the file, without a prefix that all share.
        file_name: gives the name in the file for a name of the model's.
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
        files: safetensors files, or pickles of tensors (of ``torch.save``); known by what is in
            them. No code in a pickle can run, see :func:`_unpickle`. They are mapped like
            safetensors files unless they are of the format before torch 1.6.
        rename: what to call a tensor of a name, or None to leave it out.

    Raises:
        CheckpointError: a file can't be read or is of another kind (named), a pickle would run
            code, two tensors of the same name.
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
    part leaves the memory before the next. A pickle that can't be mapped is read whole. Where
    ``dtype`` is None, float8 numbers become those of a dtype that layers compute in: that of the
    other tensors, else float16 on a GPU (it holds each of them exactly) and float32 on a CPU.

    Raises:
        CheckpointError: a file can't be read.
    """
    state = {}
    for names in _chunks(tensors):
        with _open(tensors[names[0]].file) as (_, get):
            for name in names:
                value = tensors[name].view(get(tensors[name].name))
                state[name] = value.to(device=device, dtype=dtype).contiguous()
    dtypes = {v.dtype for v in state.values() if v.is_floating_point()}
    if small := {dtype for dtype in dtypes if dtype.itemsize == 1}:
        usual = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        wider = max(dtypes - small, key=lambda one: one.itemsize, default=usual)
        state = {n: v.to(wider) if v.dtype in small else v for n, v in state.items()}
    return state


def metadata(file: Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none of any other file.

    Raises:
        CheckpointError: the file can't be read.
    """
    if _is_pickle(file):
        return {}
    with _mapped(file) as handle:
        return handle.metadata() or {}


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
        model: a model with all parameters and buffers on the meta device, left as it is on errors.
        tensors: the file's tensors by their names in it.
        source: what error messages name.
        dtype: dtype of the loaded model; None for that of the files.
        device: where to put the model.
        file_name: the name in the file for a name of the model's; the same by default.

    Raises:
        CheckpointError: a damaged file, or missing or misshapen tensors, or more layers or
            adapters than the model has (listed). Of other tensors a warning tells.
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
    expected: Mapping[str, Shape], tensors: Mapping[str, Stored], source: Path
) -> dict[str, Stored]:
    compare(source, expected, {name: tensor.shape for name, tensor in tensors.items()})
    return {
        name: tensor
        if tensor.shape == expected[name]
        else tensor.through(partial(torch.reshape, shape=expected[name]))
        for name, tensor in tensors.items()
        if name in expected
    }


def compare(
    source: Path,
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    further_layers: bool = False,
) -> None:
    """Hold a file's tensors against a model's. Of tensors that it doesn't use a warning tells.

    Args:
        source: what messages name.
        expected: shapes of the model's tensors by name.
        found: shapes of the file's.
        further_layers: the file may have more layers than the model, as text encoders have that are
            used up to the last but one.

    Raises:
        CheckpointError: tensors are missing or misshapen, or extra ones would change what the model
            computes: further layers, adapters, parts of other networks (listed by name).
    """
    problems = [f"missing: {n} {list(expected[n])}" for n in expected.keys() - found.keys()]
    for name in expected.keys() & found.keys():
        shape, got = expected[name], found[name]
        if got != shape and not _differ_by_ones(got, shape):
            problems.append(f"misshapen: {name} expected {list(shape)}, got {list(got)}")
    extra = sorted(found.keys() - expected.keys())
    kinds = {re.sub(r"\d+", "0", name) for name in expected}
    layers = not further_layers and any(re.sub(r"\d+", "0", name) in kinds for name in extra)
    if problems or layers or contents.changes(extra):
        problems += [f"extra: {name} {list(found[name])}" for name in extra]
        kind = contents.by_names(found)
        looks = f" (it looks like {kind})" if kind else ""
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        count = f"{len(problems)} of its tensors" if len(problems) > 1 else "one of its tensors"
        raise CheckpointError(f"{source}: not this model's weights{looks}, {count}:{lines}")
    if extra:
        some = ", ".join(map(repr, extra[:5])) + (" and others" if len(extra) > 5 else "")
        count = f"{len(extra)} tensors" if len(extra) > 1 else "one tensor"
        warnings.warn(f"{source}: {count} that nothing here uses: {some}", stacklevel=3)


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
    if not _is_pickle(file):
        return True
    return zipfile.is_zipfile(file) and file.suffix != ".safetensors"  # torch.load believes names


def _is_pickle(file: Path) -> bool:
    """Whether a file is one of torch.save, and not a safetensors file, by its first bytes.

    Raises:
        CheckpointError: it can't be read, or is plainly neither (what it is is named).
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(contents.HEAD)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    if head[8:9] == b"{":  # behind the length of the header
        return False
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return True
    if kind := contents.by_bytes(head):
        raise CheckpointError(f"{file}: expected a file of tensors, got {kind}")
    return file.suffix in PICKLES


Opened = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]  # shapes by name, reader


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Opened]:
    if _is_pickle(file):
        state = _unpickle(file)
        yield {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__
        return
    with _mapped(file) as handle:
        names = handle.keys()
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
        yield shapes, handle.get_tensor


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        message = f"{file}: truncated, or not a safetensors file: {error}"
        raise CheckpointError(message) from error


class _Inert(dict[Any, Any]):
    """In the place of an object that holds no weights: takes anything, does nothing."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Forget what the object was."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, which training scripts put into another dict.

    torch.load's restricted unpickler makes tensors and containers, and an inert object in the
    place of one of a harmless class. Anything else is refused, so that no code in a file can run.
    """
    try:
        inert = [(_Inert, name) for name in _globals(file) if _HARMLESS.fullmatch(name)]
        mapped = _mappable(file)
        with torch.serialization.safe_globals([_Inert, *inert]), contextlib.ExitStack() as stack:
            source = file if mapped else stack.enter_context(file.open("rb"))
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file}: refused, this pickle is damaged or holds more than tensors"
            + (f" ({named[1]})" if named else "")
            + ", and reading the rest could run any program hidden in it. Use a safetensors file"
            " of the same model"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{file}: truncated, or not a file of torch.save: {error}") from error
    if isinstance(found, dict) and "string_to_param" in found:
        raise CheckpointError(f"{file}: expected a model, got an embedding (textual inversion)")
    for name in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if isinstance(found, dict) and {"image_proj", "ip_adapter"} <= found.keys():
        parts = ((name, part) for name, part in found.items() if isinstance(part, dict))
        found = {f"{name}.{key}": value for name, part in parts for key, value in part.items()}
    tensors = {
        name: value.detach()
        for name, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{file}: expected a dict of tensors, got {type(found).__name__}")
    return tensors


def _globals(file: Path) -> set[str]:
    """The classes and functions that a pickle names, by their dotted names; nothing is loaded."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:  # torch before 1.6: magic number, version, system, state
            return set().union(*(_named(stream) for _ in range(4)))
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        return set().union(*(_named(io.BytesIO(archive.read(name))) for name in names))


def _named(stream: IO[bytes]) -> set[str]:
    """What one pickle names."""
    operations = pickletools.genops(stream)
    return {str(name).replace(" ", ".") for code, name, _ in operations if code.name == "GLOBAL"}
