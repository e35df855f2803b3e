"""Settings are the command's options; the files of Ray Serve in examples/ name ones that exist."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file

from diffusion_fast import StableDiffusion
from diffusion_fast.cli.serve import serve
from diffusion_fast.serving.settings import TOKEN, Settings

EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"


def test_they_are_the_options_of_the_command() -> None:
    options = inspect.signature(serve).parameters
    apart = {"host", "port", "ray"}  # of the one process that listens
    assert set(Settings.model_fields) == set(options) - apart
    made = Settings(model="tiny")
    for name in set(options) - apart - {"model", "token"}:
        default = options[name].default
        assert getattr(made, name) == default or (default is None and not getattr(made, name)), name


def test_limits_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    made = Settings(model="a/folder/", max_side=64, max_body=2, queue=3)
    assert made.token == "secret"
    assert made.served_name == "folder"
    limits = made.limits
    assert (limits.side, limits.pixels, limits.body, limits.queue) == (64, 4096, 2 * 2**20, 3)


@pytest.mark.parametrize(
    "change",
    [{"slots": 0}, {"max_replicas": 1, "replicas": 2}, {"graph": "on"}, {"nonsense": 1}],
    ids=str,
)
def test_wrong_ones(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(model="tiny", **change)
    assert next(iter(change)) in str(caught.value)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        Settings(model="nowhere").load()


def test_loras_whose_files_all_have_one_name(tmp_path: Path) -> None:
    unet = StableDiffusion.from_pretrained("tiny").unet
    name = next(name for name, _ in unet.named_modules() if name.endswith("attn1.to_q"))
    out, inner = unet.get_parameter(f"{name}.weight").shape
    state = {f"unet.{name}.lora_A.weight": torch.ones(2, inner)}
    state[f"unet.{name}.lora_B.weight"] = torch.ones(out, 2)
    files = [tmp_path / one / "pytorch_lora_weights.safetensors" for one in ("first", "second")]
    for file in (*files, tmp_path / "style.safetensors"):
        file.parent.mkdir(exist_ok=True)
        save_file(state, file)
    scales = {str(files[0]): 0.5, str(files[1]): 1.0, str(tmp_path / "style.safetensors"): 0.25}
    pipe, loras = Settings(model="tiny", lora=scales).load()
    assert loras == {"first": 0.5, "second": 1.0, "style": 0.25}
    assert pipe.loras.names == ["first", "second", "style"]


def config(name: str) -> dict[str, Any]:
    """What is for Ray Serve in a file."""
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    inner = found.get("spec", {}).get("serveConfigV2")
    return found if inner is None else yaml.safe_load(inner)


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_files_of_ray_serve(name: str) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed")
    cluster = pytest.importorskip("diffusion_fast.serving.cluster")
    made = schema.ServeDeploySchema.model_validate(config(name))
    [one] = made.applications
    assert one.import_path == f"{cluster.__name__}:{cluster.application.__name__}"
    assert Settings(**one.args).max_replicas == 4
    assert cluster.application(Settings(**one.args)) is not None
