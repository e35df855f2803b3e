"""The samplers with longer histories against diffusers, step by step, in float64 and float32."""

from __future__ import annotations

import pytest
from scheduler_parity import COUNTERPARTS, Parity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SAMPLERS = {
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis_1": ("DEISMultistepScheduler", {"solver_order": 1}),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "sa_solver_diffusers": ("SASolverScheduler", {}),
    "sa_solver_noise": ("SASolverScheduler", {"algorithm_type": "noise_prediction"}),
}
SPACINGS = ("leading", "trailing", "linspace", "karras")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(autouse=True)
def counterparts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, counterpart in SAMPLERS.items():
        monkeypatch.setitem(COUNTERPARTS, name, counterpart)


def compared(sampler: str, steps: int, spacing: str, prediction: str, **more) -> None:
    options = dict(more)
    if sampler == "pndm":
        options["final_alpha"] = "first"  # set_alpha_to_one is False there
    parity = Parity(sampler, "scaled_linear", steps, spacing, prediction, **options)
    float32, float64 = parity.errors_against_double()
    assert float64 <= 1e-9
    assert float32 <= 5e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", (1, 2, 7, 20))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_diffusers(sampler: str, steps: int, spacing: str, prediction: str) -> None:
    if sampler == "pndm" and (spacing == "karras" or prediction == "sample"):
        pytest.skip("diffusers has no such setting")
    if steps == 1 and spacing != "trailing" and sampler in ("pndm", "lms"):
        pytest.skip("it starts at t = 0 there")
    if steps == 1 and spacing == "karras":
        pytest.skip("a step from the highest level to itself")
    compared(sampler, steps, spacing, prediction)


@pytest.mark.parametrize("predicts, corrects", [(1, 1), (1, 2), (3, 3), (3, 4), (4, 4), (4, 1)])
@pytest.mark.parametrize("sampler", ["sa_solver_diffusers", "sa_solver_noise"])
def test_orders_of_sa_solver(sampler: str, predicts: int, corrects: int) -> None:
    orders = {"predictor_order": predicts, "corrector_order": corrects}
    compared(sampler, 9, "trailing", "epsilon", config=orders, **orders)


def test_the_order_of_lms() -> None:
    options = {"order": 2}
    compared("lms", 9, "linspace", "epsilon", step_options=options, **options)


@pytest.mark.parametrize("steps", (8, 20))
@pytest.mark.parametrize("sampler", ["deis_3", "sa_solver_diffusers"])
def test_orders_that_stay_to_the_end(sampler: str, steps: int) -> None:
    config = {"lower_order_final": False}
    compared(sampler, steps, "leading", "epsilon", config=config, **config)


@pytest.mark.parametrize("kind", ("linear", "cosine"))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_betas(sampler: str, kind: str) -> None:
    options = {"final_alpha": "first"} if sampler == "pndm" else {}
    parity = Parity(sampler, kind, 9, "linspace", "v_prediction", **options)
    assert parity.errors_against_double()[1] <= 1e-9
