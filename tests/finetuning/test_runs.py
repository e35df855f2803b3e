"""Whole runs: data in, files out, resumed, and refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from command_line import run as command
from crash_run import OPTIONS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import run, write_images

import diffusion_fast as df
from diffusion_fast.finetuning import Settings, finetune, read_toml
from diffusion_fast.finetuning.examples import Encoding
from diffusion_fast.finetuning.plan import activations, plan
from diffusion_fast.training import Trainer
from diffusion_fast.training.checkpoint import read_checkpoint
from diffusion_fast.training.options import autocast

HERE = Path(__file__).parent
Tiny = Callable[[str], Path]


def test_a_killed_run_goes_on_bit_for_bit(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    model = tiny_folder("sd15")
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE, HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(out: str, *step: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, HERE / "crash_run.py", model, images, tmp_path / out, *step]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)

    def end(process: subprocess.Popen[bytes], code: int) -> None:
        _, said = process.communicate(timeout=200)
        assert process.returncode == code, said.decode()[-2000:]

    never_killed, killed = start("b"), start("a", "5")
    end(killed, -signal.SIGKILL)
    newest = run(model, images, tmp_path / "a", **OPTIONS, resume=True).newest
    assert newest is not None
    assert newest.name == "step_00000003"
    end(start("a"), 0)
    end(never_killed, 0)
    resumed, whole = (run(model, images, tmp_path / n, **OPTIONS, resume=True) for n in "ab")
    for ours, theirs in zip(resumed.files(), whole.files(), strict=True):
        found, truth = load_file(ours), load_file(theirs)
        assert found.keys() == truth.keys()
        errors = {name: (found[name] - value).abs().max().item() for name, value in truth.items()}
        assert not any(errors.values()), errors
    groups, state = read_checkpoint(tmp_path / "a" / "checkpoints" / "step_00000008")
    trained = {name for name, _ in whole.network.named_parameters()}
    assert groups["model"].keys() == groups["ema"].keys() == trained
    assert state["settings"]["base"] == whole.base
    # A checkpoint of another base, and other settings.
    other = tmp_path / "other"
    shutil.copytree(model, other)
    unet = df.UNet2DCondition.from_pretrained(other)
    with torch.no_grad():
        unet.conv_in.bias.add_(1e-3)
    unet.save_pretrained(other / "unet")
    with pytest.raises(ValueError, match=r"^model: expected the base that \S+ was trained on .*$"):
        run(other, images, tmp_path / "a", **OPTIONS, resume=True)
    shutil.copytree(model / "unet", other / "unet", dirs_exist_ok=True)
    vae = df.AutoencoderKL.from_pretrained(other)  # which makes other latents
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1e-3)
    vae.save_pretrained(other / "vae")
    with pytest.raises(ValueError, match=r"^model: expected the base that \S+ was trained on .*$"):
        run(other, images, tmp_path / "a", **OPTIONS, resume=True)
    with pytest.raises(ValueError, match=r"^resume: [^\n]* finetuning\.rank: 2 there, 3 here;"):
        run(model, images, tmp_path / "a", **OPTIONS | {"rank": 3, "resume": True}).train()


def test_the_command_line(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{tiny_folder("sd15")}"\nbucket-step = 16\nrank = 2\nsteps = 9\nbatch_size = 2\n'
        f'[[data]]\nfolder = "{images}"\nrepeats = 2\n'
    )
    plan = command("finetune", "--config", config, "--out", tmp_path / "out", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "images: 5, 10 read in a pass of 5 batches" in plan.stdout
    assert "64 x 64: 4" in plan.stdout
    assert "pytorch_lora_weights.safetensors" in plan.stdout
    assert not (tmp_path / "out").exists()
    options = ("--steps", 2, "--validation-prompt", "a cat", "--validation-every", 2)
    options += ("--validation-steps", 1, "--format", "kohya", "--tensorboard", tmp_path / "board")
    made = command("finetune", "--config", config, "--out", tmp_path / "out", *options)
    assert made.returncode == 0, made.stderr
    reader = "tensorboard.backend.event_processing.event_accumulator"
    board = pytest.importorskip(reader).EventAccumulator(str(tmp_path / "board")).Reload()
    assert board.Tags()["images"] == ["samples"]
    assert [(shown.step, shown.width) for shown in board.Images("samples")] == [(2, 68)]
    assert "caching latents: 5/5" in made.stderr
    assert "2/2" in made.stderr
    assert Image.open(tmp_path / "out" / "samples" / "step_00000002.png").size == (68, 68)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"out.safetensors", "cache", "checkpoints", "samples"}
    again = command("finetune", "--config", config, "--out", tmp_path / "out", *options)
    assert again.returncode == 1
    assert "--resume: expected true, because" in again.stderr
    assert "step_00000002 is there" in again.stderr


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ("all",), "dora": True, "train_text": True},
        {"method": "full", "gradient_checkpointing": True, "batch_size": 4, "accumulate": 2},
        {"method": "embedding", "word": "cat", "precision": "bfloat16"},
        {"method": "controlnet"},
    ],
)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_plans_activations_are_those_of_a_step(
    kind: str, options: dict[str, Any], tiny_folder: Tiny, tmp_path: Path
) -> None:
    """To the byte; the plan runs on shapes alone."""
    folder = write_images(tmp_path / "images", ((64, 64),) * 4)
    if options.get("method") == "controlnet":
        options = options | {"conditioning": shutil.copytree(folder, tmp_path / "hints")}
    made = run(tiny_folder(kind), folder, tmp_path / "out", **options)
    planned = activations(made)
    networks = [one for one in made.network.modules() if one is not made.network]
    own = [p for one in networks for p in (*one.parameters(False), *one.buffers(False))]
    weights = {value.untyped_storage().data_ptr() for value in own}
    x_0, context = next(made.trainer().dataloader.starting_at(0))
    count = len(x_0) // made.settings.accumulate
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    given = {name: one[:count].clone() for name, one in context.items()}
    with (
        autocast(made.device, made.settings.precision),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one),
    ):
        made.network(x_0[:count].clone(), torch.zeros(count).long(), **given)
    assert planned == sum(storage.nbytes() for storage in kept.values()) > 0


def test_settings_that_are_no_settings(tmp_path: Path) -> None:
    least = {"model": "tiny", "data": tmp_path, "out": tmp_path}
    for changes, message in (
        ({"rank": 0}, r"^rank: expected a number of at least 1, got 0$"),
        ({"alpha": 0.0}, r"^alpha: expected a number above 0, got 0.0$"),
        ({"conv_alpha": float("nan")}, r"^conv_alpha: expected a number above 0, got nan$"),
        (
            {"method": "full", "dora": True},
            r"^dora: expected none, because the method is full",
        ),
        ({"vectors": 2}, r"^vectors: expected none, because the method is lora, got 2$"),
        ({"method": "embedding", "rank": 4}, r"^rank: expected none, because the method is emb"),
        ({"validation_conditioning": "a.png"}, r"^validation_conditioning: expected none, becau"),
        ({"text_learning_rate": 1e-5}, r"^text_learning_rate: expected none, because text encoder"),
        (
            {"train_text": True, "text_learning_rate": 0.5, "optimizer": "prodigy"},
            r"^text_learning_rate: expected 1, because prodigy has one rate for all, got 0.5$",
        ),
        ({"rnak": 4}, r"^rnak: expected a setting such as rank"),
        ({"steps": "many"}, r"^steps: expected a whole number, got 'many' \(str\)$"),
        ({"method": "lroa"}, r"^method: expected one of lora"),
        ({"caption_dropout": 1.5}, r"^caption_dropout: expected a number in \[0, 1\], got 1.5$"),
        ({"keep_tokens": 1}, r"^keep_tokens: expected 0, because captions aren't shuffled"),
        ({"model": None}, r"^model: expected a folder, a file or a hub id, got none$"),
        ({"data": {"repeats": 2}}, r"^data: expected a folder in each table"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.of(least | changes)
    (tmp_path / "a.toml").write_text("ranks = 4\n")
    with pytest.raises(ValueError, match=r"a\.toml: ranks: expected a setting such as rank"):
        read_toml(tmp_path / "a.toml")


def test_bad_data_is_named(tiny_folder: Tiny, tmp_path: Path) -> None:
    model = tiny_folder("sd15")

    def refused(data: Any, match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as error:
            run(model, data, tmp_path / "out", **changes)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none", "^data: expected a folder, got .*none, which is none$")
    refused(tmp_path / "empty", r"^data: expected images .* in .*empty, got none$")
    bare = write_images(tmp_path / "bare", ((64, 64), (64, 64)))
    (bare / "1.txt").unlink()
    refused(bare, r"^data: expected a caption for each image .*, got 1 images without: .*1\.png$")
    good = write_images(tmp_path / "good")
    match = r"^validation_data: expected a caption for each image .*, got 1 images .*1\.png"
    refused(good, match, validation_data=bare)
    none = tmp_path / "none"
    refused(good, "^validation_data: expected a folder, got .*none", validation_data=none)
    (bare / "metadata.jsonl").write_text('{"file_name": "7.png", "text": "a dog"}\n')
    refused(bare, r"metadata.jsonl: expected an image for each caption, got 1 .*7\.png$")
    (bare / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a dog"}\n')
    captions = [e.picture.caption for e in run(model, bare, tmp_path / "out").data.examples]
    assert captions == ["a cat, red, number 0", "a dog"]
    (bare / "1.png").write_bytes(b"<html>")
    refused(bare, r"1\.png: can't be read as an image: it is a web page")
    with pytest.warns(UserWarning, match=r"1\.png: .*; skipped"):
        assert len(run(model, bare, tmp_path / "out", broken="skip").data.examples) == 1
    tables = write_images(tmp_path / "tables", ((64, 64),))
    (tables / "0.txt").unlink()
    (tables / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    refused(tables, r"got 1 images without: .*0\.png \(metadata\.csv is not read\)$")
    (tables / "0.png").unlink()
    refused(tables, r"^data: expected images .*, got .*metadata\.csv, whose layout is not read$")
    wide = write_images(tmp_path / "wide", ((640, 64),))
    refused(wide, r"0\.png: expected an image of a ratio from 1:4 to 4:1", extreme="refuse")
    with pytest.warns(UserWarning, match="0.png: 640 x 64 is longer than all shapes"):
        run(model, wide, tmp_path / "out")
    wrong = r"^targets: expected the name of a layer, such as to_q.*, got 'to_qq'$"
    refused(good, wrong, targets=("to_qq",))
    refused(good, r"^bucket_step: expected a multiple of 8, got 12$", bucket_step=12)
    with pytest.raises(ValueError, match="expected a text-to-image model, got one for inpainting"):
        run(tiny_folder("inpainting"), good, tmp_path / "out")


def test_a_picture_cut_short_is_found_before_training(tiny_folder: Tiny, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    Image.open(folder / "2.png").save(folder / "2.jpg")
    (folder / "2.png").unlink()
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:-1000])
    for options in ({}, {"random_crop": True}):
        made = run(tiny_folder("sd15"), folder, tmp_path / "out", steps=1, **options)
        with pytest.raises(ValueError, match=r"2\.jpg: can't be read as an image"):
            made.train()
        options |= {"broken": "skip", "steps": 1}
        made = run(tiny_folder("sd15"), folder, tmp_path / "out", **options)
        with pytest.warns(UserWarning, match=r"2\.jpg: .*; skipped"):
            assert len(made.trainer().dataloader.dataset) == 4


def test_folders_of_kohya(tmp_path: Path, tiny_folder: Tiny) -> None:
    write_images(tmp_path / "data" / "3_a red cat", ((64, 64),))
    (tmp_path / "data" / "3_a red cat" / "0.txt").unlink()
    write_images(tmp_path / "data" / "1_dog", ((64, 64),))
    made = run(tiny_folder("sd15"), tmp_path / "data", tmp_path / "out")
    found = {(e.picture.caption, e.picture.repeats) for e in made.data.examples}
    assert found == {("a red cat", 3), ("a cat, red, number 0", 1)}


@pytest.mark.parametrize("random_crop", [False, True])
def test_sdxl_is_told_each_images_size_and_crop(
    random_crop: bool, tiny_folder: Tiny, images: Path, tmp_path: Path
) -> None:
    """Height and width as the file has them, top and left of what is kept, and its shape."""
    options = {"random_crop": random_crop, "flip": True}
    made = run(tiny_folder("sdxl"), images, tmp_path / "out", **options)
    data, seen = made.trainer().dataloader.dataset, set()
    encode = Encoding(made.parts.vae, None)
    for turn in range(8):
        for index, example in enumerate(data.examples):
            random.seed(10 * turn + index)
            x_0, context = data[index]
            *size, top, left, height, width = map(int, context["time_ids"].tolist())
            assert tuple(size) == example.picture.size
            assert (height, width) == example.fit.shape
            seen.add((index, top, left))
            spare = example.fit.scaled[1] - width - left
            kept = [
                example.picture.pixels(example.fit, (top, spare if flipped else left), flipped)
                for flipped in (False, True)
            ]
            if not random_crop:
                kept = [encode((one[None], {}))[0][0] for one in kept]
            assert min((x_0 - one).abs().max().item() for one in kept) < 1e-4
    assert (len(seen) > 6) == random_crop


def test_flips_are_cached_twice(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """Each picture and its mirror image, once; another run with the cache computes nothing."""
    cache = tmp_path / "cache"
    for options, files in (({}, 5), ({"flip": True}, 10), ({"flip": True, "seed": 7}, 10)):
        run(tiny_folder("sd15"), images, tmp_path / "out", cache=cache, **options).trainer()
        found = {file: file.stat().st_mtime_ns for file in cache.glob("latents/*/*")}
        assert len(found) == files
    run(tiny_folder("sd15"), images, tmp_path / "out", cache=cache, flip=True).trainer()
    assert {file: file.stat().st_mtime_ns for file in cache.glob("latents/*/*")} == found
    # Another shape, another picture: latents of their own.
    run(tiny_folder("sd15"), images, tmp_path / "out", cache=cache, bucket_step=32).trainer()
    assert len(list(cache.glob("latents/*/*"))) > 10


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, []),
        ({"flip": True}, []),
        ({"random_crop": True}, ["latents are not cached, because crops are random"]),
        ({"shuffle_captions": True}, ["text states are not cached, because captions are shuffled"]),
        ({"train_text": True}, ["text states are not cached, because what they say is trained"]),
    ],
)
def test_what_switches_a_cache_off_is_said(
    options: dict[str, Any], lines: list[str], tiny_folder: Tiny, images: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    made = run(tiny_folder("sd15"), images, tmp_path / "out", cache=cache, **options)
    assert made.data.notes(made.method) == lines
    made.trainer()
    assert (cache / "latents").exists() == ("random_crop" not in options)
    assert (cache / "text").exists() == (not {"shuffle_captions", "train_text"} & set(options))


def test_zero_terminal_snr(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """The schedule ends at pure noise, and what comes out says so, as diffusers reads it."""
    options = {"zero_terminal_snr": True, "method": "full", "steps": 1}
    made = run(tiny_folder("sd21"), images, tmp_path / "out", **options)
    made.train()
    assert made.parts.scheduler.schedule.alpha_bar[-1] == 0
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert theirs.scheduler.config.rescale_betas_zero_snr
    assert theirs.scheduler.config.timestep_spacing == "trailing"
    pipe = df.StableDiffusion.from_pretrained(tmp_path / "out")
    assert pipe("a cat", steps=2, output="latent", sampler="ddim").images.isfinite().all()
    with pytest.raises(ValueError, match=r"^zero_terminal_snr: expected False, because the model"):
        run(tiny_folder("sd15"), images, tmp_path / "two", **options)


def test_dreambooth(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """Class images are drawn, and count as equation 2 of the paper says, however many there are."""
    options = {"class_prompt": "a cat", "class_images": 2, "prior_weight": 0.5, "steps": 2}
    made = run(tiny_folder("sd15"), images, tmp_path / "out", **options)
    assert "class images: 0, 2 more to be drawn" in plan(made)
    data = made.trainer().dataloader.dataset
    assert len(list((tmp_path / "out" / "class").glob("*.png"))) == 2
    assert len(data) == 7
    weights = [data[i][2].item() for i in range(7)]
    losses = torch.rand(7, dtype=torch.float64)
    mean = (torch.tensor(weights, dtype=torch.float64) * losses).mean()
    assert abs(mean - (losses[:5].mean() + 0.5 * losses[5:].mean())) < 1e-6
    again = run(tiny_folder("sd15"), images, tmp_path / "out", **options)
    assert "class images: 2, 0 more to be drawn" in plan(again)
    assert len(again.train()) == 2


def test_masks(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """The loss is the mean over all of mask * error^2, with the mask cut as the picture is."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for file in sorted(images.glob("*.png")):
        size = Image.open(file).size
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))  # the left half counts
        mask.save(masks / file.name)
    for flip in (False, True):
        made = run(tiny_folder("sd15"), images, tmp_path / "out", masks=str(masks), flip=flip)
        trainer = made.trainer()
        found = []
        for _, batch in zip(range(12), trainer.dataloader.starting_at(0), strict=False):
            x_0, context, weight = batch
            assert weight.shape == (len(x_0), 1, *x_0.shape[2:])
            edge = weight[..., 0].mean((1, 2)).tolist()
            found += [round(one) for one in edge]
        assert set(found) == ({0, 1} if flip else {1})
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (2,), generator=generator)[: len(x_0)]
    noise = torch.randn((2, *x_0.shape[1:]), generator=generator)[: len(x_0)]
    trainer = made.trainer()
    loss = trainer.objective.backward(batch)
    with torch.no_grad():
        x_t = trainer.schedule.add_noise(x_0, t, noise)
        error = (made.network(x_t, t, **context) - noise).double().square()
    assert abs(loss.item() - (weight.double() * error).mean().item()) < 1e-6
    (masks / "3.png").unlink()
    with pytest.raises(ValueError, match=r"^masks: expected one of its name in .*3\.png$"):
        run(tiny_folder("sd15"), images, tmp_path / "out", masks=str(masks))


