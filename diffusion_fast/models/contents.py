"""What a file is, whatever its name says: by its first bytes, or by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

HEAD = 512  # bytes that tell

_BYTES = (
    (rb"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches the file itself)"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, saved in the place of the file"),
    (rb"GGUF|GGML", "a GGUF file"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM", "a picture"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "a compressed archive"),
    (rb"\x93NUMPY", "a numpy array"),
    (rb"%PDF", "a PDF"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "a JSON file"),
)

# Networks that Stable Diffusion's loader meets by mistake, or that need other formulas.
_NAMES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("Stable Diffusion 3", r"(^|\.)joint_blocks\.|(^|\.)attn\.add_[kqv]_proj\."),
        ("Flux", r"(^|[._])(double_blocks|single_transformer_blocks)[._]"),
        ("Playground v2.5 (EDM)", r"^edm_(mean|std)$"),
        ("CosXL (EDM with v-prediction)", r"^edm_vpred\."),
        ("a ControlNet", r"^control_model\.|(^|\.)(controlnet_cond_embedding|input_hint_block)\."),
        ("the Stable Diffusion upscaler", r"^model\.diffusion_model\.label_emb\.weight$"),
        ("Stable Cascade", r"^clip_txt_mapper\.|^down_blocks\.1\.0\.channelwise\."),
        ("Stable Video Diffusion", r"\.(time_stack|temporal_res_block|temporal_transformer_block)"),
        ("a motion module (AnimateDiff)", r"\.motion_modules\."),
        ("an IP-Adapter", r"^(ip_adapter|image_proj)\.|\.to_[kv]_ip\."),
        ("GLIGEN", r"\.fuser\.|^position_net\."),
        ("a U-Net conditioned on images", r"(^|\.)encoder_hid_proj\."),
        ("float8 with scales (scaled_fp8)", r"(^|\.)(scaled_fp8|scale_weight|weight_scale)$"),
        ("a quantized model", r"\.(absmax|quant_map|quant_state\.\S+|qweight|qzeros|comfy_quant)$"),
        ("an upscaler (ESRGAN)", r"^(model\.1\.sub|body|RRDB_trunk)\.0\.(RDB|rdb)1\."),
    )
)
_ADAPTER = re.compile(
    r"(^|[._])(lora(_(up|down|mid|A|B|E|embedding_\w+|magnitude_vector))?|lora_linear_layer)[._]"
    r"|\.(hada_[wt][12]|lokr_[wt][12]|oft_|boft_|dora_scale|w_norm|diff_b)"
    r"|^(lora|lycoris)_(unet|te\d?)_"
)
_EMBEDDING = re.compile(r"emb_params|string_to_param|clip_[lgh]|\*|<.*>|bundle_emb\..*|t5xxl")
_PART = re.compile(r"(^|\.)time_embed(ding)?\.cond_proj\.")  # of some U-Nets (LCM's)
_MODEL = re.compile(r"(^|\.)(conv_in|input_blocks\.0\.0|time_embed(ding)?\.\S+)\.weight$")


def by_bytes(head: bytes) -> str | None:
    """A kind of file that holds no tensors, known by its first bytes; None for any other."""
    for pattern, kind in _BYTES:
        if re.match(pattern, head, re.DOTALL):
            return kind
    return None


def by_names(names: Iterable[str]) -> str | None:
    """What only an adapter or a network that is not supported has; None if nothing shows."""
    names = list(names)
    if names and all(_EMBEDDING.fullmatch(name) for name in names):
        return "an embedding (textual inversion)"
    if any(map(_ADAPTER.search, names)) and not any(map(_MODEL.search, names)):
        return "a LoRA"
    return network(names)


def network(names: Iterable[str]) -> str | None:
    """A network that is not supported, or that these adapters are for; None if nothing shows."""
    names = list(names)
    return next((kind for kind, pattern in _NAMES if any(map(pattern.search, names))), None)


def changes(names: Iterable[str]) -> bool:
    """Whether tensors of these names would change what a network computes."""
    names = list(names)
    parts = (*map(_ADAPTER.search, names), *map(_PART.search, names))
    return any(parts) or network(names) is not None
