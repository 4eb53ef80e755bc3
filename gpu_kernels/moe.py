"""Experts on the GPU: the products with what the router chose.

    out[t] += sum over its slots s of weight[t, s] · down_e(silu(gate_e x) · (up_e x)),  e = ids[t, s]

A slot is a pair (token, choice); a token's slots are summed in the order of choice. Ids stay on the device: launches go
by shapes alone, so a captured graph serves every choice.

Up to MAX_DOT_TOKENS tokens, each slot is a row of the grid of matvec.cu and finds its weights by the expert's id: a
slot has the bits it has alone. So it is for more tokens where an expert has few slots, and by F32 weights. Else slots
are sorted by expert (experts.cu), and gemm.cu multiplies each expert's, some a tile; there are as many tiles as any
choice may need, and an empty one ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._compile import kernel
from .check import array, rows_f32, steps
from .device import Limits
from .ffn import swiglu
from .matmul import VARIANTS as VARIANTS_OF_PRODUCTS
from .matmul import (
    Variant,
    launch,
    launch_gemm,
    narrow,
    narrow_bytes,
    padded,
    quantise,
    quantised_bytes,
    takes_gemm,
)
from .quants import Weight
from .workspace import pieces

SORT_SLOTS, NARROW_SWIGLU, ADD_SLOTS = (
    kernel("experts.cu", name) for name in ("sort_slots", "narrow_swiglu", "add_slots")
)
THREADS_SORT, SHARED_SORT = 512, 128
FEW_SLOTS = 2  # an expert, below which reading its weights for each slot is faster than a tile of 32
# 64 tokens of V3, gate and down: 1.53 and 2.28 ms by 32 x 128, 2.04 and 3.18 by the 32 x 32 of plain products (H100)
VARIANTS = (*(v for v in VARIANTS_OF_PRODUCTS if v.tokens > 32 and not v.for_floats), Variant(32, 128, (1, 4), 64, 3))
THREADS, VALUES = 256, 8  # of narrow_swiglu: values of a thread


def experts(
    run: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, out: np.ndarray
) -> None:
    """out (n_tok, n_embd) += the experts' weighted sum for x (n_tok, n_embd) f32.

    ids (n_tok, n_used) int32 and weights f32 as route left them; gate and up (n_expert, n_ff_exp, n_embd), down
    (n_expert, n_embd, n_ff_exp)
    """
    check_arguments(x, ids, weights, gate, up, down, out)
    queue(run, x, ids, weights, gate, up, down, out)


def check_arguments(x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any, out: Any) -> None:
    """ValueError for what experts does not take."""
    n_tok, n_embd = rows_f32("x", x, 2)
    n_used = ids.shape[1]
    n_expert, n_ff, _ = gate.shape
    array("ids", ids, np.int32, 2, (n_tok, n_used))
    rows_f32("weights", weights, 2, (n_tok, n_used))
    rows_f32("out", out, 2, (n_tok, n_embd))
    if gate.shape != (n_expert, n_ff, n_embd) or up.shape != gate.shape or down.shape != (n_expert, n_embd, n_ff):
        raise ValueError(f"experts of shapes {gate.shape}, {up.shape}, {down.shape} for rows of {n_embd}")
    if n_embd % 32 or n_ff % 32:
        raise ValueError(f"experts of {n_embd} and {n_ff} values; expected multiples of 32")
    assert ids.flags.c_contiguous and weights.flags.c_contiguous


def by_tile(run: Any, types: Sequence[int], n_tok: int) -> bool:
    """Whether so many tokens can be multiplied by tiles."""
    return all(takes_gemm(run.limits, type_id, n_tok) for type_id in types)


def queue(
    run: Any, x: Any, ids: Any, weights: Any, gate: Weight, up: Weight, down: Weight, out: Any, first: int | None = None
) -> None:
    """As experts, with arguments checked. With `first`, gate, up and down are some of them, from there on: by tiles."""
    (n_tok, n_embd), n_used, n_expert = x.shape, ids.shape[1], gate.shape[0]
    with run.within("moe"):
        enough = first is not None or n_tok * n_used >= FEW_SLOTS * n_expert
        if enough and by_tile(run, [w.type.id for w in (gate, up, down)], n_tok):
            slots, place = _by_tile(run, x, ids, gate, up, down, first or 0)
        else:
            slots, place = _by_slot(run, x, ids, gate, up, down)
        args = (slots, place, ids, first or 0, n_expert, weights, n_used, out, *steps("out", out), n_embd)
        run.launch(ADD_SLOTS, (-(-n_embd // 256), n_tok), 256, 0, args)


def _by_slot(run: Any, x: Any, ids: Any, gate: Weight, up: Weight, down: Weight) -> tuple[Any, None]:
    """Queue: each slot's output (n_slots, n_embd) f32, in the order of slots."""
    (n_tok, n_embd), n_used, n_ff = x.shape, ids.shape[1], gate.shape[1]
    n_slots = n_tok * n_used
    gated, upped, downed, acts, acts_down = pieces(
        run, 4 * n_slots * n_ff, 4 * n_slots * n_ff, 4 * n_slots * n_embd,
        quantised_bytes([gate, up], n_tok, n_embd), quantised_bytes([down], n_slots, n_ff),
    )  # fmt: skip
    gated, upped = (v.view(np.float32).reshape(1, n_slots, n_ff) for v in (gated, upped))
    downed = downed.view(np.float32).reshape(1, n_slots, n_embd)
    of_tokens = x[None]  # (1, n_tok, n_embd): a token's x serves its n_used slots
    quantise(run, of_tokens, acts)
    launch(run, gate, of_tokens, acts, gated, ids=ids, slots_per_x=n_used)
    launch(run, up, of_tokens, acts, upped, ids=ids, slots_per_x=n_used)
    swiglu(run, gated[0], upped[0], gated[0])
    quantise(run, gated, acts_down)
    launch(run, down, gated, acts_down, downed, ids=ids)
    return downed, None


