"""The pictures of the digits example. Each function draws one, writes it, and returns its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import diffusion_fast as df

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2933"


def _show(axes: Axes, image: Tensor) -> None:
    """[1, H, W] in [-1, 1], dark ink on white."""
    axes.imshow(-image[0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#cbd2d9")


def _tile(rows: Sequence[Tensor], labels: Sequence[str], titles: Sequence[str]) -> Figure:
    """Rows of images [N, 1, H, W], a label left of each row and a title over each column."""
    columns = max(len(row) for row in rows)
    figure, grid = plt.subplots(
        len(rows),
        columns,
        figsize=(0.62 * columns + 1.4, 0.62 * len(rows) + 0.7),
        squeeze=False,
        layout="compressed",
    )
    for i, row in enumerate(rows):
        for j in range(columns):
            if j < len(row):
                _show(grid[i][j], row[j])
            else:
                grid[i][j].axis("off")
        grid[i][0].set_ylabel(labels[i], rotation=0, ha="right", va="center", color=INK, fontsize=9)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, color=INK, fontsize=9)
    return figure


def _write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)
    return path


def noising(path: Path, schedule: df.DiffusionSchedule, image: Tensor) -> Path:
    """One digit on its way to noise: x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon."""
    last = schedule.timesteps - 1
    t = torch.tensor([0, 50, 100, 200, 300, 400, 500, 700, last]).clamp(max=last)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    x_t = schedule.add_noise(image.expand(len(t), -1, -1, -1), t, noise.expand(len(t), -1, -1, -1))
    kept = schedule.alphas_cumprod[t]
    titles = [f"t={i}\n{a:.0%}" for i, a in zip(t.tolist(), kept.tolist(), strict=True)]
    figure = _tile([x_t], [""], titles)
    figure.supxlabel(
        "a digit on its way to noise; below t the share of its variance that is left",
        fontsize=9,
        color=INK,
    )
    return _write(figure, path)


def digits(path: Path, results: Sequence[tuple[str, Tensor, Tensor]]) -> Path:
    """A labelled grid per sampler: one column per class, up to five rows."""
    figure = plt.figure(figsize=(3.4 * len(results), 2.4), layout="constrained")
    for part, (name, images, labels) in zip(
        figure.subfigures(1, len(results), squeeze=False)[0], results, strict=True
    ):
        part.suptitle(name, color=INK, fontsize=10)
        grid = part.subplots(5, 10)
        for label in range(10):
            ours = images[labels == label]
            grid[0][label].set_title(str(label), color=INK, fontsize=9)
            for row in range(5):
                if row < len(ours):
                    _show(grid[row][label], ours[row])
                else:
                    grid[row][label].axis("off")
    return _write(figure, path)


def denoising(path: Path, frames: Sequence[tuple[float, Tensor]]) -> Path:
    """Digits emerging: one row per step shown, one column per class."""
    shown = sorted({round(i * (len(frames) - 1) / 9) for i in range(10)})
    rows = [frames[i][1] for i in shown]
    labels = [f"after t={frames[i][0]:g}" for i in shown]
    return _write(_tile(rows, labels, [str(c) for c in range(10)]), path)


def guidance(path: Path, by_scale: Sequence[tuple[float, Tensor]]) -> Path:
    """One row per guidance scale, the same noise in every row."""
    labels = [f"guidance {scale:g}" for scale, _ in by_scale]
    rows = [images for _, images in by_scale]
    return _write(_tile(rows, labels, [str(c) for c in range(10)]), path)


def loss(path: Path, losses: Sequence[float]) -> Path:
    """The loss of every step, and its running mean."""
    values = torch.tensor(losses, dtype=torch.float64)
    window = max(1, min(50, len(values) // 5))
    mean = values.unfold(0, window, 1).mean(1)
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(range(1, len(values) + 1), values, color="#9fb3c8", linewidth=0.7, label="each step")
    axes.plot(
        range(window, len(values) + 1), mean, color="#d64545", label=f"mean of {window} steps"
    )
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("mean squared error of the noise")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _write(figure, path)
