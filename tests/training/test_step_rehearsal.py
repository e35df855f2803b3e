"""How a training step is computed: threads, layout and products; times are made up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from tiny import SCHEDULE, Points, batches
from torch.utils.data import TensorDataset

import diffusion_fast as df
from diffusion_fast.files import CheckpointError
from diffusion_fast.kernels import measurements
from diffusion_fast.kernels.layout import format_of
from diffusion_fast.ops.cpu import contest, library, step_contest
from diffusion_fast.training import Batches, Checkpoints, Trainer
from diffusion_fast.training.rehearsal import Rehearsals, rehearsal

pytestmark = needs_cpu_kernels
FASTEST, LAYOUT = 1, "contiguous"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# As they are outside of tests.
PREPARE, KNOWN, WAY_OF_STEP = contest.prepare, contest.known, step_contest.way_of_step


@pytest.fixture(autouse=True)
def _two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Two threads, where nothing was ever measured."""
    monkeypatch.setattr(library, "_final", True)
    monkeypatch.setattr(contest, "known", KNOWN)
    monkeypatch.setattr(step_contest, "way_of_step", WAY_OF_STEP)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
    measurements.known.clear()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that steps were timed with; FASTEST of them are the fastest."""
    timed: list[int] = []

    def by(count: int, step: Callable[[], object]) -> contest.Time:
        timed.append(count)
        step()
        return contest.Time(False, 0.01 + 0.01 * abs(count - FASTEST))

    def first(ways: Mapping[str, Callable[[], object]]) -> tuple[str, bool]:
        for step in ways.values():
            step()
        return LAYOUT, True

    monkeypatch.setattr(step_contest, "_by", by)
    monkeypatch.setattr(step_contest, "_first_of", first)
    return timed


def unet(dropout: float = 0.3) -> df.UNet2DCondition:
    config = df.UNetConfig(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        num_classes=3,
        dropout=dropout,
    )
    torch.manual_seed(7)
    return df.UNet2DCondition(config)


def trainer(folder: Path | None = None, model: Any = None, **changes: Any) -> Trainer:
    generator = torch.Generator().manual_seed(5)
    images = TensorDataset(torch.randn(24, 1, 4, 4, generator=generator), torch.arange(24) % 3)
    options: dict[str, Any] = {
        "seed": 2,
        "ema_decay": 0.9,
        "gradient_clip": 1.0,
        "learning_rate": 0.01,
    }
    if folder is not None:
        options["checkpoints"] = Checkpoints(folder, every=3)
    data = Batches(images, 8, seed=3)
    return Trainer(model or unet(), data, SCHEDULE, **options | changes)


def seen(one: Trainer) -> list[int]:
    """The numbers of threads of the trainer's own steps, from now on."""
    found: list[int] = []
    backward = one.objective.backward

    def watched(*args: Any) -> Any:
        found.append(torch.get_num_threads())
        return backward(*args)

    vars(one.objective)["backward"] = watched
    return found


def test_steps_are_shared_by_the_fastest_number(times: list[int]) -> None:
    one = trainer()
    steps, callbacks = seen(one), []
    one.fit(3, lambda _: callbacks.append(torch.get_num_threads()))
    assert times == [2, 1]
    assert steps == [FASTEST] * 3
    assert callbacks == [2]
    assert torch.get_num_threads() == 2


def test_it_is_measured_once_for_a_network_and_batch(times: list[int]) -> None:
    trainer().fit(2)
    again = trainer()
    steps = seen(again)
    again.fit(2)
    assert len(times) == 2
    assert steps == [FASTEST] * 2
    trainer(accumulate=2).fit(1)
    assert len(times) == 4


def everything(one: Trainer) -> dict[str, Any]:
    """All that a run consists of, gradients and global generators too."""
    groups, rest = one.state()
    found = {f"{group}.{name}": value for group in groups for name, value in groups[group].items()}
    gradients = {
        f"grad.{name}": None if p.grad is None else p.grad.clone()
        for name, p in one.model.named_parameters()
    }
    kept = {name: rest[name] for name in ("step", "steps", "batches", "settings")}
    modes = [module.training for module in one.model.modules()]
    return copy.deepcopy(found) | gradients | kept | {"modes": modes}


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"channels_last": True}])
def test_measuring_leaves_no_trace(times: list[int], changes: dict[str, Any]) -> None:
    one = trainer(**changes)
    one.fit(2)  # moments, averages and gradients that are not zero
    before = everything(one)
    assert any(value is not None for name, value in before.items() if name.startswith("grad."))
    timed = len(times)
    one.model.eval()
    modes = [module.training for module in one.model.modules()]
    contest.known().clear()  # as if never measured
    batch = next(one.dataloader.starting_at(0))  # type: ignore[attr-defined]
    with Rehearsals(one.model, one.objective).ready(batch):
        pass
    assert len(times) > timed
    assert [module.training for module in one.model.modules()] == modes
    after = everything(one) | {"modes": before["modes"]}
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


