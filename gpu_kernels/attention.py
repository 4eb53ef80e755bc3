"""mla_decode on the GPU: cuda/mla_decode.cu and cuda/mla_decode_wgmma.cu, and which of their variants a launch takes.

    lanes a block   tokens a tile   tiles in flight   shared memory at 512 + 64 (f16, q8)   cards
         64              64                2                   230,488   230,488            Hopper, by warpgroups
         64              32                2                   162,048   167,168            163 KB (f16), 227 KB
         32              64                2                   197,760   207,936            227 KB
         32              32                2                   117,888   123,008            163 KB
         16              64                2                   177,216   169,024            227 KB
         16              32                3                   135,232   106,048            163 KB
         16              32                2                    98,368    85,056            99 KB

A lane is a pair of token and head. More lanes a block means that a tile of K is fetched for more heads at once: with 16
a block, 128 heads read each tile eight times, seven of them from the L2 cache. Blocks of 16 keep their queries in
registers.

H100, one token, 163,840 rows, with the merge of splits, µs; the copy rate of 3.0 TB/s would allow 62.9 for f16 and 35.8
for q8:

    heads                    16      20      32      48      64     128      16 tokens of 128, 32,768 rows
    f16    mma.sync        75.9    80.5    84.7   124.4   129.2     223      705    207 TFLOP/s
           warpgroups      75.2    75.4    78.1    80.8    83.7    92.8      266    550
    q8     mma.sync        65.0    90.1    93.8   146.1   149.3     265      833    175
           warpgroups      79.4    77.6    78.7    81.2    84.7   126.5      340    429

With 4,096 rows and 16 heads mma.sync takes 10.4 µs and warpgroups 11.6. From 17 lanes on warpgroups are ahead, but for
2 % of q8 with 20 heads and 4,096 rows (12.3 against 12.1).

Of mma.sync: longer tiles: 32 heads f16 93 -> 83 µs, q8 118 -> 95; 16 heads q8 74 -> 68, and 16 heads f16 as with four
short ones. Two blocks of 16 lanes on a multiprocessor: f16 79.8 against 75.9 µs. What did not help q8, whose pace is
set by widening: a second f16 tile, widened to while values of this one are multiplied, 16 heads 68 -> 70, 128 heads
272 -> 258; loads of 16 bytes for fewer bank conflicts, but more address arithmetic, 68 -> 79.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._compile import Kernel, kernel
from .check import array, rows_f32, steps
from .device import Limits
from .k_cache import TYPES_K, check_rows, row_bytes
from .stream import wide

MAX_TOKENS = 16
MAX_SPLITS = 512
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Variant:
    """A shape of mla_decode.cu."""

    m_tiles: int  # of 16 lanes
    tokens: int  # of a tile
    stages: int  # tiles held
    q_in_registers: bool = False

    file = "mla_decode.cu"
    threads = 256

    @property
    def lanes(self) -> int:
        """Of a block."""
        return 16 * self.m_tiles

    @property
    def least_lanes(self) -> int:
        """From so many of a launch on: with fewer, half of a block would do."""
        return 1 if self.m_tiles == 1 else self.lanes // 2 + 1

    def fits(self, limits: Limits, type_k: str, kv_lora_rank: int, n_rot: int) -> bool:
        return self.shared_bytes(type_k, kv_lora_rank, n_rot) <= limits.shared_per_block

    def shared_bytes(self, type_k: str, kv_lora_rank: int, n_rot: int) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""
        lanes, halves = self.lanes, 2 if self.m_tiles == 1 else 1
        pitch = -(-(kv_lora_rank + n_rot) // 64) * 128
        rows = self.stages * self.tokens * pitch
        queries = lanes * pitch
        if type_k == "q8":
            rows = self.tokens * (pitch + self.stages * row_bytes(type_k, kv_lora_rank, n_rot))
            queries *= not self.q_in_registers
        return rows + queries + halves * lanes * (self.tokens + 8) * 4 + lanes * self.tokens * 2 + lanes * 4

    def defines(self, type_k: str, kv_lora_rank: int, n_rot: int) -> dict[str, int]:
        return {
            "KV_LORA_RANK": kv_lora_rank,
            "N_ROT": n_rot,
            "TYPE_K": TYPES_K.index(type_k),
            "M_TILES": self.m_tiles,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "Q_IN_REGISTERS": int(self.q_in_registers),
            "SHARED_BYTES": self.shared_bytes(type_k, kv_lora_rank, n_rot),
        }


@dataclass(frozen=True)
class WarpgroupVariant:
    """mla_decode_wgmma.cu, in its one shape."""

    lanes: int = 64  # of a block
    least_lanes: int = 17  # of a launch
    tokens: int = 64

    file = "mla_decode_wgmma.cu"
    threads = 384

    def fits(self, limits: Limits, type_k: str, kv_lora_rank: int, n_rot: int) -> bool:
        """Its instructions are those of compute capability 9.0 alone; each of two warpgroups sums up 256 columns."""
        return limits.sm == 90 and kv_lora_rank == 512 and n_rot <= 64

    def shared_bytes(self, type_k: str, kv_lora_rank: int, n_rot: int) -> int:
        piece = self.tokens * 128  # of 64 values; queries and two tiles have 9, P has one
        return 28 * piece + 4 * 64 * 4 + 11 * 8

    def defines(self, type_k: str, kv_lora_rank: int, n_rot: int) -> dict[str, int]:
        return {
            "KV_LORA_RANK": kv_lora_rank,
            "N_ROT": n_rot,
            "TYPE_K": TYPES_K.index(type_k),
            "TOKENS": self.tokens,
            "SHARED_BYTES": self.shared_bytes(type_k, kv_lora_rank, n_rot),
        }


VARIANTS = (
    WarpgroupVariant(),
    Variant(4, 32, 2),
    Variant(2, 64, 2),
    Variant(2, 32, 2),
    Variant(1, 64, 2, q_in_registers=True),
    Variant(1, 32, 3, q_in_registers=True),
    Variant(1, 32, 2, q_in_registers=True),
)  # the first that fits is taken


def choose(limits: Limits, type_k: str, kv_lora_rank: int, n_rot: int, n_lanes: int) -> Variant | WarpgroupVariant:
    """The variant for so many (token, head) pairs on a card. ValueError if none fits."""
    for variant in VARIANTS:
        if n_lanes >= variant.least_lanes and variant.fits(limits, type_k, kv_lora_rank, n_rot):
            return variant
    raise ValueError(
        f"K-cache rows of {kv_lora_rank} + {n_rot} values need more shared memory than the {limits.shared_per_block:,} "
        f"bytes of {limits.name}; use the CPU"
    )


def geometry(limits: Limits, variant: Variant | WarpgroupVariant, n_lanes: int, n_ctx: int) -> tuple[int, int]:
    """The grid of mla_split: (splits, blocks of lanes).

    Splits fill the card once, as far as n_ctx has tiles for them; they do not depend on n_kv, which a captured launch
    reads from memory.
    """
    blocks = -(-n_lanes // variant.lanes)
    return max(1, min(limits.n_sm // blocks, -(-n_ctx // variant.tokens), MAX_SPLITS)), blocks


def kernels(variant: Variant | WarpgroupVariant, type_k: str, kv_lora_rank: int, n_rot: int) -> tuple[Kernel, Kernel]:
    """mla_split and mla_combine."""
    defines = variant.defines(type_k, kv_lora_rank, n_rot)
    return kernel(variant.file, "mla_split", defines), kernel(variant.file, "mla_combine", defines)


def mla_decode(
    run: Any, q: np.ndarray, rows: np.ndarray, type_k: str, n_kv: np.ndarray, kv_lora_rank: int, n_rot: int,
    kq_scale: float, out: np.ndarray,
) -> None:  # fmt: skip
    """Attention of 1 to 16 query tokens over the K-cache in MQA mode.

    q         (n_tok, n_head, kv_lora_rank + n_rot) f32   absorbed; for q8 after rotate_query
    rows      (n_ctx, row_stride) u8                      laid out as type_k says
    n_kv      (n_tok,) int32                              rows that each token sees; at most n_ctx
    kq_scale  1 / sqrt(head width before absorption), times mscale² under YaRN
    out       (n_tok, n_head, kv_lora_rank) f32           zeros where n_kv is 0; for q8 before unrotate_output

    Reads each K row once for scores and values: bytes = n_kv * row_stride.
    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; splits as in Flash-Decoding.
    """
    n_tok, n_head, _ = rows_f32("q", q, 3, (q.shape[0], q.shape[1], kv_lora_rank + n_rot))
    rows_f32("out", out, 3, (n_tok, n_head, kv_lora_rank))
    array("n_kv", n_kv, np.int32, 1, (n_tok,))
    check_rows(rows, type_k, kv_lora_rank, n_rot)
    if not 1 <= n_tok <= MAX_TOKENS:
        raise ValueError(f"{n_tok} query tokens; expected 1 to {MAX_TOKENS}")
    nbytes = scratch_bytes(run.limits, type_k, n_tok * n_head, rows.shape[0], kv_lora_rank, n_rot)
    queue(run, q, rows, type_k, n_kv, kv_lora_rank, n_rot, kq_scale, out, run.workspace(nbytes))


def scratch_bytes(limits: Limits, type_k: str, n_lanes: int, n_ctx: int, kv_lora_rank: int, n_rot: int) -> int:
    """Of the splits' outputs, maxima and sums."""
    splits, _ = geometry(limits, choose(limits, type_k, kv_lora_rank, n_rot, n_lanes), n_lanes, n_ctx)
    return splits * n_lanes * (4 * kv_lora_rank + 8)


