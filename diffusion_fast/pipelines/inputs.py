"""What users hand to a pipeline, checked and made uniform before any work."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.prompt import parse
from ..models.prompt_edits import is_edited
from ..ops import checks

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height, width
AESTHETIC_SCORES = 6.0, 2.5  # what SDXL's refiner is told of the prompt's half and of the other


def prompt_list(name: str, value: Any, embeddings: Collection[str] = ()) -> list[str]:
    """One prompt or several, as a list.

    Args:
        name: the argument, for errors.
        value: what the user gave.
        embeddings: words that stand for embeddings.

    Raises:
        TypeError: something else than strings; ValueError: an empty list, a prompt that
            :func:`~diffusion_fast.models.prompt.parse` refuses. Of a prompt that changes with the
            steps, :func:`.call.said` looks at what it says.
    """
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"{name}: expected a string or a list of strings, got {value!r:.60}")
    if not prompts:
        checks.fail(name, "at least one prompt", prompts)
    for prompt in prompts:
        if not is_edited(prompt, name):
            parse(prompt, name, embeddings)
    return list(prompts)


def negative_list(
    value: Any, prompts: list[str], embeddings: Collection[str] = ()
) -> list[str] | None:
    """A negative prompt for each of the prompts; None for None."""
    if value is None:
        return None
    negatives = prompt_list("negative_prompt", value, embeddings)
    if len(negatives) not in (1, len(prompts)):
        expected = f"one, or one for each of {len(prompts)} prompts"
        checks.fail("negative_prompt", expected, len(negatives))
    return negatives * (len(prompts) // len(negatives))


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy as those of Python, also inside of lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def guidance(scale: Any) -> Any:
    """Guidance scales: at most 1 is the plain conditional model, as in diffusers."""
    if isinstance(scale, (list, tuple)):
        return [guidance(one) for one in scale]
    off = isinstance(scale, (int, float)) and -math.inf < scale <= 1
    return 1.0 if off else scale


def guided(scale: Any) -> bool:
    """Whether scales of :func:`guidance` need the negative prompt at any step."""
    return any(map(guided, scale)) if isinstance(scale, list) else scale != 1


def check_embedded(scale: Any, negative_prompt: Any, more: Mapping[str, Any]) -> None:
    """What a model that has the guidance scale embedded can't do.

    Raises:
        ValueError: a negative prompt, scales that differ by step, options of guidance by two calls.
    """
    why = "a model that has the guidance scale embedded (LCM)"
    if negative_prompt is not None:
        checks.fail("negative_prompt", f"None for {why}", repr(negative_prompt)[:60])
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        checks.fail("guidance_scale", f"one number for {why}", repr(scale)[:60])
    for name in ("guidance_interval", "guidance_rescale"):
        if more.get(name):
            checks.fail(name, f"none for {why}", more[name])


def seed_list(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each image: those given, or ``seed``, ``seed + 1``, ..."""
    values = range(seed, seed + count) if _is_int(seed) else seed
    if not isinstance(values, (list, tuple, range)) or not all(_is_int(s) for s in values):
        checks.fail("seed", "an integer or a list of them", repr(seed)[:60])
    if len(values) != count:
        checks.fail("seed", f"one, or one for each of {count} images", f"{len(values)}")
    if not all(0 <= s < 2**63 for s in values):
        checks.fail("seed", "integers in [0, 2^63)", repr(seed)[:60])
    return list(values)


def scores(value: Any, refines: bool) -> tuple[float, float]:
    """Aesthetic scores of both halves of guidance, 6 and 2.5 by default.

    Raises:
        ValueError: no two numbers, or a model that isn't told of them.
    """
    if value is None:
        return AESTHETIC_SCORES
    if not refines:
        checks.fail("aesthetic_scores", "None: the model is no refiner", repr(value)[:60])
    pair = plain(value)
    numbers = isinstance(pair, (list, tuple)) and all(type(one) in (int, float) for one in pair)
    if not numbers or len(pair) != 2 or not all(map(math.isfinite, pair)):
        expected = "two numbers, of the prompt and of the negative prompt"
        checks.fail("aesthetic_scores", expected, repr(value)[:60])
    return float(pair[0]), float(pair[1])


