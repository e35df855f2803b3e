"""Planted defects: changes of the kernels that the emulated tests must notice.

The sources say where: a comment ``// mutants: NAME`` opens a stretch that ends at the next one. A
defect replaces text that its stretch has once; spaces and line breaks do not count.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from emulated_attention import CSRC

MARKER = re.compile(r"^ *// mutants: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A defect: in the stretch ``marker`` the text ``old`` becomes ``new``."""

    marker: str
    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.marker}: {self.name}"

    def source(self) -> tuple[Path, str]:
        """The file of csrc that has the stretch, and its text with this defect.

        Raises:
            AssertionError: the sources have changed: this defect must be written anew.
        """
        found = [(path, place) for name, path, place in stretches() if name == self.marker]
        assert len(found) == 1, f"{self}: {len(found)} markers of this name"
        path, place = found[0]
        text = path.read_text()
        tokens = map(re.escape, re.findall(r"\w+|\S", self.old))
        hits = list(re.compile(r"\s*".join(tokens)).finditer(text, place.start, place.stop))
        assert len(hits) == 1, f"{self}: {self.old!r} is there {len(hits)} times"
        return path, text[: hits[0].start()] + self.new + text[hits[0].end() :]

    def write(self, folder: Path) -> None:
        """A copy of csrc in a new folder, with this defect."""
        path, text = self.source()
        shutil.copytree(CSRC, folder)
        (folder / path.relative_to(CSRC)).write_text(text)


def stretches() -> Iterator[tuple[str, Path, slice]]:
    """Every marker's name, its file in csrc and the characters up to the next marker."""
    for path in sorted(CSRC.rglob("*.cuh")):
        source = path.read_text()
        marks = list(MARKER.finditer(source))
        ends = [mark.start() for mark in marks[1:]] + [len(source)]
        for mark, end in zip(marks, ends, strict=False):
            yield mark[1], path, slice(mark.end(), end)


def _mutants(table: Mapping[str, tuple[tuple[str, str, str], ...]]) -> tuple[Mutant, ...]:
    return tuple(Mutant(marker, *defect) for marker, defects in table.items() for defect in defects)


# Synchronisation: often invisible in the values, so each runs in the default run.
SYNCHRONISATION = _mutants(
    {
        "short: Q and K": (
            ("K not waited for", "cp_async_wait<2>()", "cp_async_wait<3>()"),
            ("next Q not waited for", "cp_async_wait<1>()", "cp_async_wait<2>()"),
            ("no barrier after K", "__syncthreads();", ""),
            ("no syncwarp after next Q", "__syncwarp();", ""),
        ),
        "short: output": (
            ("V not waited for", "cp_async_wait<1>()", "cp_async_wait<2>()"),
            ("no barrier after V", "__syncthreads();", ""),
        ),
        "short: copies": (
            (
                "K shares V's group",
                "padded, keys, threadIdx.x, kThreads); ptx::cp_async_commit(); load_rows",
                "padded, keys, threadIdx.x, kThreads); load_rows",
            ),
        ),
        "short: places": (("one buffer for Q", "(i & 1) * kRows", "(i & 0) * kRows"),),
        "tiled: queries": (
            ("Q not waited for", "cp_async_wait<1>()", "cp_async_wait<2>()"),
            ("no syncwarp after Q", "__syncwarp();", ""),
        ),
        "tiled: keys": (
            ("stage not waited for", "cp_async_wait<0>()", "cp_async_wait<1>()"),
            ("no barrier", "__syncthreads();", ""),
        ),
        "tiled: places": (("one stage", "(i & 1) * Shape::kStage", "(i & 0) * Shape::kStage"),),
        "store": (
            ("no syncwarp before", "(lane & 3) * 4; __syncwarp();", "(lane & 3) * 4;"),
            ("no syncwarp after", "} __syncwarp();", "}"),
        ),
        "backward: keys": (
            (
                "not waited for",
                "cp_async_wait<0>(); __syncthreads();",
                "cp_async_wait<1>(); __syncthreads();",
            ),
            ("no barrier", "__syncthreads();", ""),
            (
                "statistics in one stage",
                "(i & 1) * 2 * Shape::kStatistics",
                "(i & 0) * 2 * Shape::kStatistics",
            ),
        ),
        "backward: queries": (
            (
                "not waited for",
                "cp_async_wait<0>(); __syncthreads();",
                "cp_async_wait<1>(); __syncthreads();",
            ),
            ("no barrier", "__syncthreads();", ""),
        ),
        "short: softmax": (
            (
                "warps diverge",
                "Rounded<> p[kKeyTiles];",
                "if (lane == 3) __syncwarp(); Rounded<> p[kKeyTiles];",
            ),
        ),
        "rows": (("bank conflicts", "(kChunks | 1) * 16", "(kChunks + 3) / 4 * 64"),),
    }
)

