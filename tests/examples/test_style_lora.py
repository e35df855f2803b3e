"""The style demonstration's parts: what is compared with a LoRA, and what passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


def on_white(colors: Tensor, seed: int = 0) -> Tensor:
    """Pictures [4, 3, 16, 16] of those colors [K, 3] at random, with a white border."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.ones(4, 16, 16, 3)
    images[:, 2:-2, 2:-2] = colors[torch.randint(len(colors), (4, 12, 12), generator=generator)]
    return images.movedim(-1, 1)


@pytest.mark.parametrize(
    ("style", "name", "passes"),
    [
        (0.5, 0.9, (True, True, True, True)),
        (0.18, 0.95, (False, False, False, True)),
        (0.29, 0.95, (False, True, False, True)),
        (0.35, 0.95, (False, True, True, True)),
        (0.9, 0.5, (True, True, True, False)),
    ],
)
def test_what_passes(style: float, name: float, passes: tuple[bool, ...]) -> None:
    from style_lora import STYLES, verdict

    rows = {
        "base": {"style": 0.05, "name": 1.0},
        "tint": {"style": 0.17, "name": 0.99},
        "lora": {"style": style, "name": name},
    }
    own = {f"base, {one}": {"style": 0.5, "name": 0.99} for one in STYLES}
    lines = verdict({"decoded": {"style": 0.8, "name": 0.5}, **own}, {"1": rows})
    assert [line.endswith("passes") for line in lines] == list(passes)


def test_the_twenty_are_not_judged() -> None:
    from style_lora import SHOWN, drawn_names

    names = [f"name {i}" for i in range(100)]
    judged = names[::2]
    first, second = drawn_names(names, judged, 1), drawn_names(names, judged, 2)
    assert len(set(first)) == SHOWN
    assert not set(judged) & {*first, *second}
    assert first != second
    assert first == drawn_names(names, judged, 1)


def test_a_tint_moves_colors_and_leaves_white() -> None:
    from style_lora import foreground, tinted

    images = on_white(torch.tensor([[0.0, 0.2, -0.2], [0.1, 0.0, 0.1]]))
    like = on_white(torch.tensor([[-0.3, 0.1, 0.2], [0.0, -0.2, 0.4]]), 1)
    made = foreground(tinted(images, like))
    truth = foreground(like)
    assert len(made) == len(foreground(images))
    torch.testing.assert_close(made.mean(0), truth.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(0), truth.std(0), atol=1e-5, rtol=0)


def test_a_palette_has_the_colors_and_paints_in_them() -> None:
    from style_lora import painted, palette

    colors = torch.tensor([[-0.5, 0.5, 0.0], [0.5, -0.5, 0.0]])
    found = palette(on_white(colors), 2)
    assert torch.cdist(torch.cat((colors, torch.ones(1, 3))), found).amin(1).max() < 1e-5
    images = on_white(colors)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(painted(noisy, found), images)
