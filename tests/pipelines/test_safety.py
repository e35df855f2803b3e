"""The safety checker in a folder, against diffusers' own on the same images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch.nn import functional as F

from diffusion_fast.images import to_pil
from diffusion_fast.models import CheckpointError
from diffusion_fast.pipelines import StableDiffusion
from diffusion_fast.pipelines.safety import SafetyChecker

Folder = Callable[[str], Path]


DRAWING = {"prompt": "a cat", "steps": 1, "batch": 9, "output": "tensor"}


def drawn(folder: Path) -> torch.Tensor:
    """Images without a checker."""
    images = StableDiffusion.from_pretrained(folder, safety_checker=False)(**DRAWING).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.fixture(scope="module")
def folder(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a checker that finds about half of its images unsafe."""
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path_factory.mktemp("safety") / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(vision_config=vision, projection_dim=8)
    torch.manual_seed(1)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        for value in checker.parameters():
            value.normal_(0, 0.3)
        checker.concept_embeds_weights.fill_(2)  # never
        checker.special_care_embeds_weights.fill_(2)
    square = {"height": 28, "width": 28}
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
    processor.save_pretrained(folder / "feature_extractor")
    with torch.no_grad():
        pixels = processor(to_pil(drawn(folder)), return_tensors="pt").pixel_values
        embedding = checker.visual_projection(checker.vision_model(pixels).pooler_output)
        for name in ("concept_embeds", "special_care_embeds"):
            cosine = F.cosine_similarity(embedding, getattr(checker, name)[:1])
            getattr(checker, f"{name}_weights")[0] = cosine.median()
    checker.save_pretrained(folder / "safety_checker")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_flags_are_those_of_diffusers(folder: Path) -> None:
    ours = SafetyChecker.from_pretrained(folder)
    theirs = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    images = drawn(folder)
    pixels = ours.processor(to_pil(images), return_tensors="pt").pixel_values
    _, expected = theirs(clip_input=pixels, images=images.clone())
    assert ours(images) == expected
    assert 0 < sum(expected) < len(images)


def test_flagged_images_are_black(folder: Path) -> None:
    plain = StableDiffusion.from_pretrained(folder, safety_checker=False)
    checked = StableDiffusion.from_pretrained(folder)
    free, result = plain(**DRAWING), checked(**DRAWING)
    assert free.flagged is None
    assert result.flagged is not None
    assert 0 < sum(result.flagged) < 9
    for image, same, flagged in zip(result.images, free.images, result.flagged, strict=True):
        assert (image == -1).all() if flagged else torch.equal(image, same)
    pictures = checked(**{**DRAWING, "output": "pil"}).images
    black = [isinstance(p, Image.Image) and p.getextrema() == ((0, 0),) * 3 for p in pictures]
    assert black == result.flagged


def test_it_is_saved_with_the_model(folder: Path, tmp_path: Path) -> None:
    pipe = StableDiffusion.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path).safety_checker
    assert again is not None
    assert pipe.safety_checker is not None
    states = again.state_dict()
    assert all(torch.equal(v, states[n]) for n, v in pipe.safety_checker.state_dict().items())
    theirs = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "safety_checker")
    images = torch.rand(8, 3, 28, 28) * 2 - 1
    assert theirs(clip_input=images, images=images.clone())[1] is not None


@pytest.mark.parametrize("missing", ["safety_checker", "feature_extractor"])
def test_one_that_is_named_but_missing(folder: Path, tmp_path: Path, missing: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / missing)
    with pytest.raises(CheckpointError, match=f"no {missing} folder; pass safety_checker=False"):
        StableDiffusion.from_pretrained(copy)
    assert StableDiffusion.from_pretrained(copy, safety_checker=False).safety_checker is None


def test_another_checker_is_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"safety_checker": ["x", "Mine"]}))
    with pytest.raises(CheckpointError, match=r"checker x\.Mine is not supported"):
        StableDiffusion.from_pretrained(copy)