def unfinished(latents: Any, count: int, channels: int, mask: Any) -> Tensor:
    """Latents that another model left with noise, one for each image.

    Args:
        latents: what the user gave as the image.
        count: the number of images.
        channels: of the latents.
        mask: what the user gave.

    Raises:
        ValueError: no latents, another number of them, or a mask.
    """
    expected = f"latents [N, {channels}, h, w] (output='latent'), because denoising_start is given"
    if not isinstance(latents, Tensor) or latents.dim() not in (3, 4):
        checks.fail("image", expected, f"{type(latents).__name__}")
    latents = latents if latents.dim() == 4 else latents[None]
    if latents.shape[1] != channels or not latents.is_floating_point():
        checks.fail("image", expected, f"{latents.dtype} {list(latents.shape)}")
    if mask is not None:
        checks.fail("mask", "None beside denoising_start", type(mask).__name__)
    check_batch("image", latents, count)
    return latents.expand(count, -1, -1, -1)


def checked_size(size: Any, grain: int) -> Size:
    """Height and width as multiples of ``grain``; one number is a square."""
    pair = (size, size) if _is_int(size) else size
    expected = f"(height, width) or one number, positive multiples of {grain}"
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_int, pair)):
        checks.fail("size", expected, repr(size)[:60])
    height, width = pair
    if height < grain or width < grain or height % grain or width % grain:
        checks.fail("size", expected, repr(size))
    return height, width


def image_tensor(image: Any, size: Size | None, grain: int) -> Tensor:
    """Images as [B, 3, H, W] in [-1, 1], float32.

    Args:
        image: a PIL image, a list of them, or a tensor [3, H, W] or [B, 3, H, W] in [-1, 1]. PIL
            images are read by :func:`~diffusion_fast.images.read_picture`.
        size: height and width to scale PIL images to (Lanczos); tensors must have them. None: as
            they are.
        grain: what height and width must be multiples of.

    Raises:
        ValueError: another shape, size or range; TypeError: no image.
    """
    x = _pictures("image", image, size)
    if isinstance(image, Tensor):
        low, high = x.min().item(), x.max().item()
        if low < -1.01 or high > 1.01:  # more than rounding
            checks.fail("image", "values in [-1, 1]", f"{low:g} to {high:g}")
    else:
        x = x * 2 - 1
    _check_sides("image", x, size, grain)
    return x


def hint_tensor(name: str, image: Any, size: Size, count: int, grey: bool = False) -> Tensor:
    """What a ControlNet or T2I-Adapter reads, [1 or B, 3, H, W] in [0, 1], float32.

    Args:
        name: the argument, for errors.
        image: a PIL image, a list of them, or a tensor [3, H, W] or [B, 3, H, W] in [0, 1].
        size: height and width to scale PIL images to (Lanczos); tensors must have them.
        count: the number of images; B must be that, or 1.
        grey: whether PIL images become grey ones.

    Raises:
        ValueError: another shape, size or range; TypeError: no image.
    """
    x = _pictures(name, image, size, "L" if grey else "RGB").expand(-1, 3, -1, -1)
    check_batch(name, x, count)
    _check_sides(name, x, size, 1)
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        checks.fail(name, "values in [0, 1]", f"{low:g} to {high:g}")
    return x


def hint_size(image: Any, grain: int) -> Size | None:
    """Height and width of images to draw with such a hint; None if it is too small or no image."""
    from PIL import Image

    one = image[0] if isinstance(image, (list, tuple)) and image else image
    if isinstance(one, Image.Image):
        height, width = one.height, one.width
    elif isinstance(one, Tensor) and one.dim() >= 3:
        height, width = one.shape[-2:]
    else:
        return None
    size = height - height % grain, width - width % grain
    return size if all(size) else None


