"""The soak of benchmarks/, for twenty seconds."""

from __future__ import annotations

import io

from benchmarks.soak_serving import soak


def test_twenty_seconds_of_the_soak() -> None:
    out = io.StringIO()
    soak(20.0, clients=6, seed=1, out=out, every=2.0)
    lines = out.getvalue()
    assert lines.endswith("nothing wrong\n")
    for kind in ("good", "broken", "leaves", "stops", "slow"):
        assert f" {kind} " in lines
