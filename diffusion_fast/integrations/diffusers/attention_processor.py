"""Our attention inside diffusers' modules: ``unet.set_attn_processor(AttentionProcessor())``."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor

from ... import ops
from ...ops import checks


class AttentionProcessor:
    """What diffusers' ``Attention`` computes, with :func:`diffusion_fast.ops.attention` at heart.

    For self- and cross-attention of U-Nets and VAEs, masks and norms included. LoRA stays
    effective: the projections are called as they are. It has no state, so that one will do for all
    layers.

    Raises:
        ValueError: in use, by a layer with added keys and values (``added_kv_proj_dim``).
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, S, C] or [B, C, H, W], and back.

        Args:
            encoder_hidden_states: [B, L, C'] to attend to; None for self-attention.
            attention_mask: added to the scores, [B, 1, L] or [B * H, 1 or S, L].
            temb: for a layer with a spatial norm, what it reads.
        """
        if attn.added_kv_proj_dim is not None:
            checks.fail(
                "attn",
                "a layer without added keys and values, which AttnAddedKVProcessor2_0 is for",
                f"added_kv_proj_dim={attn.added_kv_proj_dim}",
            )
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image = x.shape[2:] if x.dim() == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q, k, v = (
            y.unflatten(2, (attn.heads, -1))  # [B, S, H, D]
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        if attn.norm_q is not None:  # they are norms of [B, H, S, D]
            q = attn.norm_q(q.transpose(1, 2)).transpose(1, 2)
        if attn.norm_k is not None:
            k = attn.norm_k(k.transpose(1, 2)).transpose(1, 2)
        bias = None
        if attention_mask is not None:
            bias = attn.prepare_attention_mask(attention_mask, k.shape[1], len(k))
            bias = bias.unflatten(0, (-1, attn.heads)).to(q.dtype)  # [B, H, 1 or S, L]
        x = ops.attention(q, k, v, scale=attn.scale, bias=bias).flatten(2)
        for layer in attn.to_out:
            x = layer(x)
        if image is not None:
            x = x.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor
