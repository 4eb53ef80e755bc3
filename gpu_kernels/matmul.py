"""Products of quantised weights and rows of activations on the GPU: cuda/matvec.cu for a few, cuda/gemm.cu for many.

    out[t, b, r] (+)= weight[b, r] · x[t, b]          b: head (1 for a plain matrix), r: row, t: token

Weights are quants.Weight, which upload() makes. Up to MAX_DOT_TOKENS tokens, a row has the bits of a row alone: int8
products, as on the CPU, for four tokens at a time. More tokens are multiplied in bf16 on tensor cores, except by F32
weights and on Turing, which has no bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._compile import Kernel, kernel
from .check import array, rows_f32, steps
from .device import Limits
from .quants import FORMATS, Weight, format_of
from .stream import wide

THREADS, THREADS_QUANTISE = 128, 256
TOKENS = (1, 4)  # at a time
MAX_DOT_TOKENS = 16
TILE, GEMM_SHARED = 64, 64 << 10  # of gemm.cu: tokens and rows a block, bytes
QUANTISE = kernel("quantise.cu", "quantise")


def matvec(type_id: int, n_tok: int) -> Kernel:
    """The kernel for a type and a number of tokens."""
    return kernel("matvec.cu", "matvec", {"TYPE_ID": type_id, "TOKENS": TOKENS[n_tok > 1]})


def gemm(type_id: int) -> Kernel:
    """The kernel for many tokens."""
    return kernel("gemm.cu", "gemm", {"TYPE_ID": type_id})


def takes_gemm(limits: Limits, type_id: int, n_tok: int) -> bool:
    return n_tok > MAX_DOT_TOKENS and limits.has_bf16 and format_of(type_id).name != "F32"


def geometry(type_id: int, n_rows: int, k: int, n_head: int) -> tuple[tuple[int, int], int]:
    """(grid, threads a row): a power of two, as many as a row has steps, up to a warp."""
    n_steps = k // FORMATS[type_id].step
    lanes = 1
    while lanes < 32 and lanes < n_steps:
        lanes *= 2
    return (-(-n_rows // (THREADS // lanes)), n_head), lanes


def matmul(
    run: Any,
    weight: Any | Sequence[Any],
    x: np.ndarray,
    out: np.ndarray | Sequence[np.ndarray],
    accumulate: bool = False,
) -> None:
    """out (n_tok, m) = x (n_tok, k) @ weight (m, k).T, all f32 but the weight; added to out if accumulate.

    weight and out may be lists: several matrices of the same x.
    """
    weights = list(weight) if isinstance(weight, list | tuple) else [weight]
    outs = list(out) if isinstance(out, list | tuple) else [out]
    rows_f32("x", x, 2)
    for w, o in zip(weights, outs):
        rows_f32("out", o, 2, (x.shape[0], w.shape[0]))
    x, outs = x[:, None, :], [o[:, None, :] for o in outs]
    queue(run, weights, x, outs, accumulate, run.workspace(scratch_bytes(run, weights, x.shape)))


def matmul_heads(run: Any, weight: Any, x: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, n_head, m) = weight (n_head, m, k) times x (n_tok, n_head, k), head by head."""
    n_head, m, k = weight.shape
    rows_f32("x", x, 3, (x.shape[0], n_head, k))
    rows_f32("out", out, 3, (x.shape[0], n_head, m))
    queue(run, [weight], x, [out], False, run.workspace(scratch_bytes(run, [weight], x.shape)))


def scratch_bytes(run: Any, weights: Sequence[Weight], shape: tuple[int, ...]) -> int:
    """What queue needs for x of this shape (n_tok, n_head, k)."""
    n_tok, n_head, k = shape
    few = [w for w in weights if not takes_gemm(run.limits, w.type.id, n_tok)]
    return quantised_bytes(few, n_tok * n_head, k)


