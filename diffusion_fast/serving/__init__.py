"""An HTTP server over a :class:`~diffusion_fast.Batcher`: ``diffusion-fast serve``.

It speaks OpenAI's images API and AUTOMATIC1111's, and has a page at ``/``. Needs the extra
``diffusion-fast[serve]``.
"""

from .app import create_app
from .limits import Limits
from .service import Service

__all__ = ["Limits", "Service", "create_app"]
