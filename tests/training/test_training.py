"""The objective, condition dropout, EMA, the trainer's options, and train_diffusion end to end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from numerics import error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffusion_fast as df
from diffusion_fast.training import EMA, Trainer, diffusion_loss, drop_condition

SCHEDULE = df.DiffusionSchedule(timesteps=50, beta_start=1e-3, beta_end=0.3)  # ends at noise


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        self.seen: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen.append(context)
        return self.net(torch.cat((x, t[:, None] / 50), dim=1))


def loader(batch: int = 16, n: int = 64) -> DataLoader[Tensor]:
    points = torch.randn(n, 2) * 0.1 + torch.tensor([2.0, -1.0])
    return DataLoader(TensorDataset(points), batch_size=batch)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_has_no_loss(target: str) -> None:
    """With a point mass as data, the exact prediction follows from x_t alone."""
    x_0 = torch.full((8, 2), 1.5, dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.sqrt_alphas_cumprod.double()[t][:, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod.double()[t][:, None]
        epsilon = (x - a * 1.5) / s
        exact = {"epsilon": epsilon, "sample": torch.full_like(x, 1.5)}
        return exact.get(target, a * epsilon - s * 1.5)

    assert diffusion_loss(model, SCHEDULE, x_0, prediction_type=target) < 1e-20
    assert diffusion_loss(lambda x, t: model(x, t) + 1, SCHEDULE, x_0, prediction_type=target) > 0.9


def test_the_loss_is_the_weighted_mean_over_the_batch() -> None:
    x_0, weight, t = torch.randn(4, 2), torch.tensor([0.0, 1, 2, 3]), torch.tensor([0, 10, 20, 49])
    noise = torch.randn(4, 2, generator=seeded())
    loss = diffusion_loss(lambda x, t: x, SCHEDULE, x_0, t=t, weight=weight, generator=seeded())
    x_t = SCHEDULE.add_noise(x_0, t, noise)
    assert error(loss, ((x_t - noise).square() * weight[:, None]).mean()) < 1e-6


def test_condition_dropout_drops_whole_conditions_at_its_rate() -> None:
    context, null = torch.ones(4000, 2, 3), torch.zeros(1, 2, 3)
    dropped = drop_condition(context, null, 0.1, seeded())
    assert isinstance(dropped, Tensor)
    per_image = dropped.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    share = 1 - per_image[:, 0].mean().item()
    assert abs(share - 0.1) < 3 * math.sqrt(0.09 / 4000)
    labels = drop_condition(torch.arange(10), torch.tensor([10]), 1.0)
    assert torch.equal(labels, torch.full((10,), 10))
    assert drop_condition(context, None, 0.0) is context
    assert drop_condition(None, null, 0.5) is None
    both = drop_condition(
        {"a": context[:, 0, 0], "b": context},
        {"a": torch.zeros(1), "b": null},
        0.5,
        seeded(),
    )
    assert torch.equal(both["a"] == 0, both["b"][:, 0, 0] == 0)


def test_ema_follows_with_its_warm_up_and_swaps_both_ways() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.register_buffer("scale", torch.zeros(()))
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema, expected = EMA(model, 0.9), 0.0
    for n in range(30):
        with torch.no_grad():
            model.weight.fill_(float(n))
            model.count += 1
            model.scale.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
        assert model.scale.item() == pytest.approx(expected, rel=1e-5)
        assert model.count == 30
    assert model.weight.item() == 29


def averaged(model: nn.Module, change: Callable[[], object], decay: float = 0.9) -> EMA:
    ema = EMA(model, decay)
    with torch.no_grad():
        change()
    ema.update()
    return ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_average_of_any_precision_moves_by_small_steps(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, 0.999)
    ema.updates = 10_000  # past its warm-up
    with torch.no_grad():
        model.weight.fill_(1.25)
    for _ in range(1000):
        ema.update()
    expected = 1.25 - 0.25 * 0.999**1000
    assert ema.state_dict()["weight"].mean().item() == pytest.approx(expected, rel=1e-4)
    average = ema.state_dict()["weight"].clone()
    with ema.applied():
        assert torch.equal(model.weight, average.to(dtype))
    assert (model.weight == 1.25).all()
    assert torch.equal(ema.state_dict()["weight"], average)


class Constants(nn.Module):
    """Tensors that training leaves alone, and one that it changes."""

    def __init__(self) -> None:
        super().__init__()
        infinite = torch.full((3, 3), -torch.inf).triu(1)
        self.register_buffer("mask", infinite)
        self.register_buffer("unknown", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("same", torch.full((1,), 0.1).expand(5))
        self.register_buffer("low", self.mask[:2])
        self.frozen = nn.Parameter(infinite.clone(), requires_grad=False)
        self.bias = nn.Parameter(infinite.clone())
        self.rough = nn.Parameter(infinite.half())
        self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def test_constants_are_kept_bit_for_bit() -> None:
    model = Constants()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = averaged(model, lambda: model.turn.fill_(1j))
    for _ in range(5):
        ema.update()
    for name, value in before.items():
        if name != "turn":
            found = ema.state_dict()[name]
            assert torch.equal(found.nan_to_num(7), value.to(found.dtype).nan_to_num(7)), name
    with ema.applied():
        assert torch.equal(model.mask, before["mask"])
    assert (model.turn == 1j).all()


def test_complex_parameters_are_averaged() -> None:
    model = Constants()
    ema = averaged(model, lambda: model.turn.fill_(1j))
    assert torch.allclose(ema.state_dict()["turn"], torch.tensor(0.1 + 0.9j))


def test_a_mask_that_changes_is_followed() -> None:
    model = Constants()
    assert (averaged(model, lambda: model.mask.fill_(0)).state_dict()["mask"] == 0).all()
    opened = averaged(model, lambda: model.mask.fill_(-torch.inf)).state_dict()["mask"]
    assert (opened == -torch.inf).all()


def test_train_diffusion_learns_a_point_cloud() -> None:
    model = Tiny()
    losses = df.train_diffusion(model, loader(), SCHEDULE, epochs=60, learning_rate=5e-3, seed=0)
    assert len(losses) == 240
    assert sum(losses[-40:]) < 0.6 * sum(losses[:40])
    x = df.sample(model, SCHEDULE, (256, 2), sampler="ddim", generator=seeded())
    assert (x.mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 0.3


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Tiny()
        data = loader()
        df.train_diffusion(model, data, SCHEDULE, epochs=2, seed=7)
        weights.append(model.net[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_warm_up_and_cosine() -> None:
    rates: list[float] = []
    trainer = Trainer(
        Tiny(), loader(), SCHEDULE, learning_rate=1.0, warmup_steps=4, decay="cosine", read_every=1
    )
    trainer.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    trainer.fit(20)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(0.0)


def test_gradient_clipping_limits_the_step() -> None:
    model = Tiny()
    trainer = Trainer(model, loader(), SCHEDULE, gradient_clip=1e-8)
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        )
    )
    trainer.fit(3)
    assert max(norms) <= 1.01e-8


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "context", "dict"])
def test_kinds_of_batches(kind: str) -> None:
    model, x, c = Tiny(), torch.randn(4, 2), torch.ones(4, 1)
    batch = {
        "tensor": x,
        "tuple": (x,),
        "list": [x],
        "context": (x, c),
        "dict": (x, {"context": c}),
    }
    Trainer(model, [batch[kind]], SCHEDULE).fit(3)
    assert len(model.seen) == 3
    assert (model.seen[0] is not None) == (kind in ("context", "dict"))


def test_progress_is_read_every_few_steps_and_at_the_end() -> None:
    read = []
    losses = Trainer(Tiny(), loader(), SCHEDULE, read_every=4).fit(10, read.append)
    assert [(p.step, p.steps) for p in read] == [(4, 10), (8, 10), (10, 10)]
    assert [p.loss for p in read] == [losses[3], losses[7], losses[9]]


def test_a_run_inside_its_own_is_refused() -> None:
    trainer = Trainer(Tiny(), loader(), SCHEDULE)
    with pytest.raises(RuntimeError, match="Trainer: expected a callback"):
        trainer.fit(2, on_read=lambda _: trainer.fit(2))
    assert trainer.step == 2
    assert len(trainer.fit(2)) == 2


def test_the_mode_of_the_model_is_restored() -> None:
    model = Tiny().eval()
    Trainer(model, loader(), SCHEDULE).fit(1)
    assert not model.training


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    good, bad = torch.randn(4, 2), torch.full((4, 2), float("nan"))
    with pytest.raises(
        FloatingPointError, match="loss: expected a finite number, got nan at step 3"
    ):
        Trainer(Tiny(), [good, good, bad], SCHEDULE).fit(9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number"),
        ({"decay": "linear"}, "decay: expected one of constant, cosine, got 'linear'"),
        ({"ema_decay": 1.0}, r"decay: expected a number in \[0, 1\), got 1.0"),
        ({"condition_dropout": 1.5}, "condition_dropout: expected a probability"),
        ({"condition_dropout": 0.1}, "null_context: expected a null condition"),
        ({"prediction_type": "noise"}, "prediction_type: expected one of epsilon"),
        ({"gradient_clip": 0.0}, "gradient_clip: expected a positive number"),
        ({"warmup_steps": -1}, "warmup_steps: expected"),
        ({"read_every": 0}, "read_every: expected a positive integer"),
        ({"weight_decay": -1.0}, "weight_decay: expected"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(Tiny(), loader(), SCHEDULE, **options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dataloader: expected at least one batch, got none"):
        df.train_diffusion(Tiny(), [], SCHEDULE)
    with pytest.raises(TypeError, match="dataloader: expected one with a length"):
        df.train_diffusion(Tiny(), iter([torch.ones(2, 2)]), SCHEDULE)
    with pytest.raises(ValueError, match="dataloader: expected at least one batch in every pass"):
        Trainer(Tiny(), iter([torch.ones(2, 2)]), SCHEDULE).fit(2)
    with pytest.raises(ValueError, match="epochs: expected a positive integer, got 0"):
        df.train_diffusion(Tiny(), loader(), SCHEDULE, epochs=0)
    with pytest.raises(TypeError, match=r"dataloader: expected batches x_0 or .* got a dict"):
        df.train_diffusion(Tiny(), [{"x": 1}], SCHEDULE)
    with pytest.raises(ValueError, match="model: expected at least one parameter"):
        df.train_diffusion(nn.Identity(), loader(), SCHEDULE)
    with pytest.raises(TypeError, match="model: expected it to return a tensor, got tuple"):
        diffusion_loss(lambda x, t: (x,), SCHEDULE, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"model: expected an output of the shape of its input"):
        diffusion_loss(lambda x, t: x[:, :1], SCHEDULE, torch.ones(2, 2))
    with pytest.raises(ValueError, match="x_0: expected a floating point dtype"):
        diffusion_loss(lambda x, t: x, SCHEDULE, torch.ones(2, 2).int())


@pytest.mark.parametrize(
    ("context", "null", "message"),
    [
        ({"a": torch.ones(4, 1)}, torch.ones(1, 1), r"null_context: expected a dict with the keys"),
        (torch.ones(4, 1), {"a": torch.ones(1, 1)}, r"null_context: expected a tensor, got dict"),
        ({"a": torch.ones(4, 1)}, {"b": torch.ones(1, 1)}, r"keys \['a'\], got \['b'\]"),
        (torch.ones(4, 2, 3), torch.ones(2, 3), r"null_context: expected shape \[4 or 1, 2, 3\]"),
        (torch.ones(4, 2), torch.ones(3, 2), r"null_context: expected shape \[4 or 1, 2\], got"),
        (
            torch.arange(4),
            torch.tensor([2.7]),
            r"null_context: expected a dtype like the condition",
        ),
    ],
)
def test_a_null_condition_that_does_not_fit(context: object, null: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        drop_condition(context, null, 0.5)


def test_dropout_needs_conditions_and_epsilon_some_signal() -> None:
    null = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"dataloader: expected batches \(x_0, context\)"):
        Trainer(Tiny(), loader(), SCHEDULE, condition_dropout=0.1, null_context=null).fit(1)
    ends_in_noise = df.DiffusionSchedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"prediction_type: expected v_prediction or sample"):
        Trainer(Tiny(), loader(), ends_in_noise)
    Trainer(Tiny(), loader(), ends_in_noise, prediction_type="v_prediction").fit(1)
