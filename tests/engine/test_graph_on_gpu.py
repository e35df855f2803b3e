"""Real graphs: against the loop on the host, replayed often, edited under, shared, broken."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from conv_model import CONTEXTS, EDITS, SCHEDULE, SHAPE, Draws, Model, Reads, same, seeded
from numerics import error
from torch import Tensor

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.engine.graphs import capture
from diffusion_fast.samplers import SAMPLERS

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["repeated", "unrolled", "captured as a whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the loop becomes one graph, as the engine explains it."""
    if request.param == "captured as a whole":
        monkeypatch.setattr(capture, "no_while_loop", lambda: "as the test says")
        monkeypatch.setattr(capture, "UnrolledLoop", no_unrolled_loop)
        return "unrolled"
    if capture.no_while_loop() is not None:
        pytest.skip(str(capture.no_while_loop()))
    if request.param == "unrolled":
        monkeypatch.setattr(capture, "no_while_loop", lambda: "as the test says")
    return str(request.param)


def no_unrolled_loop(*args: Any) -> None:
    raise RuntimeError("as the test says")


def on_gpu(model: torch.nn.Module) -> torch.nn.Module:
    return model.to("cuda")


def contexts() -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in CONTEXTS.items()}


def plain(model: torch.nn.Module, **options: Any) -> Tensor:
    call = {"shape": SHAPE, "generator": seeded(), "device": "cuda"} | options
    return df.sample(model, SCHEDULE, **call)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_against_the_host(way: str, sampler: str, prediction_type: str) -> None:
    model = on_gpu(Model())
    options = {"sampler": sampler, "prediction_type": prediction_type, "guidance_scale": 3.0}
    engine = df.Engine(model, SCHEDULE, graph="loop", steps=6, **options)
    step = df.Engine(model, SCHEDULE, graph="step", steps=6, **options)
    for steps in (6, 4, 9):
        engine.configure(steps=steps)
        step.configure(steps=steps)
        truth = plain(model, **contexts(), **options, steps=steps)
        for captured in (engine, step):
            x = captured.sample(SHAPE, **contexts(), generator=seeded())
            assert same(x, truth)
    assert way in engine.explain()["graph"]


def test_a_hundred_replays_have_the_same_bits(way: str) -> None:
    engine = df.Engine(
        on_gpu(Model(torch.float32)), SCHEDULE, graph="loop", sampler="ddpm", steps=8
    )
    first = engine.sample(SHAPE, generator=seeded())
    for i in range(100):
        engine.sample(SHAPE, generator=seeded(i + 1))
        assert torch.equal(engine.sample(SHAPE, generator=seeded()), first)
    philox = ops.Philox(5)
    first = engine.sample(SHAPE, generator=philox)
    assert torch.equal(engine.sample(SHAPE, generator=philox), first)
    assert error(first, plain(engine.model, sampler="ddpm", steps=8, generator=philox)) < 1e-5


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_number_of_steps_does_not_capture_again(
    monkeypatch: pytest.MonkeyPatch, unrolled: bool
) -> None:
    if capture.no_while_loop() is not None:
        pytest.skip(str(capture.no_while_loop()))
    if unrolled:
        monkeypatch.setattr(capture, "no_while_loop", lambda: "as the test says")
    captures: list[torch.device] = []
    real = capture.CudaCapturer.capture

    def counted(self: Any, device: torch.device, *args: Any) -> Any:
        captures.append(device)
        return real(self, device, *args)

    monkeypatch.setattr(capture.CudaCapturer, "capture", counted)
    model = on_gpu(Model())
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", max_steps=20)
    for sampler, steps in (("ddpm", 6), ("ddim", 20), ("heun", 4), ("dpmpp_2m", 9)):
        engine.configure(sampler=sampler, steps=steps)
        x = engine.sample(SHAPE, generator=seeded())
        assert same(x, plain(model, sampler=sampler, steps=steps))
        assert engine.explain()["graph"].startswith("loop")
    assert len(captures) == 1


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_never_missed(edit: str) -> None:
    model = on_gpu(Model())
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    before = engine.sample(SHAPE, generator=seeded())
    if edit == "optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(1, 1, 4, 4, dtype=torch.float64, device="cuda")
        model(x, torch.zeros(1, device="cuda")).sum().backward()
        optimizer.step()
    else:
        EDITS[edit](model)
        on_gpu(model)
    after = engine.sample(SHAPE, generator=seeded())
    assert error(after, plain(model, sampler="ddim", steps=4)) < 1e-5
    if edit != "another adapter":  # which needs a context to matter
        assert error(after, before) > 1e-3


def test_the_model_moves_and_comes_back() -> None:
    model = on_gpu(Model())
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    first = engine.sample(SHAPE, generator=seeded())
    model.cpu()
    second = engine.sample(SHAPE, generator=seeded())
    assert second.device.type == "cpu"
    on_gpu(model)
    assert same(first.cpu(), second)
    assert torch.equal(engine.sample(SHAPE, generator=seeded()), first)


def test_threads_with_streams_of_their_own() -> None:
    model = on_gpu(Model())
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=8)
    truth = [plain(model, sampler="ddpm", steps=8, generator=seeded(i)) for i in range(4)]
    good: list[bool] = []

    def run(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                good.append(same(engine.sample(SHAPE, generator=seeded(i)), truth[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(good) == 40
    assert all(good)


@pytest.mark.parametrize("model", [Reads, Draws])
def test_what_cannot_be_captured_leaves_a_usable_gpu(model: type[Model]) -> None:
    engine = df.Engine(on_gpu(model()), SCHEDULE, sampler="ddim", steps=4)
    with pytest.warns(RuntimeWarning, match="capture failed"):
        engine.sample(SHAPE)
    engine.sample(SHAPE)
    other = df.Engine(on_gpu(Model()), SCHEDULE, graph="loop", sampler="ddim", steps=4)
    x = other.sample(SHAPE, generator=seeded())
    assert same(x, plain(other.model, sampler="ddim", steps=4))


class Large(Model):
    """Needs memory while it runs, as much as ``bytes`` says."""

    bytes = 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        used = torch.empty(self.bytes, dtype=torch.uint8, device=x.device)
        return super().forward(x, t) + 0 * used[:1].to(x.dtype)


def test_out_of_memory_in_a_capture() -> None:
    """Two shapes of two thirds of the memory each can't both stay captured."""
    model = on_gpu(Large())
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for size in (4, 5):
                model.bytes = 2**29 + 2**27 + size
                engine.sample((1, 1, size, size))
                assert engine.explain()["graph"].startswith("loop")
        model.bytes = 2**31
        with (
            pytest.warns(RuntimeWarning, match="capture failed"),
            pytest.raises(torch.OutOfMemoryError),
        ):
            engine.sample((1, 1, 6, 6))
        model.bytes = 0
        engine.sample((1, 1, 7, 7))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_masked_loop(way: str) -> None:
    model, x_0 = on_gpu(Model()), torch.randn(SHAPE, dtype=torch.float64)
    mask = torch.rand(1, 1, *SHAPE[2:], dtype=torch.float64).cuda()
    call = {"x_0": x_0.cuda(), "mask": mask}
    engine = df.Engine(model, SCHEDULE, graph="loop", sampler="heun", steps=5)
    x = engine.sample(SHAPE, **call, generator=seeded())
    assert same(x, plain(model, sampler="heun", steps=5, **call))
