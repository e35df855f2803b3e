"""The validation loss: fixed noise, any number of processes, the averaged weights; callbacks."""

from __future__ import annotations

import pytest
import torch
from tiny import SCHEDULE, Points, batches
from torch import Tensor

from diffusion_fast.training import Progress, Trainer, validation_loss
from diffusion_fast.training.distributed import Processes


def test_only_the_weights_change_it() -> None:
    model, data = Points(dropout=0.5), batches()
    first = validation_loss(model, data, SCHEDULE)
    torch.manual_seed(99)
    assert validation_loss(model, data, SCHEDULE) == first
    assert model.training
    assert validation_loss(model, data, SCHEDULE, seed=1) != first
    with torch.no_grad():
        model.net[3].weight += 0.1
    assert validation_loss(model, data, SCHEDULE) != first


def test_it_is_the_mean_over_images_of_evenly_spread_timesteps() -> None:
    seen: list[Tensor] = []

    def perfect_but_one(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        a = SCHEDULE.sqrt_alphas_cumprod[t][:, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None]
        return (x - a) / s + 1

    model = Points()
    model.forward = perfect_but_one
    data = [torch.ones(50, 2), torch.ones(25, 2)]
    assert validation_loss(model, data, SCHEDULE) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(seen[0].sort().values, torch.arange(50))
    assert (seen[1].sort().values.diff() == 2).all()


def test_processes_share_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Points(), batches()
    whole = validation_loss(model, data, SCHEDULE)
    sums: list[Tensor] = []
    monkeypatch.setattr(Processes, "mean", lambda self, mine: sums.append(mine) or mine)
    for rank in range(2):
        validation_loss(model, data, SCHEDULE, processes=Processes(rank, 2))
    total = sum(sums)
    assert [s[1].item() for s in sums] == [16, 8]
    assert (total[0] / total[1]).item() == pytest.approx(whole, rel=1e-12)


def test_the_trainer_validates_its_averaged_weights() -> None:
    model, data = Points(), batches()
    seen: list[Progress] = []
    trainer = Trainer(
        *(model, data, SCHEDULE),
        **{"validation": data, "validate_every": 3, "read_every": 4, "ema_decay": 0.99, "seed": 0},
    )

    def check(progress: Progress) -> None:
        seen.append(progress)
        if progress.validation_loss is not None:
            own = validation_loss(model, data, SCHEDULE)
            assert trainer.ema is not None
            with trainer.ema.applied():
                assert validation_loss(model, data, SCHEDULE) == progress.validation_loss != own

    trainer.fit(8, check)
    assert [(p.step, p.validation_loss is not None) for p in seen] == [
        (3, True),
        (4, False),
        (6, True),
        (8, False),
    ]


def test_several_callbacks() -> None:
    first: list[Progress] = []
    second: list[Progress] = []
    Trainer(Points(), batches(), SCHEDULE).fit(3, [first.append, second.append])
    assert [p.step for p in first] == [p.step for p in second] == [3]


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="validation: expected at least one batch, got none"):
        validation_loss(Points(), [], SCHEDULE)
