"""The shapes that matter: SD1.5 at 512x512, SDXL at 1024x1024, both halves of guidance."""

from __future__ import annotations

GROUPS = 32

# GroupNorm: (model, H = W, channels of x, channels of a second source, which is the skip where a
# decoder block starts).
GROUP_NORM = (
    ("sd15", 64, 320, 0),
    ("sd15", 64, 640, 320),
    ("sd15", 32, 640, 0),
    ("sd15", 32, 1280, 640),
    ("sd15", 16, 1280, 0),
    ("sd15", 16, 1280, 1280),
    ("sd15", 8, 1280, 0),
    ("sdxl", 128, 320, 0),
    ("sdxl", 128, 320, 320),
    ("sdxl", 64, 640, 0),
    ("sdxl", 64, 1280, 640),
    ("sdxl", 32, 1280, 0),
)

# LayerNorm: (model, rows, C)
LAYER_NORM = (
    ("sd15", 8192, 320),
    ("sd15", 2048, 640),
    ("sd15", 512, 1280),
    ("sdxl", 8192, 640),
    ("sdxl", 2048, 1280),
)

# GEGLU: (model, rows, C), from [rows, 2C] to [rows, C]
GEGLU = (
    ("sd15", 8192, 1280),
    ("sd15", 2048, 2560),
    ("sd15", 512, 5120),
    ("sdxl", 8192, 2560),
    ("sdxl", 2048, 5120),
)

# Attention to a text and an image: (model, queries, heads, head dim, tokens of the image), of which
# the plain IP-Adapter has 4 and the one with a resampler 16.
TEXT = 77
CONTEXTS = (
    ("sd15", 4096, 8, 40, 4),
    ("sd15", 1024, 8, 80, 4),
    ("sd15", 256, 8, 160, 4),
    ("sd15", 4096, 8, 40, 16),
    ("sd15", 1024, 8, 80, 16),
    ("sd15", 256, 8, 160, 16),
    ("sdxl", 4096, 10, 64, 4),
    ("sdxl", 1024, 20, 64, 16),
)

# Latents: (model, batch, H = W). The large batches are where bandwidth can be measured.
LATENTS = (("sd15", 2, 64), ("sd15", 256, 64), ("sdxl", 2, 128), ("sdxl", 256, 128))

# Bias, residual, scale: (model, H = W, channels)
RESIDUAL = (("sd15", 64, 320), ("sd15", 16, 1280), ("sdxl", 128, 320), ("sdxl", 32, 1280))

# Linear layers: (model, rows, N, K, what follows). "geglu": N counts value and gate.
LINEAR = (
    ("sd15", 8192, 320, 320, "residual"),
    ("sd15", 2048, 640, 640, "residual"),
    ("sd15", 512, 1280, 1280, "residual"),
    ("sd15", 128, 1280, 5120, "residual"),
    ("sd15", 154, 1280, 768, "plain"),
    ("sd15", 8192, 2560, 320, "geglu"),
    ("sd15", 512, 10240, 1280, "geglu"),
    ("sdxl", 2048, 1280, 1280, "residual"),
    ("sdxl", 2048, 10240, 1280, "geglu"),
)

# Convolutions: (model, H = W, channels of x, of a second source, of the result, window, stride)
CONV2D = (
    ("sd15", 64, 320, 0, 320, 3, 1),
    ("sd15", 64, 640, 320, 320, 3, 1),
    ("sd15", 64, 320, 0, 320, 3, 2),
    ("sd15", 32, 640, 0, 640, 3, 1),
    ("sd15", 16, 1280, 0, 1280, 3, 1),
    ("sd15", 16, 1280, 0, 1280, 2, 1),
    ("sd15", 8, 1280, 0, 1280, 3, 1),
    ("sd15", 8, 1280, 1280, 1280, 3, 1),
    ("sd15", 8, 1280, 1280, 1280, 1, 1),
    ("sdxl", 128, 320, 0, 320, 3, 1),
    ("sdxl", 32, 1280, 0, 1280, 3, 1),
)