VALUES = _mutants(
    {
        "short: softmax": (
            ("last tile not masked", "(j + 1) * 16 > keys", "(j + 1) * 16 > keys + 15"),
            ("sum over lanes missing", "sum[0][r] = row_sum(sum[0][r]);", ";"),
        ),
        "short: output": (
            ("a tile of V left out", "if (j * 16 < keys)", "if (j < 4)"),
            ("lse past the end", "if (row < params.queries)", ""),
        ),
        "short: scores": (("a tile of K left out", "if (j * 16 < keys)", "if (j < 4)"),),
        "short: places": (
            ("V over K", "shared_k + padded", "shared_k + (padded - 8)"),
            ("warps share rows of Q", "(padded + warp * 16)", "(padded + warp * 8)"),
            (
                "lengths ignored",
                "key_count(params.key_lengths, place.batch, params.keys)",
                "params.keys",
            ),
        ),
        "short: copies": (("exit with copies", "if (tile + params.blocks_per_head < tiles)", ""),),
        "tiled: keys": (
            ("last tile not masked", "(tile + 1) * kKeys > keys", "false"),
            ("sum not rescaled", "sum[m][r] *= shrink;", ""),
            ("output not rescaled", "o.x[m][d][2 * r] *= shrink;", ""),
            ("rescaled by itself", "fmaf(before[m][r]", "fmaf(maximum[m][r]"),
            ("V from K", "stage(tile) + (kKeys + j * 16)", "stage(tile) + (j * 16)"),
            ("mask of the wrong tile", "tile * kKeys + j * 16, keys", "tile + j, keys"),
        ),
        "load": (
            ("rows past the end", "first + row < limit", "true"),
            ("chunk", "* stride + chunk * 8", "* stride + chunk * 4"),
        ),
        "left operand": (
            ("blocks swapped", "(block & 1) * 8", "(block >> 1) * 8"),
            ("tail", "(R::kChunks - 1)", "(R::kChunks - 2)"),
        ),
        "right operand": (
            ("blocks swapped", "s[j].x[m][0], a[m], b[0], b[1]", "s[j].x[m][0], a[m], b[0], b[2]"),
            ("tail", "s[j].x[m][1], a[m], b[1]", "s[j].x[m][1], a[m], b[0]"),
            ("head dim step", "step * 32", "step * 16"),
        ),
        "accumulate": (
            ("not transposed", "ldmatrix_x4_transposed", "ldmatrix_x4"),
            ("tail not transposed", "ldmatrix_x2_transposed", "ldmatrix_x2"),
            ("pair", "p.x[m], b[2], b[3]", "p.x[m], b[3], b[2]"),
        ),
        "rounding": (("order", "[i >> 1][(i & 1) * 2]", "[i & 1][(i >> 1) * 2]"),),
        "reductions": (
            ("max over half a row", "fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2))", "x"),
            (
                "sum over other rows",
                "x + __shfl_xor_sync(0xffffffffu, x, 2)",
                "x + __shfl_xor_sync(0xffffffffu, x, 4)",
            ),
        ),
        "store": (
            ("factor of the other row", "x[d][2] * factor[1]", "x[d][2] * factor[0]"),
            ("rows past the end", "if (first + row >= limit) break;", ""),
            ("row", "mine + 8 * R::kStride", "mine + 4 * R::kStride"),
        ),
        "place": (
            (
                "head and batch mixed",
                "head(blockIdx.x / parts % heads)",
                "head(blockIdx.x / parts / heads)",
            ),
        ),
        "mask": (
            ("one key too many", "allowed = key < keys", "allowed = key <= keys"),
            ("column", "(lane_id() & 3) * 2 + e", "(lane_id() & 3) * 2"),
            ("bias not divided by the scale", "bias[key] * inverse_scale", "bias[key]"),
        ),
        "softmax": (
            ("no keys: maximum", "maximum == -INFINITY ? 0.f :", ""),
            ("no keys: division", "sum == 0.f ? 0.f :", ""),
            ("maximum ignored", "-base[m][e >> 1]", "0.f"),
            ("lse without its base", "(base + log2f(sum))", "log2f(sum)"),
        ),
        "backward: probability": (("lse in the wrong base", "lse * kLog2E", "lse"),),
        "backward: keys": (
            ("bias ignored for keys", "[key] * kLog2E", "[key] * 0.f"),
            ("delta of the other query", "e & 1 ? delta.y : delta.x", "delta.x"),
            ("base of the other query", "e & 1 ? base.y : base.x", "base.x"),
            ("dK from dO", "round_to<T>(ds[j]), rows_q", "round_to<T>(ds[j]), rows_dout"),
            ("dV from dS", "round_to<T>(s[j])", "round_to<T>(ds[j])"),
            ("step of queries", "rows_q = stage(tile) + step * kRow", "rows_q = stage(tile)"),
            ("statistics of the step", "(step + j * 16 + n * 8", "(j * 16 + n * 8"),
            ("scale of dK", "dk.x[0][d][e] * p.scale", "dk.x[0][d][e]"),
            ("keys past the length", "if (!inside[e >> 1]) dv.x[0][d][e] = 0.f;", ""),
            (
                "dK past the length",
                "inside[e >> 1] ? dk.x[0][d][e] * p.scale : 0.f",
                "dk.x[0][d][e] * p.scale",
            ),
            ("a split left out", "begin = split * share", "begin = split * share + 1"),
            ("splits overlap", "place.part / key_tiles", "place.part / key_tiles / 2"),
            ("dbias of a lane", "sum = row_sum(dbias[r])", "sum = dbias[r]"),
        ),
        "backward: queries": (
            ("scale of dQ", "factor[2] = {p.scale, p.scale}", "factor[2] = {1.f, 1.f}"),
            ("delta not summed", "delta[r] = row_sum(delta[r]);", ""),
            ("delta not written", "row < p.queries) p.delta", "row < 0) p.delta"),
            ("exact delta ignored", "p.exact_delta && round == tiles", "false"),
            ("mask for dQ", "key + 16 > keys", "false"),
        ),
        "backward: delta": (
            ("rowsum over half", "sum += __shfl_xor_sync(0xffffffffu, sum, 4);", ""),
            ("rowsum of one half", "ptx::to_float<T>(y[i] >> 16)", "0.f"),
        ),
    }
)

