"""Requests of every kind in one batch: exact in any company, bounded, each with its own fate."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close
from PIL import Image
from torch import Tensor, nn

from diffusion_fast import Batcher, StableDiffusion, UNet2DCondition
from diffusion_fast.models.ip_adapter import IPAdapter
from diffusion_fast.pipelines import BatcherClosed, Pending, QueueFull, make_tiny
from diffusion_fast.samplers import SAMPLERS

TIMEOUT = 60
PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)
MASK = (torch.arange(64)[:, None] + torch.arange(64) > 60).float()
# Every way to ask for an image that is a way of its own inside a batch.
WAYS: list[dict[str, Any]] = [
    {"guidance_scale": 1},
    {"sampler": "heun", "guidance_scale": 3.0, "steps": 3},
    {"sampler": "euler_ancestral", "negative_prompt": "a dog"},
    {"sampler": "unipc", "guidance_scale": 5.0, "guidance_rescale": 0.5},
    {"image": PICTURE, "strength": 0.6, "sampler": "dpmpp_2m_sde"},
    {"image": PICTURE, "mask": MASK, "sampler": "ddim", "eta": 0.5},
    {"image": PICTURE, "mask": MASK, "strength": 0.7, "sampler": "dpmpp_3m"},
    {"prompt": "a cat " * 60, "clip_skip": 1},
    {"prompt": "[a|b] (c:1.2)", "negative_prompt": "[d:e:2]", "sampler": "heun", "steps": 4},
    {"guidance_interval": (0.5, 5.0), "sampler": "DPM++ 2M Karras"},
]

# Its state overflows in the first step, so that the second one's output is not finite.
BROKEN = {"guidance_scale": 1e308, "guidance_interval": None, "steps": 4}


def request(number: int) -> dict[str, Any]:
    """One of :data:`WAYS`, with a prompt, seed and number of steps of its own."""
    way = WAYS[number % len(WAYS)]
    usual = {"prompt": f"a cat {number}", "seed": number, "steps": 2 + number % 4}
    return {**usual, "output": "latent", "size": 64, **way} | (
        {"size": None} if "image" in way else {}
    )


def alone(pipe: StableDiffusion, asked: dict[str, Any]) -> Tensor:
    prompt = asked["prompt"]
    return pipe(prompt, **{n: v for n, v in asked.items() if n != "prompt"}).latents


@pytest.fixture(scope="module")
def exact() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tiny", dtype=torch.float64)


@pytest.fixture(scope="module")
def expected(exact: StableDiffusion) -> list[Tensor]:
    """The latents of each way, drawn by the pipeline alone."""
    return [alone(exact, request(i)) for i in range(len(WAYS))]


@pytest.fixture
def batcher(exact: StableDiffusion) -> Iterator[Batcher]:
    with Batcher(exact, slots=8) as made:
        yield made
        made.close(0)


def test_all_ways_together_are_what_they_are_alone(
    batcher: Batcher, expected: list[Tensor]
) -> None:
    pending = batcher.submit_all([request(i) for i in range(len(WAYS))])
    for one, truth in zip(pending, expected, strict=True):
        result = one.result(TIMEOUT)
        assert_close(result.latents, truth)
        assert one.progress.state == "done"
    assert result.settings["guidance_interval"] == (0.5, 5.0)
    assert batcher.statistics.finished == len(WAYS)
    assert batcher.statistics.images / batcher.statistics.steps > 3


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_every_sampler(batcher: Batcher, exact: StableDiffusion, part: int) -> None:
    """Every third, of all families, each beside the next ones: some call the model twice, some read
    three calls before or the unconditional output alone."""
    common = {"prompt": "a cat", "steps": 3, "size": 64, "output": "latent", "seed": 5}
    names = {*list(SAMPLERS)[part::3], "lms", "pndm", "sa_solver_pece", "dpmpp_2m_cfg_pp"}
    asked = [{**common, "sampler": name} for name in sorted(names)]
    pending = batcher.submit_all(asked)
    for one, how in zip(pending, asked, strict=True):
        assert_close(one.result(TIMEOUT).latents, alone(exact, how))


def test_as_many_model_calls_as_the_longest_has_rows(batcher: Batcher) -> None:
    asked = [{**request(0), "steps": steps, "seed": steps} for steps in range(2, 10)]
    asked[7]["sampler"] = "heun"  # 17 rows
    for one in batcher.submit_all(asked):
        one.result(TIMEOUT)
    assert batcher.statistics.steps == 17
    assert batcher.statistics.images == sum(range(2, 9)) + 17


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(WAYS) - 1),
            st.sampled_from([0, 0, 0.002, 0.02]),
            st.sampled_from(["keep", "keep", "keep", "cancel", "later", "nan"]),
        ),
        min_size=3,
        max_size=10,
    ),
    st.integers(1, 4),
)
def test_arrivals_cancellations_and_failures_at_random(
    exact: StableDiffusion,
    expected: list[Tensor],
    arrivals: list[tuple[int, float, str]],
    slots: int,
) -> None:
    with Batcher(exact, slots=slots) as batcher:
        pending: list[tuple[int, str, Pending]] = []
        for way, delay, fate in arrivals:
            time.sleep(delay)
            asked = request(way) | (BROKEN if fate == "nan" else {})
            one = batcher.submit(**asked)
            pending.append((way, fate, one))
            if fate == "cancel":
                one.cancel()
            elif fate == "later":
                threading.Timer(0.01, one.cancel).start()
        for way, fate, one in pending:
            if fate == "nan":
                with pytest.raises(FloatingPointError, match="model: expected finite outputs"):
                    one.result(TIMEOUT)
            elif fate == "cancel":
                assert one.cancelled()
            else:
                try:
                    assert_close(one.result(TIMEOUT).latents, expected[way])
                except CancelledError:
                    assert fate == "later"
        concurrent.futures.wait([one for *_, one in pending], timeout=TIMEOUT)
        assert batcher.close(TIMEOUT)
        assert batcher.occupied == 0
        assert batcher.statistics.failed == sum(fate == "nan" for _, fate, _ in pending)


def test_neighbours_change_no_bit_where_the_number_of_rows_is_fixed(exact: StableDiffusion) -> None:
    """Idle ones, others, and NaN."""
    with Batcher(exact, slots=3, rows=[6]) as batcher:
        own, other = request(1), request(3)
        single = batcher.submit(**own).result(TIMEOUT).latents
        beside = batcher.submit_all([own, other, request(2)])
        assert torch.equal(beside[0].result(TIMEOUT).latents, single)
        both = batcher.submit_all([own, request(4) | BROKEN])
        assert torch.equal(both[0].result(TIMEOUT).latents, single)
        with pytest.raises(FloatingPointError):
            both[1].result(TIMEOUT)


def test_sizes_take_turns(batcher: Batcher, exact: StableDiffusion) -> None:
    asked = [{**request(0), "size": size, "steps": 6} for size in (64, (64, 128), 64, (128, 64))]
    pending = batcher.submit_all(asked)
    for one, how in zip(pending, asked, strict=True):
        assert_close(one.result(TIMEOUT).latents, alone(exact, how))
    assert batcher.statistics.steps == 3 * 6


def test_progress_preview_and_cancel(batcher: Batcher) -> None:
    long = batcher.submit(**{**request(0), "steps": 100, "output": "pil"})
    seen = set()
    preview = None
    until = time.monotonic() + TIMEOUT
    while preview is None and time.monotonic() < until:
        seen.add(long.progress.state)
        preview = long.preview()
        time.sleep(0.001)
    assert isinstance(preview, Image.Image)
    assert preview.size == (64, 64)
    assert seen <= {"queued", "running"}
    assert 0 < long.progress.step < 100
    assert long.progress.part == long.progress.step / 100
    assert long.cancel()
    with pytest.raises(CancelledError):
        long.result(TIMEOUT)
    after = batcher.submit(**{**request(0), "output": "pil"}).result(TIMEOUT)
    assert after.images[0].size == (64, 64)
    assert batcher.occupied == 0


def test_a_preview_is_the_image_that_a_step_predicts(
    batcher: Batcher, exact: StableDiffusion
) -> None:
    """Without the noise that is still in the latents: a picture of what ``preview=`` is given."""
    asked = {**request(0), "steps": 40, "guidance_scale": 3.0}
    given: list[Tensor] = []
    noisy: list[Tensor] = []
    prompt = asked.pop("prompt")
    with torch.no_grad():
        exact(
            prompt,
            **asked,
            preview=lambda step, t, latents: given.append(latents),
            callback=lambda step, t, latents: noisy.append(latents),
        )
        pictures = [exact.vae.decode(exact.vae.unscale(torch.cat(all_))) for all_ in (given, noisy)]
    one, drawn = batcher.submit(prompt, **asked), []
    until = time.monotonic() + TIMEOUT
    while not one.done() and time.monotonic() < until:
        if (preview := one.preview()) is not None and preview not in drawn:
            drawn.append(preview)
        time.sleep(0.001)
    assert drawn
    for preview in drawn:
        picture = torch.from_numpy(np.array(preview)).permute(2, 0, 1) / 127.5 - 1
        near, far = ((one.clamp(-1, 1) - picture).abs().amax((1, 2, 3)) for one in pictures)
        assert near.min() <= 1 / 127
        assert far[near.argmin()] > 0.05 or near.argmin() > 30  # at the end they are the same


def test_a_full_queue_refuses_at_once(exact: StableDiffusion) -> None:
    with Batcher(exact, slots=1, queue=2) as batcher:
        running = batcher.submit(**{**request(0), "steps": 100})
        while running.progress.state == "queued":
            time.sleep(0.001)
        waiting = batcher.submit_all([request(0)] * 2)
        with pytest.raises(QueueFull, match="queue: expected room for 1 requests, got 2 wait of"):
            batcher.submit(**request(0))
        waiting[0].cancel()
        with pytest.raises(QueueFull):
            batcher.submit_all([request(0)] * 2)
        batcher.submit(**request(0)).cancel()
        running.cancel()
        waiting[1].result(TIMEOUT)


def test_pictures_that_wait_are_bounded(exact: StableDiffusion) -> None:
    with Batcher(exact, slots=1, max_bytes=80_000) as batcher:
        running = batcher.submit(**{**request(0), "steps": 100})
        while running.progress.state == "queued":
            time.sleep(0.001)
        batcher.submit(**request(4))  # 49152 bytes
        with pytest.raises(QueueFull, match="queue: expected room for the pictures, got 49152"):
            batcher.submit(**request(4))
        batcher.close(0)


def test_when_the_loop_dies_every_request_learns_it(exact: StableDiffusion) -> None:
    batcher = Batcher(exact, slots=2)

    def fail(*_: Any, **more: Any) -> None:
        raise MemoryError("the device is gone")

    batcher._shared.network.run = fail
    pending = batcher.submit_all([request(0)] * 5)
    for one in pending:
        with pytest.raises(BatcherClosed, match="thread ended: MemoryError"):
            one.result(TIMEOUT)
    with pytest.raises(BatcherClosed, match="the device is gone"):
        batcher.submit(**request(0))
    assert not batcher.alive
    assert batcher.close()


def test_closing_finishes_or_says_so(exact: StableDiffusion) -> None:
    batcher = Batcher(exact, slots=1)
    first, second = batcher.submit_all([request(0), request(1)])
    assert batcher.close(TIMEOUT)
    assert first.done() and second.done()  # noqa: PT018
    with pytest.raises(BatcherClosed, match="was closed"):
        batcher.submit(**request(0))
    batcher = Batcher(exact, slots=1)
    pending = batcher.submit_all([{**request(0), "steps": 100}] * 2)
    assert not batcher.close(0.05)
    for one in pending:
        with pytest.raises(BatcherClosed, match="before the request was done"):
            one.result(TIMEOUT)


@pytest.mark.parametrize("model", ["tiny-sdxl", "tiny-inpainting", "tiny-sd21"])
def test_other_models(model: str) -> None:
    pipe = StableDiffusion.from_pretrained(model, dtype=torch.float64)
    asked = [request(5), request(5) | {"guidance_scale": 1, "seed": 3, "steps": 4}]
    if model != "tiny-inpainting":
        asked += [request(0), request(2), request(7) | {"clip_skip": 0}]
    with Batcher(pipe, slots=3) as batcher:
        pending = batcher.submit_all(asked)
        for one, how in zip(pending, asked, strict=True):
            assert_close(one.result(TIMEOUT).latents, alone(pipe, how))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_model_that_takes_the_guidance_scale_as_an_input(tmp_path: Path, kind: str) -> None:
    folder = make_tiny(tmp_path / kind, kind)
    config = UNet2DCondition.from_pretrained(folder).config
    torch.manual_seed(1)
    lcm = UNet2DCondition(dataclasses.replace(config, time_cond_proj_dim=16))
    lcm.save_pretrained(folder / "unet")
    pipe = StableDiffusion.from_pretrained(folder, dtype=torch.float64)
    asked = [{**request(0), "guidance_scale": scale, "steps": 3} for scale in (1.5, 8.0)]
    with Batcher(pipe, slots=3) as batcher:
        pending = batcher.submit_all(asked)
        for one, how in zip(pending, asked, strict=True):
            result = one.result(TIMEOUT)
            assert_close(result.latents, alone(pipe, how))
            assert result.settings["guidance_scale"] == how["guidance_scale"]
        with pytest.raises(ValueError, match="negative_prompt: expected None for a model"):
            batcher.submit(**asked[0], negative_prompt="a dog")


def test_edits_between_two_images_are_seen() -> None:
    pipe = StableDiffusion.from_pretrained("tiny", dtype=torch.float64)
    with Batcher(pipe, slots=2) as batcher:
        before = batcher.submit(**request(0)).result(TIMEOUT).latents
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight.mul_(1.5)
        after = batcher.submit(**request(0)).result(TIMEOUT).latents
        assert not torch.equal(before, after)
        assert_close(after, alone(pipe, request(0)))


def test_an_ip_adapter_that_comes_later_fails_requests_and_not_the_batcher() -> None:
    pipe = StableDiffusion.from_pretrained("tiny", dtype=torch.float64)
    with Batcher(pipe, slots=1) as batcher:
        running = batcher.submit(**{**request(0), "steps": 100})
        while running.progress.state == "queued":
            time.sleep(0.001)
        accepted = batcher.submit_all([request(2)] * 2)
        widths = [one.to_k.out_features for _, one in pipe.unet.cross_attentions()]
        pipe.unet.ip_adapters.append(IPAdapter(nn.Identity(), 8, widths))
        pipe.ip_adapters.scales["late"] = 1.0
        with pytest.raises(ValueError, match=r"pipe: expected one without IP-Adapters.*got late"):
            batcher.submit(**request(2))
        running.cancel()
        for one in accepted:
            with pytest.raises(ValueError, match="model: expected one without IP-Adapters, got 1"):
                one.result(TIMEOUT)
        assert batcher.alive
        pipe.ip_adapters.unload("late")
        after = batcher.submit(**request(2)).result(TIMEOUT).latents
        assert_close(after, alone(pipe, request(2)))
        assert batcher.occupied == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "prompt: expected a string, got int"),
        ({"steps": 0}, "steps: expected a positive integer"),
        ({"steps": 400}, "steps: expected at most 150 model calls, got 400"),
        ({"sampler": "nothing"}, "sampler: expected one of"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected finite"),
        ({"seed": -1}, "seed: expected integers"),
        ({"size": 60}, "size: expected .* multiples of 8"),
        ({"mask": MASK}, "mask: expected None without image="),
        ({"clip_skip": 99}, "clip_skip: expected an integer in"),
        ({"strength": 0.5}, "strength: expected None without image="),
        ({"nonsense": 1}, "nonsense: expected one of the keywords"),
        ({"output": "jpeg"}, "output: expected one of"),
    ],
)
def test_bad_requests_are_refused_at_once(
    batcher: Batcher, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        batcher.submit(**{**request(0), **change})
    assert batcher.statistics.accepted == 0


@pytest.mark.parametrize("name", ["slots", "queue", "max_steps"])
def test_bad_arguments(exact: StableDiffusion, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a positive integer"):
        Batcher(exact, **{name: 0})


def test_rows_that_do_not_reach(exact: StableDiffusion) -> None:
    with pytest.raises(ValueError, match=r"sizes: expected one of at least 6"):
        Batcher(exact, slots=3, rows=[4])
