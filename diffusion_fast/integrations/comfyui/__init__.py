"""A ComfyUI node: a model whose attention and norms run on this package's ops.

To install it, make a folder with this line as its ``__init__.py`` in ComfyUI's ``custom_nodes``::

    from diffusion_fast.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

``workflow.json`` beside this file is an example. The node has only been tested with a stand-in for
ComfyUI's ``ModelPatcher`` and its U-Net, not inside ComfyUI.
"""

from .node import DiffusionFastPatch

NODE_CLASS_MAPPINGS = {"DiffusionFastPatch": DiffusionFastPatch}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffusionFastPatch": "Speed up (diffusion_fast)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "DiffusionFastPatch"]