def _by_tile(run: Any, x: Any, ids: Any, gate: Weight, up: Weight, down: Weight, begin: int) -> tuple[Any, Any]:
    """Queue: each slot's output (n_slots, n_embd) f32, sorted by expert, and the place of each slot there.

    Slots of experts that are not here, begin … begin + len(gate) - 1, have neither.
    """
    (n_tok, n_embd), n_used, (n_expert, n_ff, _) = x.shape, ids.shape[1], gate.shape
    n_slots = n_tok * n_used
    variants = choose(run.limits, [w.type.id for w in (gate, up, down)], n_slots / n_expert)
    n_tiles = n_slots // variants[0].tokens + n_expert
    outputs, narrowed, inner, order, place, tiles = pieces(
        run, 4 * n_slots * max(2 * n_ff, n_embd), narrow_bytes([gate], n_tok, n_embd),
        narrow_bytes([down], n_slots, n_ff), 4 * n_slots, 4 * n_slots, 16 * n_tiles,
    )  # fmt: skip
    outputs, tiles = outputs.view(np.float32), tiles.view(np.int32).reshape(n_tiles, 4)
    gated, upped = outputs[: 2 * n_slots * n_ff].reshape(2, n_slots, 1, n_ff)
    downed = outputs[: n_slots * n_embd].reshape(n_slots, 1, n_embd)  # once gated and upped have been read
    run.launch(
        SORT_SLOTS,
        (n_expert,),
        THREADS_SORT,
        SHARED_SORT,
        (ids, n_slots, begin, variants[0].tokens, order, place, tiles),
    )
    narrow(run, x[:, None], narrowed)
    for w, to, variant in ((gate, gated, variants[0]), (up, upped, variants[1])):
        launch_gemm(run, w, narrowed, n_embd, to, tiles=tiles, gather=order, per=n_used, variant=variant)
    grid = (n_slots, -(-padded(n_ff) // (THREADS * VALUES)))
    args = (gated, upped, n_ff, inner, padded(n_ff), int(not run.limits.has_bf16))
    run.launch(NARROW_SWIGLU, grid, THREADS, 0, args)
    launch_gemm(run, down, inner, n_ff, downed, tiles=tiles, variant=variants[2])
    return downed, place


def choose(limits: Limits, type_ids: Sequence[int], slots_an_expert: float) -> list[Variant]:
    """A variant for each matrix, all of as many tokens a tile, which an expert's slots fill to two thirds at least."""
    found: list[Variant] = []
    for tokens in (128, 64, 32):
        options = [v for v in VARIANTS if v.tokens == tokens]
        of_types = [[v for v in options if v.fits(limits, t)] for t in type_ids]
        if all(of_types) and (slots_an_expert * 3 >= tokens * 2 or tokens == 32):
            found = [some[0] for some in of_types]
            break
    return found
