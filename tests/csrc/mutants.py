"""Planted defects: textual changes of the kernels that the emulated tests must notice.

Each is (name, file under csrc/attention, text, replacement); the first occurrence is replaced.
"""

from __future__ import annotations

SHORT, TILED, TILE, SOFTMAX, BACKWARD = (
    "attention_short.cuh",
    "attention_tiled.cuh",
    "tile.cuh",
    "softmax.cuh",
    "attention_backward.cuh",
)
KEYS_KERNEL, QUERIES_KERNEL = "attention_backward_keys", "attention_backward_queries"

# Synchronisation: often invisible in the values, so each runs in the default run.
SYNCHRONISATION = (
    ("short: K not waited for", SHORT, "cp_async_wait<2>()", "cp_async_wait<3>()"),
    ("short: V not waited for", SHORT, "cp_async_wait<1>();  // V", "cp_async_wait<2>();"),
    (
        "short: next Q not waited for",
        SHORT,
        "cp_async_wait<1>();\n      __syncwarp();",
        "cp_async_wait<2>();\n      __syncwarp();",
    ),
    (
        "short: no barrier after K",
        SHORT,
        "on their way\n      __syncthreads();",
        "\n",
    ),
    ("short: no barrier after V", SHORT, "// V\n      __syncthreads();", "\n"),
    (
        "short: no syncwarp after next Q",
        SHORT,
        "cp_async_wait<1>();\n      __syncwarp();",
        "cp_async_wait<1>();",
    ),
    (
        "short: K shares V's group",
        SHORT,
        "keys, threadIdx.x, kThreads);\n  ptx::cp_async_commit();",
        "keys, threadIdx.x, kThreads);",
    ),
    ("short: one buffer for Q", SHORT, "(i & 1) * kRows", "(i & 0) * kRows"),
    ("tiled: Q not waited for", TILED, "cp_async_wait<1>()", "cp_async_wait<2>()"),
    ("tiled: no syncwarp after Q", TILED, "  __syncwarp();\n", ""),
    ("tiled: stage not waited for", TILED, "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("tiled: no barrier", TILED, "    __syncthreads();", "    "),
    ("tiled: one stage", TILED, "(i & 1) * Shape::kStage", "(i & 0) * Shape::kStage"),
    ("store: no syncwarp before", TILE, "  __syncwarp();  // other lanes", "  //"),
    ("store: no syncwarp after", TILE, "  }\n  __syncwarp();\n", "  }\n"),
    ("backward, keys: not waited for", BACKWARD, "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("backward, keys: no barrier", BACKWARD, "    __syncthreads();", "    "),
    (
        "backward, keys: statistics in one stage",
        BACKWARD,
        "(i & 1) * 2 * Shape::kStatistics",
        "(i & 0) * 2 * Shape::kStatistics",
    ),
    (
        "backward, queries: not waited for",
        f"{BACKWARD}:{QUERIES_KERNEL}",
        "cp_async_wait<0>()",
        "cp_async_wait<1>()",
    ),
    (
        "backward, queries: no barrier",
        f"{BACKWARD}:{QUERIES_KERNEL}",
        "    __syncthreads();",
        "    ",
    ),
    ("warps diverge", SHORT, "    // P = 2^", "    if (lane == 3) __syncwarp();\n    // P = 2^"),
    ("bank conflicts", TILE, "(kChunks | 1) * 16", "(kChunks + 3) / 4 * 64"),
)

VALUES = (
    ("short: last tile not masked", SHORT, "(j + 1) * 16 > keys)", "(j + 1) * 16 > keys + 15)"),
    ("short: a tile of V left out", SHORT, "if (j * 16 < keys) accum", "if (j < 4) accum"),
    ("short: a tile of K left out", SHORT, "if (j * 16 < keys) mult", "if (j < 4) mult"),
    ("short: V over K", SHORT, "shared_k + padded * R", "shared_k + (padded - 8) * R"),
    ("short: warps share rows of Q", SHORT, "(padded + warp * 16)", "(padded + warp * 8)"),
    (
        "short: lengths ignored",
        SHORT,
        "key_count(params.key_lengths, place.batch, params.keys)",
        "params.keys",
    ),
    ("short: lse past the end", SHORT, "if (row < params.queries) params.lse", "params.lse"),
    (
        "short: exit with copies",
        SHORT,
        "if (tile + params.blocks_per_head < tiles) load_q",
        "load_q",
    ),
    ("short: sum over lanes missing", SHORT, "sum[0][r] = row_sum(sum[0][r]);", ";"),
    ("tiled: last tile not masked", TILED, "(tile + 1) * kKeys > keys", "false"),
    ("tiled: sum not rescaled", TILED, "sum[m][r] *= shrink;", ""),
    ("tiled: output not rescaled", TILED, "o.x[m][d][2 * r] *= shrink;", ""),
    ("tiled: rescaled by itself", TILED, "fmaf(before[m][r]", "fmaf(maximum[m][r]"),
    ("tiled: V from K", TILED, "stage(tile) + (kKeys + j * 16)", "stage(tile) + (j * 16)"),
    ("tiled: mask of the wrong tile", TILED, "tile * kKeys + j * 16, keys", "tile + j, keys"),
    ("load: rows past the end", TILE, "valid = first + row < limit", "valid = true"),
    ("load: chunk", TILE, "* stride + chunk * 8", "* stride + chunk * 4"),
    (
        "left operand: blocks swapped",
        TILE,
        "(block & 1) * 8 + (lane_id()",
        "(block >> 1) * 8 + (lane_id()",
    ),
    (
        "left operand: tail",
        TILE,
        "lane_id() & 15)) * R::kStride + (R::kChunks - 1)",
        "lane_id() & 15)) * R::kStride + (R::kChunks - 2)",
    ),
    (
        "right operand: blocks swapped",
        TILE,
        "mma_m16n8k16<T>(s[j].x[m][0], a[m], b[0], b[1])",
        "mma_m16n8k16<T>(s[j].x[m][0], a[m], b[0], b[2])",
    ),
    (
        "right operand: tail",
        TILE,
        "a[m], b[1]);\n      }\n    }\n  }\n}",
        "a[m], b[0]);\n      }\n    }\n  }\n}",
    ),
    ("right operand: head dim step", TILE, "step * 32", "step * 16"),
    ("values: not transposed", TILE, "ldmatrix_x4_transposed", "ldmatrix_x4"),
    ("values: tail not transposed", TILE, "ldmatrix_x2_transposed", "ldmatrix_x2"),
    (
        "values: pair",
        TILE,
        "acc.x[m][2 * d + 1], p.x[m], b[2], b[3]",
        "acc.x[m][2 * d + 1], p.x[m], b[3], b[2]",
    ),
    ("probabilities: order", TILE, "[i >> 1][(i & 1) * 2]", "[i & 1][(i >> 1) * 2]"),
    (
        "max over half a row",
        TILE,
        "return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));",
        "return x;",
    ),
    (
        "sum over other rows",
        TILE,
        "return x + __shfl_xor_sync(0xffffffffu, x, 2)",
        "return x + __shfl_xor_sync(0xffffffffu, x, 4)",
    ),
    ("store: factor of the other row", TILE, "x[d][2] * factor[1]", "x[d][2] * factor[0]"),
    ("store: rows past the end", TILE, "if (first + row >= limit) break;", ""),
    ("store: row", TILE, "mine + 8 * R::kStride", "mine + 4 * R::kStride"),
    (
        "head and batch mixed",
        TILE,
        "head(blockIdx.x / parts % heads)",
        "head(blockIdx.x / parts / heads)",
    ),
    ("mask: one key too many", SOFTMAX, "allowed = key < keys", "allowed = key <= keys"),
    ("mask: column", SOFTMAX, "(lane_id() & 3) * 2 + e", "(lane_id() & 3) * 2"),
    ("bias not divided by the scale", SOFTMAX, "bias[key] * inverse_scale", "bias[key]"),
    ("no keys: maximum", SOFTMAX, "maximum == -INFINITY ? 0.f :", ""),
    ("no keys: division", SOFTMAX, "sum == 0.f ? 0.f :", ""),
    ("maximum ignored", SOFTMAX, "log2_scale, -base[m][e >> 1])", "log2_scale, 0.f)"),
    ("lse without its base", SOFTMAX, "(base + log2f(sum))", "log2f(sum)"),
    ("backward: lse in the wrong base", BACKWARD, ": lse * kLog2E", ": lse"),
    ("backward: bias ignored for keys", BACKWARD, "[key] * kLog2E", "[key] * 0.f"),
    ("backward: delta of the other query", BACKWARD, "e & 1 ? delta.y : delta.x", "delta.x"),
    ("backward: base of the other query", BACKWARD, "e & 1 ? base.y : base.x", "base.x"),
    (
        "backward: dK from dO",
        BACKWARD,
        "accumulate<T>(dk, round_to<T>(ds[j]), rows_q",
        "accumulate<T>(dk, round_to<T>(ds[j]), rows_dout",
    ),
    (
        "backward: dV from dS",
        BACKWARD,
        "accumulate<T>(dv, round_to<T>(s[j])",
        "accumulate<T>(dv, round_to<T>(ds[j])",
    ),
    (
        "backward: step of queries",
        BACKWARD,
        "rows_q = stage(tile) + step * kRow",
        "rows_q = stage(tile)",
    ),
    ("backward: statistics of the step", BACKWARD, "(step + j * 16 + n * 8", "(j * 16 + n * 8"),
    ("backward: scale of dK", BACKWARD, "dk.x[0][d][e] * p.scale", "dk.x[0][d][e]"),
    ("backward: keys past the length", BACKWARD, "if (!inside[e >> 1]) dv.x[0][d][e] = 0.f;", ""),
    (
        "backward: dK past the length",
        BACKWARD,
        "inside[e >> 1] ? dk.x[0][d][e] * p.scale : 0.f",
        "dk.x[0][d][e] * p.scale",
    ),
    ("backward: a split left out", BACKWARD, "begin = split * share", "begin = split * share + 1"),
    ("backward: splits overlap", BACKWARD, "place.part / key_tiles", "place.part / key_tiles / 2"),
    ("backward: dbias of a lane", BACKWARD, "sum = row_sum(dbias[r])", "sum = dbias[r]"),
    ("backward: scale of dQ", BACKWARD, "factor[2] = {p.scale, p.scale}", "factor[2] = {1.f, 1.f}"),
    ("backward: delta not summed", BACKWARD, "delta[r] = row_sum(delta[r]);", ""),
    ("backward: delta not written", BACKWARD, "row < p.queries) p.delta", "row < 0) p.delta"),
    ("backward: exact delta ignored", BACKWARD, "p.exact_delta && round == tiles", "false"),
    ("backward: mask for dQ", BACKWARD, "key + 16 > keys)", "false)"),
    ("backward: rowsum over half", BACKWARD, "sum += __shfl_xor_sync(0xffffffffu, sum, 4);", ""),
    ("backward: rowsum of one half", BACKWARD, "ptx::to_float<T>(y[i] >> 16)", "0.f"),
)

# Changes that alter no value on purpose, and why; each is checked to stay unnoticed, so that a
# reason that no longer holds comes to light.
HARMLESS = (
    (
        "queries past the end have P = 1, but their dO and Q are zeros",
        BACKWARD,
        "probability_base(p.lse[at]) : INFINITY",
        "probability_base(p.lse[at]) : 0.f",
    ),
    (
        "tiles past the keys are skipped, so masking only the last one changes nothing",
        SHORT,
        "if (j * 16 >= keys) continue;",
        "",
    ),
)
