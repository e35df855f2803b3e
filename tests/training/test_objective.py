"""A step: what is drawn, weighted, cut into parts, rounded; each option against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from numerics import error
from tiny import SCHEDULE, Points, batches
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast.training import (
    P2,
    ImportanceSampler,
    LogitNormalSampler,
    MinSNR,
    Trainer,
    UniformSampler,
)


def gradients(**options: object) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step on a fixed batch in float64."""
    torch.manual_seed(1)
    model = Points(dtype=torch.float64)
    batch = torch.randn(10, 2, dtype=torch.float64), torch.arange(10) % 3
    trainer = Trainer(model, [batch], SCHEDULE, seed=4, **options)
    (loss,) = trainer.fit(1)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def by_hand(
    prediction_type: str, table: Tensor | None = None, sampler: UniformSampler | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The same, from the formulas."""
    torch.manual_seed(1)
    model = Points(dtype=torch.float64)
    x_0, label = torch.randn(10, 2, dtype=torch.float64), torch.arange(10) % 3
    generator = torch.Generator().manual_seed(4)
    if sampler is None:
        t, weight = torch.randint(50, (10,), generator=generator), torch.ones(10)
    else:
        t, weight = sampler.sample(10, x_0.device, generator)
    noise = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    a = SCHEDULE.sqrt_alphas_cumprod.double()[t][:, None]
    s = SCHEDULE.sqrt_one_minus_alphas_cumprod.double()[t][:, None]
    target = {"epsilon": noise, "v_prediction": a * noise - s * x_0, "sample": x_0}
    square = (model(a * x_0 + s * noise, t, label) - target[prediction_type]).square().mean(1)
    assert weight is not None
    loss = (square * weight * (1 if table is None else table[t])).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(
    ours: tuple[float, dict[str, Tensor]], truth: tuple[float, dict[str, Tensor]]
) -> None:
    assert ours[0] == pytest.approx(truth[0], rel=1e-6)
    for name, gradient in truth[1].items():
        assert error(ours[1][name], gradient) < 1e-6, name


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", [None, MinSNR(), P2()], ids=repr)
def test_a_step_is_its_formula(prediction_type: str, weighting: MinSNR | P2 | None) -> None:
    table = None if weighting is None else weighting.table(SCHEDULE, prediction_type)
    ours = gradients(prediction_type=prediction_type, loss_weighting=weighting)
    assert_same(ours, by_hand(prediction_type, table))


def test_importance_weights_multiply_the_loss_weights() -> None:
    def learned() -> ImportanceSampler:
        sampler = ImportanceSampler(50, history=1)
        sampler.update(torch.arange(50), torch.linspace(1, 3, 50))
        return sampler

    table = MinSNR().table(SCHEDULE, "epsilon")
    ours = gradients(timestep_sampler=learned(), loss_weighting=MinSNR())
    assert_same(ours, by_hand("epsilon", table, learned()))


@pytest.mark.parametrize("parts", [2, 3, 10, 64])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts: int) -> None:
    """Ten images don't divide by three, and are fewer than 64."""
    options = {"loss_weighting": P2(), "condition_dropout": 0.5, "null_context": torch.tensor([3])}
    assert_same(gradients(accumulate=parts, **options), gradients(**options))


def test_accumulation_runs_the_model_on_parts() -> None:
    sizes = []
    model = Points()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    Trainer(model, batches(8), SCHEDULE, accumulate=3).fit(2)
    assert sizes == [3, 3, 2] * 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_history_holds_the_losses_of_the_images(accumulate: int) -> None:
    """With the loss weighting, without the importance weight."""
    sampler = ImportanceSampler(50, history=4)
    loss, _ = gradients(timestep_sampler=sampler, loss_weighting=MinSNR(), accumulate=accumulate)
    state = sampler.state_dict()
    assert state["counts"].sum() == 10
    assert state["losses"].sum().item() / 10 == pytest.approx(loss, rel=1e-6)


def test_timesteps_come_from_the_sampler() -> None:
    seen = []
    model = Points()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    sampler = LogitNormalSampler(50, mean=2.0, std=0.3)
    Trainer(model, batches(8), SCHEDULE, timestep_sampler=sampler, seed=0).fit(20)
    assert torch.cat(seen).float().mean() == pytest.approx(50 / (1 + 2.71828**-2), abs=1.5)


def unet() -> df.UNet2DCondition:
    torch.manual_seed(0)
    return df.UNet2DCondition(df.UNetConfig.preset("digits"))


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8))]


