"""The loop: what it hands to the model, what it keeps, and that it is the table's recurrence."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from numerics import assert_close, error
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.samplers import SAMPLERS, make_table

SHAPE = (3, 1, 4, 4)
SCHEDULE = df.DiffusionSchedule(timesteps=100)


class Linear(nn.Module):
    """A model with weights, a dtype and a taste for its context; its output depends on t."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1, dtype=dtype)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), t, context))
        out = self.mix(x) * (1 + t.to(x.dtype).view(-1, 1, 1, 1) / 100)
        if context is None:
            return out
        amount = context.to(x.dtype).mean((1, 2)).view(-1, 1, 1, 1)
        return out * (1 + amount) + amount


def pickled(engine: df.Engine) -> df.Engine:
    return pickle.loads(pickle.dumps(engine))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(
    model: nn.Module,
    x_T: Tensor,
    generator: torch.Generator,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The recurrence of ops.sampler_step, straight from the unfolded table, in float64."""
    table = make_table(schedule=SCHEDULE, **options)
    x = x_T.double() * table.initial_scale
    kept = {name: torch.zeros_like(x) for name in table.kept}
    for i in range(len(table)):
        t = torch.full(x.shape[:1], table.timesteps[i].item())
        if table.halves == "both":
            joined = torch.cat((null_context, context))
            out = model(torch.cat((x, x)), torch.cat((t, t)), joined)
        else:
            chosen = context if table.halves == "conditional" else null_context
            out = model(x, t, chosen)
        noise = torch.randn(x.shape, generator=generator).double() if table.draws[i] else None
        ops.sampler_step(x, out, table.rows, i, noise=noise, **kept)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 2.5])
def test_the_loop_is_the_recurrence(sampler: str, guidance_scale: float) -> None:
    """Folding, skipping what is not needed and reusing buffers change nothing."""
    options = {"sampler": sampler, "steps": 8, "guidance_scale": guidance_scale}
    context, null_context = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    model = Linear()
    x_T = torch.randn(SHAPE)
    x = df.sample(
        model,
        SCHEDULE,
        SHAPE,
        x_T=x_T,
        generator=seeded(),
        context=context,
        null_context=null_context,
        **options,
    )
    with torch.no_grad():
        truth = by_hand(model.double(), x_T, seeded(), context, null_context, **options)
    assert error(x, truth) < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": [3.0, 0.0, 1.0, 7.5, 2.0]},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
        {"guidance_scale": 4.0, "guidance_interval": (0.3, 2.0)},
    ],
    ids=["per step", "rescale", "interval"],
)
def test_guidance_schedules(sampler: str, guidance: dict[str, object]) -> None:
    options = {"sampler": sampler, "steps": 5, **guidance}
    contexts = {"context": torch.randn(3, 2, 5), "null_context": torch.randn(3, 2, 5)}
    model, x_T = Linear(), torch.randn(SHAPE)
    x = df.sample(model, SCHEDULE, SHAPE, x_T=x_T, generator=seeded(), **contexts, **options)
    with torch.no_grad():
        truth = by_hand(model.double(), x_T, seeded(), **contexts, **options)
        plain = by_hand(
            model, x_T, seeded(), **contexts, sampler=sampler, steps=5, guidance_scale=4.0
        )
    assert error(x, truth) < 1e-5
    assert error(plain, truth) > 1e-3


def test_a_silent_model_can_be_rescaled() -> None:
    """Its outputs have no deviation at all."""
    contexts = {"context": torch.zeros(3, 1), "null_context": torch.zeros(3, 1)}
    guidance = {"guidance_scale": 3.0, "guidance_rescale": 0.5}
    for shape in (SHAPE, (3, 1)):
        x = df.sample(lambda x, t, c: torch.zeros_like(x), SCHEDULE, shape, **contexts, **guidance)
        assert x.isfinite().all()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun", "unipc"])
def test_float64_models_keep_float64(sampler: str) -> None:
    model, x_T = Linear(torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    x = df.sample(model, SCHEDULE, SHAPE, x_T=x_T, generator=seeded(), sampler=sampler, steps=7)
    assert x.dtype == torch.float64
    table = make_table(sampler, SCHEDULE, 7)
    if not table.draws.any():
        with torch.no_grad():
            truth = by_hand(model, x_T, seeded(), sampler=sampler, steps=7)
        assert error(x, truth) < 1e-9


def test_half_models_keep_a_float32_state() -> None:
    model = Linear(torch.bfloat16)
    x = df.sample(model, SCHEDULE, SHAPE, steps=5, sampler="ddim")
    assert x.dtype == torch.float32
    assert all(seen.dtype == torch.bfloat16 for seen, _, _ in model.calls)


def test_what_the_model_is_given() -> None:
    model, context, null_context = Linear(), torch.ones(3, 2, 5), torch.zeros(1, 2, 5)
    df.sample(
        *(model, SCHEDULE, SHAPE),
        **{"sampler": "ddim", "steps": 4, "guidance_scale": 3.0},
        **{"context": context, "null_context": null_context},
    )
    x, t, seen = model.calls[0]
    assert x.shape == (6, 1, 4, 4)
    assert torch.equal(x[:3], x[3:])
    assert t.dtype == torch.int64
    assert t.tolist() == [75] * 6
    assert seen is not None
    assert torch.equal(seen, torch.cat((null_context.expand(3, 2, 5), context)))
    assert [call[1][0].item() for call in model.calls] == [75, 50, 25, 0]


def test_fractional_timesteps_are_float32() -> None:
    model = Linear()
    df.sample(model, SCHEDULE, SHAPE, sampler="euler", steps=7, timestep_spacing="linspace")
    assert model.calls[0][1].dtype == torch.float32


def test_a_dict_context_goes_by_keyword() -> None:
    def model(x: Tensor, t: Tensor, *, label: Tensor, text: Tensor) -> Tensor:
        assert label.tolist() == [7, 7, 1, 2]
        assert text.shape == (4, 3)
        return x

    context = {"label": torch.tensor([1, 2]), "text": torch.zeros(2, 3)}
    null_context = {"label": torch.tensor([7]), "text": torch.zeros(1, 3)}
    shared = {"context": context, "null_context": null_context, "guidance_scale": 2.0}
    df.sample(model, SCHEDULE, (2, 1, 4, 4), steps=2, **shared)


def test_one_generator_per_image_makes_each_as_if_alone() -> None:
    model = Linear()
    together = df.sample(model, SCHEDULE, SHAPE, steps=9, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = df.sample(model, SCHEDULE, (1, *SHAPE[1:]), steps=9, generator=[seeded(i)])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_noise_is_that_of_randn() -> None:
    """Same seed, same image as a plain loop that calls torch.randn."""
    x = df.sample(lambda x, t: torch.zeros_like(x), SCHEDULE, SHAPE, generator=seeded())
    g, alphas, betas = seeded(), SCHEDULE.alphas.double(), SCHEDULE.betas.double()
    state = torch.randn(SHAPE, generator=g).double()
    for t in reversed(range(100)):
        state = state / alphas[t].sqrt()
        if t > 0:
            state = state + betas[t].sqrt() * torch.randn(SHAPE, generator=g).double()
    assert error(x, state) < 1e-5


def test_an_engine_is_reused_without_traces() -> None:
    engine = df.Engine(Linear(), SCHEDULE, sampler="unipc", steps=6)
    first = engine.sample(SHAPE, generator=seeded(1))
    kept = first.clone()
    engine.sample((5, 1, 8, 8), generator=seeded(2))
    again = engine.sample(SHAPE, generator=seeded(1))
    assert torch.equal(first, kept)
    assert torch.equal(first, again)


def test_two_threads_share_an_engine() -> None:
    engine = df.Engine(Linear(), SCHEDULE, sampler="dpmpp_2m", steps=20)
    want = [engine.sample(SHAPE, generator=seeded(i)) for i in range(4)]
    got: dict[int, Tensor] = {}

    def run(i: int) -> None:
        got[i] = engine.sample(SHAPE, generator=seeded(i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(4))


INSIDE: dict[str, Callable[[df.Engine], object]] = {
    "sample": lambda engine: engine.sample(SHAPE),
    "configure": lambda engine: engine.configure(steps=3),
    "refresh": lambda engine: engine.refresh(),
}


@pytest.mark.parametrize("call", INSIDE)
@pytest.mark.parametrize("by", ["callback", "model"])
def test_a_run_inside_its_own_is_refused(call: str, by: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if busy and by == "model":
            INSIDE[call](engine)
        return x

    busy: list[bool] = []
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    expected = engine.sample(SHAPE, generator=seeded())
    busy.append(True)
    callback = (lambda *_: INSIDE[call](engine)) if by == "callback" else None
    with pytest.raises(RuntimeError, match="Engine: expected a callback, hook or model that"):
        engine.sample(SHAPE, generator=seeded(), callback=callback)
    busy.clear()
    assert torch.equal(engine.sample(SHAPE, generator=seeded()), expected)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_is_an_engine_of_its_own(copied: Callable[[df.Engine], df.Engine]) -> None:
    engine = df.Engine(Linear(), SCHEDULE, "off", sampler="ddim", steps=4, max_steps=50)
    expected = engine.sample(SHAPE, generator=seeded())
    other = copied(engine)
    assert torch.equal(other.sample(SHAPE, generator=seeded()), expected)
    assert other.explain() == engine.explain()
    seen: list[Tensor] = []
    engine.sample(SHAPE, callback=lambda *_: seen.append(other.sample(SHAPE, generator=seeded())))
    assert torch.equal(seen[0], expected)


def test_buffers_are_allocated_once_per_shape() -> None:
    engine = df.Engine(Linear(), SCHEDULE, sampler="dpmpp_3m", steps=6)
    engine.sample(SHAPE)
    (loop,) = engine._loops.values()
    engine.sample(SHAPE)
    engine.configure(sampler="heun", steps=9)
    engine.sample(SHAPE)
    assert list(engine._loops.values()) == [loop]
    engine.sample((2, 1, 4, 4))
    assert len(engine._loops) == 2


def test_no_step_reads_the_device_on_the_host() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (5, 50):
        engine = df.Engine(Linear(), SCHEDULE, sampler="ddpm", steps=steps)
        with NoReads() as mode:
            engine.sample(SHAPE)
        counts.append(mode.reads)
    assert counts[0] == counts[1]


def test_a_model_may_return_its_input() -> None:
    x_T = torch.randn(SHAPE)
    for sampler in ("ddim", "dpmpp_2m", "heun"):
        options = {"sampler": sampler, "steps": 5, "x_T": x_T}
        same = df.sample(lambda x, t: x, SCHEDULE, SHAPE, **options)
        torch.testing.assert_close(same, df.sample(lambda x, t: x * 1, SCHEDULE, SHAPE, **options))


def test_eval_mode_for_the_time_of_a_run_only() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Linear())
    model[1].eval()
    modes = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            modes.append(self.inner[0].training)
            return x

    watch = Watch()
    df.sample(watch, SCHEDULE, SHAPE, steps=2)
    assert modes == [False, False]
    assert watch.training
    assert model[0].training
    assert not model[1].training


def test_no_gradient_is_recorded() -> None:
    model = Linear()
    assert not df.sample(model, SCHEDULE, SHAPE, steps=2).requires_grad
    assert all(not x.requires_grad for x, _, _ in model.calls)


def test_the_callback_gets_copies() -> None:
    seen: list[tuple[int, float, Tensor]] = []
    x = df.sample(
        Linear(), SCHEDULE, SHAPE, sampler="ddim", steps=4, callback=lambda *a: seen.append(a)
    )
    assert [(step, t) for step, t, _ in seen] == [(0, 75.0), (1, 50.0), (2, 25.0), (3, 0.0)]
    assert torch.equal(seen[-1][2], x)
    assert not torch.equal(seen[0][2], seen[1][2])


def test_the_callback_comes_once_per_step_also_where_the_model_is_called_twice() -> None:
    seen: list[tuple[int, float]] = []
    model = Linear()
    options = {"sampler": "heun", "steps": 3, "callback": lambda step, t, x: seen.append((step, t))}
    df.sample(model, SCHEDULE, SHAPE, **options)
    assert seen == [(0, 66.0), (1, 33.0), (2, 0.0)]
    assert len(model.calls) == 5


def test_a_model_that_writes_to_its_input_is_found() -> None:
    with pytest.raises(ValueError, match=r"model: expected one that leaves x as it is.*x\.clone"):
        df.sample(lambda x, t: x.mul_(2) * 1, SCHEDULE, SHAPE, steps=2)
    with pytest.raises(ValueError, match=r"model: expected one that leaves t as it is"):
        df.sample(lambda x, t: x * t.add_(1).view(-1, 1, 1, 1), SCHEDULE, SHAPE, steps=2)


def test_the_model_may_be_cast_between_runs() -> None:
    model = Linear()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    first = engine.sample(SHAPE, generator=seeded())
    model.double()
    second = engine.sample(SHAPE, x_T=torch.randn(SHAPE, generator=seeded()))
    assert (first.dtype, second.dtype) == (torch.float32, torch.float64)
    assert error(first, second) < 1e-5


def test_unknown_keywords_list_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"sampelr: expected one of the .*sampler, .*steps"):
        df.Engine(Linear(), SCHEDULE, sampelr="ddim")


def test_image_to_image_starts_from_the_noised_image() -> None:
    starts = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        starts.append((x.clone(), t))
        return torch.zeros_like(x)

    image, z = torch.randn(SHAPE), torch.randn(SHAPE)
    df.sample(model, SCHEDULE, SHAPE, sampler="ddim", steps=10, strength=0.5, x_0=image, x_T=z)
    x, t = starts[0]
    assert len(starts) == 5
    assert_close(
        x, SCHEDULE.add_noise(image.double(), t, z.double()), SCHEDULE.add_noise(image, t, z)
    )


def test_progress_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    df.sample(Linear(), SCHEDULE, SHAPE, steps=3)
    assert capsys.readouterr() == ("", "")
    df.sample(Linear(), SCHEDULE, SHAPE, steps=3, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "ddpm" in err


def test_explain() -> None:
    engine = df.Engine(Linear(), SCHEDULE, sampler="heun", steps=5, guidance_scale=2.0)
    told = engine.explain()
    assert told["sampler"] == "heun, 9 model calls"
    assert told["guidance halves"] == "both"
    assert told["graph"].startswith("off")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_what_is_not_finite_is_reported_with_its_first_step(
    value: float, clip_sample: bool
) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1, 1) <= 50, value, 0.0) + x

    with pytest.raises(
        FloatingPointError, match=r"model: .* step 1 \(t = 50; steps count from 0 to 3\)"
    ):
        df.sample(model, SCHEDULE, SHAPE, sampler="ddim", steps=4, clip_sample=clip_sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 2.0}, "null_context: expected .*guidance_scale is not 1 or for CFG"),
        ({"guidance_scale": 0.0}, "null_context: expected"),
        (
            {"guidance_scale": 2.0, "null_context": torch.zeros(3, 2, 5)},
            "context: expected a context to guide towards",
        ),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected"),
        ({"context": torch.zeros(2, 2, 5)}, r"context: expected a batch of 3 \(or 1\), got \[2"),
        (
            {
                "guidance_scale": 2.0,
                "context": torch.zeros(3, 2, 5),
                "null_context": torch.zeros(3, 1, 5),
            },
            r"context: expected the shape and dtype of null_context",
        ),
        ({"steps": 101}, "steps: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"sampler": "fast"}, "sampler: expected one of ddpm"),
        ({"prediction_type": "noise"}, "prediction_type: expected one of epsilon"),
        ({"timestep_spacing": "even"}, "timestep_spacing: expected one of leading"),
        ({"variance": "medium", "sampler": "ddim"}, "variance: expected one of"),
        ({"x_T": torch.zeros(3, 1, 4, 5)}, r"x_T: expected shape of the samples"),
        ({"x_T": torch.zeros(SHAPE).long()}, "x_T: expected a floating point dtype"),
        ({"shape": (3, 0, 4, 4)}, r"shape: expected positive sizes"),
        ({"shape": ()}, r"shape: expected positive sizes"),
        ({"shape": 3}, r"shape: expected positive sizes \[B, ...\], got 3"),
        ({"shape": (3, 1.5)}, r"shape: expected positive sizes"),
        ({"generator": 3}, r"generator: expected a torch.Generator or a list of them, got 3"),
        ({"generator": ["a", "b", "c"]}, r"generator: expected a torch.Generator or a list"),
        ({"device": "gpu"}, r"device: expected one that works, got 'gpu'"),
        ({"strength": 0.5}, r"x_0: expected an image to start from, because strength is given"),
        ({"x_0": torch.zeros(SHAPE)}, r"strength: expected how far to noise x_0"),
        ({"strength": 0.5, "x_0": torch.zeros(1, 1, 4, 4)}, r"x_0: expected shape of the samples"),
        ({"generator": [torch.Generator()]}, r"generator: expected one or 3 generators"),
        ({"device": "meta"}, "device: expected the device of the model's parameters"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    call = {"model": Linear(), "schedule": SCHEDULE, "shape": SHAPE} | change
    with pytest.raises(ValueError, match=message):
        df.sample(**call)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"model: expected an output of the shape of its input"):
        df.sample(lambda x, t: x[:, :, :2], SCHEDULE, SHAPE, steps=2)
    with pytest.raises(TypeError, match=r"model: expected it to return a tensor, got tuple"):
        df.sample(lambda x, t: (x,), SCHEDULE, SHAPE, steps=2)
    with pytest.raises(TypeError, match=r"model: expected a callable, got int"):
        df.sample(3, SCHEDULE, SHAPE)
    with pytest.raises(TypeError, match=r"schedule: expected a DiffusionSchedule, got Linear"):
        df.Engine(Linear(), Linear())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU says so")
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_graph_that_cannot_be_captured_is_refused(graph: str) -> None:
    with pytest.raises(RuntimeError, match="there is no CUDA device"):
        df.Engine(Linear(), SCHEDULE, graph=graph)
