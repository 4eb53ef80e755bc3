"""Products of quantised weights and rows of activations on the GPU: cuda/matvec.cu for a few, cuda/gemm.cu for many.

    out[t, b, r] (+)= weight[b, r] · x[t, b]          b: head (1 for a plain matrix), r: row, t: token

Weights are quants.Weight, which upload() makes. Up to MAX_DOT_TOKENS tokens, a row has the bits of a row alone: int8
products, as on the CPU, for four tokens at a time. More tokens are multiplied on tensor cores, in bf16 (Turing: f16);
by F32 weights in f32, as few tokens are.

A block of gemm.cu makes 128 x 128 (tokens x rows), 64 x 64 or 32 x 32 values: the largest that fills the card, with k
cut into splits if even the smaller would leave most of it idle. H100, 8,192 rows of 4,096, µs, before (64 x 64 values,
loaded, decoded and multiplied one after another) and now:

                 BF16          Q4_K          Q6_K          Q8_0          Q5_0
    512 tokens   540 -> 105    505 -> 138    545 -> 163    574 -> 153    555 -> 157
    64           168 ->  38    115 ->  36            46
    17            92 ->  33     79 ->  31            45

What did not help: 128 x 256, whose eight warps wait for one another (BF16 108, Q4_K 157); 256 x 128, which spills; a
fourth stage of x (BF16 134, for a multiprocessor then holds one block; Q4_K 137); splits where blocks fill the card
(2,048 x 2,048, 512 tokens, Q4_K 31 -> 40). Copies and decoding between products, not before them: BF16 122 -> 105,
Q4_K 157 -> 138.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
RESERVED = 1024  # shared memory of a block that the driver takes
PADDING = 128  # rows of 16-bit activations are filled up to a multiple
QUANTISE, NARROW = kernel("quantise.cu", "quantise"), kernel("quantise.cu", "narrow")
ADD_SPLITS = kernel("splits.cu", "add_splits")
MAX_SPLITS, MIN_STAGES = 8, 4  # of k; of a split


def matvec(type_id: int, n_tok: int) -> Kernel:
    """The kernel for a type and a number of tokens."""
    return kernel("matvec.cu", "matvec", {"TYPE_ID": type_id, "TOKENS": TOKENS[n_tok > 1]})


@dataclass(frozen=True)
class Variant:
    """A shape of gemm.cu: tokens and rows of a block, its warps along both, values of k a stage, stages of x."""

    tokens: int
    rows: int
    warps: tuple[int, int]
    depth: int
    stages: int
    # only where two blocks fit a multiprocessor; a third stage of weights, not of x, is what helps
    for_floats: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    def kernel(self, limits: Limits, type_id: int) -> Kernel:
        return kernel("gemm.cu", "gemm", {
            "TYPE_ID": type_id, "F16_PRODUCTS": int(not limits.has_bf16), "TOKENS": self.tokens, "ROWS": self.rows,
            "WARPS_T": self.warps[0], "WARPS_R": self.warps[1], "DEPTH": self.depth, "STAGES": self.stages,
        })  # fmt: skip

    def shared_bytes(self, type_id: int) -> int:
        """Dynamic shared memory of a block. Weights that are floats have as many stages as x."""
        w_stages = self.stages if format_of(type_id).is_float else 2
        return 2 * self.depth * (self.stages * self.tokens + w_stages * self.rows) + 4 * self.tokens

    def per_sm(self, limits: Limits, type_id: int) -> int:
        """Blocks that a multiprocessor holds; as registers allow, at most 256 threads."""
        return min(256 // self.threads, limits.shared_per_sm // (self.shared_bytes(type_id) + RESERVED))

    def fits(self, limits: Limits, type_id: int) -> bool:
        if self.for_floats and not (format_of(type_id).is_float and self.per_sm(limits, type_id) > 1):
            return False
        return self.shared_bytes(type_id) <= limits.shared_per_block

    def most_splits(self, k: int) -> int:
        """Into how many parts k may be cut; a block of 128 x 128 cannot, see gemm.cu."""
        return max(1, min(MAX_SPLITS, -(-k // self.depth) // MIN_STAGES)) if self.tokens < 128 else 1

    def blocks(self, n_tok: int, n_rows: int, n_head: int) -> int:
        return -(-n_tok // self.tokens) * -(-n_rows // self.rows) * n_head


VARIANTS = (
    Variant(128, 128, (2, 2), 64, 3),
    Variant(64, 64, (2, 2), 128, 3, for_floats=True),
    Variant(64, 64, (2, 2), 128, 2),
    Variant(64, 128, (2, 2), 64, 2),  # Turing's
    Variant(32, 32, (2, 1), 128, 3),
)


def takes_gemm(limits: Limits, type_id: int, n_tok: int) -> bool:
    return n_tok > MAX_DOT_TOKENS and format_of(type_id).name != "F32"


def choose(limits: Limits, type_id: int, n_tok: int, n_rows: int, n_head: int, k: int) -> tuple[Variant, int]:
    """A variant, and into how many splits k is cut: the first that fills the card, and its own tokens to a half."""
    for v in VARIANTS:
        blocks, most = v.blocks(n_tok, n_rows, n_head), v.most_splits(k)
        fills = blocks * most >= 0.9 * limits.n_sm and v.tokens < 2 * n_tok
        if v.fits(limits, type_id) and (fills or v is VARIANTS[-1]):
            return v, max(1, min(most, limits.n_sm * v.per_sm(limits, type_id) // blocks))
    raise AssertionError("the last variant fits every card")


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
    few, many = _by_way(run, weights, n_tok)
    parts = [_split(run, w, (n_tok, n_head, w.shape[-2]), k)[2] for w in many]
    return quantised_bytes(few, n_tok * n_head, k) + narrow_bytes(many, n_tok * n_head, k) + max(parts, default=0)


def queue(run: Any, weights: Sequence[Weight], x: Any, outs: Sequence[Any], accumulate: bool, scratch: Any) -> None:
    """Products with arguments checked: x (n_tok, n_head, k), outs (n_tok, n_head, m), scratch (scratch_bytes,) u8."""
    n_tok, n_head, k = x.shape
    few, many = _by_way(run, weights, n_tok)
    ends = np.cumsum([quantised_bytes(few, n_tok * n_head, k), narrow_bytes(many, n_tok * n_head, k)])
    acts, narrowed, parts = scratch[: ends[0]], scratch[ends[0] : ends[1]], scratch[ends[1] :]
    quantise(run, x, acts)
    narrow(run, x, narrowed)
    for w, out in zip(weights, outs):
        if not takes_gemm(run.limits, w.type.id, n_tok):
            launch(run, w, x, acts, out, accumulate)
            continue
        variant, n_splits, nbytes = _split(run, w, out.shape, k)
        if n_splits == 1:
            launch_gemm(run, w, narrowed, k, out, variant, accumulate)
            continue
        m = out.shape[2]
        part = parts[:nbytes].view(np.float32).reshape(n_splits * n_tok, n_head, m)
        launch_gemm(run, w, narrowed, k, part[:n_tok], variant, n_splits=n_splits)
        run.launch(
            ADD_SPLITS, (-(-m // 256), n_tok * n_head), 256, 0,
            (part, n_splits, out, *steps("out", out), n_head, m, int(accumulate)),
        )  # fmt: skip


def _split(run: Any, w: Weight, shape: tuple[int, int, int], k: int) -> tuple[Variant, int, int]:
    """For out (n_tok, n_head, m): a variant, its splits, and the bytes of their outs (0 for one)."""
    n_tok, n_head, m = shape
    variant, n_splits = choose(run.limits, w.type.id, n_tok, m, n_head, k)
    return variant, n_splits, 4 * n_splits * n_tok * n_head * m if n_splits > 1 else 0


def _by_way(run: Any, weights: Sequence[Weight], n_tok: int) -> tuple[list[Weight], list[Weight]]:
    ways: tuple[list[Weight], list[Weight]] = ([], [])
    for w in weights:
        ways[takes_gemm(run.limits, w.type.id, n_tok)].append(w)
    return ways


def launch_gemm(
    run: Any, w: Weight, x: Any, k: int, out: Any, variant: Variant, accumulate: bool = False, n_splits: int = 1,
    tiles: Any = None, gather: Any = None, per: int = 1,
) -> None:  # fmt: skip
    """Queue one product: out (n_tok, n_head, m) from rows of k values that narrow left at x.

    Splits have an out each, one after another. With tiles (n, 4) int32, as gemm.cu says, n_head is 1, and the matrices
    are those of w.
    """
    n_tok, n_head, m = out.shape
    f = format_of(w.type.id)
    if w.shape[-2:] != (m, k) or k % f.block:
        raise ValueError(f"a weight of {w.shape} values for rows of {k}")
    n_tiles = -(-n_tok // variant.tokens) if tiles is None else len(tiles)
    pitch = 2 * padded(k)
    run.launch(
        variant.kernel(run.limits, f.type_id), (n_tiles * -(-m // variant.rows) * n_head, n_splits), variant.threads,
        variant.shared_bytes(f.type_id),
        (w.data, *map(wide, w.planes), x, n_head * pitch, wide(pitch), out, *steps("out", out), wide(out.size), m, k,
         n_tok, n_tiles, int(accumulate), tiles, gather, per),
    )  # fmt: skip


def padded(k: int) -> int:
    return -(-k // PADDING) * PADDING


def narrow_bytes(weights: Sequence[Weight], n_rows: int, k: int) -> int:
    """Bytes that activations of so many rows take in 16 bits; 0 without weights."""
    return 2 * n_rows * padded(k) if weights else 0


def narrow(run: Any, x: Any, out: Any) -> None:
    """Queue: x (n_tok, n_head, k) in 16 bits to out, of narrow_bytes; nothing if these are 0."""
    n_tok, n_head, k = x.shape
    if not out.size:
        return
    grid = (n_tok * n_head, -(-padded(k) // (8 * THREADS_QUANTISE)))
    is_f16 = int(not run.limits.has_bf16)
    run.launch(NARROW, grid, THREADS_QUANTISE, 0, (x, *steps("x", x, 4), n_head, k, out, padded(k), is_f16))


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
    (row_blocks, _), lanes = geometry(f.type_id, m, k, n_head)
    grid = row_blocks, n_head * -(-n_tok // MAX_DOT_TOKENS)
    if f.is_float:
        of_x = (x, *(wide(4 * s) for s in steps("x", x, 4)), None)
    else:
        of_x = (acts, wide(n_x * k), wide(k), acts[-(-n_tok * n_x * k // 256) * 256 :])
    run.launch(
        matvec(f.type_id, n_tok), grid, THREADS, 0,
        (w.data, *map(wide, w.planes), *of_x, out, *steps("out", out), m, k, n_tok, n_head, lanes, int(accumulate),
         MAX_DOT_TOKENS, ids, slots_per_x),
    )  # fmt: skip


def embed_rows(run: Any, weight: Any, tokens: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, k) f32 = weight (m, k) at rows tokens (n_tok,) int32, which the caller has checked to be below m."""
    (n_tok,) = array("tokens", tokens, np.int32, 1)
    k = weight.shape[-1]
    rows_f32("out", out, 2, (n_tok, k))
    code = kernel("embed.cu", "embed_rows", {"TYPE_ID": format_of(weight.type.id).type_id})
    run.launch(code, (n_tok,), THREADS, 0, (weight.data, *map(wide, weight.planes), tokens, out, *steps("out", out), k))
