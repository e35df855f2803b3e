"""Threads wait for each other, and none waits for itself."""

from __future__ import annotations

import copy
import threading

import pytest

from diffusion_fast.turns import Turns


def test_a_thread_is_refused_where_it_would_wait_for_itself() -> None:
    turns = Turns("Thing")
    for _ in range(2):
        with turns:
            with pytest.raises(RuntimeError, match="Thing: expected a callback"), turns:
                pass
            with copy.deepcopy(turns):
                pass


def test_other_threads_wait() -> None:
    turns, order = Turns("Thing"), []

    def run() -> None:
        with turns:
            order.append("other")

    thread = threading.Thread(target=run)
    with turns:
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns("Thing")
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass
