"""Experts on the GPU: the products with what the router chose.

    out[t] += sum over its slots s of weight[t, s] · down_e(silu(gate_e x) · (up_e x)),  e = ids[t, s]

A slot is a pair (token, choice). Each is a row of the grid of matvec.cu, and finds its weights by the expert's id,
which is read when the kernel runs; slots are summed in the order of choice. Two tokens of one expert read its weights
twice: for a prompt that is slow, and a product on tensor cores over slots sorted by expert is to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import kernel
from .check import array, rows_f32, steps
from .ffn import swiglu
from .matmul import launch, quantise, quantised_bytes

ADD_SLOTS = kernel("experts.cu", "add_slots")


def experts(
    run: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, out: np.ndarray
) -> None:
    """out (n_tok, n_embd) += the experts' weighted sum for x (n_tok, n_embd) f32.

    ids (n_tok, n_used) int32 and weights f32 as route left them; gate and up (n_expert, n_ff_exp, n_embd), down
    (n_expert, n_embd, n_ff_exp)
    """
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
    n_slots = n_tok * n_used
    sizes = [
        4 * n_slots * n_ff, 4 * n_slots * n_ff, 4 * n_slots * n_embd,
        quantised_bytes([gate, up], n_tok, n_embd), quantised_bytes([down], n_slots, n_ff),
    ]  # fmt: skip
    ends = np.cumsum([-(-n // 256) * 256 for n in sizes])
    memory = run.workspace(int(ends[-1]))
    gated, upped, downed, acts, acts_down = (
        memory[int(end) - -(-n // 256) * 256 :][:n] for n, end in zip(sizes, ends, strict=True)
    )
    gated, upped = (v.view(np.float32).reshape(1, n_slots, n_ff) for v in (gated, upped))
    downed = downed.view(np.float32).reshape(1, n_slots, n_embd)

    of_tokens = x[None]  # (1, n_tok, n_embd): a token's x serves its n_used slots
    quantise(run, of_tokens, acts)
    launch(run, gate, of_tokens, acts, gated, ids=ids, slots_per_x=n_used)
    launch(run, up, of_tokens, acts, upped, ids=ids, slots_per_x=n_used)
    swiglu(run, gated[0], upped[0], gated[0])
    quantise(run, gated, acts_down)
    launch(run, down, gated, acts_down, downed, ids=ids)
    args = (downed, weights, n_used, out, *steps("out", out), n_embd)
    run.launch(ADD_SLOTS, (-(-n_embd // 256), n_tok), 256, 0, args)