def one_each(name: str, value: Any, count: int, low: float, high: float) -> list[float]:
    """A number for each of the controls, from one or a list of them."""
    value = plain(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        checks.fail(name, f"one number, or one for each of {count} controls", len(values))
    for one in values:
        checks.finite(name, one)
        if not low <= one <= high:
            checks.fail(name, f"numbers in [{low:g}, {high:g}]", one)
    return [float(one) for one in values]


def _pictures(name: str, image: Any, size: Size | None, mode: str = "RGB") -> Tensor:
    """A tensor as it is, of a batch; PIL images as [B, 3 or 1, H, W] in [0, 1]."""
    if isinstance(image, Tensor):
        checks.floating(name, image)
        x = image[None] if image.dim() == 3 else image
        if x.dim() != 4 or x.shape[1] != 3 or not len(x):
            checks.fail(name, "shape [3, H, W] or [B, 3, H, W]", list(image.shape))
        x = x.detach().float()
        if not x.isfinite().all():
            checks.fail(name, "finite numbers", "NaN or infinity")
        return x
    several = image if isinstance(image, (list, tuple)) else [image]
    return _joined(name, [_pixels(_scaled(_pil(name, one, mode), size)) for one in several])


def mask_tensor(mask: Any, original: Any, size: Size, count: int) -> Tensor:
    """A mask as [B, 1, H, W] of zeros and ones: 1 where to draw, 0 where to keep the image.

    Args:
        mask: a PIL image (white is where to draw; transparent is black), a list of them, or a
            tensor [H, W], [1, H, W] or [B, 1, H, W] in [0, 1]. Halves and more count as 1.
        original: the image as it was given: the mask must be of its size.
        size: height and width to scale PIL masks to: 1 wherever a pixel touches a 1.
        count: the number of images; B must be that, or 1.

    Raises:
        ValueError: a mask of another size; TypeError: no mask.
    """
    if isinstance(mask, Tensor):
        checks.tensor("mask", mask)
        x = mask.detach().float()
        x = x[(None,) * (4 - x.dim())] if x.dim() in (2, 3) else x
        if x.dim() != 4 or x.shape[1] != 1 or not x.numel():
            checks.fail("mask", "shape [H, W], [1, H, W] or [B, 1, H, W]", list(mask.shape))
        if not 0 <= x.min() <= x.max() <= 1:
            checks.fail("mask", "values in [0, 1]", f"{x.min():g} to {x.max():g}")
    else:
        several = mask if isinstance(mask, (list, tuple)) else [mask]
        x = _joined("mask", [_pixels(_pil("mask", one, "L", "black")) for one in several])
    wanted = size if isinstance(mask, Tensor) else _sides(original)
    if tuple(x.shape[2:]) != wanted:
        got = f"{x.shape[3]} x {x.shape[2]}"
        checks.fail("mask", f"the size of the image ({wanted[1]} x {wanted[0]})", got)
    check_batch("mask", x, count)
    return _touched((x >= 0.5).float(), size)


def small_mask(mask: Tensor, grain: int) -> Tensor:
    """A mask [B, 1, H, W] for latents, [B, 1, H / grain, W / grain]: 1 where any pixel is."""
    return _touched(mask, (mask.shape[2] // grain, mask.shape[3] // grain))


def absent(name: str, value: Any, without: str) -> None:
    """Refuse an argument that needs another one."""
    if value is not None:
        checks.fail(name, f"None without {without}=", repr(value)[:60])


def check_batch(name: str, x: Tensor, count: int) -> None:
    """One for all images, or one for each."""
    if len(x) not in (1, count):
        checks.fail(name, f"one, or one for each of {count} images", len(x))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _pil(name: str, image: Any, mode: str = "RGB", background: str = "white") -> Image:
    from PIL import Image

    from ..images import read_picture

    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected PIL images or a tensor, got {type(image).__name__}")
    try:
        return read_picture(image, mode, background)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scaled(image: Image, size: Size | None) -> Image:
    if size is None or (image.height, image.width) == size:
        return image
    from PIL.Image import Resampling

    return image.resize((size[1], size[0]), Resampling.LANCZOS)


def _sides(image: Any) -> Size:
    """Height and width of an image as it was given, upright."""
    one = image[0] if isinstance(image, (list, tuple)) else image
    if not isinstance(one, Tensor):
        picture = _pil("image", one)
        return picture.height, picture.width
    height, width = one.shape[-2:]
    return height, width


def _touched(mask: Tensor, size: Size) -> Tensor:
    """A mask [B, 1, H, W] of zeros and ones, scaled: 1 where it has a 1 anywhere in a pixel."""
    return F.adaptive_max_pool2d(mask, size)


def _pixels(image: Image) -> Tensor:
    """[C, H, W] in [0, 1], float32."""
    import numpy as np

    array = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1).contiguous()


def _joined(name: str, images: list[Tensor]) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        checks.fail(name, "images of one size", " and ".join(map(str, sorted(shapes))) or "none")
    return torch.stack(images)


def _check_sides(name: str, x: Tensor, size: Size | None, grain: int) -> None:
    height, width = x.shape[2:]
    if size is not None and (height, width) != size:
        checks.fail(name, f"the size asked for ({size[1]} x {size[0]})", f"{width} x {height}")
    if height % grain or width % grain or not height or not width:
        expected = f"width and height to be multiples of {grain} (or size=, to scale it)"
        checks.fail(name, expected, f"{width} x {height}")
