"""What an image launches, found without weights and compiled before it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run

from diffusion_fast import UNetConfig
from diffusion_fast.engine import ahead
from diffusion_fast.models import VAEConfig


def small() -> UNetConfig:
    return UNetConfig.preset("digits", in_channels=4, out_channels=4, num_classes=None)


def test_every_op_of_an_image_is_found() -> None:
    found = ahead.calls(
        small(), VAEConfig.preset("tiny"), torch.bfloat16, batch=2, size=(8, 8), steps=5
    )
    names = {name for name, _ in found}
    assert {"linear", "conv2d", "group_norm_silu", "attention", "sampler_step"} <= names
    assert all(t.is_meta for _, args in found for t in args if isinstance(t, torch.Tensor))
    batches = {args[0].shape[0] for name, args in found if name == "conv2d"}
    assert {2, 4} <= batches  # one half, both
    assert list(ahead.head_dims(found))


COUNT = """
import sys
import torch
from diffusion_fast import UNetConfig
from diffusion_fast.engine import ahead
from diffusion_fast.kernels import ahead as kernels
from diffusion_fast.models import VAEConfig

name, decoder = sys.argv[1:]
config = UNetConfig.preset(name)
size = (config.sample_size, config.sample_size)
found = ahead.calls(config, VAEConfig.preset(decoder), torch.bfloat16, batch=1, size=size, steps=20)
for ops in ({"group_norm_silu"}, {"linear", "conv2d"}):
    chosen = [one for one in found if one[0] in ops]
    print(len(chosen), len(kernels.programs(ahead.launches(chosen, 90), 90)))
"""


@pytest.mark.parametrize(("unet", "vae", "most"), [("sd15", "sd", 185), ("sdxl", "sdxl", 130)])
def test_a_model_has_few_programs(unet: str, vae: str, most: int, tmp_path: Path) -> None:
    """Nothing is compiled to count them. A program takes seconds of a core. Of products, each of
    the tiles that are measured is one, with what may follow it.
    """
    norms, of_norms, products, of_products = in_process(COUNT, unet, vae, cache=tmp_path)
    assert norms >= 60
    assert of_norms <= 20
    assert products >= 200
    assert of_products <= most


WARM = """
import sys
import torch
from diffusion_fast import UNetConfig
from diffusion_fast.engine import ahead
from diffusion_fast.kernels import ahead as kernels

config = UNetConfig.preset("digits", in_channels=4, out_channels=4, num_classes=None)
found = ahead.calls(config, None, torch.bfloat16, batch=1, size=(8, 8), steps=5)
wanted = "_layer_norm", "_sampler_step"
launches = [one for one in ahead.launches(found, 90) if one.kernel in wanted]
programs = kernels.programs(launches, 90)
if sys.argv[1] == "compile":
    print(*kernels.compile_all(programs, 90, 2))
else:
    from triton import knobs
    compiled = []
    knobs.compilation.listener = lambda **told: compiled.append(not told["cache_hit"])
    kernels.move_in(kernels.cache_folder())
    kernels._begin(90)
    for one in launches:
        one.warm_up()
    print(len(programs), len(compiled), sum(compiled))
"""


def in_process(code: str, *arguments: str, cache: Path) -> list[int]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


@pytest.mark.compiles
def test_the_jit_finds_all_in_a_cache_that_was_carried_elsewhere(tmp_path: Path) -> None:
    done = in_process(WARM, "compile", cache=tmp_path / "here")
    assert done == list(range(1, len(done) + 1))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    programs, looked_up, compiled = in_process(WARM, "look", cache=tmp_path / "there")
    assert programs == len(done) == looked_up
    assert compiled == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "sd3"], "--model: expected one of sd15, sdxl, digits, got 'sd3'"),
        (["--model", "sd15", "--dtype", "int8"], "--dtype: expected one of bfloat16"),
        (["--model", "sd15", "--size", "100"], "--size: expected a positive multiple of 64"),
    ],
)
def test_errors_of_the_command(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run("warm", *options, "--arch", "90")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
