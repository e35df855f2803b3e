"""A function of tensors without its Python: the operators that it called are called again.

What a CUDA graph does for a GPU, for a small network on a CPU: there most of a step is Python that
walks over blocks, looks at arguments and finds the kernel of each op, each time with the same
answers. A function may take gradients: then its backward pass is among the operators, and calling
them again needs no graph of autograd.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ...ops.dispatch import known_ops
from ..graphs.capture import draws
from ..graphs.policy import surroundings
from .plan import RewritePlan

MOST = 32  # kinds of arguments whose operators are kept
# Calls of a kind before the one that is recorded: in the first weights are packed and kernels are
# found, and so few steps are not worth a recording.
PLAIN = 2
_CPU = torch.device("cpu")
# Whose memory something writes that PyTorch doesn't see.
_UNWRITTEN = [
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
]
_watchers = torch._C._len_torch_dispatch_stack
_PLAIN_VALUES = (bool, int, float, str)


def recorded(function: Callable[..., Any], plan: RewritePlan) -> Callable[..., Any]:
    """The function, as a :class:`Recorded` one where a plan says so."""
    return Recorded(function) if "recorded_step" in plan.on else function


class Recorded:
    """A function whose operators are recorded at the third call of a kind, then called alone.

    Arguments are of one kind that agree in shapes, strides and dtypes of their tensors, in which of
    these are the same, and in all that stands beside them. What else the function reads must stay
    as it is, but for the numbers in tensors. What reads one of these on the host, draws random
    numbers, or writes memory past PyTorch's operators is never recorded. With gradients enabled,
    under autocast, and where something watches PyTorch's operators the function is called as it is.

    Args:
        function: takes nested lists, tuples and dicts of tensors, numbers, strings and None, and
            returns lists and tuples of them.
        gradients: whether it enables gradients, and takes some.
    """

    def __init__(self, function: Callable[..., Any], gradients: bool = False) -> None:
        self.function, self._gradients = function, gradients
        # Of each kind what computes it; how often it was called until then; None: nothing can.
        self._replays: OrderedDict[Hashable, Callable[..., Any] | int | None] = OrderedDict()

    def __call__(self, *args: Any) -> Any:
        if _watchers() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.function(*args)
        tensors: dict[int, Tensor] = {}
        kind = _kind(args, tensors), surroundings(_CPU)
        found = self._replays.get(kind, 0)
        if callable(found):
            return found(*tensors.values())
        if found == PLAIN:
            with _Tape(tensors.values(), self._gradients) as tape:
                result = self.function(*args)
            self._keep(kind, tape.replay(result))
            return result
        if found is not None:
            self._keep(kind, found + 1)
        return self.function(*args)

    def _keep(self, kind: Hashable, found: Callable[..., Any] | int | None) -> None:
        self._replays[kind] = found
        if len(self._replays) > MOST:
            self._replays.popitem(last=False)


def _kind(args: tuple[Any, ...], tensors: dict[int, Tensor]) -> Hashable:
    """The kind of nested arguments; adds their tensors, each once, by their identities."""
    parts: list[Any] = [len(args)]
    values = list(args)
    for value in values:  # and what is inside them, which joins behind
        if isinstance(value, Tensor):
            if id(value) in tensors:
                parts.append(list(tensors).index(id(value)))
            else:
                tensors[id(value)] = value
                parts += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, (list, tuple)):
            parts += (value.__class__, len(value))
            values += value
        elif isinstance(value, Mapping):
            parts += (value.__class__, tuple(value))
            values += value.values()
        elif value is None or isinstance(value, _PLAIN_VALUES):
            parts += (value.__class__, value)
        else:
            wanted = "tensors, numbers, strings or None"
            raise TypeError(f"expected {wanted}, got {type(value).__name__}")
    return tuple(parts)


class _Tape(TorchDispatchMode):
    """Writes down the calls of PyTorch's operators, as a function of some tensors.

    Args:
        inputs: the tensors that the function is to take.
        gradients: whether it takes gradients, by its own.
    """

    def __init__(self, inputs: Collection[Tensor], gradients: bool) -> None:
        super().__init__()
        self._gradients = gradients
        self._refused = False  # whether something can't be done again so
        self._names: Any = WeakIdKeyDictionary()  # of tensors
        self._lines: list[tuple[str, list[str]]] = []  # a line, and what it reads
        self._known: dict[str, Any] = {}  # what lines name beside tensors that they make
        self._ours = {op.torch_op: op for op in known_ops.values()}
        self._made: dict[int, StorageWeakRef] = {}  # memory that a line, or the caller, filled
        self._inputs = [f"x{i}" for i in range(len(inputs))]
        for name, one in zip(self._inputs, inputs, strict=True):
            self._names[one] = name
            if gradients:  # autograd saves what it reads, at times as another tensor
                self._fills(one)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, called = kwargs or {}, func
        if func in self._ours:
            # As the function itself would have it: in a forward pass that is below autograd here.
            backward = torch._C._current_autograd_node() is not None
            with torch.set_grad_enabled(self._gradients and not backward):
                args, called = self._ours[func].resolved(*args)
            # Part of a forward pass that is computed again has gradients, which nothing tells here.
            self._refused |= backward and not self._ours[func].name.endswith("_backward")
        result = called(*args, **kwargs)
        made = result if isinstance(result, (list, tuple)) else [result]
        past = func.overloadpacket in _UNWRITTEN and result.numel() > 0
        if past or draws(func) or not all(isinstance(one, Tensor | None) for one in made):
            self._refused = True
        elif not self._refused:
            self._write(called, args, kwargs, result, made)
        return result

    def _write(self, called: Any, args: Any, kwargs: Any, result: Any, made: Any) -> None:
        reads: list[str] = []
        given = [self._text(one, reads) for one in args]
        given += [f"{name}={self._text(one, reads)}" for name, one in kwargs.items()]
        number = len(self._lines)
        names = []
        for i, one in enumerate(made):
            names.append("_" if one is None else self._names.get(one, f"t{number}_{i}"))
            if one is not None:
                self._names[one] = names[-1]
                self._fills(one)
        left = f"[{', '.join(names)}]" if isinstance(result, (list, tuple)) else names[0]
        self._known[f"f{number}"] = called
        self._lines.append((f"{left} = f{number}({', '.join(given)})", [*reads, *names]))

    def _text(self, value: Any, reads: list[str]) -> str:
        """How a line names a value."""
        if isinstance(value, Tensor):
            name = self._names.get(value)
            if name is None:  # the function's own, such as a weight
                self._refused |= self._is_made(value)
                name = self._names[value] = self._named(value)
            if name[0] != "k":
                reads.append(name)
            return str(name)
        if isinstance(value, (list, tuple)):
            before = len(reads)
            parts = [self._text(one, reads) for one in value]
            if len(reads) == before:
                return self._named(value)
            return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)},)"
        return self._named(value)

    def _fills(self, value: Tensor) -> None:
        if value.layout == torch.strided:
            storage = StorageWeakRef(value.untyped_storage())
            self._made[storage.cdata] = storage

    def _is_made(self, value: Tensor) -> bool:
        """Whether the memory of a tensor that no line names is filled anew at each call."""
        if value.layout != torch.strided:
            return False
        storage = self._made.get(value.untyped_storage()._cdata)
        return storage is not None and not storage.expired()

    def _named(self, value: Any) -> str:
        name = f"k{len(self._known)}"
        self._known[name] = value
        return name

    def replay(self, result: Any) -> Callable[..., Any] | None:
        """A function of the inputs that gives what the recorded one gave; None where none can."""
        returned: list[str] = []
        end = f"return {self._text(result, returned)}"
        if self._refused:
            return None
        last = {name: number for number, (_, names) in enumerate(self._lines) for name in names}
        body = []
        for number, (line, names) in enumerate(self._lines):
            over = [n for n in dict.fromkeys(names) if last[n] == number and n not in returned]
            body.append(line + "".join(f"; {name} = None" for name in over if name[0] == "t"))
        # As defaults, all of them are local names.
        known = [f"{name}={name}" for name in self._known]
        head = f"def replay({', '.join([*self._inputs, *known])}):"
        space: dict[str, Any] = dict(self._known)
        exec("\n    ".join([head, *body, end]), space)
        made: Callable[..., Any] = space["replay"]
        return made
