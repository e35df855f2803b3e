"""The samplers of k-diffusion and ComfyUI against their formulas, in float64, noise given.

The formulas are written out here as loops over x = x_0 + sigma z; the tables know nothing of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from diffusion_fast.ops import sampler_step
from diffusion_fast.samplers import Grid, table_from_grid

SIGMAS = [*np.geomspace(15.0, 0.05, 7).tolist(), 0.0]
Draw = Callable[[], Tensor]


def denoised(x: Tensor, sigma: float) -> Tensor:
    u = torch.tanh(x / (1 + sigma))
    return 0.8 * u + 0.3 * torch.sin(u.roll(1, -1) + 0.1 * sigma)


def line(x: Tensor, x_0: Tensor, start: float, end: float) -> Tensor:
    return x_0 + end / start * (x - x_0)


def split(start: float, end: float, eta: float) -> tuple[float, float]:
    """(level to go down to, noise to add)."""
    up = eta * end * math.sqrt(1 - (end / start) ** 2)
    return math.sqrt(end**2 - up**2), up


def euler_ancestral(x, sigmas, draw, eta, s_noise):
    for start, end in itertools.pairwise(sigmas):
        down, up = split(start, end, eta)
        x = line(x, denoised(x, start), start, down)
        if end and eta:
            x = x + s_noise * up * draw()
    return x


def dpm_2(x, sigmas, draw, eta, s_noise):
    for start, end in itertools.pairwise(sigmas):
        down, up = split(start, end, eta)
        slope = (x - denoised(x, start)) / start
        if down:
            middle = math.sqrt(start * down)
            there = x + (middle - start) * slope
            slope = (there - denoised(there, middle)) / middle
        x = x + (down - start) * slope
        if end and eta:
            x = x + s_noise * up * draw()
    return x


def dpmpp_2s_ancestral(x, sigmas, draw, eta, s_noise):
    for start, end in itertools.pairwise(sigmas):
        down, up = split(start, end, eta)
        x_0 = denoised(x, start)
        if down:
            middle = math.sqrt(start * down)
            x_0 = denoised(line(x, x_0, start, middle), middle)
        x = line(x, x_0, start, down)
        if end and eta:
            x = x + s_noise * up * draw()
    return x


def dpmpp_sde(x, sigmas, draw, eta, s_noise):
    """With the values of one Brownian path in sigma, as differences W."""
    for start, end in itertools.pairwise(sigmas):
        x_0 = denoised(x, start)
        if not end:
            return x_0
        middle = math.sqrt(start * end)
        first, rest = math.sqrt(start - middle), math.sqrt(middle - end)
        path = first * draw() if eta else 0.0
        down, up = split(start, middle, eta)
        there = line(x, x_0, start, down) + s_noise * up * path / first
        x_0 = denoised(there, middle)
        path = path + rest * draw() if eta else 0.0
        down, up = split(start, end, eta)
        x = line(x, x_0, start, down) + s_noise * up * path / math.sqrt(start - end)
    return x


def sde_multistep(order: int, exact: bool):
    def run(x, sigmas, draw, eta, s_noise):
        past: list[tuple[float, Tensor]] = []
        for start, end in itertools.pairwise(sigmas):
            past.append((-math.log(start), denoised(x, start)))
            (here, x_0), known = past[-1], past[-order:]
            if not end:
                return x_0
            h = -math.log(end) - here
            wide = (1 + eta) * h
            x = math.exp(-wide) * x + (1 - math.exp(-wide)) * x_0
            phi = 1 - (1 - math.exp(-wide)) / wide
            if len(known) >= 2:
                recent = (x_0 - known[-2][1]) / (here - known[-2][0])
            if len(known) == 2:
                x = x + (phi * h if exact else 0.5 * (1 - math.exp(-wide)) * h) * recent
            if len(known) == 3:
                (t_2, x_2), (t_1, x_1), _ = known
                older = (x_1 - x_2) / (t_1 - t_2)
                bend = (recent - older) / (here - t_2)
                x = x + phi * h * (recent + bend * (here - t_1))
                x = x - (phi / wide - 0.5) * h**2 * bend
            if eta:
                x = x + s_noise * end * math.sqrt(1 - math.exp(-2 * eta * h)) * draw()
        return x

    return run


def res_multistep(x, sigmas, draw, eta, s_noise):
    before = None
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        x_0 = denoised(x, start)
        down, up = split(start, end, eta)
        if before is None or not down:
            x = line(x, x_0, start, down)
        else:
            h, last = math.log(start / down), math.log(before[0] / sigmas[i - 1])
            slope = 1 - (1 - math.exp(-h)) / h  # the integral of exp(tau - h) tau / h
            share = slope * h / last if last else 0.0
            x = math.exp(-h) * x + (1 - math.exp(-h)) * x_0 + share * (before[1] - x_0)
        if end and eta:
            x = x + s_noise * up * draw()
        before = down, x_0
    return x


def gradient_estimation(x, sigmas, draw, eta, s_noise):
    before = None
    for start, end in itertools.pairwise(sigmas):
        x_0 = denoised(x, start)
        slope = (x - x_0) / start
        if not end:
            return x_0
        x = x + (end - start) * (slope if before is None else 2 * slope - before)
        before = slope
    return x


def er_sde(x, sigmas, draw, eta, s_noise):
    def scale(sigma):
        return sigma * (np.exp(np.power(sigma, 0.3)) + 10)

    history: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        history.append(denoised(x, start))
        if not end:
            return history[-1]
        ratio = scale(end) / scale(start)
        x = ratio * x + (1 - ratio) * history[-1]
        points = end + (start - end) * np.arange(200) / 200
        width = (start - end) / 200
        if i >= 1:
            slopes.append((history[-1] - history[-2]) / (start - sigmas[i - 1]))
            x = x + (end - start + scale(end) * (width / scale(points)).sum()) * slopes[-1]
        if i >= 2:
            bend = 2 * (slopes[-1] - slopes[-2]) / (start - sigmas[i - 2])
            integral = scale(end) * (width * (points - start) / scale(points)).sum()
            x = x + ((end - start) ** 2 / 2 + integral) * bend
        x = x + s_noise * math.sqrt(end**2 - (ratio * start) ** 2) * draw()
    return x


def seeds(nodes: list[float], exact: bool = False):
    """SEEDS with calls at the fractions ``nodes`` of a step in log-SNR."""

    def run(x, sigmas, draw, eta, s_noise):
        for start, end in itertools.pairwise(sigmas):
            found = [denoised(x, start)]
            if not end:
                return found[0]
            h, noise, at, last = math.log(start / end), 0.0, start, 0.0
            for node in (*nodes, 1.0):
                wide = node * h * (1 + eta)
                whole = 1 - math.exp(-wide)
                share = 0.0  # of the last x_0 beside the first one
                if len(found) > 1:
                    straight = (wide - whole) / wide / last * node
                    share = straight if exact or len(nodes) == 2 else whole / (2 * last)
                level = start * math.exp(-node * h)
                part = math.exp(-(node - last) * h * eta)
                fresh = draw() if eta and node > last else 0.0
                noise = level / at * part * noise + level * math.sqrt(1 - part**2) * fresh
                there = math.exp(-wide) * x + whole * found[0] + share * (found[-1] - found[0])
                there = there + s_noise * noise
                if node == 1.0 and len(found) == len(nodes) + 1:
                    x = there
                    break
                found.append(denoised(there, level))
                at, last = level, node
        return x

    return run


def heunpp2(x, sigmas, draw, eta, s_noise):
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        ahead, there, slopes = sigmas[i : i + 3], x, []
        if i + 3 > len(sigmas) - 1:
            ahead = sigmas[i:-1]
        for k, level in enumerate(ahead):
            slopes.append((there - denoised(there, level)) / level)
            if k + 1 < len(ahead):
                there = there + (ahead[k + 1] - level) * slopes[-1]
        weights = [level / (len(ahead) * sigmas[0]) for level in ahead]
        weights[0] = 1 - sum(weights[1:])
        x = x + (end - start) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


def lcm_plain(x, sigmas, draw, eta, s_noise):
    for start, end in itertools.pairwise(sigmas):
        x = denoised(x, start)
        if end:
            x = x + s_noise * end * draw()
    return x


def heun(x, start, end):
    slope = (x - denoised(x, start)) / start
    there = x + (end - start) * slope
    if not end:
        return there
    return x + (end - start) / 2 * (slope + (there - denoised(there, end)) / end)


def restart(x, sigmas, draw, eta, s_noise):
    """20 to 35 steps: nine are for going from near 2 to near 0.1 once more."""

    def karras(low, high, count):
        ends = np.linspace(high ** (1 / 7), low ** (1 / 7), count)
        return [float(v) for v in ends**7]

    levels = [*karras(sigmas[-2], sigmas[0], len(sigmas) - 1 - 9), 0.0]
    bottom, top = (min(range(len(levels)), key=lambda i: abs(levels[i] - v)) for v in (0.1, 2.0))
    for i in range(len(levels) - 1):
        x = heun(x, levels[i], levels[i + 1])
        if i + 1 == bottom:
            again = karras(levels[bottom], levels[top], 10)
            x = x + s_noise * math.sqrt(again[0] ** 2 - levels[bottom] ** 2) * draw()
            for start, end in itertools.pairwise(again):
                x = heun(x, start, end)
    return x


def lagrange(nodes, k, u):
    return math.prod((u - b) / (nodes[k] - b) for j, b in enumerate(nodes) if j != k)


def multistep(order, weights, first_order_end=True):
    """x' = x + sum of weights times slopes; weights of (levels, newest first; the next one)."""

    def run(x, sigmas, draw, eta, s_noise):
        slopes: list[Tensor] = []
        for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
            slopes.insert(0, (x - denoised(x, start)) / start)
            last = sigmas[max(i - order + 1, 0) : i + 1][::-1]
            if first_order_end and not end:
                last = last[:1]
            if len(last) == 1:
                x = x + (end - start) * slopes[0]
            else:
                pairs = zip(weights(last, end), slopes, strict=False)
                x = x + sum(w * slope for w, slope in pairs)
        return x

    return run


