"""Folders as people have them: names that occur twice, folders in each other, links; and settings
that would end a run late are refused before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import run, write_images

from diffusion_fast.files import visible_files
from diffusion_fast.finetuning.pictures import read_pictures, with_hints, with_masks
from diffusion_fast.finetuning.settings import DataFolder, Settings, read_toml

Tiny = Callable[[str], Path]


def image(file: Path, size: tuple[int, int] = (64, 64), color: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, color).save(file)
    return file


def pictures(*roots: Path) -> list[Any]:
    return read_pictures([DataFolder(root, 1, "a cat") for root in roots])


@pytest.mark.parametrize("beside", [with_masks, with_hints])
def test_files_of_one_name_in_two_folders_are_told_apart(beside: Any, tmp_path: Path) -> None:
    data, other = tmp_path / "images", tmp_path / "masks"
    names = ["1_cat/001.png", "1_dog/001.png", "top.png", "1_cat/only.png"]
    for name in names:
        image(data / name)
    for name in ("1_cat/001.png", "1_dog/001.jpg", "top.png", "elsewhere/only.png"):
        image(other / name)

    def found() -> list[tuple[str, str]]:
        given = pictures(data)
        made = (
            with_masks(given, str(other), False)
            if beside is with_masks
            else with_hints(given, other)
        )
        files = [one.mask if beside is with_masks else one.hint for one in made]
        return [
            (str(one.file.relative_to(data)), str(file.relative_to(other)))
            for one, file in zip(made, files, strict=True)
        ]

    assert sorted(found()) == [
        ("1_cat/001.png", "1_cat/001.png"),
        ("1_cat/only.png", "elsewhere/only.png"),
        ("1_dog/001.png", "1_dog/001.jpg"),
        ("top.png", "top.png"),
    ]
    (other / "1_dog" / "001.jpg").unlink()  # that of the cat is not the dog's
    with pytest.raises(ValueError, match=r"1_dog/001\.png$"):
        found()
    image(other / "1_dog" / "001.png")
    image(other / "1_dog" / "001.jpg")
    with pytest.raises(ValueError, match="expected one file of a name"):
        found()


def test_two_data_folders_with_the_same_names(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    image(first / "001.png")
    image(second / "001.png")
    image(tmp_path / "masks" / "001.png")
    with pytest.raises(ValueError, match=r"^masks: expected one of its name"):
        with_masks(pictures(first, second), str(tmp_path / "masks"), False)
    for one in ("a", "b"):
        image(tmp_path / "masks" / one / "001.png")
    found = with_masks(pictures(first, second), str(tmp_path / "masks"), False)
    assert [one.mask.parent.name for one in found] == ["a", "b"]


def test_masks_are_looked_at_before_training(tmp_path: Path) -> None:
    image(tmp_path / "images" / "1.png")
    mask = image(tmp_path / "masks" / "1.png", (64, 128))
    with pytest.raises(ValueError, match=r"1\.png: expected the shape of .* \(64 x 64\), got 64 x"):
        with_masks(pictures(tmp_path / "images"), str(mask.parent), False)
    mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"masks/1\.png"):
        with_masks(pictures(tmp_path / "images"), str(mask.parent), False)
    with pytest.warns(UserWarning, match="skipped"):
        assert not with_masks(pictures(tmp_path / "images"), str(mask.parent), True)


def test_class_images_of_the_user_stay(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    own = [image(tmp_path / "class" / name) for name in ("00001.png", "00003.png", "dog.png")]
    before = [file.read_bytes() for file in own]
    options = {"class_prompt": "a dog", "class_data": tmp_path / "class", "class_images": 5}
    made = run(tiny_folder("sd15"), images, tmp_path / "out", steps=1, **options)
    made.trainer()
    assert [file.read_bytes() for file in own] == before
    names = {file.name for file in (tmp_path / "class").glob("*.png")}
    assert names == {"00001.png", "00003.png", "dog.png", "00004.png", "00005.png"}


def test_what_lies_among_the_images_is_not_trained_on(tiny_folder: Tiny, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data")
    write_images(data / "held out")
    for name in ("samples/step_1.png", "class/00000.png"):
        image(data / "out" / name)
    made = run(
        tiny_folder("sd15"), data, data / "out", validation_data=data / "held out", class_prompt="x"
    )
    instances = [one for one in made.data.examples if not one.picture.prior]
    assert {one.picture.file.parent for one in instances} == {data}
    assert len(instances) == 5


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    image(tmp_path / "data" / "1.png")
    image(tmp_path / "far" / "2.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "data")
    image(tmp_path / "data" / "own" / "3.png")
    (tmp_path / "data" / "before").symlink_to(tmp_path / "data" / "own")  # that has its own place
    files = visible_files(tmp_path / "data", (".png",))
    names = [str(file.relative_to(tmp_path / "data")) for file in files]
    assert names == ["1.png", "linked/2.png", "own/3.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "embedding", "word": "../../escaped"}, "word: expected a word without /"),
        ({"method": "embedding", "word": "a/b"}, "word: expected a word without /"),
        ({"method": "embedding", "word": "  "}, "word: expected a word without /"),
        ({"method": "embedding", "word": "x" * 300}, "word: expected at most 200 letters"),
        ({"class_images": 5}, "class_prompt: expected a prompt, because of class_images"),
        ({"snr_gamma": 3.0}, "snr_gamma: expected none, because the loss weighting is none"),
        ({"masks": ""}, "masks: expected a folder, or alpha, got ''"),
        ({"targets": 3}, r"targets: expected texts, got 3 \(int\)"),
        ({"validation_prompts": None}, "validation_prompts: expected texts, got None"),
        ({"data": 3}, "data: expected folders, or tables with a folder, got 3"),
        ({"seed": 10**20}, "seed: expected a number in"),
    ],
)
def test_settings_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings.of({"model": "tiny", "data": "images", "out": "out"} | changes)


def test_out_is_a_folder(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"^out: expected a folder to write to, got .*out, which"):
        run(tiny_folder("sd15"), images, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^device: expected one of PyTorch's, such as cpu"):
        run(tiny_folder("sd15"), images, tmp_path / "other", device="foo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prompts": ["a AND b"]}, "validation_prompts: "),
        ({"class_prompt": "a AND b"}, "class_prompt: "),
        ({"validation_prompts": ["a"], "validation_steps": 5000}, "validation_steps: .* 1000"),
        ({"resolution": 32, "bucket_step": 64}, r"bucket_step: expected at most the resolution"),
        ({"train_text": True, "targets": ["to_q"]}, "targets: expected layers of the text"),
        ({"conv_rank": 4}, "conv_rank: expected none, because targets are no convolutions"),
    ],
)
def test_nothing_is_trained_that_would_end_later(
    tiny_folder: Tiny, images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        run(tiny_folder("sd15"), images, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_pictures_are_of_the_resolution_and_the_word(tiny_folder: Tiny, tmp_path: Path) -> None:
    images = image(tmp_path / "data" / "1.png").parent
    options = {"method": "embedding", "word": "<it>", "validation_prompts": ["a {}"]}
    more = {"validation_every": 1, "validation_steps": 1, "steps": 1, "resolution": 96}
    run(tiny_folder("sd15"), images, tmp_path / "out", **options, **more).train()
    with Image.open(tmp_path / "out" / "samples" / "step_00000001.png") as picture:
        assert picture.size == (100, 100)  # with the frame of a grid
        assert "a <it>" in str(picture.text)  # type: ignore[attr-defined]


def test_another_precision_is_named(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    options = {"steps": 1, "checkpoint_every": 1}
    run(tiny_folder("sd15"), images, tmp_path / "out", **options).train()
    with pytest.raises(ValueError, match=r"^precision: expected float32, as .* was trained, got"):
        run(
            *(tiny_folder("sd15"), images, tmp_path / "out"),
            **options | {"precision": "bfloat16", "resume": True, "steps": 2},
        )


def test_names_in_toml_are_those_of_options(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('validation-prompt = ["a cat"]\nvalidation-steps = 3\n')
    assert read_toml(file) == {"validation_prompts": ["a cat"], "validation_steps": 3}
