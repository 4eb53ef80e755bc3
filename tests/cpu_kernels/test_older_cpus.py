"""Kernels that choose by instruction set, compiled for older CPUs and run on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels.isa import CPU_NAME, FEATURES

AVX2 = set("64bit avx avx2 bmi bmi2 cmov crc32 cx16 cx8 f16c fma fxsr lzcnt mmx movbe popcnt sahf".split())
AVX2 |= set("sse sse2 sse3 sse4.1 sse4.2 ssse3 xsave xsaveopt".split())


@pytest.mark.parametrize(
    "name, features",
    [("haswell", FEATURES & AVX2), (CPU_NAME, FEATURES - {"avx512bf16"})],
    ids=["avx2", "without bf16"],
)
def test_attention_and_rows_are_right(name: str, features: frozenset[str], request: pytest.FixtureRequest) -> None:
    if "avx2" not in features:
        pytest.skip("this CPU has no AVX2")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "test_k_cache.py"]
        + [here / "test_attention.py", "-k", "16_bit_rows or q8_rows or own_limit"],
        env=os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ",".join(f"+{f}" for f in sorted(features))},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
