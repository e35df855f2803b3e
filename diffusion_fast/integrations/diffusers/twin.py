"""Our model over the layers of a diffusers model."""

from __future__ import annotations

from ..twin import Twin


class DiffusersTwin(Twin):
    """See :class:`~diffusion_fast.integrations.twin.Twin`."""

    known = ("diffusers.", "torch.nn.")
    # An IP-Adapter's layers.
    beside = frozenset(
        {
            "IPAdapterAttnProcessor",
            "IPAdapterAttnProcessor2_0",
            "IPAdapterXFormersAttnProcessor",
            "MultiIPAdapterImageProjection",
        }
    )