def integrals(time):
    def weights(last, end):
        nodes = [time(sigma) for sigma in last]

        def integral(k):
            return quad(lambda s: lagrange(nodes, k, time(s)), last[0], end, epsabs=1e-14)[0]

        return [integral(k) for k in range(len(nodes))]

    return weights


def adams_bashforth(last, end):
    table = {2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}
    table[4] = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    return [(end - last[0]) * w for w in table[len(last)]]


def ipndm_v(last, end):
    a, b, c, d = [end - last[0], *(-np.diff(last)), *([1.0] * 4)][:4]
    w = [1 + a / b / 2, -a / b / 2, 0.0, 0.0]
    if len(last) > 2:
        two = (1 - a / (3 * (a + b)) * (a * (a + b)) / (b * (b + c))) / 2
        w = [w[0] + two, w[1] - (1 + b / c) * two, two * b / c, 0.0]
    if len(last) > 3:
        three = (1 - a / (3 * (a + b))) / 2 + (1 - a / (2 * (a + b))) * a / (6 * (a + b + c))
        three *= a * (a + b) * (a + b + c) / (b * (b + c) * (b + c + d))
        far = b * (b + c) / (c * (c + d))
        w[0] += three
        w[1] -= (1 + b / c + far) * three
        w[2] += (b / c + far * (1 + c / d)) * three
        w[3] -= three * far * b / c
    return [a * v for v in w[: len(last)]]


