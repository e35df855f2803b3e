"""The damage is seeded and differs by seed; what survives it is told from what doesn't."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from mutations import deadline, mutated, mutated_json, mutated_json_text, survives


def test_one_seed_is_one_edit() -> None:
    data = bytes(range(256)) * 4
    assert [mutated(data, seed) for seed in range(50)] == [mutated(data, s) for s in range(50)]
    different = {mutated(data, seed) for seed in range(50)} - {data}
    assert len(different) > 40
    assert {len(one) > len(data) for one in different} == {True, False}
    assert all(isinstance(mutated(b"", seed), bytes) for seed in range(50))


def test_edits_of_json() -> None:
    value = {"a": [1, {"b": None}], "c": "d"}
    edited = [json.dumps(mutated_json(value, seed)) for seed in range(60)]
    assert edited == [json.dumps(mutated_json(value, seed)) for seed in range(60)]
    assert len(set(edited)) > 30
    assert value == {"a": [1, {"b": None}], "c": "d"}
    texts = {mutated_json_text(json.dumps(value), seed) for seed in range(60)}
    assert len(texts) > 30


def _raise(error: Exception) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


def test_what_survives() -> None:
    assert survives(lambda: 3, (ValueError,), ["x"], 0) == 3
    assert survives(_raise(ValueError("x: bad")), (ValueError,), ["x"], 0) is None
    with pytest.raises(AssertionError, match=r"seed 7: \['x'\] not in: bad"):
        survives(_raise(ValueError("bad")), (ValueError,), ["x"], 7)
    with pytest.raises(AssertionError, match="seed 7: KeyError"):
        survives(_raise(KeyError("x")), (ValueError,), ["x"], 7)


def test_a_deadline_ends_what_hangs() -> None:
    with pytest.raises(TimeoutError, match=r"no end after 0\.05 s"), deadline(0.05):
        time.sleep(5)
