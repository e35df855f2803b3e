"""Hub ids: fetched through huggingface_hub, found in its cache, or refused with what to do."""

from __future__ import annotations

import builtins
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from small_unets import small_config
from unet_parity import twins

from diffusion_fast.models import AutoencoderKL, CheckpointError, UNet2DCondition, hub
from diffusion_fast.models.checkpoints import STEM
from diffusion_fast.pipelines import StableDiffusion

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_FETCHED = (
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "README.md",
)


def chosen(patterns: list[str], files: tuple[str, ...]) -> list[str]:
    return [name for name in files if any(fnmatch.fnmatch(name, p) for p in patterns)]


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of snapshot_download, which answers with a folder or raises ``error``."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return "/fetched"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_what_exists_is_a_path(
    snapshots: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.resolve("owner/name") == Path("owner/name")
    assert hub.resolve(tmp_path) == tmp_path
    assert not snapshots


def test_an_id_is_fetched(snapshots: list[dict[str, Any]]) -> None:
    assert hub.resolve("owner/some-model.v1", revision="fp16") == Path("/fetched")
    assert hub.resolve("owner/name", models={"unet": STEM}, others=["x/*"]) == Path("/fetched")
    first, second = snapshots
    assert (first["repo"], first["revision"]) == ("owner/some-model.v1", "fp16")
    assert set(hub.OTHERS) < set(first["allow_patterns"])
    assert second["allow_patterns"] == ["x/*", *hub.model_files("unet", STEM, None, "safetensors")]


@pytest.mark.parametrize("text", ["model", "a b/c", "./a/b", "/a/b", "a/b/c", "~/a", "", "a/.."])
def test_what_is_neither_is_refused(text: str, snapshots: list[dict[str, Any]]) -> None:
    if text == "":
        assert hub.resolve(text) == Path()  # the current folder, as everywhere
        return
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        hub.resolve(text)
    assert not snapshots


def test_a_path_object_is_never_an_id(snapshots: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        hub.resolve(Path("owner/name"))
    assert not snapshots


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_without_a_network(offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, with an empty cache and an address that nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    with pytest.raises(CheckpointError) as caught:
        UNet2DCondition.from_pretrained("owner/name")
    message = str(caught.value)
    assert message.startswith("owner/name: no such file or folder, and as a hub id it isn't in the")
    assert "can't be fetched" in message
    assert "hf download owner/name" in message


def test_a_cached_model_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--owner--name"
    model, _ = twins(small_config())
    model.save_pretrained(repo / "snapshots" / COMMIT / "unet")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub._snapshot_download.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = UNet2DCondition.from_pretrained("owner/name")
    assert loaded.config == model.config


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no connection\nmore"), r"can't be fetched \(no connection\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RepositoryNotFoundError(
                "404: no such model", response=SimpleNamespace(headers={}, request=None)
            ),
            "as a hub id it is refused: 404: no such model",
        ),
    ],
    ids=["offline", "disk", "unknown"],
)
def test_what_went_wrong_is_told(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        hub.resolve("owner/name")


def test_names_that_the_hub_forbids() -> None:
    with pytest.raises(CheckpointError, match=r"as a hub id it is refused: .*--"):
        hub.resolve("owner--x/name")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(name: str, *rest: Any, _import: Any = builtins.__import__) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return _import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", forbid)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.resolve("owner/name")


WANTED = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer_2/vocab.json",
)


def test_only_what_is_read_is_fetched(snapshots: list[dict[str, Any]]) -> None:
    half = ("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors")
    hub.resolve("owner/name")
    hub.resolve("owner/name", variant="fp16")
    plain, halves = (call["allow_patterns"] for call in snapshots)
    assert chosen(plain, WANTED + half + NOT_FETCHED) == list(WANTED)
    names = chosen(halves, WANTED + half + NOT_FETCHED)
    assert set(half) <= set(names)
    assert "unet/diffusion_pytorch_model.safetensors" not in names


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Fetches from a repository that has these files, and tells what came."""

    def fetched(
        files: Sequence[str],
        variant: str | None = None,
        use: Callable[..., object] = hub.resolve,
        message: str | None = None,
    ) -> list[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"

        def snapshot_download(_: str, allow_patterns: list[str], **__: Any) -> str:
            for name in chosen(allow_patterns, tuple(files)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        refused = pytest.raises(CheckpointError, match=message) if message else nullcontext()
        with refused:
            use("owner/name", variant=variant)
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    return fetched


UNET = "unet/diffusion_pytorch_model"
TEXT = ("text_encoder/config.json", "text_encoder/pytorch_model.bin")


def test_pickles_are_fetched_where_there_is_nothing_else(
    repository: Callable[..., list[str]],
) -> None:
    files = ("model_index.json", "unet/config.json", f"{UNET}.bin", *TEXT)
    assert repository(files) == sorted(files)
    better = (*files, f"{UNET}.safetensors")
    assert repository(better) == sorted({*better} - {f"{UNET}.bin"})


def test_a_variant_of_some_parts_only(repository: Callable[..., list[str]]) -> None:
    """The variant where it is, the plain files of the other parts; never both."""
    files = ("unet/config.json", f"{UNET}.fp16.safetensors", f"{UNET}.safetensors", *TEXT)
    wanted = sorted({*files} - {f"{UNET}.safetensors"})
    assert repository(files, variant="fp16") == wanted
    assert repository(files) == sorted({*files} - {f"{UNET}.fp16.safetensors"})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("use", "folders"),
    [
        (UNet2DCondition.from_pretrained, [""]),
        (UNet2DCondition.from_pretrained, ["unet/", "vae/"]),
        (AutoencoderKL.from_pretrained, [""]),
        (AutoencoderKL.from_pretrained, ["vae/", "unet/"]),
        (StableDiffusion.from_pretrained, ["unet/", "vae/"]),
    ],
)
def test_a_variant_that_is_not_there_is_refused_before_other_weights_come(
    use: Callable[..., object],
    folders: list[str],
    variant: str,
    kind: str,
    repository: Callable[..., list[str]],
) -> None:
    files = [f"{folder}{name}" for folder in folders for name in ("config.json", f"{STEM}.{kind}")]
    message = f"^owner/name: variant: no model in it has weights of '{variant}'"
    came = repository([*files, "other.fp16.safetensors"], variant, use, message)
    assert set(came) <= {f"{folder}config.json" for folder in folders}


def test_one_models_files() -> None:
    def files(folder: str, variant: str | None, kind: str = "safetensors") -> list[str]:
        return hub.model_files(folder, STEM, variant, kind)

    root = ("config.json", "diffusion_pytorch_model.safetensors", *NOT_FETCHED)
    assert chosen(files("", None), root) == list(root[:2])
    assert chosen(files("unet", None, "bin"), root) == [f"{UNET}.bin"]
    sharded = (
        f"{UNET}.safetensors.index.fp16.json",
        f"{UNET}.fp16-00001-of-00002.safetensors",
        f"{UNET}-00001-of-00002.fp16.safetensors",
    )
    assert chosen(files("unet", "fp16"), sharded) == list(sharded)
    assert chosen(files("unet", None), sharded) == []
