"""Fashion-MNIST (Xiao et al. 2017): its files, and a small classifier to judge images like them."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 16
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HOW_TO_GET_IT = (
    "on Debian and Ubuntu, `apt-get install dataset-fashion-mnist` puts the four files in"
    f" {DEBIAN}; elsewhere, get them from github.com/zalandoresearch/fashion-mnist"
)


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 16, 16] in [-1, 1] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


def load(folder: Path) -> tuple[Split, Split]:
    """60,000 images to train on and 10,000 held out, scaled from 28 to 16 pixels.

    Raises:
        FileNotFoundError: a file is not there; says how to get it.
        ValueError: a file that is not what its name says.
    """
    return _split(folder, "train"), _split(folder, "t10k")


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file, packed by gzip."""
    if not path.is_file():
        raise FileNotFoundError(f"--data: expected {path}, which is not there; {HOW_TO_GET_IT}")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: can't be unpacked: {error}") from error
    kind, dimensions = data[2:4] if data[:2] == b"\0\0" and len(data) >= 4 else (0, 0)
    header = 4 + 4 * dimensions
    if kind != 8 or len(data) < header:
        raise ValueError(f"{path}: expected an IDX file of bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != int(np.prod(shape)):
        raise ValueError(f"{path}: expected {shape} bytes after the header, got another number")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def _split(folder: Path, name: str) -> Split:
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}: expected as many labels as images ({name})")
    # 28 pixels and a border of 2 on each side are 2 x 16: each new pixel is the mean of four.
    x = F.avg_pool2d(F.pad(images.float().unsqueeze(1), (2, 2, 2, 2)), 2)
    return Split(x / 127.5 - 1, labels.long())


class Classifier(nn.Module):
    """Three convolutions; its 64 features before the last layer describe an image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU()),
        )
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))

    @classmethod
    def trained(
        cls, split: Split, path: Path, epochs: int = 4, batch_size: int = 128
    ) -> Classifier:
        """One trained on real images; kept in ``path``, from where it is read the next time."""
        torch.manual_seed(0)
        model = cls()
        if path.is_file():
            model.load_state_dict(load_file(path))
            return model.eval()
        steps = max(1, epochs * len(split.images) // batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(split.images), (batch_size,))
            loss = F.cross_entropy(model(split.images[rows]), split.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
        return model.eval()


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of features [N, D]."""
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T))

    def frechet(self, other: Gaussian) -> float:
        r"""\|m - m'\|^2 + tr(S + S' - 2 (S S')^{1/2}) (Dowson & Landau 1982)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        # S S' and S^1/2 S' S^1/2 have the same eigenvalues, and the latter is symmetric.
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
        traces = self.covariance.trace() + other.covariance.trace()
        return float((self.mean - other.mean).square().sum() + traces - 2 * cross)


@torch.no_grad()
def in_parts(function: nn.Module, images: Tensor) -> Tensor:
    """A network's outputs for many images."""
    return torch.cat([function(part) for part in images.split(1000)])