# Changes that alter no value on purpose, and why; each is checked to stay unnoticed, so that a
# reason that no longer holds comes to light.
HARMLESS = _mutants(
    {
        "backward: keys": (
            (
                "queries past the end have P = 1, but their dO and Q are zeros",
                "probability_base(p.lse[at]) : INFINITY",
                "probability_base(p.lse[at]) : 0.f",
            ),
        ),
        "short: softmax": (
            (
                "tiles past the keys are skipped, so masking only the last one changes nothing",
                "if (j * 16 >= keys) continue; if (bias",
                "if (bias",
            ),
        ),
    }
)

# The kernel for Hopper, tested apart.
HOPPER_SYNCHRONISATION = _mutants(
    {
        "hopper: consumer": (
            ("tile not waited for", "ptx::mbarrier_wait(memory.full(ring.slot), ring.round);", ""),
            ("queries not waited for", "ptx::mbarrier_wait(memory.queries(group), 0);", ""),
            (
                "K released too early",
                "ptx::wgmma_wait<1>(); pin_scores(); release(slot_k);",
                "release(slot_k); ptx::wgmma_wait<1>();",
            ),
            (
                "V released too early",
                "ptx::wgmma_wait<0>(); pin_values(); release(slot_v);",
                "release(slot_v); ptx::wgmma_wait<0>();",
            ),
            ("scores not waited for", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
            (
                "no barrier after clearing",
                "ptx::named_barrier(1, Shape::kGroups * kWarpgroup);",
                "",
            ),
            ("no barrier before outputs", "ptx::named_barrier(2 + group, kWarpgroup);", ""),
        ),
        "hopper: producer": (
            (
                "slot taken while in use",
                "ptx::mbarrier_wait(memory.empty(ring.slot), ring.round ^ 1);",
                "",
            ),
        ),
        "hopper: cleared values": (("no proxy fence", "ptx::proxy_fence();", ""),),
        "hopper: start": (("no barrier after mbarriers", "__syncthreads();", ""),),
    }
)

HOPPER_VALUES = _mutants(
    {
        "hopper: producer": (
            ("first round waits", "ring.round ^ 1", "ring.round"),
            ("bytes announced", "rows * Shape::kColumns * 2", "rows * Shape::kColumns"),
            ("box column", "box * Shape::kBoxColumns", "box * 8"),
            (
                "group's queries",
                "place.part * Shape::kRows + group * Shape::kGroupRows",
                "place.part * Shape::kRows",
            ),
            ("heads mixed", "strides.head == 0 ? 0 : place.head", "strides.head == 0 ? 0 : 0"),
            ("batch mixed", "strides.batch == 0 ? 0 : place.batch", "place.batch * 0"),
            ("K of the same tile", "p.k_strides, tile + 1);", "p.k_strides, tile);"),
        ),
        "hopper: consumer": (
            (
                "values not waited for",
                "softmax(tile + 1); ptx::wgmma_wait<0>(); pin_values();",
                "softmax(tile + 1); ptx::wgmma_wait<1>();",
            ),
            ("warps release twice", "if (lane == 0)", "if (lane < 2)"),
            ("last tile not masked", "(tile + 1) * Shape::kKeys > keys", "false"),
            ("mask of the wrong tile", "softmax(tile + 1);", "softmax(tile);"),
            ("output not rescaled", "outputs[i] *= shrink[i >> 1 & 1];", ";"),
            ("rescaled by the other row", "shrink[i >> 1 & 1]", "shrink[i & 1]"),
            (
                "values past the length kept",
                "keys < p.keys && tiles * Shape::kKeys > keys",
                "false",
            ),
            (
                "a value too many cleared",
                "keys - (tiles - 1) * Shape::kKeys",
                "keys - (tiles - 1) * Shape::kKeys - 1",
            ),
            ("sum of a lane", "rows.sum[0][r] = row_sum(rows.sum[0][r]);", ";"),
            ("warps' outputs", "+ warp * 16;", ";"),
            ("lse past the end", "if (at < p.queries)", ""),
        ),
        "hopper: start": (
            ("barriers not shown", "ptx::mbarrier_init_fence();", ""),
            ("one warp releases for all", "Shape::kGroups * 4", "Shape::kGroups"),
        ),
        "hopper: descriptor": (
            ("swizzle mode", "? 2 : 3", "? 3 : 2"),
            ("stride of rows", "8 * kSwizzle", "16 * kSwizzle"),
        ),
        "hopper: values": (
            (
                "span of values",
                "Shape::kKeys * Shape::kSwizzle",
                "Shape::kKeys * Shape::kSwizzle / 2",
            ),
            ("step of values", "v + step * 16 * Shape::kSwizzle", "v + step * 8 * Shape::kSwizzle"),
        ),
        "hopper: scores": (
            ("box of queries", "q + box * Shape::kGroupRows", "q + box * Shape::kKeys"),
            ("box of keys", "k + box * Shape::kKeys", "k + box * Shape::kGroupRows"),
            ("scores kept", "step > 0", "true"),
        ),
        "hopper: softmax": (("sum not rescaled", "sum[0][r] *= shrink[r];", ""),),
        "hopper: cleared values": (
            ("clearing leaves a box out", "i < Shape::kBoxes * words", "i < words"),
        ),
    }
)

EXPONENTIAL = _mutants(
    {
        "exponential": (
            ("not a number lost", "ptx::max_or_nan(", "fmaxf("),
            ("hidden keys count", "-127.f", "-126.f"),
            ("a coefficient", "0.240247443318367f", "0.250247443318367f"),
        ),
    }
)
