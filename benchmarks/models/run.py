"""From what is asked for to rows on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..lib.environment import GPU, environment
from . import ladder
from . import variants as ways
from .limits import limit_seconds, step_cost
from .measure import measure, reason, release
from .networks import KINDS, Networks, truth_dtype
from .store import Group, Results

WHATS = (*ways.WORK, "ladder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def groups(
    models: Iterable[str], whats: Iterable[str], batches: Iterable[int], dtype: str, steps: int
) -> list[Group]:
    """Everything to measure, a model's groups together."""
    whats, batches = list(whats), list(batches)
    return [
        Group(what, model, dtype, batch, 1 if what == "unet" else steps)
        for model in models
        for batch in batches
        for what in whats
    ]


def run(
    wanted: Iterable[Group],
    results: Results,
    *,
    compiles: bool,
    budget: float,
    say: Callable[[str], None],
) -> None:
    """Measure what the folder doesn't have yet; each group is written as it is finished.

    Args:
        wanted: the groups.
        results: where rows go; those of this code and machine are kept.
        compiles: whether torch.compile is among the variants.
        budget: seconds to measure each group for, besides building and truth.
        say: called with a line as work goes on.
    """
    networks: Networks | None = None
    facts = environment()
    for group in wanted:
        if results.current(group, facts) and not (compiles and _lacks_compiled(results, group)):
            say(f"{group}: measured before with this code on this machine, kept")
            continue
        say(f"{group} ...")
        kind, dtype = KINDS[group.model], DTYPES[group.dtype]
        if networks is None or (networks.kind, networks.dtype) != (kind, dtype):
            networks = None
            release()
            networks = Networks(kind, dtype, torch.device("cuda" if GPU else "cpu"))
        try:
            with torch.no_grad(), _full_precision():
                rows = _measured(group, networks, compiles, budget)
        except Exception as error:  # before any variant: the model itself, or its truth
            names = ladder.ROWS if group.what == "ladder" else ways.TITLES
            rows = [{"variant": name, "reason": reason(error)} for name in names]
            networks = None
        shape = [2 * group.batch, kind.unet.in_channels, kind.side, kind.side]
        about = {"weights": "random", "shape": shape}
        about["truth"] = str(truth_dtype(dtype)).removeprefix("torch.")
        results.add(group, [about | row for row in rows], facts)
        release()


def _lacks_compiled(results: Results, group: Group) -> bool:
    return any(row.get("reason") == ways.NOT_COMPILED for row in results.of(group))


def _measured(
    group: Group, networks: Networks, compiles: bool, budget: float
) -> list[dict[str, Any]]:
    images, steps = group.batch, group.steps
    if group.what == "ladder":
        return _with_limit(ladder.measure_ladder(networks, images, steps, budget), group, networks)
    variants, truth = ways.WORK[group.what]
    rows = measure(
        variants(networks, images, steps, compiles),
        lambda: truth(networks, images, steps),
        images=None if group.what == "unet" else images,
        steps=steps,
        budget=budget,
    )
    return rows if group.what == "pipeline" else _with_limit(rows, group, networks)


def _with_limit(
    rows: list[dict[str, Any]], group: Group, networks: Networks
) -> list[dict[str, Any]]:
    """The cost of a step with all rewrites, which is what is needed; its limit on this GPU."""
    cost = step_cost(networks.kind, networks.dtype, group.batch)
    seconds = limit_seconds(cost, networks.dtype)
    for row in rows:
        if "reason" in row:
            continue
        if group.what != "ladder":
            row |= {"bytes": cost.total.bytes, "flops": cost.total.flops}
        if seconds is not None:
            row |= {
                "limit_steps_per_s": 1 / seconds,
                "share_of_limit": row["steps_per_s"] * seconds,
            }
    return rows


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32: no TF32 in any variant, nor in the truth of half precision."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
