"""bad_weights(): what in a file's weights cannot be meant so: NaN, infinity, absurd size, holes.

Nothing is dequantised: a block of quantised weights is as large as its f16 scales make it, so these are all that is
read of it, with a bound of what they can stand for. A broken bit in a scale's exponent shows there; one in the codes
shows nowhere but in a digest.

    not finite   a scale, or a weight of a float type, is NaN or infinite
    absurd       a weight may reach MAX_WEIGHT, or MAX_RATIO times what is usual in its tensor
    a hole       MIN_HOLE bytes and more of blocks with scale 0, as an interrupted download leaves them. The embedding
                 and the output may have them: rows of tokens that do not exist
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..tensor import QuantTensor

MAX_WEIGHT = 1e4
MAX_RATIO = 1000.0  # the largest blocks of trained matrices are 10 to 50 times the median one
MIN_HOLE = 64 << 10
CHUNK = 32 << 20  # bytes looked at together
FLOAT_BLOCK = 32  # values of a float type that are taken together

# type: {byte of an f16 scale in the block: the most that it is multiplied with}; ggml-common.h
SCALES: dict[str, dict[int, int]] = {
    "Q4_0": {0: 8},
    "Q4_1": {0: 15, 2: 1},
    "Q5_0": {0: 16},
    "Q5_1": {0: 31, 2: 1},
    "Q8_0": {0: 128},
    "Q2_K": {80: 15 * 3, 82: 15},
    "Q3_K": {108: 32 * 4},
    "Q4_K": {0: 63 * 15, 2: 63},
    "Q5_K": {0: 63 * 31, 2: 63},
    "Q6_K": {208: 128 * 32},
    "IQ4_NL": {0: 127},
    "IQ4_XS": {0: 32 * 127},
}

Progress = Callable[[int, int, str], None]  # bytes read, in all, name of the tensor


def bad_weights(tensors: Iterable[QuantTensor], progress: Progress | None = None) -> list[dict[str, Any]]:
    """[{"tensor", "type", "what": a sentence}] of these tensors, at most one for each; empty: all is well."""
    found: list[dict[str, Any]] = []
    tensors = list(tensors)
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for tensor in tensors:
        if progress is not None:
            progress(done, total, tensor.name)
        what = _what(tensor)
        if what:
            found.append({"tensor": tensor.name, "type": tensor.type.name, "what": what})
        done += tensor.nbytes
    return found


def _what(tensor: QuantTensor) -> str | None:
    magnitudes = np.concatenate([np.zeros(0, np.float32), *_block_magnitudes(tensor)])
    per_row = max(1, len(magnitudes) * tensor.shape[-1] // max(1, int(np.prod(tensor.shape))))
    if not len(magnitudes):
        return None
    if not np.isfinite(magnitudes).all():
        bad = np.flatnonzero(~np.isfinite(magnitudes))
        kind = "NaN" if np.isnan(magnitudes[bad]).any() else "infinite"
        return (
            f"weights of {len(bad):,} of {len(magnitudes):,} blocks are {kind}, the first in row {bad[0] // per_row:,}"
        )
    largest = int(magnitudes.argmax())
    where = f"in row {largest // per_row:,}"
    if magnitudes[largest] >= MAX_WEIGHT:
        return f"weights reach {magnitudes[largest]:.3g} {where}; expected less than {MAX_WEIGHT:g}"
    if len(tensor.shape) == 1:
        return None
    some = magnitudes[magnitudes > 0]
    if len(some) and magnitudes[largest] >= MAX_RATIO * (usual := float(np.median(some))):
        return (
            f"weights reach {magnitudes[largest]:.3g} {where}, {magnitudes[largest] / usual:,.0f} times what is usual"
        )
    if tensor.name not in ("token_embd.weight", "output.weight"):
        start, n = _longest_run(magnitudes == 0)
        nbytes = n * (tensor.nbytes // len(magnitudes))
        if nbytes >= MIN_HOLE:
            return f"{nbytes >> 10:,} KiB from row {start // per_row:,} on are zero, as after an interrupted download"
    return None


def _block_magnitudes(tensor: QuantTensor) -> Iterator[np.ndarray]:
    """How large the weights of each block may be, f32, chunk by chunk; NaN and inf stay what they are."""
    flat = np.ascontiguousarray(tensor.data).reshape(-1)
    block, scales = tensor.type.nbytes, SCALES.get(tensor.type.name)
    if scales is None:
        width = FLOAT_BLOCK if tensor.shape[-1] % FLOAT_BLOCK == 0 else 1
        block *= width
    step = CHUNK // block * block
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, len(flat), step):
            blocks = flat[at : at + step].reshape(-1, block)
            if scales is None:
                yield np.abs(_floats(blocks, tensor.type.name)).max(axis=1)
            else:
                parts = [
                    np.abs(blocks[:, byte : byte + 2].copy().view("<f2")[:, 0].astype(np.float32)) * np.float32(most)
                    for byte, most in scales.items()
                ]
                yield sum(parts[1:], parts[0])


def _floats(blocks: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return blocks.view({"F32": "<f4", "F16": "<f2"}[type_name]).astype(np.float32)


def _longest_run(mask: np.ndarray) -> tuple[int, int]:
    """(start, length) of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(starts[longest]), int(lengths[longest])