def queue(
    run: Any, q: Any, rows: Any, type_k: str, n_kv: Any, kv_lora_rank: int, n_rot: int, kq_scale: float, out: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """As mla_decode, of any number of tokens, with its arguments checked and scratch given (scratch_bytes,) u8."""
    n_tok, n_head, _ = q.shape
    n_lanes = n_tok * n_head
    if type_k == "bf16" and not run.limits.has_bf16:
        raise ValueError(f"{run.limits.name} has no bf16 products; use type_k f16 or q8")
    variant = choose(run.limits, type_k, kv_lora_rank, n_rot, n_lanes)
    splits, blocks = geometry(run.limits, variant, n_lanes, rows.shape[0])
    part_out, part_ml = scratch, scratch[splits * n_lanes * kv_lora_rank * 4 :]
    split, combine = kernels(variant, type_k, kv_lora_rank, n_rot)
    run.launch(
        split, (splits, blocks), variant.threads, variant.shared_bytes(type_k, kv_lora_rank, n_rot),
        (q, *steps("q", q, 4), rows, wide(rows.strides[0]), n_kv, n_tok, n_head, float(kq_scale * LOG2_E),
         part_out, part_ml),
    )  # fmt: skip
    run.launch(
        combine, (n_lanes, kv_lora_rank // 128), 256, 4 * (16 + 8 * 128 + splits),
        (part_out, part_ml, n_kv, n_tok, n_head, splits, out, *steps("out", out)),
    )  # fmt: skip