def vp_time(sigma):
    """t of a linear schedule whose sigma is 0.002 at t = 0.001 and 80 at t = 1."""
    low, high = math.log(1 + 0.002**2), math.log(1 + 80**2)
    rise = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    base = high - rise / 2
    return (math.sqrt(base**2 + 2 * rise * math.log(1 + sigma**2)) - base) / rise


LEVELS = np.geomspace(0.03, 15.0, 1000)  # of a schedule


def sa_solver(again: bool):
    low, high = (float(np.exp(np.log(LEVELS[0]) + p * np.log(500))) for p in (0.2, 0.8))

    def weights(last, start, end, tau):
        p, total = 1 + tau**2, math.log(start / end)
        nodes = [math.log(start / s) for s in last]

        def integral(k):
            def f(v):
                return p * math.exp(p * (v - total)) * lagrange(nodes, k, v)

            return quad(f, 0, total, epsabs=1e-14)[0]

        return [integral(k) for k in range(len(last))]

    def run(x, sigmas, draw, eta, s_noise):
        n, seen = len(sigmas) - 1, []
        ahead, tau, noise = x, 0.0, 0.0
        for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
            seen.insert(0, denoised(ahead, start))
            order = min(4, len(seen), n - i)
            if i == 0 or (end == 0 and not again):
                x = ahead
            else:
                before = sigmas[i - 1]
                w = weights(sigmas[i - order + 1 : i + 1][::-1], before, start, tau)
                decay = math.exp(-(tau**2) * math.log(before / start))
                x = start / before * decay * x + noise
                x = x + sum(a * b for a, b in zip(w, seen, strict=False))
                if again:
                    seen[0] = denoised(x, start)
            if end == 0:
                return seen[0]
            tau = eta if low <= end <= high else 0.0
            order = min(3, len(seen), n - 1 - i)
            w = weights(sigmas[i - order + 1 : i + 1][::-1], start, end, tau)
            h = math.log(start / end)
            noise = s_noise * end * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * draw() if tau else 0
            ahead = end / start * math.exp(-(tau**2) * h) * x + noise
            ahead = ahead + sum(a * b for a, b in zip(w, seen, strict=False))

    return run