def test_validation_keeps_the_best(
    tiny_folder: Tiny, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last weights come out, and those of the lowest validation loss in a folder of theirs."""
    held_out = write_images(tmp_path / "held out", ((64, 64), (96, 48)))
    options = {"validation_data": held_out, "checkpoint_every": 1, "steps": 3, "keep": 1}
    made = run(tiny_folder("sd15"), images, tmp_path / "out", caption_dropout=0.5, **options)
    losses = [made.trainer().validation_loss() for _ in range(2)]
    assert losses[0] == losses[1]
    best = 2  # of the three checkpoints
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: next(losses))
    made.train()
    kept = {path.name for path in made._checkpoints.all()}
    assert kept == {"step_00000002", "step_00000003"}  # the best, and the last
    names = ["pytorch_lora_weights.safetensors", "out.safetensors"]
    last, chosen = tmp_path / "out", tmp_path / "out" / "best"
    assert made.files() == [folder / name for folder in (last, chosen) for name in names]
    shorter = run(tiny_folder("sd15"), images, tmp_path / "two", **options | {"steps": best},
                  caption_dropout=0.5)  # fmt: skip
    losses = iter([3.0, 1.0])
    shorter.train()
    truth = load_file(shorter.files()[0])
    assert not all(torch.equal(v, truth[n]) for n, v in load_file(made.files()[0]).items())
    assert all(torch.equal(v, truth[n]) for n, v in load_file(made.files()[2]).items())
    with safe_open(made.files()[3], framework="pt") as file:
        assert file.metadata()["ss_steps"] == "2"


def test_half_precision(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """Frozen weights are of that precision, trained ones float32; a run goes on where it was."""
    for precision in ("bfloat16", "float16"):
        out = tmp_path / precision
        options = {"precision": precision, "steps": 4, "checkpoint_every": 2, "targets": ("all",)}
        made = run(tiny_folder("sdxl"), images, out, **options)
        dtypes = {p.dtype for p in made.network.parameters()}
        assert dtypes == {torch.float32}
        assert made.parts.vae.encoder.conv_in.weight.dtype == getattr(torch, precision)
        losses = made.train()
        shutil.rmtree(out / "checkpoints" / "step_00000004")
        resumed = run(tiny_folder("sdxl"), images, out, **options, resume=True)
        assert resumed.train() == losses


def test_pictures_of_prompts_come_when_they_are_due(
    tiny_folder: Tiny, images: Path, tmp_path: Path
) -> None:
    """Also between two reads of the loss; with the weights of that step, from the same noise."""
    options = {"validation_prompts": ["a cat", "a dog"], "validation_steps": 1, "steps": 7}
    options |= {"learning_rate": 0.01, "targets": ("all",), "validation_every": 3}
    run(tiny_folder("sd15"), images, tmp_path / "out", **options).train()
    drawn = sorted((tmp_path / "out" / "samples").glob("*.png"))
    assert [file.stem for file in drawn] == ["step_00000003", "step_00000006"]
    first, second = map(Image.open, drawn)
    assert first.size == second.size == (2 * 66 + 2, 68)
    assert first.tobytes() != second.tobytes()
    run(tiny_folder("sd15"), images, tmp_path / "two", **options | {"steps": 3}).train()
    again = Image.open(tmp_path / "two" / "samples" / drawn[0].name)
    assert again.tobytes() == first.tobytes()


def test_in_python(tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    small = {"bucket_step": 16, "steps": 1, "log": tmp_path / "log.csv", "random_crop": True}
    out = df.finetune(tiny_folder("sd21"), images, tmp_path / "out", "lora", **small)
    assert out == tmp_path / "out"
    assert df.finetune is finetune
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "log.csv").read_text().startswith("step,loss")
