"""A sampler on a fixed grid is a table: one row of coefficients per model call.

:mod:`diffusion_fast.ops.sampler_step` executes the rows; see there for the formula.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..guidance import HALVES
from ..ops import checks
from ..ops.sampler_step import COLUMNS
from ..schedule import FloatArray

INDEX = {name: i for i, name in enumerate(COLUMNS)}


def coefficients(count: int, **columns: float | FloatArray) -> FloatArray:
    """[count, len(COLUMNS)] with the named columns set; else no clipping, guidance 1, x_0 as
    history, and 0."""
    rows = np.zeros((count, len(COLUMNS)))
    for name, value in {"clip": math.inf, "guidance": 1.0, "e_0": 1.0, **columns}.items():
        rows[:, INDEX[name]] = value
    return rows


@dataclass(frozen=True)
class StepTable:
    """Everything a sampling loop needs, as data.

    Attributes:
        sampler: the sampler's name.
        rows: float64 [N, len(COLUMNS)] on the CPU, one row per model call.
        timesteps: float64 [N], the t handed to the model with each row.
        step_of_row: int64 [N], the step that each row belongs to (Heun has two rows per step).
        initial_scale: the state starts as initial_scale * x_T with standard normal x_T.
        signal, noise: A and S of x = A x_0 + S epsilon at the first row; an image-to-image run
            starts there with x = signal * image + noise * z.
        levels: float64 [N, 2], A and S of the state that each row sees.
        halves: which halves of guidance run: "conditional", "unconditional" or "both".
        next_levels: float64 [N, 2], A and S of the state after each row: where an image must be
            noised to, to take the place of the state there.
        draws: bool [N], the rows that take noise from the generator: those that read it, and where
            a sampler has others draw some too, those.
        ends: whether the last row leads to an image, and not to a state that another table goes on
            with.

    The state is in the variance-preserving form (A^2 + S^2 = 1) for every sampler, so that the
    model sees the state itself as its input.

    Raises:
        ValueError: an attribute whose shape, dtype or values break the above.
    """

    sampler: str
    rows: Tensor
    timesteps: Tensor
    step_of_row: Tensor
    initial_scale: float
    signal: float
    noise: float
    halves: str
    levels: Tensor
    next_levels: Tensor
    draws: Tensor
    ends: bool = True

    def __post_init__(self) -> None:
        n = len(self.rows)
        if n == 0:
            checks.fail("rows", "at least one row", "none")
        checks.shapes(
            ("rows", self.rows, (n, len(COLUMNS)), "[N, len(COLUMNS)]"),
            ("timesteps", self.timesteps, (n,), "[N]"),
            ("step_of_row", self.step_of_row, (n,), "[N]"),
            ("draws", self.draws, (n,), "[N]"),
            ("levels", self.levels, (n, 2), "[N, 2]"),
            ("next_levels", self.next_levels, (n, 2), "[N, 2]"),
        )
        for name, value, dtype in (
            ("rows", self.rows, torch.float64),
            ("timesteps", self.timesteps, torch.float64),
            ("levels", self.levels, torch.float64),
            ("next_levels", self.next_levels, torch.float64),
            ("step_of_row", self.step_of_row, torch.int64),
            ("draws", self.draws, torch.bool),
        ):
            if value.dtype != dtype or value.device.type != "cpu":
                checks.fail(name, f"{dtype} on the CPU", f"{value.dtype} on {value.device}")
        clip = self.rows[:, INDEX["clip"]]
        if not bool((clip > 0).all()):
            checks.fail("rows", "a positive clip (infinity: off)", clip.min().item())
        others = [i for name, i in INDEX.items() if name != "clip"]
        bad = ~torch.isfinite(self.rows[:, others]).all(1)
        if bool(bad.any()):
            checks.fail(
                "rows", "finite coefficients", f"others in rows {bad.nonzero()[:, 0].tolist()}"
            )
        if not bool((torch.isfinite(self.timesteps) & (self.timesteps >= 0)).all()):
            checks.fail("timesteps", "finite values >= 0", self.timesteps.tolist())
        checks.one_of("halves", self.halves, HALVES)

    def __len__(self) -> int:
        """The number of rows, that is of model calls."""
        return len(self.rows)

    def only(self, rows: list[int]) -> StepTable:
        """Some of the rows."""
        names = ("rows", "timesteps", "step_of_row", "levels", "next_levels", "draws")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in names})

    def folded(self) -> Tensor:
        """The rows with x0 written out, c_0 x0 = c_0 (a x + b m), where nothing else reads it.

        One pass less over the data per step, and no rounding of a large x0 at high noise. Rows
        stay as they are if x0 is clipped or kept.
        """
        rows = self.rows.clone()
        column = {name: rows[:, i] for name, i in INDEX.items()}
        if self.needs_h1 or bool((column["clip"] != math.inf).any() | (column["d_0"] != 0).any()):
            return rows
        column["c_x"] += column["c_0"] * column["a"]
        column["c_m"] += column["c_0"] * column["b"]
        for name in ("a", "b", "c_0"):
            column[name].zero_()
        return rows

    def predictions(self) -> Tensor:
        """The rows that lead from the same x and m to the x0 of each."""
        rows = torch.zeros_like(self.rows)
        for name in ("a", "b", "clip", "guidance", "rescale"):
            rows[:, INDEX[name]] = self.rows[:, INDEX[name]]
        rows[:, INDEX["c_0"]] = 1.0
        return rows

    @property
    def steps(self) -> int:
        return int(self.step_of_row[-1]) + 1

    @property
    def ends_step(self) -> Tensor:
        """bool [N]: the rows that are the last of their step."""
        last = torch.tensor([-1])
        return self.step_of_row.diff(append=last) != 0

    @property
    def rescales(self) -> bool:
        """Whether any row rescales guidance."""
        return self._any("rescale")

    @property
    def integer_timesteps(self) -> bool:
        """Whether every timestep is an integer, so that it may be handed over as int64."""
        return bool((self.timesteps == self.timesteps.round()).all())

    @functools.cached_property
    def kept(self) -> tuple[str, ...]:
        """The tensors that a run keeps beside x: those of y, h1, h2 and h3 that a row reads."""
        return tuple(name for name in ("y", "h1", "h2", "h3") if getattr(self, f"needs_{name}"))

    @functools.cached_property
    def needs_y(self) -> bool:
        return self._any("c_y", "d_x", "d_0", "d_1", "d_2", "d_3", "d_y", "d_u")

    @functools.cached_property
    def needs_h1(self) -> bool:
        return self._any("c_1", "d_1") or self.needs_h2

    @functools.cached_property
    def needs_h2(self) -> bool:
        return self._any("c_2", "d_2") or self.needs_h3

    @functools.cached_property
    def needs_h3(self) -> bool:
        return self._any("c_3", "d_3")

    @property
    def reads_unconditional(self) -> bool:
        """Whether any row reads the unconditional output by itself."""
        return self._any("c_u", "d_u", "e_u")

    def _any(self, *columns: str) -> bool:
        return bool((self.rows[:, [INDEX[c] for c in columns]] != 0).any())
