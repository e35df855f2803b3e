"""An op: one function with several implementations, known to autograd and compilers."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autocast, checks
from . import backend as _backend
from .backend import BACKENDS, Backend, BackendError

_LIBRARY = torch.library.Library("diffusion_fast", "FRAGMENT")
_MOST = 4096  # signatures that an op remembers
_watchers = torch._C._len_torch_dispatch_stack
_any_autocast, _is_compiling = torch._C._is_any_autocast_enabled, torch.compiler.is_compiling
_grad_enabled, _functorch_level = torch.is_grad_enabled, torch._C._functorch.maybe_current_level
NO_TRANSFORM = "torch.func and forward-mode AD transform PyTorch's own functions only"
NO_GRADIENT = "a gradient is needed"
PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = (int, float, bool)
Found = TypeVar("Found")


class Resolved(NamedTuple):
    """What computes calls of one signature.

    Attributes:
        call: takes an op's arguments, in eager code.
        run: computes without a gradient; the registered operator's way.
        backend: the backend's name.
        hidden: whether watchers of PyTorch's operators would miss the call.
    """

    call: Callable[..., Any]
    run: Callable[..., Any]
    backend: str
    hidden: bool


class Op:
    """A named function ``torch.ops.diffusion_fast.<name>`` with a reference and faster backends.

    Eager calls run a backend directly, so that on a CPU an op costs little more than its PyTorch
    code. Under ``torch.compile`` and ``torch.export``, on the meta device, and for kernels of which
    a gradient is recorded, the call goes through the registered operator, which has a fake
    (shape-only) version and a gradient.

    Args:
        name: operator and op are known by it.
        reference: the definition in plain PyTorch. Its annotated signature is the op's.
        fake: the same signature; returns empty tensors of the right shapes, dtypes and strides.
        public: the function that users call, for :func:`~.explain.explain`.
        check: raises ValueError or TypeError for arguments of the same signature that don't fit.
            It is asked once per signature, so it looks at nothing else.
        values: as ``check``, for the numbers in tensors; asked at every eager call.
        policy: what autocast does to the arguments, see :mod:`.autocast`.
        recorded: returns the arguments for a call of which a gradient is recorded.
        mutates: names of the arguments that are written.
        data: how many of the last arguments no choice depends on.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        public: Callable[..., Any] | None = None,
        check: Callable[..., None] | None = None,
        values: Callable[..., None] | None = None,
        policy: Callable[..., autocast.Policy] | None = None,
        recorded: Callable[..., tuple[Any, ...]] | None = None,
        mutates: Sequence[str] = (),
        data: int = 0,
    ) -> None:
        self.name, self.reference, self.public = name, reference, public
        self._check, self._values, self._policy = check, values, policy
        self._recorded = recorded
        parameters = inspect.signature(reference).parameters.values()
        self._defaults = tuple(parameter.default for parameter in parameters)
        self._keyed = len(parameters) - data
        self._function: type[torch.autograd.Function] | None = None
        # By signature, also of functions that are kept; what a backend lacks here, by its name.
        self._found: dict[Any, Any] = {}
        self.last_ran: str | None = None
        self.backends = [Backend("reference", lambda: reference, composite=True)]
        _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=mutates))
        registered = functools.partial(self, _registered=True)
        _LIBRARY.impl(name, registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffusion_fast::{name}", fake, lib=_LIBRARY)
        self.torch_op = getattr(torch.ops.diffusion_fast, name).default
        _backend.known_ops[name] = self

    def autograd(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Register the gradient; see :func:`torch.library.register_autograd`."""
        torch.library.register_autograd(
            f"diffusion_fast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
        self._function = _function(setup_context, backward)

    def add(self, backend: Backend) -> None:
        """Add a backend. It takes its place in the order of :data:`~.backend.BACKENDS`."""
        self.backends.append(backend)
        self.backends.sort(key=lambda one: BACKENDS.index(one.name))

    def __call__(self, *args: Any, _registered: bool = False) -> Any:
        """Check the arguments and compute, as PyTorch's own function would under autocast.

        The registered operator calls it too, below autocast and autograd.
        """
        if _registered:  # PyTorch leaves out defaults at the end
            args = (*args, *self._defaults[len(args) :])
        elif _any_autocast() and autocast.enabled(args[0]):
            return self._under_autocast(args)
        elif _is_compiling():
            return self._through(args)
        grad = _grad_enabled()
        # All that a choice can depend on, in one flat tuple: it is made at every call.
        parts: list[Any] = [_backend.overrides, grad, _functorch_level(), forward_ad._current_level]
        for a in args[: self._keyed]:
            if a is None:
                parts.append(None)
            elif isinstance(a, Tensor):
                parts += (a.__class__, a.shape, a.stride(), a.dtype, a.device)
                parts.append(grad and a.requires_grad)
            elif isinstance(a, (list, tuple)):
                parts.append(len(a))
                for e in a:
                    if isinstance(e, Tensor):
                        strides = e.layout == torch.strided and e.stride()
                        parts += (e.shape, strides, e.dtype, e.device)
                    else:
                        parts += (e.__class__, e)
            else:
                parts += (a.__class__, a)
        key: Any = tuple(parts)
        try:
            found = self._found.get(key)
        except TypeError:  # a value that no signature can hold: sizes of a trace, or none of ours
            key, found = None, None
        call, run, self.last_ran, hidden = found or self.resolve(key, args)
        if _registered:
            return run(*args)
        if hidden and _watchers():
            return self._through(args)
        if self._values is not None:
            self._values(*args)
        return call(*args)

    def _under_autocast(self, args: tuple[Any, ...]) -> Any:
        args, dtype = self._policy(*args) if self._policy is not None else (args, None)
        with torch.autocast(args[0].device.type, enabled=False):
            result = self(*args)
        return result if dtype is None else result.to(dtype)

    def _through(self, args: tuple[Any, ...]) -> Any:
        """A call of the registered operator: in a trace, or beside what watches operators."""
        if self._check is not None:
            self._check(*args)
        return (self._recording if checks.needs_gradient(*args) else self.torch_op)(*args)

    def resolve(self, key: tuple[Any, ...] | None, args: tuple[Any, ...]) -> Resolved:
        """What computes all calls of a signature, asked at the first of them.

        Args:
            key: the signature, under which the answer is kept. Of tensors their kind counts in it,
                not the numbers in them nor where they begin in memory; of lists the elements; of
                other values all. None: nothing is kept.
            args: the call's arguments.

        Raises:
            BackendError: the backend asked for can't run them.
            ValueError, TypeError: they don't fit, or each other.
        """
        if self._check is not None:
            self._check(*args)
        if isinstance(args[0], Question):
            raise Answer(self, tuple(map(_answered, args)))
        inner = [e for a in args if isinstance(a, (list, tuple)) for e in a]
        if any(isinstance(a, numbers.Number) and type(a) not in NUMBERS for a in (*args, *inner)):
            found = _of_plain_numbers(self.resolve(None, tuple(map(_plain, args))))
        else:
            found = self._asked(args)
        if key is not None:
            if len(self._found) >= _MOST:
                self._found.clear()
            self._found[key] = found
        return found

    def resolved(self, *args: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """All arguments of a call of the registered operator, and what computes it."""
        args = (*args, *self._defaults[len(args) :])
        return args, self.resolve(None, args).run

    def kept(self, decide: Callable[..., Found]) -> Callable[..., Found]:
        """The same function, asked once for each signature until :meth:`forget`.

        It may depend on shape, dtype and device of tensors, on other values and on the backends
        asked for. Where a value can't be hashed nothing is kept.
        """

        def answer(*args: Any) -> Found:
            key: Any = [decide, _backend.overrides]
            for a in args:
                key += (a.shape, a.dtype, a.device) if isinstance(a, Tensor) else (a.__class__, a)
            key = tuple(key)
            try:
                found: Found | None = self._found.get(key)
            except TypeError:
                return decide(*args)
            if found is None:
                found = self._found[key] = decide(*args)
            return found

        return answer

    def forget(self) -> None:
        """Ask again, as in a new process: for tests, which change what machines answer."""
        self._found.clear()

    def _recording(self, *args: Any) -> Any:
        """The registered operator, whose gradient is recorded."""
        return self.torch_op(*(args if self._recorded is None else self._recorded(*args)))

    def _recording_eagerly(self, run: Callable[..., Any], *args: Any) -> Any:
        """The same without the registered operator, which costs five times as much."""
        assert self._function is not None
        return self._function.apply(
            *(args if self._recorded is None else self._recorded(*args)), run
        )

    def _asked(self, args: tuple[Any, ...]) -> Resolved:
        """The first backend, of those asked for, that can and will run the call."""
        choices = _backend.overrides
        transformed = _functorch_level() is not None or forward_ad._current_level >= 0
        asked = dict(choices.per_op).get(self.name, choices.everywhere)
        tensors = [value for value in args if isinstance(value, Tensor)]
        gradient = _grad_enabled() and any(one.requires_grad for one in tensors)
        why: Any = ["not implemented for this op"]
        for candidate in self.backends:
            if asked in ("auto", candidate.name):
                why = self._found.get(candidate.name)
                if why is None:
                    why = candidate.machine() if candidate.machine is not None else []
                    self._found[candidate.name] = why
                if not why and transformed and not candidate.composite:
                    why = [NO_TRANSFORM]
                if not why and gradient and candidate.forward_only:
                    why = [NO_GRADIENT]
                if not why and candidate.supports is not None:
                    why = candidate.supports(*args)
                if not why and candidate.ready is not None:
                    why = candidate.ready(*args)
                if not why:
                    break
        if why:
            told = f"{self.name}: backend {asked!r} was asked for and can't run: "
            raise BackendError(told + "; ".join(why))
        run = candidate.run
        records = gradient and not candidate.composite
        foreign = not candidate.composite and any(type(one) not in PLAIN for one in tensors)
        through = foreign or tensors[0].is_meta
        if records and not through and self._function is not None:
            call: Callable[..., Any] = functools.partial(self._recording_eagerly, run)
        elif records:
            call = self._recording
        else:
            call = self.torch_op if through else run
        return Resolved(call, run, candidate.name, candidate.hidden)


class Question(Tensor):
    """A tensor of a call that is never computed: its first op says who would compute it."""


class Answer(Exception):
    """Where the call of a :class:`Question` ends: its first op, and that op's arguments."""

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        super().__init__(op.name)
        self.op, self.op_args = op, args


def asked(value: Any) -> Any:
    """A tensor as a :class:`Question`; anything else as it is."""
    return value.as_subclass(Question) if type(value) in PLAIN else value


def _answered(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Question) else value


def _function(
    setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The gradient for eager calls. The last argument computes; lists have no gradient."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = args[-1](*args[:-1])
            setup_context(ctx, args[:-1], output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            found = backward(ctx, *gradients)
            found = found if isinstance(found, tuple) else (found,)
            return *(None if isinstance(one, list) else one for one in found), None

    return Recorded


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's, also in a list."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if not isinstance(value, numbers.Number) or type(value) in NUMBERS:
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]


def _of_plain_numbers(found: Resolved) -> Resolved:
    def converted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*map(_plain, args))

    return found._replace(call=converted(found.call), run=converted(found.run))
