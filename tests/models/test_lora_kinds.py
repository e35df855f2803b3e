"""What adapters change a weight by, against each formula written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_fast.models.adapters import Adapter, rank

TOLERANCE = 1e-12


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


sizes = st.integers(1, 5)
kernels = st.sampled_from([(), (1, 1), (3, 3), (1, 2)])


@settings(max_examples=25, deadline=None)
@given(out=sizes, inner=sizes, r=sizes, kernel=kernels)
def test_lora(out: int, inner: int, r: int, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    up, down = draw(out, r, *ones), draw(r, inner, *kernel)
    weight = draw(out, inner, *kernel)
    wanted = sum(
        up[:, k].reshape(out, 1, *ones) * down[k].reshape(1, inner, *kernel) for k in range(r)
    )
    assert rank({"lora_down": down}) == r
    close(Adapter({"lora_up": up, "lora_down": down}, 0.7).delta(weight), 0.7 * wanted)


@settings(max_examples=25, deadline=None)
@given(out=sizes, inner=sizes, r=sizes, s=sizes)
def test_tucker_decompositions(out: int, inner: int, r: int, s: int) -> None:
    def product(core: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """sum_rs core[r, s] b[o, r] a[s, i], one pair after the other."""
        terms = [
            b[:, i].reshape(-1, 1, 1, 1) * a[j].reshape(1, -1, 1, 1) * core[i, j]
            for i in range(r)
            for j in range(s)
        ]
        return torch.stack(terms).sum(0)

    weight = draw(out, inner, 3, 2)
    first, second = ((draw(r, s, 3, 2), draw(out, r), draw(s, inner)) for _ in range(2))
    core, b, a = first
    lora = {"lora_mid": core, "lora_up": b[..., None, None], "lora_down": a[..., None, None]}
    close(Adapter(lora).delta(weight), product(*first))
    loha = {
        f"hada_{name}": value
        for i, (core, b, a) in ((1, first), (2, second))
        for name, value in ((f"t{i}", core), (f"w{i}_a", b.T), (f"w{i}_b", a))
    }
    close(Adapter(loha, 2.0).delta(weight), 2 * product(*first) * product(*second))
    small = draw(2, 3)
    lokr = {"lokr_w1": small, "lokr_t2": core, "lokr_w2_a": b.T, "lokr_w2_b": a}
    wanted = torch.einsum("pq,oihw->poqihw", small, product(*first))
    shape = (2 * out, 3 * inner, 3, 2)
    close(Adapter(lokr).delta(draw(*shape)), wanted.reshape(shape))


@settings(max_examples=25, deadline=None)
@given(out=sizes, inner=sizes, r=sizes, kernel=kernels)
def test_loha(out: int, inner: int, r: int, kernel: tuple[int, ...]) -> None:
    columns = inner * int(np.prod(kernel))
    b1, a1, b2, a2 = draw(out, r), draw(r, columns), draw(out, r), draw(r, columns)
    parts = {"hada_w1_a": b1, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}
    wanted = (b1[:, :, None] * a1).sum(1) * (b2[:, :, None] * a2).sum(1)
    weight = draw(out, inner, *kernel)
    assert rank(parts) == r
    close(Adapter(parts, 0.5).delta(weight), 0.5 * wanted.reshape(weight.shape))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, sizes, sizes),
    r=sizes,
    kernel=kernels,
    products=st.tuples(st.booleans(), st.booleans()),
)
def test_lokr(
    shape: tuple[int, int, int, int],
    r: int,
    kernel: tuple[int, ...],
    products: tuple[bool, bool],
) -> None:
    out1, in1, out2, in2 = shape
    columns = in2 * int(np.prod(kernel))
    parts: dict[str, Tensor] = {}
    factors = []
    for i, (rows, width) in enumerate(((out1, in1), (out2, columns)), start=1):
        if products[i - 1]:
            b, a = draw(rows, r), draw(r, width)
            parts |= {f"lokr_w{i}_a": b, f"lokr_w{i}_b": a}
            factors.append((b @ a).numpy())
        else:
            factors.append(draw(rows, width).numpy())
            matrix = torch.from_numpy(factors[-1])
            parts[f"lokr_w{i}"] = matrix if i == 1 else matrix.reshape(rows, in2, *kernel)
    weight = draw(out1 * out2, in1 * in2, *kernel)
    wanted = torch.from_numpy(np.kron(*factors)).reshape(weight.shape)
    assert rank(parts) == (r if any(products) else None)
    close(Adapter(parts, 1.5).delta(weight), 1.5 * wanted)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_dora(axis: int, kernel: tuple[int, ...]) -> None:
    weight, change = draw(4, 5, *kernel), draw(4, 5, *kernel)
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    magnitude = draw(*shape)
    moved = (weight + change).transpose(0, axis)
    unit = moved.flatten(1) / moved.flatten(1).norm(dim=1, keepdim=True)
    wanted = unit.reshape(moved.shape).transpose(0, axis) * magnitude - weight
    close(Adapter({"diff": change, "dora_scale": magnitude}).delta(weight), wanted)
    if axis == 0:  # the same numbers as a vector
        vector = Adapter({"diff": change, "dora_scale": magnitude.flatten()})
        close(vector.delta(weight), wanted)


def test_a_scalar_and_a_difference() -> None:
    weight, change = draw(3), draw(3)
    close(Adapter({"diff": change}).delta(weight), change)
    scaled = Adapter({"diff": change, "scalar": torch.tensor(0.25)}, 2.0)
    close(scaled.delta(weight), change / 2)


def test_what_does_not_fit_is_refused() -> None:
    up, down = draw(4, 2), draw(2, 6)
    for shape in ((6, 4), (4, 5), (8, 3)):
        with pytest.raises(ValueError, match=r"\[4, 6\]"):
            Adapter({"lora_up": up, "lora_down": down}).delta(draw(*shape))
    with pytest.raises(KeyError, match="lora_down"):
        Adapter({"lora_up": up}).delta(draw(4, 6))
    with pytest.raises(RuntimeError):
        Adapter({"lora_up": up, "lora_down": draw(3, 6)}).delta(draw(4, 6))
