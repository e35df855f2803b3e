"""``python -m diffusion_fast`` is ``diffusion-fast``."""

from .cli import main

main()
