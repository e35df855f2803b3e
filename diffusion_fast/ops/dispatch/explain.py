"""Which backend an op runs on, and why not the others: asked without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import backend as _backend
from . import checks
from .backend import BACKENDS, known_ops
from .op import NO_GRADIENT, NO_TRANSFORM, Answer, Op, asked

LATER = "decided at the first call"


@dataclass(frozen=True)
class Choice:
    """The backend chosen for an op, and for every other backend the reason why not.

    Examples:
        >>> with df.use_backend("reference"):
        ...     choice = df.ops.explain("geglu")
        >>> choice.backend
        'reference'
    """

    op: str
    backend: str
    rejected: dict[str, str]
    last_ran: str | None = None

    def __str__(self) -> str:
        reasons = "".join(f"\n  not {name}: {why}" for name, why in self.rejected.items())
        ran = f", last ran {self.last_ran}" if self.last_ran else ""
        return f"{self.op}: {self.backend}{ran}{reasons}"


def explain(op: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """Which backend an op runs on, and why not the others. Nothing is computed or compiled.

    Args:
        op: an op's name, such as ``"attention"``; None for all of them.
        args, kwargs: the arguments of a call of the public function, to ask about that call;
            without them the answer is about the machine.

    Returns:
        A :class:`Choice`, or a list of them; ``str()`` of one is readable. Where a measurement
        decides that was never made here, the backend is ``"decided at the first call"``.

    Raises:
        ValueError: no op of this name, or arguments that the op refuses.

    Examples:
        >>> q = torch.randn(1, 64, 8, 40)
        >>> df.ops.explain("attention", q, q, q).op
        'attention'
        >>> len(df.ops.explain()) > 10
        True
    """
    if op is None:
        return [_choice(known, None) for known in known_ops.values()]
    if op not in known_ops:
        raise ValueError(f"op: expected one of {', '.join(known_ops)}, got {op!r}")
    known = known_ops[op]
    if not args and not kwargs:
        return _choice(known, None)
    call = known if known.public is None else known.public
    try:
        call(*map(asked, args), **{name: asked(value) for name, value in kwargs.items()})
    except Answer as answer:
        return _choice(answer.op, answer.op_args)
    raise ValueError(f"{op}: expected the arguments of an eager call, which reaches an op")


def _choice(op: Op, args: tuple[Any, ...] | None) -> Choice:
    """About a call, or about the machine where ``args`` is None."""
    rejected = dict.fromkeys(BACKENDS, "not implemented for this op")
    chosen, wanted = "", _backend.requested(op.name)
    for candidate in op.backends:
        why: list[str] | None = [] if candidate.machine is None else candidate.machine()
        if not why and args is not None and checks.transformed() and not candidate.composite:
            why = [NO_TRANSFORM]
        if not why and args is not None and checks.needs_gradient(*args) and candidate.forward_only:
            why = [NO_GRADIENT]
        if not why and args is not None and candidate.supports is not None:
            why = candidate.supports(*args)
        if not why and args is not None and candidate.foresee is not None:
            why = candidate.foresee(*args)
        if not why and wanted not in ("auto", candidate.name):
            why = [f"{wanted} was asked for"]
        if why is None and not chosen:
            chosen = LATER
        elif not why and not chosen:
            chosen = candidate.name
            continue
        rejected[candidate.name] = "; ".join(why or [LATER if chosen == LATER else _faster(chosen)])
    rejected.pop(chosen, None)
    return Choice(op.name, chosen or f"none ({wanted} can't run)", rejected, op.last_ran)


def _faster(chosen: str) -> str:
    return f"{chosen} is faster"