def queue(run: Any, weights: Sequence[Weight], x: Any, outs: Sequence[Any], accumulate: bool, scratch: Any) -> None:
    """Products with arguments checked: x (n_tok, n_head, k), outs (n_tok, n_head, m), scratch (scratch_bytes,) u8."""
    quantise(run, x, scratch)
    for w, out in zip(weights, outs):
        if takes_gemm(run.limits, w.type.id, len(x)):
            _launch_gemm(run, w, x, out, accumulate)
        else:
            launch(run, w, x, scratch, out, accumulate)


def _launch_gemm(run: Any, w: Weight, x: Any, out: Any, accumulate: bool) -> None:
    (n_tok, n_head, m), k = out.shape, x.shape[2]
    f = format_of(w.type.id)
    if w.shape[-2:] != (m, k) or k % f.block:
        raise ValueError(f"a weight of {w.shape} values for rows of {k}")
    run.launch(
        gemm(f.type_id), (n_head * -(-m // TILE), -(-n_tok // TILE)), THREADS, GEMM_SHARED,
        (w.data, *map(wide, w.planes), x, *steps("x", x, 4), out, *steps("out", out), m, k, n_tok, int(accumulate)),
    )  # fmt: skip


def quantised_bytes(weights: Sequence[Weight], n_rows: int, k: int) -> int:
    """Bytes that activations of so many rows take in int8; 0 where no weight wants them so."""
    if all(format_of(w.type.id).is_float for w in weights):
        return 0
    return -(-n_rows * k // 256) * 256 + -(-n_rows * k // 1024) * 256


def quantise(run: Any, x: Any, acts: Any) -> None:
    """Queue: x (n_tok, n_head, k) in int8 to acts, of quantised_bytes; nothing if these are 0."""
    n_tok, n_head, k = x.shape
    if not acts.size:
        return
    if k % 32:
        raise ValueError(f"rows of {k} values; expected a multiple of 32")
    scales = acts[-(-n_tok * n_head * k // 256) * 256 :]
    run.launch(
        QUANTISE, (-(-k // 256), n_tok * n_head), THREADS_QUANTISE, 0, (x, *steps("x", x), n_head, k, acts, scales)
    )


def launch(
    run: Any, w: Weight, x: Any, acts: Any, out: Any, accumulate: bool = False, ids: Any = None, slots_per_x: int = 1
) -> None:
    """Queue one product: out (n_tok, n_head, m) from x (n_tok, n_x, k), or its int8 in acts, as the type wants.

    Without ids n_x is n_head, and the weight of head h is w[h] (n_head 1: w). With ids (int32, one a head), it is
    w[ids[h]], and x is row h // slots_per_x.
    """
    (n_tok, n_head, m), (_, n_x, k) = out.shape, x.shape
    f = format_of(w.type.id)
    if w.shape[-2:] != (m, k) or k % f.block:
        raise ValueError(f"a weight of {w.shape} values for rows of {k}")
    grid, lanes = geometry(f.type_id, m, k, n_head)
    if f.is_float:
        of_x = (x, *(wide(4 * s) for s in steps("x", x, 4)), None)
    else:
        of_x = (acts, wide(n_x * k), wide(k), acts[-(-n_tok * n_x * k // 256) * 256 :])
    run.launch(
        matvec(f.type_id, n_tok), grid, THREADS, 0,
        (w.data, *map(wide, w.planes), *of_x, out, *steps("out", out), m, k, n_tok, n_head, lanes, int(accumulate),
         ids, slots_per_x),
    )  # fmt: skip


def embed_rows(run: Any, weight: Any, tokens: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, k) f32 = weight (m, k) at rows tokens (n_tok,) int32, which the caller has checked to be below m."""
    (n_tok,) = array("tokens", tokens, np.int32, 1)
    k = weight.shape[-1]
    rows_f32("out", out, 2, (n_tok, k))
    code = kernel("embed.cu", "embed_rows", {"TYPE_ID": format_of(weight.type.id).type_id})
    run.launch(code, (n_tok,), THREADS, 0, (weight.data, *map(wide, weight.planes), tokens, out, *steps("out", out), k))
