"""ops.Philox: known answers of the generator, its statistics, and what a stream depends on."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_fast import ops
from diffusion_fast.ops.philox import normal, words


def _known(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Through the words of the state: key = seed, counter = (block, offset)."""

    def signed(low: int, high: int) -> int:
        value = low | high << 32
        return value - 2**64 if value >= 2**63 else value

    state = torch.tensor([signed(*key), signed(*counter[2:])])
    return [int(w) for w in words(state, torch.tensor([signed(*counter[:2])]))]


def test_known_answers() -> None:
    """The vectors that Random123 ships for philox4x32-10 (kat_vectors)."""
    assert _known((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert _known((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert _known((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_moments_and_tails() -> None:
    z = ops.Philox(3).normal((400_000,), torch.float64)
    assert abs(z.mean()) < 4 / math.sqrt(z.numel())
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / z.numel())
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / z.numel())
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / z.numel())
    within = (z.abs() < 1).double().mean()
    assert abs(within - math.erf(math.sqrt(0.5))) < 4 * math.sqrt(0.25 / z.numel())


def test_neighbours_are_uncorrelated() -> None:
    z = ops.Philox(5).normal((100_000,))
    others = [z.roll(k) for k in (1, 2, 3, 4)]
    others += [ops.Philox(5, 1).normal((100_000,)), ops.Philox(6).normal((100_000,))]
    for other in others:
        assert abs((z * other).mean()) < 4.5 / math.sqrt(z.numel())


def test_an_element_does_not_depend_on_the_shape() -> None:
    z = ops.Philox(7, 11).normal((3, 5, 7))
    assert torch.equal(z.flatten()[:10], ops.Philox(7, 11).normal((10,)))
    assert torch.equal(z.bfloat16(), ops.Philox(7, 11).normal((3, 5, 7), torch.bfloat16))


def test_set_changes_the_state_in_place() -> None:
    philox = ops.Philox(1)
    state = philox.state
    philox.set(2, 3)
    assert philox.state is state
    assert torch.equal(philox.normal((9,)), ops.Philox(2, 3).normal((9,)))
    assert repr(philox) == "Philox(seed=2, offset=3, device='cpu')"


def test_no_element_is_out_of_range() -> None:
    """The smallest and the largest word give finite normals."""
    assert normal(torch.tensor([1, 2]), (0,)).shape == (0,)
    z = ops.Philox(2**63 - 1, 2**63 - 1).normal((1000,))
    assert z.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, "seed: expected an integer"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"offset": True}, "offset: expected an integer"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.Philox(**({"seed": 1} | change))
