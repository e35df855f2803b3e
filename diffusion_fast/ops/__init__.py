"""The ops: each a plain PyTorch definition and, where a machine has them, faster kernels."""

from .add_noise import add_noise
from .attention import attention
from .conv2d import conv2d, pack_conv2d
from .decoupled_attention import decoupled_attention
from .dispatch import BackendError, Choice, checks, explain, use_backend
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .layer_norm import layer_norm
from .linear import linear, pack_linear
from .philox import Philox
from .residual import residual
from .row_statistics import row_statistics
from .sampler_step import sampler_step
from .weighted_mse import weighted_mse

__all__ = [
    "BackendError",
    "Choice",
    "Philox",
    "add_noise",
    "attention",
    "checks",
    "conv2d",
    "decoupled_attention",
    "explain",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "linear",
    "pack_conv2d",
    "pack_linear",
    "residual",
    "row_statistics",
    "sampler_step",
    "use_backend",
    "weighted_mse",
]
