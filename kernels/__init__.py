"""Triton kernels, imported as ``diffusion_fast.kernels``. This file imports nothing."""

if __name__ != "diffusion_fast.kernels":
    # At the repository root this folder shadows a package of the same name that transformers and
    # diffusers probe for; version "0" tells them that it is not theirs.
    __version__ = "0"
