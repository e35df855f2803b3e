"""The quality table: made from fake data, measures held to known values, results as written."""

from __future__ import annotations

import csv
import gzip
import importlib
import struct
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality"


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.bench_quality")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like that of Fashion-MNIST, with noise."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 200), ("t10k", 40)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = (torch.arange(count) % 10).byte()
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
            path = folder / f"{name}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.numpy().tobytes()))
    return folder


def run(bench: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    folder = data.parent
    paths = ["--data", data, "--out", folder / "out", "--work", folder / "work"]
    short = ["--steps", 2, 2, "--per-class", 2, 2, "--sampling-seeds", 2]
    monkeypatch.setattr(bench, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["bench_quality.py", *map(str, [*paths, *short])])
    bench.main()
    with (folder / "out" / "quality.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_table(
    bench: ModuleType,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run(bench, data, monkeypatch)
    counts = Counter((row["data"], row["variant"], row["ema"]) for row in rows)
    for name, real in (("Fashion-MNIST", 2), ("digits", 1)):
        assert counts.pop((name, "real, held out", "")) == real
        for variant in bench.VARIANTS:
            assert counts.pop((name, variant, "yes")) == 2
        assert counts.pop((name, bench.BASELINE, "no")) == 2
    assert not counts
    for row in rows:
        assert (row["frechet"] != "") == (row["data"] == "Fashion-MNIST")
        assert float(row["share"]) <= 1
        assert float(row["spread"]) > 0
    drawn = {tuple(row[m] for m in bench.MEASURES) for row in rows if row["data"] != "digits"}
    assert len(drawn) == 12  # no two rows are of the same images
    assert capsys.readouterr().out.count("| digits | P2 | yes | 2 | 2 x 20 |") == 1

    path = data.parent / "out" / "quality.csv"
    assert bench.markdown(rows) == path.with_name("table.md").read_text()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))  # what an interruption may leave
    trained = []
    train = bench.train
    monkeypatch.setattr(bench, "train", lambda *a: trained.append(a[1]) or train(*a))
    again = run(bench, data, monkeypatch)
    assert trained == ["min-SNR", "importance sampling"]
    assert again == rows


def test_the_frechet_distance(bench: ModuleType) -> None:
    """Of normal distributions that share their axes: differences of means and deviations."""
    fashion = bench.fashion_mnist
    axes, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    m1, m2 = torch.randn(2, 4, dtype=torch.float64)
    s1, s2 = torch.rand(2, 4, dtype=torch.float64)
    first, second = (
        fashion.Gaussian(axes @ m, axes @ torch.diag(s**2) @ axes.T)
        for m, s in ((m1, s1), (m2, s2))
    )
    wanted = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert first.frechet(second) == pytest.approx(wanted.item(), rel=1e-10)
    assert first.frechet(first) == pytest.approx(0, abs=1e-10)


def test_the_spread_is_that_of_pairs(bench: ModuleType) -> None:
    images = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 2.0]]).view(4, 1, 1, 2)
    assert bench.spread(images, torch.tensor([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)


def test_images_are_scaled(bench: ModuleType, data: Path) -> None:
    train, held_out = bench.fashion_mnist.load(data)
    assert train.images.shape == (200, 1, 16, 16)
    assert held_out.labels.tolist() == [i % 10 for i in range(40)]
    raw = bench.fashion_mnist.read_idx(data / "train-images-idx3-ubyte.gz")
    assert train.images[3, 0, 1, 1] == raw[3, :2, :2].float().mean() / 127.5 - 1
    assert train.images[3, 0, 0].unique().tolist() == [-1]


def test_files_that_are_missing_or_damaged(bench: ModuleType, data: Path) -> None:
    fashion = bench.fashion_mnist
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion.load(data.parent)
    path = data / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-50], "can't be unpacked"),
        (b"no gzip", "can't be unpacked"),
        (gzip.compress(b"\0\0\x0d\x01"), "expected an IDX file of bytes"),
        (gzip.compress(gzip.decompress(whole)[:-9]), "expected .* bytes after the header"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte.gz: {message}"):
            fashion.load(data)


def test_the_table_is_that_of_the_rows(bench: ModuleType) -> None:
    rows = bench.Table(RESULTS / "quality.csv").rows
    assert rows
    assert bench.markdown(rows) == (RESULTS / "table.md").read_text(encoding="utf-8")
