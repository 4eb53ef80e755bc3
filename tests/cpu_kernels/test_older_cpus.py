"""Kernels that choose by instruction set, compiled for other CPUs and run on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels.isa import CPU_NAME, FEATURES

HERE = Path(__file__).parent
AVX2 = set("64bit avx avx2 bmi bmi2 cmov crc32 cx16 cx8 f16c fma fxsr lzcnt mmx movbe popcnt sahf".split())
AVX2 |= set("sse sse2 sse3 sse4.1 sse4.2 ssse3 xsave xsaveopt".split())
# one case of each kernel, and of each way in which a format is multiplied: what takes time is to compile them
EVERY_KERNEL = (
    "own_limit or (test_past and 37 and not -bf16) or (test_16_bit_rows and 256) or (test_q8_rows and 256)"
    " or (test_query_and_output and 192) or (test_rms_norm_is and 37) or test_rope_is or (test_swiglu_is and 16)"
    " or (test_every_type and not panels and (1- or F32 or Q4_K or Q6_K or Q5_0)) or (test_heads and 3-8)"
    " or (test_route_is and sigmoid and 5) or (test_experts_are_added and Q4_K and (3 or 65))"
)
DOTS = "(own_limit and q8) or (test_every_type and (17-Q8_0 or 17-Q4_K)) or int8_dot_is_exact or has_a_limit"


def run_tests(program: list[str], files: list[str], which: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", *program, "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in files)]
        + ["-k", which],
        env=os.environ | env,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize(
    "name, features, which",
    [
        ("haswell", FEATURES & AVX2, EVERY_KERNEL),
        (CPU_NAME, FEATURES - {"avx512bf16"}, "own_limit and bf16"),
    ],
    ids=["avx2", "without bf16"],
)
def test_kernels_for_an_older_cpu_are_right(name: str, features: frozenset[str], which: str) -> None:
    if "avx2" not in features:
        pytest.skip("this CPU has no AVX2")
    files = [f"test_{name}.py" for name in ("attention", "ffn", "k_cache", "matmul", "moe", "norm", "prefill", "rope")]
    features_text = ",".join(f"+{f}" for f in sorted(features))
    run_tests(["-m", "pytest"], files, which, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features_text)


@pytest.mark.parametrize("cpu", ["dotprod", pytest.param("avxvnni", marks=pytest.mark.slow)])
def test_kernels_with_another_cpu_s_dot_product_are_right(cpu: str, tmp_path: Path) -> None:
    if "avx2" not in FEATURES:
        pytest.skip("emulated on CPUs with AVX2 only")
    program = [str(HERE / "as_another_cpu.py"), cpu]
    files = [f"test_{name}.py" for name in ("attention", "matmul", "quants", "roofline")]
    run_tests(program, files, DOTS, KONLY_CACHE_DIR=str(tmp_path))


def test_another_cpu_s_name_alone_keeps_the_features_of_this_one() -> None:
    """As Numba has it, which compiles for them."""
    program = "from cpu_kernels.isa import CPU_NAME, FEATURES; print(CPU_NAME, *sorted(FEATURES))"
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CPU_FEATURES"} | {"NUMBA_CPU_NAME": "haswell"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["haswell", *sorted(FEATURES)]