def uni_pc(bh1: bool):
    def run(x, sigmas, draw, eta, s_noise):
        levels = [*sigmas[:-1], sigmas[-1] or 0.001]
        n = len(levels) - 1
        most, seen = min(3, n - 1), [denoised(x, levels[0])]
        for k in range(1, n + 1):
            order = k if k < most else min(most, n + 1 - k)
            start, end = levels[k - 1], levels[k]
            h = math.log(end / start)  # -h of the paper
            base = end / start * x - math.expm1(h) * seen[0]
            B = h if bh1 else math.expm1(h)
            r = [math.log(start / levels[k - 1 - i]) / -h for i in range(1, order)] + [1.0]
            phi, moments, factorial = math.expm1(h) / h - 1, [], 1
            for i in range(1, order + 1):
                moments.append(phi * factorial / B)
                factorial *= i + 1
                phi = phi / h - 1 / factorial
            powers = np.array([[v**i for v in r] for i in range(order)])
            changes = [(seen[i] - seen[0]) / r[i - 1] for i in range(1, order)]

            def change(weights, changes=changes):
                return sum(w * c for w, c in zip(weights, changes, strict=True))

            ahead = [0.5] if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
            x = base - B * change(ahead if changes else [])
            if k == n:
                return x
            new = denoised(x, end)
            back = [0.5] if order == 1 else np.linalg.solve(powers, moments)
            x = base - B * (change(back[:-1]) + back[-1] * (new - seen[0]))
            seen = [new, *seen[:2]]

    return run


REFERENCES = {
    "uni_pc": uni_pc(bh1=True),
    "uni_pc_bh2": uni_pc(bh1=False),
    "lms": multistep(4, integrals(lambda sigma: sigma), first_order_end=False),
    "ipndm": multistep(4, adams_bashforth),
    "ipndm_v": multistep(4, ipndm_v),
    "deis": multistep(3, integrals(vp_time)),
    "sa_solver": sa_solver(again=False),
    "sa_solver_pece": sa_solver(again=True),
    "euler_ancestral": euler_ancestral,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": sde_multistep(2, exact=False),
    "dpmpp_2m_sde_heun": sde_multistep(2, exact=True),
    "dpmpp_3m_sde": sde_multistep(3, exact=True),
    "res_multistep": res_multistep,
    "res_multistep_ancestral": res_multistep,
    "gradient_estimation": gradient_estimation,
    "er_sde": er_sde,
    "seeds_2": seeds([0.5]),
    "seeds_3": seeds([1 / 3, 2 / 3]),
    "exp_heun_2_x0": seeds([1.0], exact=True),
    "exp_heun_2_x0_sde": seeds([1.0], exact=True),
    "heunpp2": heunpp2,
    "lcm_plain": lcm_plain,
    "restart": restart,
}
NOISE = {
    "eta": {"eta": 1.0, "s_noise": 1.0},
    "part": {"eta": 0.6, "s_noise": 1.1},
    "none": {"eta": 0.0, "s_noise": 1.0},
}


def epsilon(x: Tensor, sigma: float) -> Tensor:
    return (x - denoised(x, sigma)) / sigma


