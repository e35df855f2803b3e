"""A ComfyUI node: a model whose U-Net runs our forward, or its attention and norms our ops.

``diffusion-fast comfyui PATH`` puts it into a ComfyUI folder; ``workflow.json`` beside this file is
an example. ``benchmarks/bench_comfyui.py`` runs it inside ComfyUI; the tests have a stand-in.
"""

from .node import DiffusionFastPatch

NODE_CLASS_MAPPINGS = {"DiffusionFastPatch": DiffusionFastPatch}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffusionFastPatch": "Speed up (diffusion_fast)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "DiffusionFastPatch"]
