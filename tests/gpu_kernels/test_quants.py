"""The ggml types on the GPU: those of the engine, and any bytes decoded as gguf decodes them, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from shim import ShimRun, instances

from engine.tensor import GGML_TYPES
from gpu_kernels import embed_rows, upload
from gpu_kernels._compile import kernel
from gpu_kernels.quants import FORMATS

QUANTISED = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values() if not f.is_float]
F16_AT = {3: (0, 2), 7: (0, 2), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,)}  # others: at 0

instances(kernel("embed.cu", "embed_rows", {"TYPE_ID": f}) for f in FORMATS)


def test_every_type_that_the_engine_runs_is_there() -> None:
    assert set(FORMATS) == set(GGML_TYPES)
    for f in FORMATS.values():
        t = GGML_TYPES[f.type_id]
        assert f.name == t.name and f.nbytes * t.block == t.nbytes * f.block


@pytest.mark.parametrize("type_id", QUANTISED)
def test_any_block_is_decoded_as_gguf_does(type_id: int) -> None:
    f, n_rows, k = FORMATS[type_id], 40, 512
    rng = np.random.default_rng(type_id)
    blocks = rng.integers(0, 256, (n_rows * k // f.block, f.nbytes), dtype=np.uint8)
    for at in F16_AT.get(type_id, (0,)):
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    data = blocks.reshape(n_rows, -1)
    weight = SimpleNamespace(type=SimpleNamespace(id=type_id), shape=(n_rows, k), data=data)
    out, run = np.full((n_rows, k), np.nan, np.float32), ShimRun()
    embed_rows(run, upload(run, weight), np.arange(n_rows, dtype=np.int32), out)
    expected = quants.dequantize(data, GGMLQuantizationType(type_id))
    assert np.array_equal(out.view(np.uint32), expected.astype(np.float32).view(np.uint32))
