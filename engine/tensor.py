"""A weight as the file has it: QuantTensor, and the table of ggml's tensor types.

A row of ne0 values (the input dimension of the layer, contiguous) is ne0 / block blocks of `nbytes` bytes each. What
the bytes of a block mean is the business of cpu_kernels/quants; here are only sizes.

Source: ggml.h and ggml.c of llama.cpp (ids, block sizes).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import ModelFormatError


@dataclass(frozen=True, slots=True)
class GGMLType:
    """One ggml tensor type."""

    id: int  # as stored in the file
    name: str
    block: int  # values per block
    nbytes: int  # bytes per block

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of n values; n is a multiple of `block`."""
        return n // self.block * self.nbytes


_TYPES_WE_RUN = (
    GGMLType(0, "F32", 1, 4),
    GGMLType(1, "F16", 1, 2),
    GGMLType(2, "Q4_0", 32, 18),
    GGMLType(3, "Q4_1", 32, 20),
    GGMLType(6, "Q5_0", 32, 22),
    GGMLType(7, "Q5_1", 32, 24),
    GGMLType(8, "Q8_0", 32, 34),
    GGMLType(10, "Q2_K", 256, 84),
    GGMLType(11, "Q3_K", 256, 110),
    GGMLType(12, "Q4_K", 256, 144),
    GGMLType(13, "Q5_K", 256, 176),
    GGMLType(14, "Q6_K", 256, 210),
    GGMLType(20, "IQ4_NL", 32, 18),
    GGMLType(23, "IQ4_XS", 256, 136),
    GGMLType(30, "BF16", 1, 2),
)

# A file with these opens, and `inspect` names them; a model that needs one is refused by name.
_TYPES_WE_ONLY_KNOW = (
    GGMLType(9, "Q8_1", 32, 40),
    GGMLType(15, "Q8_K", 256, 292),
    GGMLType(16, "IQ2_XXS", 256, 66),
    GGMLType(17, "IQ2_XS", 256, 74),
    GGMLType(18, "IQ3_XXS", 256, 98),
    GGMLType(19, "IQ1_S", 256, 50),
    GGMLType(21, "IQ3_S", 256, 110),
    GGMLType(22, "IQ2_S", 256, 82),
    GGMLType(24, "I8", 1, 1),
    GGMLType(25, "I16", 1, 2),
    GGMLType(26, "I32", 1, 4),
    GGMLType(27, "I64", 1, 8),
    GGMLType(28, "F64", 1, 8),
    GGMLType(29, "IQ1_M", 256, 56),
    GGMLType(34, "TQ1_0", 256, 54),
    GGMLType(35, "TQ2_0", 256, 66),
    GGMLType(39, "MXFP4", 32, 17),
    GGMLType(40, "NVFP4", 64, 36),
    GGMLType(41, "Q1_0", 128, 18),
)

GGML_TYPES: dict[int, GGMLType] = {t.id: t for t in _TYPES_WE_RUN}
KNOWN_TYPES: dict[int, GGMLType] = {t.id: t for t in _TYPES_WE_RUN + _TYPES_WE_ONLY_KNOW}
REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})  # ids that ggml once used


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A tensor whose values stay in the bytes of the file.

    shape  numpy order: the last axis is GGUF's ne0, the input dimension; a linear layer is (n_out, n_in)
    data   uint8, read-only, shape[:-1] + (row_bytes,): a view of the mapped file, so `data[e]` of (n_expert, …) is free
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def f32(self) -> np.ndarray:
        """The values of an F32 tensor: float32 of `shape`, a read-only view."""
        if self.type.name != "F32":
            raise ModelFormatError(f"tensor {self.name!r} has type {self.type.name}, expected F32")
        return self.data.view("<f4")
