"""The loop's inputs: masks, extra channels, streams of noise; what it allocates and reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from samplers.scheduler_parity import COUNTERPARTS, in_double
from tape import TapeCapturer, tape
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.samplers import SAMPLERS, make_table

__all__ = ["tape"]  # a fixture

SHAPE = (2, 4, 6, 5)
SCHEDULE = df.DiffusionSchedule(timesteps=100)
GRAPHS = ["off", "step", "loop"]


class Model(nn.Module):
    """Mixes its channels, of which there may be more than the samples have."""

    def __init__(self, extra: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4 + extra, 4, 3, padding=1, dtype=dtype)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.inputs.append(x.clone())
        out = self.mix(x) * (1 + t.to(x.dtype).view(-1, 1, 1, 1) / 100)
        return out if context is None else out + context.view(-1, 1, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inpainted(model: Model, x_0: Tensor, mask: Tensor, z: Tensor, **options: Any) -> Tensor:
    """Straight from the table: a step, then what is known noised to where the step has come."""
    table = make_table(schedule=SCHEDULE, **options)
    x = z * table.initial_scale
    if options.get("strength") is not None:
        x = table.signal * x_0 + table.noise * z
    kept = {name: torch.zeros_like(x) for name in table.kept}
    noise = seeded(7)
    for i in range(len(table)):
        t = torch.full(x.shape[:1], table.timesteps[i].item())
        drawn = torch.randn(x.shape, generator=noise, dtype=x.dtype) if table.draws[i] else None
        ops.sampler_step(x, model(x, t), table.rows, i, noise=drawn, **kept)
        step = table.step_of_row[i]
        if i + 1 == len(table):
            x = mask * x + (1 - mask) * x_0
        elif table.step_of_row[i + 1] != step:
            signal, level = table.next_levels[i].tolist()
            x = mask * x + (1 - mask) * (signal * x_0 + level * z)
    return x


# One of each kind of table: what it keeps and draws, and where its calls are.
KINDS = (
    *("ddpm", "ddim", "dpmpp_2m", "heun", "unipc_3", "dpm_2_ancestral", "dpmpp_sde", "seeds_3"),
    *("dpmpp_3s", "restart", "heunpp2", "dpm_fast", "lcm", "tcd", "lms", "pndm", "deis_3"),
    *("sa_solver", "sa_solver_pece", "dpm_solver_3m", "dpm_solver_3s"),
)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("strength", [None, 0.6])
def test_inpainting(tape: TapeCapturer, graph: str, sampler: str, strength: float | None) -> None:
    """Soft masks too; final_alpha leaves noise on what is drawn, but not on what is kept."""
    model, x_0, z = Model(), randn(*SHAPE), randn(*SHAPE)
    options = {"sampler": sampler, "steps": 5, "final_alpha": "first", "strength": strength}
    engine = df.Engine(model, SCHEDULE, graph=graph, **options)
    for mask in (
        (torch.rand(SHAPE[0], 1, *SHAPE[2:]) > 0.5).double(),
        torch.rand(1, *SHAPE[1:], dtype=torch.float64),
    ):
        x = engine.sample(SHAPE, x_T=z, x_0=x_0, mask=mask, generator=seeded(7))
        with torch.no_grad():
            truth = inpainted(model, x_0, mask, z, **options)
        assert error(x, truth) < 1e-9
        kept = (mask == 0).expand(SHAPE)
        assert torch.equal(x[kept], x_0[kept])


def test_a_mask_of_ones_changes_nothing_and_bool_masks_are_masks() -> None:
    model, x_0 = Model(), randn(*SHAPE)
    engine = df.Engine(model, SCHEDULE, sampler="dpmpp_2m", steps=5)
    ones = torch.ones(1, 1, *SHAPE[2:], dtype=torch.bool)
    free = engine.sample(SHAPE, generator=seeded())
    drawn = engine.sample(SHAPE, generator=seeded(), x_0=x_0, mask=ones)
    assert error(drawn, free) < 1e-12
    kept = engine.sample(SHAPE, generator=seeded(), x_0=x_0, mask=~ones)
    assert torch.equal(kept, x_0)
    again = engine.sample(SHAPE, generator=seeded())
    assert torch.equal(again, free)


class Wrapped(nn.Module):
    """A float64 module around a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.dtype = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def inpainting_pipeline(sampler: str) -> Any:
    """diffusers' pipeline for a U-Net of 4 channels, in float64."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    name, options = COUNTERPARTS[sampler]
    linear = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02}
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=vae.double(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.double(),
        scheduler=getattr(diffusers, name)(
            **options, **linear, timestep_spacing="leading", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_is_that_of_diffusers(sampler: str, strength: float) -> None:
    pipeline = inpainting_pipeline(sampler)
    prompt, negative, z = randn(1, 3, 6), randn(1, 3, 6), randn(1, 4, 8, 8)
    image, mask = torch.randn(1, 4, 8, 8).double(), (torch.rand(1, 1, 8, 8) > 0.5).double()
    with in_double(pipeline.scheduler, SCHEDULE):
        theirs = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            image=image,
            mask_image=mask,
            masked_image_latents=torch.zeros_like(image),
            height=8,
            width=8,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=3.0,
            generator=seeded(),
            output_type="latent",
        ).images
    z = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    x = df.sample(
        Wrapped(lambda x, t, context: pipeline.unet(x, t, context).sample),
        SCHEDULE,
        tuple(z.shape),
        sampler=sampler,
        steps=10,
        steps_offset=1,
        guidance_scale=3.0,
        strength=None if strength == 1.0 else strength,
        context=prompt,
        null_context=negative,
        x_T=z,
        x_0=image,
        mask=mask,
    )
    assert error(x, theirs) < 1e-9


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_extra_channels_join_every_input(
    tape: TapeCapturer, graph: str, guidance_scale: float, batch: int
) -> None:
    model, extra = Model(extra=5), randn(batch, 5, *SHAPE[2:])
    contexts = {"context": randn(2), "null_context": randn(2)}
    options = {"sampler": "unipc", "steps": 4, "guidance_scale": guidance_scale}
    engine = df.Engine(model, SCHEDULE, graph=graph, **options)
    z = randn(*SHAPE)
    engine.sample(SHAPE, **contexts, x_T=z, extra_channels=randn(batch, 5, *SHAPE[2:]))
    x = engine.sample(SHAPE, **contexts, x_T=z, extra_channels=extra)

    def joined(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        beside = extra.expand(2, *extra.shape[1:]).repeat(len(x) // 2, 1, 1, 1)
        return model(torch.cat((x, beside), dim=1), t, context)

    truth = df.sample(Wrapped(joined), SCHEDULE, SHAPE, **contexts, x_T=z, **options)
    assert error(x, truth) < 1e-9


@pytest.mark.parametrize("graph", GRAPHS)
def test_philox_noise_is_its_own_stream(tape: TapeCapturer, graph: str) -> None:
    """The start reads the stream of the offset, row i that of the offset + 1 + i."""
    model = Model()
    engine = df.Engine(model, SCHEDULE, graph=graph, sampler="ddpm", steps=5)
    x = engine.sample(SHAPE, generator=ops.Philox(3, 20))
    table = make_table("ddpm", SCHEDULE, 5)
    state = ops.Philox(3, 20).normal(SHAPE, torch.float64)
    with torch.no_grad():
        for i in range(5):
            t = torch.full((2,), table.timesteps[i].item())
            z = ops.Philox(3, 21 + i).normal(SHAPE, torch.float64)
            ops.sampler_step(state, model(state, t), table.rows, i, noise=z)
    assert error(x, state) < 1e-9
    assert error(engine.sample(SHAPE, generator=ops.Philox(3, 21)), state) > 0.1


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m_sde"])
def test_a_generator_is_asked_for_what_is_read(
    tape: TapeCapturer, graph: str, sampler: str
) -> None:
    """The start, and the rows with noise: the next number is that of the same number of randn."""
    engine = df.Engine(Model(), SCHEDULE, graph=graph, sampler=sampler, steps=5)
    used, fresh = seeded(), seeded()
    engine.sample(SHAPE, generator=used)
    for _ in range(1 + int(engine.table.draws.sum())):
        torch.randn(SHAPE, generator=fresh, dtype=torch.float64)
    assert torch.equal(torch.rand(1, generator=used), torch.rand(1, generator=fresh))


def test_configure_is_a_new_engine_on_the_same_buffers() -> None:
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=4)
    engine.sample(SHAPE)
    (loop,) = engine._loops.values()
    for options in (
        {"sampler": "heun", "steps": 7},
        {"sampler": "euler", "timestep_spacing": "linspace"},
        {"steps": 100, "prediction_type": "sample"},
    ):
        engine.configure(**options)
        x = engine.sample(SHAPE, generator=seeded())
        assert torch.equal(
            x, df.sample(model, SCHEDULE, SHAPE, generator=seeded(), **vars(engine._options))
        )
        assert list(engine._loops.values()) == [loop]


def test_a_configuration_that_cannot_be_leaves_the_old_one() -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    before = engine.sample(SHAPE, generator=seeded())
    for bad, kind in (({"steps": 0}, ValueError), ({"stesp": 3}, TypeError)):
        with pytest.raises(kind):
            engine.configure(**bad)
    assert torch.equal(engine.sample(SHAPE, generator=seeded()), before)


class Outside(TorchDispatchMode):
    """Counts, outside of the model's calls, new memory and tensors read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.in_model = True  # until the first call of the model
        self.allocated: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.in_model:
            known = {address(t) for t in pytree.tree_leaves((args, kwargs)) if is_tensor(t)}
            new = [t for t in pytree.tree_leaves(result) if is_tensor(t)]
            if any(address(t) not in known for t in new):
                self.allocated.append(func.name())
            if func is torch.ops.aten._local_scalar_dense.default:
                self.reads.append(func.name())
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def watch(model: nn.Module, mode: Outside, last: int) -> None:
    """The mode looks between the end of the model's first call and the start of its last one."""
    calls = [0]

    def enter(*_: Any) -> None:
        mode.in_model = True

    def leave(*_: Any) -> None:
        calls[0] += 1
        mode.in_model = calls[0] >= last

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_allocates_nothing_and_reads_nothing(sampler: str, masked: bool) -> None:
    model, mode = Model(dtype=torch.float32), Outside()
    engine = df.Engine(model, SCHEDULE, sampler=sampler, steps=8, guidance_scale=2.0)
    call: dict[str, Any] = {"context": torch.ones(2), "null_context": torch.zeros(2)}
    if masked:
        call |= {"x_0": torch.zeros(SHAPE), "mask": torch.rand(1, 1, *SHAPE[2:])}
    watch(model, mode, last=len(engine.table))
    with mode:
        engine.sample(SHAPE, **call)
    assert len(model.inputs) == len(engine.table)
    assert mode.allocated == []
    assert mode.reads == []


