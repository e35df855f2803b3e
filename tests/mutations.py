"""Damaged files for the tests that read them: seeded edits of bytes and of JSON.

One seed gives one edit, always the same, so that a failure names the seed that repeats it.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOSTILE = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1e308, 0.5, float("nan"), float("inf")),
    *("", "a", "\x00", "\u2028", "../../x", "é" * 40, [], {}, [[]], [None], {"a": None}),
    *([1, 2], "1", "[" * 50),
)


def mutated(data: bytes, seed: int) -> bytes:
    """The bytes with one to three flips, cuts, insertions, copies, or edits of length fields."""
    rng = random.Random(seed)
    edited = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_flip, _flip, _cut, _insert, _remove, _repeat, _length))(edited, rng)
    return bytes(edited)


def mutated_json(value: Any, seed: int) -> Any:
    """A JSON value with one or two of its nodes replaced, removed, renamed, doubled or added."""
    rng = random.Random(seed)
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        parent, key = rng.choice(list(_places(holder)))
        action = rng.randrange(5)
        if action == 0 and parent is not holder:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice((f"{key}_", str(key).upper(), ""))] = parent.pop(key)
        elif action == 2 and isinstance(parent[key], list):
            parent[key] = parent[key] * 2
        elif action == 3 and isinstance(parent, dict):
            parent[f"new_{rng.randrange(9)}"] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return holder[0]


def mutated_json_text(text: str, seed: int) -> bytes:
    """JSON text with an edit of its value, or (one seed in three) of its bytes."""
    if seed % 3 == 0:
        return mutated(text.encode(), seed)
    return json.dumps(mutated_json(json.loads(text), seed)).encode()


def survives(
    read: Callable[[], Any], errors: tuple[type[Exception], ...], names: Iterable[Any], seed: Any
) -> Any:
    """What ``read()`` returns, or None where it raises one of ``errors``.

    Args:
        read: reads a damaged file.
        errors: the exceptions that are meant for users.
        names: such an error's message holds one of these, such as the file's path.
        seed: what the failure shows, so that it can be repeated.

    Raises:
        AssertionError: another exception, a message without a name, or no end after 20 seconds.
    """
    names = [str(name) for name in names]
    try:
        with deadline(20):
            return read()
    except errors as error:
        if any(name in str(error) for name in names):
            return None
        raise AssertionError(f"seed {seed}: {names} not in: {error}") from error
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(path: Path, data: bytes) -> Path:
    """The path, whose file is a new one: what was mapped from the old one stays as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# Edits of bytes. The first 64 are met as often as all others: headers and magic numbers are there.


def _place(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(min(len(data), rng.choice((64, len(data)))) or 1)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] ^= rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _insert(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = rng.choice((rng.randbytes(rng.randrange(1, 40)), b"\x00" * 8, b"{", b"\n"))


def _remove(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.randrange(1, 40)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start, target = _place(data, rng), _place(data, rng)
    data[target:target] = data[start : start + rng.randrange(1, 80)]


def _length(data: bytearray, rng: random.Random) -> None:
    """Another number in the place of 1, 2, 4 or 8 bytes, which may be a length."""
    value = rng.choice((0, 1, 7, 2**7, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1))
    size = rng.choice((1, 2, 4, 8))
    place = rng.choice((0, _place(data, rng)))
    data[place : place + size] = struct.pack("<Q", value)[:size]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every node of a JSON value as its parent and its key there."""
    keys = holder if isinstance(holder, dict) else range(len(holder))
    for key in list(keys):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from _places(holder[key])
