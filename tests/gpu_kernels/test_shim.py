"""The shim notices what is wrong with a kernel: here are kernels with one fault each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shim import ShimRun

from gpu_kernels import _compile
from gpu_kernels._compile import kernel

REVERSE = """
#include "prims.cuh"
KERNEL(64, 1, reverse)(const float* x, float* out) {
  DYN_SMEM(smem);
  float* s = (float*)smem;
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
"""
FAULTS = {
    "a barrier is missing": (("__syncthreads();", ""), "differs"),
    "a barrier is met by some threads": (("__syncthreads();", "if (threadIdx.x < 32) __syncthreads();"), "returned"),
    "two barriers are mixed up": (
        ("__syncthreads();", "if (threadIdx.x < 32) { __syncthreads(); } else {\n __syncthreads(); }"),
        "different __syncthreads",
    ),
    "a write is past the end": (("s[threadIdx.x] =", "s[64] = 0.f; s[threadIdx.x] ="), "past the end"),
    "a copy is never waited for": (
        ("__syncthreads();", "__syncthreads(); cp_async16(smem_addr(s), x, true);"),
        "under way",
    ),
    "a copy is not aligned": (("__syncthreads();", "cp_async16(smem_addr(s + 1), x, true);"), "not aligned"),
    "a shuffle is met by half a warp": (
        ("__syncthreads();", "if (threadIdx.x & 1) __shfl_sync(0xffffffffu, 0, 0); __syncthreads();"),
        "deadlock",
    ),
}


def reversed_by(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int) -> np.ndarray:
    name = f"{tmp_path.name}.cu"  # builds are remembered by name
    (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "prims.cuh").write_text((_compile.CUDA / "prims.cuh").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(_compile, "CUDA", tmp_path)
    x, out = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    ShimRun(order).launch(kernel(name, "reverse"), (1,), 64, 256, (x, out))
    return out


@pytest.mark.parametrize("order", [0, 1, 2, -1])
def test_a_kernel_without_faults_runs(order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(reversed_by(REVERSE, tmp_path, monkeypatch, order), np.arange(64)[::-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = FAULTS[fault]
    assert change[0] in REVERSE
    with pytest.raises(AssertionError, match=message):
        out = reversed_by(REVERSE.replace(*change), tmp_path, monkeypatch, order=-1)
        assert np.array_equal(out, np.arange(64)[::-1]), "the result differs"


def test_too_much_shared_memory_for_the_card_is_noticed() -> None:
    with pytest.raises(AssertionError):
        ShimRun().launch(kernel("small.cu", "rms_norm"), (1,), 256, 1 << 20, ())


def test_a_wrong_number_of_arguments_is_noticed() -> None:
    with pytest.raises(AssertionError, match="takes 7 arguments, got 1"):
        ShimRun().launch(kernel("small.cu", "rms_norm"), (1,), 256, 32, (1,))