def test_a_run_with_the_measurement_is_the_run_without(times: list[int]) -> None:
    torch.manual_seed(1)
    losses = trainer().fit(4)
    torch.manual_seed(1)
    assert trainer().fit(4) == losses  # now it is on disk
    assert len(times) == 2


def test_a_resumed_run_has_the_number_of_its_checkpoint(times: list[int], tmp_path: Path) -> None:
    """Whatever was measured on this machine since."""
    torch.manual_seed(1)
    whole = trainer()
    losses = whole.fit(6)
    torch.manual_seed(1)
    trainer(tmp_path).fit(3)
    timed = len(times)
    file = contest._file()
    found = dict(measurements.results(file))
    assert sorted(found.values()) == [str(FASTEST)]  # dropout leaves the layout as it is
    for key in found:
        measurements.remember(file, key, "2")
    again = trainer(tmp_path)
    steps = seen(again)
    assert again.resume() == 3
    assert again.fit(6) == losses
    assert steps == [FASTEST] * 3
    assert len(times) == timed
    for name, value in whole.weights().items():
        assert torch.equal(value, again.weights()[name]), name


def test_another_machine_measures_for_itself(times: list[int], tmp_path: Path) -> None:
    trainer(tmp_path).fit(3)
    timed = len(times)
    torch.set_num_threads(3)  # another number is another machine
    again = trainer(tmp_path)
    steps = seen(again)
    again.resume()
    again.fit(4)
    assert times[timed:] == [3, 1]
    assert steps == [FASTEST]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("shared_by", count) for count in (0, 5, "two", True, 1.0)),
        *(("images_channels_last", value) for value in ("yes", 1, [True])),
        *(
            ("contests", value)
            for value in ([], "none", {"ways": ["cpu"]}, {"machine": "a"}, {"ways": {"linear": 1}})
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(
    times: list[int], tmp_path: Path, name: str, value: object
) -> None:
    one = trainer(tmp_path)
    state = one.state
    one.state = lambda: (state()[0], state()[1] | {name: value})  # type: ignore[method-assign]
    one.fit(3)
    with pytest.raises(CheckpointError, match=f"{name}: expected"):
        trainer(tmp_path).resume()


class Lacking(torch.autograd.Function):
    """What the meta device has no operator for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            raise NotImplementedError
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_what_cannot_be_foreseen_is_not_measured(
    times: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = df.UNet2DCondition.denoise

    def lacking(self: df.UNet2DCondition, x: torch.Tensor, *args: Any, **more: Any) -> Any:
        return Lacking.apply(denoise(self, x, *args, **more))

    monkeypatch.setattr(df.UNet2DCondition, "denoise", lacking)
    assert "conv2d_backward" not in kinds(larger())


def test_where_a_call_may_do_more_nothing_is_measured(times: list[int]) -> None:
    hooked, watched = unet(), unet()
    hooked.conv_out.register_forward_hook(lambda *_: None)
    watched.conv_out.register_full_backward_hook(lambda *_: None)
    for one in (trainer(model=hooked), trainer(model=watched)):
        steps = seen(one)
        one.fit(1)
        assert steps == [2]
    somebodys = Trainer(Points(), batches(), SCHEDULE)
    steps = seen(somebodys)
    somebodys.fit(1)
    assert (steps, times) == ([2], [])


def larger(**changes: Any) -> df.UNet2DCondition:
    """A U-Net whose products are worth a measurement."""
    config = df.UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
        **changes,
    )
    torch.manual_seed(7)
    return df.UNet2DCondition(config)


def kinds(model: Any, sizes: Sequence[int] = (8,)) -> dict[str, list[contest.Kind]]:
    """What steps with batches of these sizes have measured, by the ops' names."""
    measured: dict[str, list[contest.Kind]] = {}

    def sure(self: contest.Contest, kind: contest.Kind) -> bool:
        measured.setdefault(self.op.name, []).append(kind)
        return True

    data = [(torch.randn(size, 1, 8, 8), torch.randn(size, 5, 16)) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "prepare", PREPARE)
        patch.setattr(library, "settle", lambda: [])
        patch.setattr(contest.Contest, "measure", sure)
        Trainer(model, data, SCHEDULE).fit(len(data))
    return measured


def test_the_products_of_a_step_are_measured_with_their_gradients(times: list[int]) -> None:
    found = kinds(larger())
    image = (8, 32, 8, 8, 32, 3, 3, 1, 1, 1, 1, 1)
    assert image in found["conv2d"]
    assert (True, True, *image) in found["conv2d_backward"]
    first = (8, 1, 8, 8, 32, 3, 3, 1, 1, 1, 1, 1)
    assert (False, True, *first) in found["conv2d_backward"]
    assert (512, 32, 32, False) in found["linear"]
    assert (512, 32, 32, False, False, True) in found["linear"]  # by x
    assert (32, 512, 32, False, True, True) in found["linear"]  # by the weight


def test_batches_of_another_size_are_measured_too(times: list[int]) -> None:
    """Once each, for the way of a step that was found for the first."""
    found = kinds(larger(), sizes=(9, 6, 6, 9))["conv2d"]
    assert {kind[0] for kind in found} == {9, 6}
    assert len(found) == len(set(found))
    assert times == [2, 1]


def test_what_is_frozen_has_no_gradient_to_measure(times: list[int]) -> None:
    model = larger()
    model.requires_grad_(False)
    model.conv_in.requires_grad_(True)
    for kind in kinds(model)["conv2d_backward"]:
        assert kind[:2] == ((False, True) if kind[3] == 1 else (True, False))


def test_a_network_with_adapters_is_measured_too(times: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = larger()
    model.requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"])
    found = kinds(peft.inject_adapter_in_model(config, model))
    assert (512, 32, 32, False, False, True) in found["linear"]
    assert (32, 512, 32, False, True, True) not in found["linear"]
    assert times == [2, 1]


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[torch.memory_format]:
    """Those of what U-Nets get."""
    found: list[torch.memory_format] = []
    denoise = df.UNet2DCondition.denoise

    def watched(self: df.UNet2DCondition, x: torch.Tensor, *args: Any, **more: Any) -> Any:
        found.append(format_of(x))
        return denoise(self, x, *args, **more)

    monkeypatch.setattr(df.UNet2DCondition, "denoise", watched)
    return found


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_images_are_laid_out_as_was_the_fastest(
    times: list[int],
    layouts: list[torch.memory_format],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
) -> None:
    """Also where a run goes on, whatever was measured since."""
    monkeypatch.setattr(step_contest, "_first_of", lambda ways: (layout, True))
    one = trainer(tmp_path, unet(0.0))
    one.fit(3)
    saved = Checkpoints(tmp_path).newest()
    assert layouts[-1] == FORMATS[layout]
    for other in FORMATS:
        contest.known().clear()
        monkeypatch.setattr(step_contest, "_first_of", lambda ways, other=other: (other, True))
        layouts.clear()
        again = trainer(model=unet(0.0))
        again.resume(saved)
        again.fit(4)
        assert layouts == [FORMATS[layout]]


@pytest.mark.parametrize("option", [False, True])
def test_what_is_dropped_does_not_depend_on_a_measurement(
    times: list[int],
    layouts: list[torch.memory_format],
    monkeypatch: pytest.MonkeyPatch,
    option: bool,
) -> None:
    """A mask is another one in another layout."""
    other = "contiguous" if option else "channels_last"
    monkeypatch.setattr(step_contest, "_first_of", lambda ways: (other, True))
    trainer(model=unet(dropout=0.3), channels_last=option).fit(1)
    assert layouts[-1] == FORMATS["channels_last" if option else "contiguous"]


def test_what_is_not_measured_is_laid_out_as_the_options_say(
    times: list[int], layouts: list[torch.memory_format]
) -> None:
    for option in (False, True):
        model = unet()
        model.conv_out.register_forward_hook(lambda *_: None)
        trainer(model=model, channels_last=option).fit(1)
    assert layouts == [torch.contiguous_format, torch.channels_last]


def test_a_rehearsal_changes_nothing() -> None:
    model = Points(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    rehearsal(model, SCHEDULE, (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)))()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    torch.randn(4, 2)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
