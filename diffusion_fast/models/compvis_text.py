"""The text encoders of a CompVis (LDM) checkpoint, in transformers' names and configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .tensors import Stored

HEAD_DIM = 64  # of every CLIP text encoder that Stable Diffusion uses
SD2_LAYERS = 23  # SD 2.x conditions on what the last but one of 24 gives
OPEN_CLIP_WIDTH = 1024  # of the narrowest OpenCLIP encoder in use; OpenAI's has 768
CLIP_LAYERS = 12  # of OpenAI's; SDXL conditions on what the last but one gives
# Of the published encoders, by width and whether they are projected: CLIP-L, OpenCLIP H and bigG.
_LAYERS = {(768, False): CLIP_LAYERS, (OPEN_CLIP_WIDTH, False): SD2_LAYERS, (1280, True): 32}

_CONFIG: dict[str, Any] = {
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published: the end of a text is its largest token
    "pad_token_id": 1,
}
_IGNORED = ("position_ids", "logit_scale", "attn_mask")
_BESIDE = ("text_projection.", "visual_projection.", "vision_model.")  # not read by SD
OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def clip_tensors(tensors: Mapping[str, Stored], penultimate: bool) -> dict[str, Stored]:
    """OpenAI's CLIP (SD 1.x, SDXL's first), which CompVis kept in transformers' names.

    Args:
        tensors: names without prefix; ``text_model.`` may be missing, as in newer versions of
            transformers, and ``position_ids`` be there, as in older ones. What else a whole CLIP
            has, Stable Diffusion doesn't read.
        penultimate: only the states before the last layer are read (SDXL). A file may lack that
            layer; one of zeros, which adds nothing to them, then takes its place, so that states
            are counted from the end of the same model, here and in what is saved.
    """
    found = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in _IGNORED and not name.startswith(_BESIDE)
    }
    before, last = (f"text_model.encoder.layers.{i}." for i in (CLIP_LAYERS - 2, CLIP_LAYERS - 1))
    if penultimate and not any(name.startswith(last) for name in found):
        found |= {
            name.replace(before, last): tensor.through(torch.zeros_like)
            for name, tensor in found.items()
            if name.startswith(before)
        }
    return found


def open_clip_tensors(tensors: Mapping[str, Stored], projected: bool) -> dict[str, Stored]:
    """OpenCLIP (SD 2.x, SDXL's second) in transformers' names.

    Query, key and value are one matrix there, and ``text_projection`` multiplies from the right.

    Args:
        tensors: names without prefix.
        projected: keep all layers and the projection. Else only the layers that SD 2.x reads are
            kept, whether the file has the one behind them or not.
    """
    matches = {name: _RESBLOCK.fullmatch(name) for name in tensors}
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = matches[name]
        if match and (projected or int(match[1]) < SD2_LAYERS):
            found |= _layer(f"text_model.encoder.layers.{match[1]}.", match[2], tensor)
        elif name == "text_projection" and projected:
            found["text_projection.weight"] = tensor.through(torch.t)
        elif not match and name not in (*_IGNORED, "text_projection"):
            found[OPEN_CLIP.get(name, name)] = tensor
    return found


def _layer(prefix: str, name: str, tensor: Stored) -> dict[str, Stored]:
    stem, dot, kind = name.rpartition(".")
    if stem == "attn" and kind.startswith("in_proj_"):
        kind = kind.removeprefix("in_proj_")
        return {
            f"{prefix}self_attn.{letter}_proj.{kind}": tensor.through(partial(_third, i))
            for i, letter in enumerate("qkv")
        }
    return {prefix + OPEN_CLIP_LAYER.get(stem, stem) + dot + kind: tensor}


def _third(i: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(3)[i]


def text_config(tensors: Mapping[str, Stored], open_clip: bool) -> dict[str, Any]:
    """The ``config.json`` of a text encoder, from its tensors in transformers' names.

    One of a published width has as many layers as are read of it, whether the file holds more
    (they are left out) or fewer (the missing ones are named when it is built).

    Raises:
        KeyError: a tensor that every encoder has is missing.
    """
    tokens = tensors["text_model.embeddings.token_embedding.weight"].shape
    positions = tensors["text_model.embeddings.position_embedding.weight"].shape
    matches = [re.match(r"text_model\.encoder\.layers\.(\d+)\.", name) for name in tensors]
    there = 1 + max((int(match[1]) for match in matches if match), default=0)
    projection = tensors.get("text_projection.weight")
    return {
        **_CONFIG,
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "hidden_act": "gelu" if open_clip or tokens[1] >= OPEN_CLIP_WIDTH else "quick_gelu",
        "hidden_size": tokens[1],
        "vocab_size": tokens[0],
        "max_position_embeddings": positions[0],
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(tokens[1] // HEAD_DIM, 1),
        "num_hidden_layers": _LAYERS.get((tokens[1], bool(projection)), there),
        "projection_dim": projection.shape[0] if projection else tokens[1],
    }
