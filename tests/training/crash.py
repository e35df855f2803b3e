"""Runs that are killed, each in a process of its own: python crash.py FOLDER.

For every place below a child trains in FOLDER/<place> until it kills itself there with SIGKILL, as
``kill -9`` would. Prints a place and the signal that ended its process per line.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import STEPS, full_trainer
from unmeasured import unmeasured

from diffusion_fast.training import Trainer, checkpoint


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], before: Callable[..., None]) -> Any:
    """``function``, but killed in its call ``number``, after ``before`` has seen its arguments."""
    calls = 0

    def replaced(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            before(*args)
            kill()
        return function(*args, **keywords)

    return replaced


def nothing(*_: object) -> None:
    pass


def half_a_file(tensors: object, path: Path, *_: object) -> None:
    path.write_bytes(b"\0" * 100)


def in_forward(trainer: Trainer) -> None:
    # Two validations of four calls each come before.
    trainer.model.register_forward_hook(at_call(12 + 8, nothing, nothing))


def between_gradient_and_update(trainer: Trainer) -> None:
    trainer.optimizer.register_step_pre_hook(at_call(12, nothing, nothing))


def between_update_and_average(trainer: Trainer) -> None:
    trainer.optimizer.register_step_post_hook(at_call(9, nothing, nothing))


def in_a_file(trainer: Trainer) -> None:
    # The second file of the second checkpoint.
    checkpoint.save_tensors = at_call(8, checkpoint.save_tensors, half_a_file)


def before_the_rename(trainer: Trainer) -> None:
    os.rename = at_call(2, os.rename, nothing)


def before_the_mark(trainer: Trainer) -> None:
    checkpoint._write_mark = at_call(2, checkpoint._write_mark, nothing)


def before_the_mark_has_its_name(trainer: Trainer) -> None:
    os.replace = at_call(3, os.replace, nothing)


def while_an_old_one_is_removed(trainer: Trainer) -> None:
    def before(path: Path, **_: object) -> None:
        next(iter(path.iterdir())).unlink()

    remove = shutil.rmtree
    killed = at_call(1, remove, before)

    def rmtree(path: Path, **keywords: Any) -> None:
        old = path.name.startswith("step_") and path.exists()
        (killed if old else remove)(path, **keywords)

    shutil.rmtree = rmtree


PLACES = {
    place.__name__: place
    for place in (
        in_forward,
        between_gradient_and_update,
        between_update_and_average,
        in_a_file,
        before_the_rename,
        before_the_mark,
        before_the_mark_has_its_name,
        while_an_old_one_is_removed,
    )
}

if __name__ == "__main__":
    unmeasured()
    for name, place in PLACES.items():
        child = os.fork()
        if child == 0:
            trainer = full_trainer(Path(sys.argv[1]) / name)
            place(trainer)
            trainer.fit(STEPS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "finished", flush=True)
