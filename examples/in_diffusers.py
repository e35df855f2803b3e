"""A diffusers pipeline on our models and with our sampler: the same picture as without.

The weights are random, so the picture is noise; put in a pipeline of your own
(``StableDiffusionPipeline.from_pretrained(...)``) in the place of ``tiny_pipeline()``.
"""

import diffusers
import torch
from torch import Tensor

from diffusion_fast.integrations.diffusers import (
    DiffusionFastDDIM,
    accelerate,
    explain,
    restore,
)


def tiny_pipeline() -> diffusers.StableDiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        **dict.fromkeys(names),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: diffusers.StableDiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 7, 24, generator=generator)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=64,
        width=64,
        num_inference_steps=10,
        generator=generator,
        output_type="pt",
    ).images


def main() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    plain = picture(pipe)
    accelerate(pipe)  # shares the weights; LoRA loaded now or before stays effective
    pipe.scheduler = DiffusionFastDDIM.from_config(pipe.scheduler.config)
    fast = picture(pipe)
    print(explain(pipe))  # what ran where, and why
    print("largest difference:", (fast - plain).abs().max().item())
    restore(pipe)
    return plain, fast


if __name__ == "__main__":
    main()