def test_the_watch_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mode = Model(dtype=torch.float32), Outside()
    step = ops.sampler_step

    def careless(x: Tensor, *args: Any, **kwargs: Any) -> None:
        step(x, *args, **kwargs)
        x.mul_(float((x * 2).sum()))

    monkeypatch.setattr(ops, "sampler_step", careless)
    watch(model, mode, last=5)
    with mode:
        df.sample(model, SCHEDULE, SHAPE, sampler="ddim", steps=5)
    assert len(mode.reads) == 4
    assert "aten::mul.Tensor" in mode.allocated


def test_inference_mode_leaves_usable_buffers() -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=3)
    with torch.inference_mode():
        first = engine.sample(SHAPE, generator=seeded())
    assert torch.equal(engine.sample(SHAPE, generator=seeded()), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(1, 1, 6, 5)}, "x_0: expected an image to keep, because mask is given"),
        ({"x_0": torch.zeros(SHAPE)}, r"strength: expected how far to noise x_0.*or a mask"),
        (
            {"x_0": torch.zeros(SHAPE), "mask": torch.ones(1, 2, 6, 5)},
            r"mask: expected shape \[1 or 2, 1 or 4, ...\] beside samples \[2, 4, 6, 5\]",
        ),
        ({"x_0": torch.zeros(SHAPE), "mask": torch.ones(6, 5)}, "mask: expected shape"),
        (
            {"x_0": torch.zeros(SHAPE), "mask": torch.full((1, 1, 6, 5), 255.0)},
            r"mask: expected values in \[0, 1\], got values in \[255, 255\]",
        ),
        (
            {"x_0": torch.zeros(SHAPE), "mask": torch.full((1, 1, 6, 5), float("nan"))},
            r"mask: expected values in \[0, 1\]",
        ),
        (
            {"x_0": torch.zeros(SHAPE), "mask": torch.ones(1, 1, 6, 5).long()},
            "mask: expected a floating point dtype or torch.bool",
        ),
        (
            {"extra_channels": torch.ones(3, 5, 6, 5)},
            r"extra_channels: expected shape \[1 or 2, any",
        ),
        ({"extra_channels": torch.ones(1, 5, 5, 5)}, "extra_channels: expected shape"),
        ({"extra_channels": torch.ones(1, 5, 6, 5).long()}, "extra_channels: expected a floating"),
        ({"extra_channels": 3}, "extra_channels: expected a tensor"),
        ({"max_steps": 0}, "max_steps: expected a positive integer"),
        ({"rewrites": ["fused_qkv"]}, "rewrites: expected 'all' or 'none' for a model of type"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    made = {k: change[k] for k in ("max_steps", "rewrites") if k in change}
    with pytest.raises((ValueError, TypeError), match=message):
        df.Engine(Model(dtype=torch.float32), SCHEDULE, sampler="ddim", steps=2, **made).sample(
            SHAPE, **{k: v for k, v in change.items() if k not in made}
        )
