"""One step of a LoRA beside the arithmetic of diffusers' and peft's, written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from numerics import assert_close, error
from peft import LoraConfig
from small_runs import gradients, randomize, run
from theirs import encoded, networks_of
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast.finetuning.run import Finetuning

GAMMA = 5.0


class Theirs:
    """The networks of diffusers and transformers with peft's adapters, and the example's loss."""

    def __init__(self, folder: Path, ours: Finetuning, dtype: torch.dtype) -> None:
        self.dtype, self.folder = dtype, folder
        self.networks = networks_of(folder)
        self.unet = self.networks["unet"]
        for name, network in self.networks.items():
            network.requires_grad_(False)
            if name in ours.method.configs:
                settings = ours.method.configs[name]
                network.add_adapter(
                    LoraConfig(
                        r=settings.r,
                        lora_alpha=settings.lora_alpha,
                        target_modules=list(settings.target_modules),
                        use_dora=settings.use_dora,
                        rank_pattern=settings.rank_pattern,
                        alpha_pattern=settings.alpha_pattern,
                    )
                )
            network.to(dtype)
        own = dict(ours.network.named_parameters())
        self.trained = {
            f"{component}.{name}": parameter
            for component, network in self.networks.items()
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        assert self.trained.keys() == own.keys()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(own[name])

    def loss(self, batch: Any, t: Tensor, noise: Tensor, min_snr: bool) -> Tensor:
        """train_text_to_image_lora.py, and for SDXL train_text_to_image_lora_sdxl.py."""
        latents, context = batch[0].to(self.dtype), batch[1]
        scheduler = diffusers.DDPMScheduler.from_pretrained(self.folder / "scheduler")
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(torch.float64)
        # The example's tables are float32; here in the dtype of the truth.
        abar = scheduler.alphas_cumprod[t].to(self.dtype).view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        prompt, added = encoded(self.networks, context, self.dtype)
        pred = self.unet(noisy, t, prompt, added_cond_kwargs=added, return_dict=False)[0]
        v = scheduler.config.prediction_type == "v_prediction"
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents if v else noise
        if not min_snr:
            return F.mse_loss(pred, target, reduction="mean")
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        weights = torch.minimum(snr, torch.full_like(snr, GAMMA)) / (snr + 1 if v else snr)
        each = F.mse_loss(pred, target, reduction="none").mean(dim=[1, 2, 3])
        return (each * weights.to(self.dtype)).mean()


CASES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd15, all layers and the text encoder": {
        **{"targets": ("all",), "train_text": True, "conv_rank": 3, "conv_alpha": 1.5},
    },
    "sd21": {"loss_weighting": "min_snr", "alpha": 1.0, "targets": ("transformer",)},
    "sdxl": {"loss_weighting": "min_snr"},
    "sdxl, DoRA and both text encoders": {"dora": True, "train_text": True},
    "sdxl, recomputed": {"gradient_checkpointing": True, "train_text": True},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(
    case: str, tiny_folder: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    folder, options = tiny_folder(case.split(",")[0]), CASES[case]
    ours = run(folder, images, tmp_path / "out", **options)
    randomize(ours.network)
    trainer = ours.trainer()
    batch = next(trainer.dataloader.starting_at(0))
    loss = trainer.objective.backward(batch)

    generator = torch.Generator().manual_seed(ours.settings.seed)
    t = torch.randint(1000, (2,), generator=generator)[: len(batch[0])]
    noise = torch.randn((2, *batch[0].shape[1:]), generator=generator)[: len(batch[0])]
    found = []
    # In float32 twice, summed in two orders: some of these gradients are small differences.
    for dtype, layout in (
        (torch.float64, torch.contiguous_format),
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ):
        theirs = Theirs(folder, ours, dtype)
        theirs.unet.to(memory_format=layout)
        given = noise.to(dtype, memory_format=layout)
        value = theirs.loss(batch, t, given, "loss_weighting" in options)
        value.backward()
        grads = {n: p.grad for n, p in theirs.trained.items() if p.grad is not None}
        found.append((value.detach(), grads))
    (truth, true_gradients), *plains = found
    assert_close(loss, truth, max((value for value, _ in plains), key=lambda v: error(v, truth)))
    own = gradients(ours.network)
    assert own.keys() == true_gradients.keys()
    assert all(grad.any() for grad in own.values())

    def joined(values: dict[str, Tensor]) -> Tensor:  # each by the size of its truth
        return torch.cat([(values[n] / one.abs().max()).flatten() for n, one in scales.items()])

    scales = {name: value.float() for name, value in true_gradients.items()}
    exact = torch.cat(
        [(g / scales[n].double().abs().max()).flatten() for n, g in true_gradients.items()]
    )
    plain = max((joined(grads) for _, grads in plains), key=lambda value: error(value, exact))
    assert_close(joined(own), exact, plain, factor=3)  # of attention
