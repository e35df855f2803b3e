"""Trains autoencoder, text encoder and U-Net, and writes a diffusers folder.

    python examples/emoji/train.py [--out build/emoji] [--steps 9000]

Run ``make_data.py`` first. Every stage is saved as it goes: the same command goes on after an
interruption, and what is done stays done. On two CPU cores it takes hours. To make it bigger, with
a GPU, change ``CONFIG`` in ``train_vae.py``, ``UNET`` and ``BATCH`` in ``train_diffusion.py``, take
more names (``KINDS`` in ``make_data.py``), and pass ``--device cuda``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import train_diffusion
import train_vae
from make_data import load

from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.training.trainer import Progress


def autoencoder(out: Path, steps: int, device: str) -> AutoencoderKL:
    """The trained autoencoder; trained now if it is not there yet."""
    if not (out / "vae").is_dir():
        vae = train_vae.train(*load(out), steps, out / "vae.pt", device=device)
        vae.save_pretrained(out / "vae")
    return AutoencoderKL.from_pretrained(out / "vae", device=device)


def sharper(out: Path, vae: AutoencoderKL, steps: int, device: str) -> AutoencoderKL:
    """The same with its decoder trained on alone, so that latents stay what they are."""
    if not (out / "vae-sharper").is_dir():
        data, start = load(out), vae.state_dict()
        again = train_vae.train(
            *data, steps, out / "decoder.pt", device=device, seed=1, start=start
        )
        again.save_pretrained(out / "vae-sharper")
    return AutoencoderKL.from_pretrained(out / "vae-sharper", device=device)


def diffusion(out: Path, vae: AutoencoderKL, steps: int, device: str) -> None:
    """Train on its latents, then write the model to ``out/model``."""
    data = train_diffusion.make_dataset(*load(out), vae, out)
    trainer = train_diffusion.make_trainer(data, out, device, decay="cosine", read_every=50)
    first, started = trainer.resume(), time.monotonic()

    def show(progress: Progress) -> None:
        losses = progress.losses[-200:]
        pace = (time.monotonic() - started) / (progress.step - first)
        print(
            f"U-Net: step {progress.step} of {steps}, loss {sum(losses) / len(losses):.4f},"
            f" {pace * (steps - progress.step) / 60:.0f} minutes left",
            flush=True,
        )

    trainer.fit(steps, show)
    train_diffusion.export(trainer, vae, data, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/emoji"), help="folder to work in")
    parser.add_argument("--steps", type=int, default=9000, help="of the U-Net, 64 latents each")
    parser.add_argument("--vae-steps", type=int, default=12000, help="of the autoencoder, 8 each")
    parser.add_argument("--decoder-steps", type=int, default=8000, help="of its decoder alone")
    parser.add_argument("--threads", type=int, default=1, help="for PyTorch on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trained = autoencoder(options.out, options.vae_steps, options.device)
    trained = sharper(options.out, trained, options.decoder_steps, options.device)
    diffusion(options.out, trained, options.steps, options.device)
