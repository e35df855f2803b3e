"""Guidance scales per step, intervals, rescale, and which halves must run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_fast.guidance import plan_guidance
from diffusion_fast.ops import sampler_step
from diffusion_fast.ops.sampler_step import COLUMNS
from diffusion_fast.samplers import make_table
from diffusion_fast.schedule import DiffusionSchedule

SIGMA = np.array([10.0, 5.0, 2.0, 1.0, 0.3])
GUIDANCE, RESCALE = COLUMNS.index("guidance"), COLUMNS.index("rescale")


@pytest.mark.parametrize(
    "scale, halves",
    [
        (1.0, "conditional"),
        (1, "conditional"),
        ([1.0] * 5, "conditional"),
        (0.0, "unconditional"),
        ([0] * 5, "unconditional"),
        (7.5, "both"),
        (-1.0, "both"),
        ([1, 1, 1, 1, 0], "both"),
        ([1, 1, 2, 1, 1], "both"),
    ],
)
def test_halves(scale, halves):
    plan = plan_guidance(SIGMA, scale)
    assert plan.halves == halves
    np.testing.assert_array_equal(plan.scale, np.broadcast_to(scale, 5))


def test_interval_is_in_noise_levels_and_includes_its_ends():
    plan = plan_guidance(SIGMA, 4.0, interval=(1.0, 5.0))
    assert plan.scale.tolist() == [1, 4, 4, 4, 1]
    assert plan.halves == "both"
    assert plan_guidance(SIGMA, 4.0, interval=(20, math.inf)).halves == "conditional"
    assert plan_guidance(SIGMA, [2, 3, 4, 5, 6], interval=(0, 2)).scale.tolist() == [1, 1, 4, 5, 6]


def test_an_infinite_noise_level_is_outside_a_finite_interval():
    plan = plan_guidance(np.array([math.inf, 1.0]), 3.0, interval=(0, 100))
    assert plan.scale.tolist() == [1, 3]


def test_rescale_only_where_guidance_does_something():
    plan = plan_guidance(SIGMA, 4.0, interval=(1.0, 5.0), rescale=0.7)
    assert plan.rescale.tolist() == [0, 0.7, 0.7, 0.7, 0]
    assert not plan_guidance(SIGMA, 1.0, rescale=0.7).rescale.any()
    assert not plan_guidance(SIGMA, 0.0, rescale=0.7).rescale.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale": math.nan}, "guidance_scale: expected finite numbers, got nan"),
        ({"scale": math.inf}, "guidance_scale: expected finite numbers, got inf"),
        ({"scale": [1, 2, math.nan, 1, 1]}, "guidance_scale: expected finite numbers"),
        ({"scale": [1, 2]}, r"guidance_scale: expected a number or one for each of 5 steps"),
        ({"scale": "high"}, "guidance_scale: expected a number or one for each of 5 steps"),
        ({"interval": (2, 1)}, "guidance_interval: expected two noise levels"),
        ({"interval": (-1, 1)}, "guidance_interval: expected two noise levels"),
        ({"interval": (math.nan, 1)}, "guidance_interval: expected two noise levels"),
        ({"interval": 3.0}, "guidance_interval: expected two noise levels"),
        ({"interval": (1, 2, 3)}, "guidance_interval: expected two noise levels"),
        ({"rescale": 1.5}, r"guidance_rescale: expected a number in \[0, 1\], got 1.5"),
        ({"rescale": math.nan}, "guidance_rescale: expected a finite number, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_guidance(SIGMA, **arguments)


@given(st.lists(st.floats(-50, 50), min_size=5, max_size=5), st.floats(0, 1))
def test_halves_follow_from_the_scales(scale, rescale):
    plan = plan_guidance(SIGMA, scale, rescale=rescale)
    expected = {(1.0,): "conditional", (0.0,): "unconditional"}
    assert plan.halves == expected.get(tuple(set(scale)), "both")


def test_the_table_carries_the_plan():
    schedule = DiffusionSchedule()
    sigma = np.sqrt(1 / schedule.alpha_bar - 1)
    table = make_table(
        "ddim", schedule, 10, guidance_scale=3.0, guidance_interval=(0.5, 5), guidance_rescale=0.4
    )
    inside = [0.5 <= sigma[int(t)] <= 5 for t in table.timesteps]
    assert 0 < sum(inside) < 10
    assert table.rows[:, GUIDANCE].tolist() == [3.0 if i else 1.0 for i in inside]
    assert table.rows[:, RESCALE].tolist() == [0.4 if i else 0.0 for i in inside]


def test_both_rows_of_a_heun_step_share_its_guidance():
    scales = [1.0, 2.0, 3.0, 4.0]
    table = make_table("heun", DiffusionSchedule(), 4, guidance_scale=scales)
    assert table.rows[:, GUIDANCE].tolist() == [1, 1, 2, 2, 3, 3, 4]
    assert table.halves == "both"


def test_image_to_image_takes_one_scale_per_step_that_runs():
    schedule = DiffusionSchedule()
    table = make_table("ddim", schedule, 10, strength=0.3, guidance_scale=[5.0, 6.0, 7.0])
    assert table.rows[:, GUIDANCE].tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="one for each of 3 steps"):
        make_table("ddim", schedule, 10, strength=0.3, guidance_scale=[5.0] * 10)


def test_guided_step_is_the_formula():
    """Lin et al. 2023, eq. 15-16, on the last DDIM step, where x' = x_0."""
    table = make_table(
        "ddim",
        DiffusionSchedule(),
        10,
        prediction_type="sample",
        guidance_scale=3.0,
        guidance_rescale=0.6,
    )
    uncond, cond = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    guided = uncond + 3 * (cond - uncond)
    ratio = cond.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True)
    x = torch.randn_like(cond)
    sampler_step(x, torch.cat([uncond, cond]), table.rows, 9)
    torch.testing.assert_close(x, 0.6 * guided * ratio + 0.4 * guided)
