"""Attention of many tokens with K and V of every head expanded from the rows: widen.cu, expand.cu, mha.cu.

    W_UK, W_UV  ->  16 bits                                      once a call
    for each chunk of rows:
        K (n_head, rows, nope), V (n_head, rows, Dv)  =  latents · W        16 bits
        every block of queries attends to its share of the chunk            sums stay in f32 until the next
    out = the shares, added up

2 (nope + n_rot + Dv) operations a head, query and row, and 2 C (nope + Dv) a head and row: 640 and 262,144 for 512 +
64, absorbed 2,176. At one pace 171 queries would pay for it; its pace is better, and pays() says what was measured.

16 bits are f16 for rows in f16, else bf16. Rows of q8 are multiplied as the whole numbers that they are (expand.cu).

H100, 512 tokens after 7,680 rows of 512 + 64, f16, 16 heads: 255 µs, of which widen has 7, expand 118 (291 TFLOP/s) and
mha 125 (333 TFLOP/s); absorbed 1,268. What it took: 4 splits (64 blocks of queries leave three quarters of the card
idle), chunks of 8,192 rows rather than 4,096 (293 -> 255 µs with a faster combine). What did not help: blocks of 64
queries (149 -> 164 µs of mha) or of 8 warps (179), tiles of 32 rows (165), K fetched before the softmax (spills, 283
against 294 TFLOP/s after 15,872 rows), 256 columns a block of expand (118 -> 129).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ._compile import Kernel, kernel
from .attention import LOG2_E
from .check import steps
from .device import Limits
from .k_cache import TYPES_K
from .quants import FORMATS, Weight
from .stream import wide
from .workspace import pieces

TILE, EXPAND_SHARED = 128, 96 << 10  # of expand.cu: rows and columns of a block, bytes
CHUNK_BYTES, CHUNK_ROWS = 128 << 20, (2048, 16_384)  # of K and V; at least and at most so many rows
MAX_SPLITS, OF_A_SPLIT = 8, 0.02  # what one more costs, as a part of the time without any
MAX_KEPT = 2048  # tokens, times splits, whose sums are kept: so that fewer tokens do not take more memory


@dataclass(frozen=True)
class Variant:
    """A shape of mha.cu."""

    m_tiles: int  # of 16 queries, a warp
    warps: int
    tokens: int  # rows of a tile
    blocks: int  # a multiprocessor's, by registers

    @property
    def queries(self) -> int:
        return 16 * self.m_tiles * self.warps

    def shared_bytes(self, d: int, n_v: int) -> int:
        k, v = (-(-n // 64) * 128 for n in (d, n_v))
        return self.queries * k + self.tokens * (k + v)


VARIANTS = (Variant(2, 4, 64, 2), Variant(1, 4, 64, 2), Variant(1, 4, 32, 2))  # the first that fits is taken


def pays(n_tok: int, n_past: int, warpgroups: bool) -> bool:
    """Whether it is faster than the absorbed form, by the clock of an H100; warpgroups: whether that one is by wgmma.

    If not: from 65 tokens on, which the absorbed form would take in two rounds, and for fewer where rows are few: 17
    tokens break even at 1,050 rows, 32 at 1,700, 64 at 5,260.

    If so: 16 heads of 128, q8: 32 tokens break even at 800 rows, 64 at 2,100, 128 at 8,000, 192 at 18,000, 256 at
    40,000; f16 and 128 heads are near that, and 512 tokens break even nowhere. Of 270 cases of 17 to 1,024 tokens after
    0 to 131,072, the form that this takes needs 0.4 % more than the faster one on average, and at most 23 %.
    """
    n_kv = n_past + n_tok
    if warpgroups:
        return n_tok >= 384 or 2 * n_kv <= n_tok**2
    return n_tok > 64 or n_kv <= 64 * n_tok


def choose(limits: Limits, nope: int, n_rot: int, n_v: int, n_tok: int, n_past: int) -> Variant | None:
    """None where the absorbed form is all there is: on Turing, which has no bf16, and for odd widths.

    Blocks of 64 queries where 128 would see little in common (2,048 tokens of their own: 92 against 110 µs).
    """
    if not limits.has_bf16 or nope % 32 or n_rot % 16 or n_v % 32:
        return None
    short = n_tok <= 64 or n_past <= n_tok
    for v in VARIANTS:
        fits = v.m_tiles * n_v <= 256 and v.shared_bytes(nope + n_rot, n_v) <= limits.shared_per_block
        if fits and not (short and v.queries > 64):
            return v
    return None


def geometry(limits: Limits, v: Variant, shared: int, n_tok: int, n_head: int, n_kv: int) -> tuple[int, int]:
    """The grid of mha: (blocks of queries, all heads'; splits of a chunk, so many that the card is well filled)."""
    at_once = limits.n_sm * max(1, min(v.blocks, limits.shared_per_sm // (shared + 1024)))
    blocks = n_head * -(-n_tok // v.queries)
    splits = range(1, min(MAX_SPLITS, -(-n_kv // v.tokens), max(1, MAX_KEPT // n_tok)) + 1)
    return blocks, min(splits, key=lambda s: -(-blocks * s // at_once) / s + OF_A_SPLIT * s)


def chunk_rows(n_kv: int, n_head: int, nope: int, n_v: int) -> int:
    """Rows that are expanded at once: a multiple of TILE."""
    least, most = CHUNK_ROWS
    rows = min(max(CHUNK_BYTES // (2 * n_head * (nope + n_v)), least), most, n_kv)
    return -(-rows // TILE) * TILE


@functools.cache
def widen_kernel(type_id: int, type_k: str) -> Kernel:
    return kernel("widen.cu", "widen_weights", {"TYPE_ID": type_id, "TYPE_K": TYPES_K.index(type_k)})


@functools.cache
def expand_kernels(type_k: str, kv_lora_rank: int, n_rot: int, nope: int, n_v: int) -> dict[str, Kernel]:
    defines = {
        "KV_LORA_RANK": kv_lora_rank, "N_ROT": n_rot, "TYPE_K": TYPES_K.index(type_k), "NOPE": nope, "N_V": n_v,
    }  # fmt: skip
    return {name: kernel("expand.cu", name, defines) for name in ("expand", "widen_rows", "rotate_weights")}


@functools.cache
def kernels(v: Variant, type_k: str, kv_lora_rank: int, n_rot: int, nope: int, n_v: int) -> tuple[Kernel, Kernel]:
    """mha and mha_combine."""
    defines = {
        "KV_LORA_RANK": kv_lora_rank, "N_ROT": n_rot, "TYPE_K": TYPES_K.index(type_k), "NOPE": nope, "N_V": n_v,
        "M_TILES": v.m_tiles, "WARPS": v.warps, "TOKENS": v.tokens, "BLOCKS": v.blocks,
        "SHARED_BYTES": v.shared_bytes(nope + n_rot, n_v),
    }  # fmt: skip
    return kernel("mha.cu", "mha", defines), kernel("mha.cu", "mha_combine", defines)


def queue(
    run: Any, v: Variant, q: Any, rows: Any, type_k: str, n_past: int, kv_lora_rank: int, n_rot: int, kq_scale: float,
    w_uk: Weight, w_uv: Weight, norm_weight: Any, out: Any,
) -> None:  # fmt: skip
    """As mla_prefill, with its arguments checked."""
    (n_tok, n_head, n_v), nope = out.shape, w_uk.shape[2]
    n_kv, n_columns, is_q8 = n_past + n_tok, n_head * (nope + n_v), type_k == "q8"
    chunk, shared = chunk_rows(n_kv, n_head, nope, n_v), v.shared_bytes(nope + n_rot, n_v)
    blocks, splits = geometry(run.limits, v, shared, n_tok, n_head, n_kv)
    n_parts = splits * n_tok * n_head
    weights, as_f32, latents, keys, values, part_out, part_ml = pieces(
        run, 2 * n_columns * kv_lora_rank, 4 * n_columns * kv_lora_rank * is_q8, 2 * chunk * kv_lora_rank * is_q8,
        2 * chunk * n_head * nope, 2 * chunk * n_head * n_v, 4 * n_parts * n_v, 8 * n_parts,
    )  # fmt: skip
    expanding = expand_kernels(type_k, kv_lora_rank, n_rot, nope, n_v)
    attend, combine = kernels(v, type_k, kv_lora_rank, n_rot, nope, n_v)

    widened = as_f32 if is_q8 else weights
    _widen(run, w_uk, type_k, widened, transposed=True)
    _widen(run, w_uv, type_k, widened[n_head * nope * kv_lora_rank * (4 if is_q8 else 2) :], transposed=False)
    if is_q8:
        blocks_of_h = n_columns * (kv_lora_rank // (kv_lora_rank & -kv_lora_rank))
        args = (as_f32, norm_weight, weights, n_columns)
        run.launch(expanding["rotate_weights"], (-(-blocks_of_h // 4),), 128, 0, args)
    for first in range(0, n_kv, chunk):
        some, n = rows[first:], min(chunk, n_kv - first)
        n_tiles = -(-n // TILE)
        latent, stride = some, rows.strides[0]
        if is_q8:
            latent, stride = latents, 2 * kv_lora_rank
            args = (some, wide(rows.strides[0]), n, latents)
            run.launch(expanding["widen_rows"], (n_tiles * (kv_lora_rank // 8),), 128, 0, args)
        run.launch(
            expanding["expand"], (-(-n_columns // TILE), n_tiles), 128, EXPAND_SHARED,
            (latent, wide(stride), some, wide(rows.strides[0]), n, weights, n_head, keys, values, chunk),
        )  # fmt: skip
        run.launch(
            attend, (blocks, splits), 32 * v.warps, shared,
            (q, *steps("q", q, 4), keys, values, some, wide(rows.strides[0]), chunk, first, n, n_past, n_tok, n_head,
             float(kq_scale * LOG2_E), part_out, part_ml),
        )  # fmt: skip
    args = (part_out, part_ml, splits, n_tok, n_head, out, *steps("out", out))
    run.launch(combine, (-(-n_tok * n_head * n_v // 512),), 128, 0, args)


def _widen(run: Any, w: Weight, type_k: str, out: Any, transposed: bool) -> None:
    (n_head, n_rows, k), f = w.shape, FORMATS[w.type.id]
    n = n_head * n_rows * (k // (32 if f.is_float else f.step))
    args = (w.data, *map(wide, w.planes), out, n_head, n_rows, k, int(transposed))
    run.launch(widen_kernel(f.type_id, type_k), (-(-n // 128),), 128, 0, args)
