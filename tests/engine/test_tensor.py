"""The table of tensor types, and QuantTensor's views."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import EngineError
from engine.tensor import GGML_TYPES, KNOWN_TYPES, REMOVED_TYPES, GGMLType, QuantTensor

F32 = GGML_TYPES[0]


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    sizes = {int(t): (t.name, *size) for t, size in constants.GGML_QUANT_SIZES.items()}
    assert {t.id: (t.name, t.block, t.nbytes) for t in KNOWN_TYPES.values()} == sizes


def test_every_type_we_run_is_known() -> None:
    assert GGML_TYPES.items() <= KNOWN_TYPES.items()
    assert len(GGML_TYPES) == 15


def test_no_removed_type_is_known() -> None:
    assert not REMOVED_TYPES & KNOWN_TYPES.keys()


def test_row_bytes_counts_whole_blocks() -> None:
    q4_k: GGMLType = KNOWN_TYPES[12]
    assert q4_k.row_bytes(2048) == 8 * 144


def test_f32_is_a_view_of_the_bytes() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = QuantTensor("x", F32, (2, 3), values.view(np.uint8))
    assert np.shares_memory(tensor.f32(), values)
    np.testing.assert_array_equal(tensor.f32(), values)
    assert tensor.nbytes == 24


def test_f32_of_another_type_is_an_error_which_names_the_tensor() -> None:
    tensor = QuantTensor("blk.0.attn_norm.weight", GGML_TYPES[8], (2, 32), np.zeros((2, 34), np.uint8))
    with pytest.raises(EngineError, match=r"'blk\.0\.attn_norm\.weight' has type Q8_0, expected F32"):
        tensor.f32()
