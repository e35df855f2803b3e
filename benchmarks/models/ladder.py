"""One row per technique, each switched on over the last: speed, memory and error of the loop.

Each rung is timed in turns with the first one, plain eager PyTorch, so at most two of them are in
memory, and the machine's drift doesn't look like a gain.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from diffusion_fast.engine.rewrites.plan import REWRITES

from .limits import step_cost
from .measure import Call, Variant, measure
from .networks import Inputs, Networks
from .variants import engine_loop, loop_truth, on_reference, plain_loop

FIRST, OPS = "our model on the reference ops", "our ops"
GRAPHS = {"step": "one CUDA graph replayed per step", "loop": "the whole loop as one CUDA graph"}

ROWS = ("eager", OPS, *REWRITES, *(f"graph={name}" for name in GRAPHS))


def measure_ladder(
    networks: Networks, images: int, steps: int, budget: float
) -> list[dict[str, Any]]:
    """The rungs' rows, with ``over_last`` and ``does`` beside what :func:`measure` gives."""
    inputs, truth = networks.inputs(images), loop_truth(networks, images, steps)
    first = Variant("eager", lambda: on_reference(plain_loop(networks, inputs, steps)))
    refused = off_rewrites(networks, inputs, steps)
    rungs = _rungs(refused)
    rows: list[dict[str, Any]] = []
    last = 1.0
    for rung in rungs:

        def build(rung: Rung = rung) -> Call:
            return engine_loop(networks, inputs, steps, rung.rewrites or "none", rung.graph)[1]

        pair = [first, Variant(rung.name, build)]
        share = budget / len(rungs)
        both = measure(pair, lambda: truth, images=images, steps=steps, budget=share)
        if not rows:
            rows.append(both[0] | {"does": FIRST} | _cost(networks, images, ()))
        row = both[1] | {"does": rung.does}
        if "reason" not in row:
            row |= _cost(networks, images, rung.rewrites)
            row["over_last"], last = row["over_eager"] / last, row["over_eager"]
        rows.append(row)
    return _in_order(rows, refused)


@dataclass(frozen=True)
class Rung:
    """One technique, on top of those before it."""

    name: str
    does: str
    rewrites: tuple[str, ...]
    graph: str = "off"


def _rungs(refused: Container[str]) -> list[Rung]:
    on: tuple[str, ...] = ()
    rungs = [Rung(OPS, "kernels and fused ops, each where it is the fastest", on)]
    for name, rewrite in REWRITES.items():
        if name not in refused:
            on = (*on, name)
            rungs.append(Rung(name, rewrite.does, on))
    return rungs + [Rung(f"graph={name}", does, on, name) for name, does in GRAPHS.items()]


def off_rewrites(networks: Networks, inputs: Inputs, steps: int) -> dict[str, str]:
    """Rewrites that the engine doesn't use for this model, and why."""
    engine, run = engine_loop(networks, inputs, min(steps, 1), graph="off")
    run()
    rows = (row for row in engine.explain()["rewrites"] if row.name in REWRITES)
    return {row.name: row.why for row in rows if not row.on}


def _cost(networks: Networks, images: int, rewrites: tuple[str, ...]) -> dict[str, int]:
    total = step_cost(networks.kind, networks.dtype, images, rewrites or "none").total
    return {"launches": total.launches, "bytes": total.bytes, "flops": total.flops}


def _in_order(rows: list[dict[str, Any]], refused: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of rewrites that are off stand where they would have been."""
    by_name = {row["variant"]: row for row in rows}
    for name, why in refused.items():
        by_name[name] = {"variant": name, "does": REWRITES[name].does, "reason": why}
    return [by_name[name] for name in ROWS]