def run_on(name: str, sigmas: list[float], x: Tensor, draw: Draw, **options) -> Tensor:
    """One of ours on given levels, from x = x_0 + sigma z and back to it."""
    levels = np.array(sigmas)
    grid = dataclasses.replace(Grid.from_sigmas(levels, levels[:-1]), levels=LEVELS)
    grid = grid if name.startswith("sa_") else dataclasses.replace(grid, levels=None)
    table = table_from_grid(name, grid, **options)
    state = x / math.hypot(1, sigmas[0])
    kept = {name: torch.full_like(x, math.nan) for name in table.kept}
    model = epsilon if options["prediction_type"] == "epsilon" else denoised
    for i, sigma in enumerate(table.timesteps.tolist()):
        noise = draw() if table.draws[i] else None
        output = model(state / table.levels[i, 0], sigma)
        sampler_step(state, output, table.rows, i, noise=noise, **kept)
    return state / table.next_levels[-1, 0]


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_the_formula(name: str, noise: str, prediction_type: str) -> None:
    from diffusion_fast.samplers import SAMPLERS

    has = SAMPLERS[name].options
    options = {key: value for key, value in NOISE[noise].items() if key in has}
    if noise != "eta" and not options:
        pytest.skip("draws nothing")
    given = {"eta": 0.0, "s_noise": 1.0, **options}
    sigmas = [*np.geomspace(15.0, 0.05, 24).tolist(), 0.0] if name == "restart" else SIGMAS
    start = torch.Generator().manual_seed(1)
    x = sigmas[0] * torch.randn(2, 3, 4, generator=start, dtype=torch.float64)
    results = []
    for run in ("ours", "formula"):
        generator = torch.Generator().manual_seed(2)

        def draw(generator=generator) -> Tensor:
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        if run == "ours":
            more = {"prediction_type": prediction_type, **options}
            results.append(run_on(name, sigmas, x, draw, **more))
        else:
            results.append(REFERENCES[name](x, sigmas, draw, **given))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def euler_step(x, start, end, sigmas):
    return line(x, denoised(x, start), start, end)


def heun_step(x, start, end, sigmas):
    return heun(x, start, end)


def dpm_2_step(x, start, end, sigmas):
    slope = (x - denoised(x, start)) / start
    if end:
        middle = math.sqrt(start * end)
        there = x + (middle - start) * slope
        slope = (there - denoised(there, middle)) / middle
    return x + (end - start) * slope


CHURN = {"s_churn": 1.5, "s_tmin": 0.1, "s_tmax": 12.0, "s_noise": 1.05}
STEPS = {"euler": euler_step, "heun": heun_step, "dpm_2": dpm_2_step}


@pytest.mark.parametrize("name", STEPS)
def test_churn_raises_a_level_before_its_step(name: str) -> None:
    """Karras et al. 2022, algorithm 2; the first level, 15, is above s_tmax."""
    x = SIGMAS[0] * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    ours, theirs = (
        lambda g=g: torch.randn(x.shape, generator=g, dtype=torch.float64) for g in draws
    )
    result = run_on(name, SIGMAS, x, ours, prediction_type="epsilon", **CHURN)
    gamma = min(CHURN["s_churn"] / (len(SIGMAS) - 1), math.sqrt(2) - 1)
    for start, end in itertools.pairwise(SIGMAS):
        if CHURN["s_tmin"] <= start <= CHURN["s_tmax"]:
            hat = start * (1 + gamma)
            x = x + CHURN["s_noise"] * math.sqrt(hat**2 - start**2) * theirs()
            start = hat
        x = STEPS[name](x, start, end, SIGMAS)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [*STEPS, "heunpp2"])
def test_the_first_churn_is_part_of_the_starting_noise(name: str) -> None:
    levels = np.array(SIGMAS)
    grid = Grid.from_sigmas(levels, levels[:-1])
    hat = SIGMAS[0] * (1 + 1.5 / 7)
    table = table_from_grid(name, grid, s_churn=1.5)
    assert table.noise / table.signal == pytest.approx(hat)
    assert (table.levels[0, 1] / table.levels[0, 0]).item() == pytest.approx(hat)
    wide = math.hypot(1, SIGMAS[0])  # the start is wide z
    expected = math.hypot(wide, math.sqrt(hat**2 - SIGMAS[0] ** 2)) / math.hypot(1, hat)
    assert table.initial_scale == pytest.approx(expected)
    assert table_from_grid(name, grid, s_churn=0.0).rows.equal(table_from_grid(name, grid).rows)
    with pytest.raises(ValueError, match="s_churn: expected none for ddim"):
        table_from_grid("ddim", grid, s_churn=1.0)
