"""From what is asked for to rows on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..lib.environment import GPU, environment
from . import by_op, ladder, learning, parts
from . import variants as ways
from .limits import limit_seconds, step_cost
from .measure import LEAST_ROUNDS, Variant, measure, reason, release
from .networks import KINDS, Networks, truth_dtype
from .steered import beside_bare, steered_truth, steered_variants
from .store import Group, Results
from .variants import BARE

Work = tuple[Callable[[Networks, int, int, bool], list[Variant]], Callable[..., Tensor]]
WORK: dict[str, Work] = {  # variants, and the truth for networks, images and steps
    "unet": (ways.step_variants, ways.step_truth),
    "loop": (ways.loop_variants, ways.loop_truth),
    "pipeline": (ways.pipeline_variants, ways.pipeline_truth),
    "vae": (parts.decode_variants, parts.decode_truth),
    "text": (parts.encode_variants, parts.encode_truth),
    "training": (learning.gradient_variants, learning.gradient_truth),
}
STEERED: Work = (steered_variants, steered_truth)
OF_THE_ENGINE = {"ladder": ladder.ROWS, "profile": (by_op.STEP,)}  # and rows that say why not
WHATS = (*WORK, *OF_THE_ENGINE)
EXACT = "exact"
NO_WAY = "not a way to compute this"
ONE_CALL = ("unet", "vae", "text", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def groups(
    models: Iterable[str], whats: Iterable[str], batches: Iterable[int], dtype: str, steps: int
) -> list[Group]:
    """Everything to measure, a model's groups together; of a steered model its step alone.

    Raises:
        ValueError: nothing is left.
    """
    whats, batches = list(whats), list(batches)
    found = [
        Group(what, model, dtype, batch, 1 if what in ONE_CALL else steps)
        for model in models
        for batch in batches
        for what in whats
        if what == "unet" or not KINDS[model].steering
    ]
    if not found:
        raise ValueError(f"--what: expected unet for a steered model, got {', '.join(whats)}")
    return found


def run(
    wanted: Iterable[Group],
    results: Results,
    *,
    compiles: bool,
    only: Collection[str] | None,
    budget: float,
    rounds: int = LEAST_ROUNDS,
    truth: str = EXACT,
    say: Callable[[str], None],
) -> None:
    """Measure what the folder doesn't have yet; each group is written as it is finished.

    Args:
        wanted: the groups.
        results: where rows go; those of this code and machine are kept.
        compiles: whether torch.compile is among the variants.
        only: names of the variants to measure, None for all.
        budget: seconds to measure each group for, besides building and truth.
        rounds: the least turns that each variant takes.
        truth: what errors are measured against: high precision, or the variant of this name.
        say: called with a line as work goes on.
    """
    networks: Networks | None = None
    facts = environment()
    for group in wanted:
        if results.current(group, facts) and not _lacks(results, group, compiles, only):
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
                rows = _measured(group, networks, compiles, only, budget, rounds, truth)
        except Exception as error:  # before any variant: the model itself, or its truth
            names = OF_THE_ENGINE.get(group.what, only or ways.TITLES)
            rows = [{"variant": name, "reason": reason(error)} for name in names]
            networks = None
        shape = [2 * group.batch, kind.unet.in_channels, kind.side, kind.side]
        about = {"weights": "random", "shape": shape}
        exact = str(truth_dtype(dtype)).removeprefix("torch.")
        about["truth"] = exact if truth == EXACT else truth
        results.add(group, [about | row for row in rows], facts)
        release()


def _lacks(results: Results, group: Group, compiles: bool, only: Collection[str] | None) -> bool:
    """Whether a variant that is asked for was not asked for before."""
    rows = {row["variant"]: row.get("reason") for row in results.of(group)}
    if compiles and ways.NOT_COMPILED in rows.values():
        return True
    return group.what not in OF_THE_ENGINE and not set(only or ()) <= rows.keys()


def _measured(
    group: Group,
    networks: Networks,
    compiles: bool,
    only: Collection[str] | None,
    budget: float,
    rounds: int,
    truth: str,
) -> list[dict[str, Any]]:
    images, steps = group.batch, group.steps
    if group.what == "profile":
        return by_op.measure_ops(networks, images, steps, budget, rounds)
    if group.what == "ladder":
        return _with_limit(ladder.measure_ladder(networks, images, steps, budget), group, networks)
    steered = bool(networks.kind.steering)
    variants, exact = STEERED if steered else WORK[group.what]
    bare = {BARE: lambda: ways.step_truth(networks, images, steps)} if steered else {}
    ways_to_it = variants(networks, images, steps, compiles)
    rows = measure(
        [one for one in ways_to_it if only is None or one.name in only],
        truth if truth != EXACT else lambda: exact(networks, images, steps),
        images=None if group.what == "unet" else images,
        steps=steps,
        budget=budget,
        rounds=rounds,
        in_files=networks.in_files,
        others=bare,
    )
    known = {one.name for one in ways_to_it}
    rows += [{"variant": name, "reason": NO_WAY} for name in only or () if name not in known]
    if steered:
        return beside_bare(rows)
    return _with_limit(rows, group, networks) if group.what in ("unet", "loop") else rows


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
