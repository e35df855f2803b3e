"""The model of a step's time: labelled, monotone, and by hand where a hand can follow."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.models.limits import step_cost
from benchmarks.models.networks import KINDS
from benchmarks.tools.predict import (
    GPUS,
    LEVERS,
    Assumptions,
    by_class,
    call_us,
    main,
    predict,
    product_us,
)
from diffusion_fast.engine.rewrites.cost import Cost

H200, PLAIN = GPUS["H200"], Assumptions()


@pytest.fixture(scope="module")
def calls() -> list[Any]:
    return step_cost(KINDS["small"], torch.bfloat16, batch=1).calls


def test_a_product_by_hand() -> None:
    """132 tiles of 128 x 128 are one full wave, at the share of the peak that is stated."""
    given = replace(PLAIN, tiles=((128, 128, 0.5),), splits=(1,))
    m, n, k = 11 * 128, 12 * 128, 4096
    assert product_us(m, n, k, H200, given) == pytest.approx(2 * m * n * k / (989.4e6 * 0.5))
    # One column more is another column of tiles, and a second wave.
    assert product_us(m, n + 1, k, H200, given) == pytest.approx(
        2 * product_us(m, n, k, H200, given)
    )


def test_cut_sums_fill_a_gpu_that_few_tiles_leave_idle() -> None:
    whole = replace(PLAIN, splits=(1,))
    assert product_us(512, 1280, 11520, H200, PLAIN) < product_us(512, 1280, 11520, H200, whole)
    assert product_us(8192, 8192, 512, H200, PLAIN) == product_us(8192, 8192, 512, H200, whole)


def test_memory_by_hand() -> None:
    """64 MB are more than the cache's half, and a gap follows."""
    cost = Cost(1, 64 * 10**6, 0)
    assert call_us("add_", (), cost, H200, PLAIN) == pytest.approx(64 / (4.8 * 0.8) + 1)
    small = Cost(1, 10**6, 0)
    assert call_us("add_", (), small, H200, PLAIN) == pytest.approx(1 / (4.8 * 0.8 * 1.8) + 1)


def test_the_sum_and_the_levers(calls: list[Any]) -> None:
    found = predict(calls, H200)
    assert found["a prediction, not a measurement"] is True
    assert found["launches"] == len(calls)
    assert found["ms_sum"] == pytest.approx(sum(found["ms"].values()))
    assert {"convolutions", "linear layers", "attention", "group norms"} <= found["ms"].keys()
    assert found["ms_saved"].keys() == {*LEVERS, "all of these"}
    assert all(saved >= 0 for saved in found["ms_saved"].values())
    assert max(found["ms_saved"].values()) == found["ms_saved"]["all of these"]
    assert len(predict(calls, GPUS["A100"])["ms_saved"]) == len(LEVERS)  # one is for Hopper


@pytest.mark.parametrize("change", [{"tflops": 2.0}, {"memory": 2.0}, {"cache": 2.0}])
def test_no_faster_part_makes_a_step_slower(change: dict[str, float], calls: list[Any]) -> None:
    name, factor = next(iter(change.items()))
    better = replace(H200, **{name: getattr(H200, name) * factor})
    before, after = (sum(by_class(calls, gpu, PLAIN).values()) for gpu in (H200, better))
    assert after <= before


def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "small", "--gpu", "H200", "--measured", "3"])
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not measured: ")
    assert "measured over predicted" in text
    main(["--model", "small", "--json"])
    assert json.loads(capsys.readouterr().out).keys() == GPUS.keys()
    with pytest.raises(SystemExit):
        main(["--model", "small", "--measured", "3"])
    assert "and --gpu beside it" in capsys.readouterr().err
