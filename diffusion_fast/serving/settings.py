"""What ``diffusion-fast serve`` is told, on its command line or in a file of Ray Serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..pipelines import StableDiffusion
from ..pipelines.loading import SHIPPED
from ..pipelines.tiny import KINDS
from .limits import Limits

TOKEN = "DIFFUSION_FAST_TOKEN"  # the variable that has the token


class Settings(BaseModel):
    """The model, who may ask, and for how much; ``diffusion-fast serve --help`` tells of each.

    ``replicas`` and what follows it are of Ray Serve alone. ``max_replicas`` above ``replicas``
    lets their number follow the load.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    name: str | None = None
    token: str | None = Field(default_factory=lambda: os.environ.get(TOKEN))
    allow_host: list[str] = []
    allow_origin: list[str] = []
    slots: int = Field(default=8, ge=1)
    queue: int = Field(default=64, ge=1)
    max_steps: int = Field(default=150, ge=1)
    max_side: int = Field(default=2048, ge=8)
    max_batch: int = Field(default=8, ge=1)
    max_body: int = Field(default=32, ge=1)
    rate: int = Field(default=0, ge=0)
    timeout: float = Field(default=600.0, gt=0)
    drain: int = Field(default=60, ge=0)
    lora: dict[str, float] = {}  # scales by files
    vae: str | None = None
    tokenizer: str | None = None
    safety_checker: bool = True
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    graph: Literal["auto", "off"] = "auto"

    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _replicas(self) -> Settings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            got = self.max_replicas
            raise ValueError(
                f"max_replicas: expected at least replicas, {self.replicas}, got {got}"
            )
        return self

    @property
    def limits(self) -> Limits:
        return Limits(
            steps=self.max_steps,
            side=self.max_side,
            pixels=self.max_side * self.max_side,
            batch=self.max_batch,
            queue=self.queue,
            body=self.max_body * 2**20,
            rate=self.rate,
            timeout=self.timeout,
        )

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model.rstrip("/")).stem

    def load(self) -> tuple[StableDiffusion, dict[str, float]]:
        """The pipeline, and scales of its LoRAs by their names.

        Raises:
            ValueError: a model or a LoRA that can't be.
        """
        model = self.model
        known = model in ("tiny", *SHIPPED) or model.removeprefix("tiny-") in KINDS
        if not (known or "/" in model or Path(model).exists()):
            raise ValueError(f"{model}: no such file or folder")
        pipe = StableDiffusion.from_pretrained(
            model,
            vae=self.vae,
            tokenizer=self.tokenizer,
            safety_checker=self.safety_checker,
            variant=self.variant,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=self.device,
        )
        loras = {}
        for path, scale in self.lora.items():
            name = _name_of(Path(path))
            try:
                pipe.loras.load(path, name, scale)
            except ValueError as error:
                raise ValueError(f"--lora: {error}") from error
            loras[name] = scale
        return pipe, loras


def _name_of(file: Path) -> str:
    """What clients call a LoRA: its folder's name where the file's is the one that all have."""
    usual = file.stem in ("pytorch_lora_weights", "adapter_model")
    return file.absolute().parent.name if usual else file.stem