def test_mixed_precision_keeps_float32_weights_and_stays_close() -> None:
    """Our norms refuse mixed dtypes, so this also shows that the U-Net casts for them."""
    runs = {}
    for precision in ("float32", "bfloat16"):
        model, seen = unet(), []
        model.conv_out.register_forward_hook(lambda _, i, out, seen=seen: seen.append(out.dtype))
        trainer = Trainer(model, images(), SCHEDULE, seed=0, precision=precision, ema_decay=0.9)
        runs[precision] = trainer.fit(4), model
        assert seen == [getattr(torch, precision)] * 4
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        moments = trainer.optimizer.state.values()
        assert {v.dtype for state in moments for v in state.values()} == {torch.float32}
    losses, mixed = runs["float32"][0], runs["bfloat16"][0]
    assert losses != mixed
    assert mixed == pytest.approx(losses, rel=0.02)
    for a, b in zip(*(run[1].parameters() for run in runs.values()), strict=True):
        assert (a - b).abs().max() < 4 * 2 * 2e-4  # Adam's steps are no longer than the rate


def test_channels_last() -> None:
    layouts, model = [], unet()
    model.conv_in.register_forward_hook(
        lambda _, i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    ours = Trainer(model, images(), SCHEDULE, seed=0, channels_last=True).fit(3)
    assert layouts == [True] * 3
    assert ours == pytest.approx(Trainer(unet(), images(), SCHEDULE, seed=0).fit(3), rel=1e-5)


@pytest.mark.slow
def test_compiled() -> None:
    torch.manual_seed(1)
    compiled = Trainer(Points(), batches(), SCHEDULE, seed=0, compile=True)
    torch.manual_seed(1)
    eager = Trainer(Points(), batches(), SCHEDULE, seed=0)
    assert compiled.fit(4) == pytest.approx(eager.fit(4), rel=1e-5)


def test_compile_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = Points(), []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    Trainer(model, batches(), SCHEDULE)
    assert compiled == []
    Trainer(model, batches(), SCHEDULE, compile=True)
    assert compiled == [model]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_optimizer_is_torchs(name: str) -> None:
    """One step with weight decay, where the two differ."""
    models = [nn.Linear(2, 2, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x_0 = torch.randn(6, 2, dtype=torch.float64)
    options = {"learning_rate": 0.1, "weight_decay": 0.5}

    class Called(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x)

    Trainer(Called(models[0]), [x_0], SCHEDULE, seed=0, optimizer=name, **options).fit(1)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(models[1].parameters(), lr=0.1, weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    df.training.diffusion_loss(Called(models[1]), SCHEDULE, x_0, generator=generator).backward()
    optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert error(a.detach(), b.detach()) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw, adam, adafactor, .*, got 'sgd'"),
        ({"accumulate": 0}, "accumulate: expected a positive integer"),
        ({"precision": "float8"}, "precision: expected one of float32, bfloat16, float16"),
        ({"loss_weighting": "p2"}, "loss_weighting: expected one such as MinSNR"),
        ({"validate_every": 0}, "validate_every: expected a positive integer"),
        ({"timestep_sampler": UniformSampler(49)}, "timestep_sampler: expected one for the 50"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(Points(), batches(), SCHEDULE, **options)
