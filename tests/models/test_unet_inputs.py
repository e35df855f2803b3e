"""A bad argument to the U-Net is named, with what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_unets import TEXT_TIME, small_config
from unet_parity import inputs

from diffusion_fast.models import UNet2DCondition


def _refuses(config_changes: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = small_config(**config_changes)
    model = UNet2DCondition(config)
    arguments: dict[str, Any] = dict(inputs(config))
    if config.num_classes is not None:
        arguments["context"] = torch.tensor([0, 1])
    model(**arguments)  # good as they are
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 3, 8, 8)}, r"x: expected shape \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ({"x": torch.randn(4, 8, 8)}, r"x: expected shape \[B, 4, H, W\], got \[4, 8, 8\]"),
        ({"x": torch.zeros(2, 4, 8, 8).long()}, "x: expected a floating point dtype"),
        ({"x": torch.zeros(2, 4, 8, 8).double()}, "x: expected the dtype of the model"),
        ({"x": [0.0]}, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, 8, 8, device="meta")}, "x: expected the device of the model"),
        ({"t": torch.tensor([1, 2, 3])}, r"t: expected shape \[B\] = \[2\], or a 0-dim tensor"),
        ({"t": torch.tensor([[1], [2]])}, r"t: .* got \[2, 1\]"),
        ({"t": 5}, "t: expected a tensor, got int"),
        ({"t": torch.tensor(5, device="meta")}, "t: expected the device of x"),
        ({"context": None}, "context: expected text states, got None"),
        ({"context": torch.randn(2, 7, 23)}, r"context: .* = \[2 or 1, L, 24\], got \[2, 7, 23\]"),
        ({"context": torch.randn(3, 7, 24)}, r"context: .* got \[3, 7, 24\]"),
        ({"context": torch.randn(2, 24)}, r"context: .* got \[2, 24\]"),
        ({"context": torch.randn(2, 0, 24)}, "context: expected at least one token"),
        ({"context": torch.randn(2, 7, 24).double()}, "context: expected the dtype of x"),
        ({"context": torch.tensor([0, 1])}, r"context: expected shape .* got \[2\]"),
        ({"context_lengths": torch.tensor([1])}, r"context_lengths: expected shape \[B\] = \[2\]"),
        ({"context_lengths": torch.tensor([0, 7])}, r"expected values in \[1, 7\]"),
        ({"context_lengths": torch.tensor([1, 8])}, r"expected values in \[1, 7\]"),
        ({"text_embeds": torch.randn(2, 20)}, "text_embeds: .* no addition_embed_type"),
        ({"time_ids": torch.zeros(2, 6)}, "time_ids: .* no addition_embed_type"),
    ],
)
def test_text_model(changes: dict[str, Any], message: str) -> None:
    _refuses({}, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": None}, "context: expected class labels, got None"),
        ({"context": torch.tensor([0, 6])}, r"context: expected values in \[0, 6\)"),
        ({"context": torch.tensor([-1, 5])}, r"context: expected values in \[0, 6\)"),
        ({"context": torch.tensor([0, 1, 2])}, r"context: expected shape \[B\] = \[2\]"),
        ({"context": torch.tensor([0.0, 1.0])}, "context: expected dtype torch.int64"),
        ({"context": torch.randn(2, 7, 24)}, "context: expected dtype torch.int64"),
        ({"context_lengths": torch.tensor([1, 1])}, "context_lengths: expected None"),
    ],
)
def test_class_model(changes: dict[str, Any], message: str) -> None:
    _refuses({"num_classes": 5}, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embeds": None}, "text_embeds: expected a tensor, got NoneType"),
        ({"time_ids": None}, "time_ids: expected a tensor, got NoneType"),
        ({"text_embeds": torch.randn(3, 20)}, r"text_embeds: expected shape \[B, \.\.\.\] with"),
        ({"time_ids": torch.zeros(6)}, r"time_ids: expected shape \[B, \.\.\.\] with B = 2"),
        ({"text_embeds": torch.randn(2, 20).double()}, "text_embeds: expected the dtype of x"),
        ({"time_ids": torch.zeros(2, 5)}, "text_embeds, time_ids: expected 68 features"),
    ],
)
def test_text_time_model(changes: dict[str, Any], message: str) -> None:
    _refuses(TEXT_TIME, changes, message)


def test_a_model_without_classes_has_no_null_class() -> None:
    with pytest.raises(ValueError, match="null_class: expected a model with num_classes"):
        _ = UNet2DCondition(small_config()).null_class
