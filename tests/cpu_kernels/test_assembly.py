"""The instructions that kernels become on CPUs which are not here to run them: what multiplies, and nothing to call."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

Q8_0, Q4_K = 8, 12
AVX2 = "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CPUS = {
    "haswell": (X86, AVX2),
    "alderlake": (X86, AVX2 + ",+avxvnni"),
    "apple-m1": (ARM, "+neon,+dotprod,+fullfp16"),
    "neoverse-n1": (ARM, "+neon,+dotprod,+fullfp16"),
    "neoverse-v1": (ARM, "+neon,+dotprod,+fullfp16,+bf16,+i8mm"),
}
KERNELS = {
    "rows Q4_K": ("matmul", "dot_rows", {"type_id": Q4_K, "accumulate": False, "several": False}),
    "rows Q8_0": ("matmul", "dot_rows", {"type_id": Q8_0, "accumulate": False, "several": False}),
    "panels Q4_K": ("panels", "multiply", {"type_id": Q4_K, "kind": "int8", "accumulate": False}),
    "panels Q8_0": ("panels", "multiply", {"type_id": Q8_0, "kind": "int8", "accumulate": False}),
    "panels Q8_0 int16": ("panels", "multiply", {"type_id": Q8_0, "kind": "int16", "accumulate": False}),
    "panels f32": ("panels", "multiply", {"type_id": Q8_0, "kind": "f32", "accumulate": False}),
    "panels bf16": ("panels", "multiply", {"type_id": Q8_0, "kind": "bf16", "accumulate": False}),
    "decode f16": ("attention", "decode_split", {"type_k": "f16", "kind": "f32"}),
    "decode bf16": ("attention", "decode_split", {"type_k": "bf16", "kind": "f32"}),
    "decode q8": ("attention", "decode_split", {"type_k": "q8", "kind": "int8"}),
    "attend": ("prefill", "attend", {"kind": "f32"}),
    "store f16": ("k_cache", "store_row", {"type_k": "f16", "neox": False}),
    "store bf16": ("k_cache", "store_row", {"type_k": "bf16", "neox": False}),
}
INT8 = ["rows Q8_0", "panels Q4_K", "panels Q8_0", "decode q8"]
FLOAT = ["panels f32", "decode f16", "decode bf16", "attend"]


@functools.cache
def assembly(cpu: str) -> dict[str, str]:
    """Of every kernel that the cases name, from one process."""
    triple, features = CPUS[cpu]
    names = sorted({name for c, name, *_ in CASES if c == cpu})
    done = subprocess.run(
        [sys.executable, "-P", Path(__file__).with_name("assembly_for.py"), triple],
        input=json.dumps([(name, *KERNELS[name]) for name in names]),
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def instructions(code: str) -> list[str]:
    """One a line, without labels, directives and comments."""
    lines = (re.sub(r"\t#.*|\{vex\}\s*", "", line).strip() for line in code.splitlines() if line.startswith("\t"))
    return [line for line in lines if line and not line.startswith(".")]


def loops(code: str) -> Iterator[list[str]]:
    """The instructions of every innermost loop: a label and the next jump, which is back to it."""
    start, label = 0, ""
    lines = code.splitlines()
    for i, line in enumerate(lines):
        if found := re.match(r"(\.L\w+):", line):
            start, label = i, found[1]
        elif (found := re.match(r"\t(?:j\w+|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)) and found[1] == label:
            yield instructions("\n".join(lines[start : i + 1]))


def n_of(code: list[str], what: str) -> int:
    return sum(re.match(what, line) is not None for line in code)


def spills(code: list[str]) -> int:
    """Vector registers that are kept in the stack."""
    return n_of(code, r".*%[xyz]mm.*\(%rsp") + n_of(code, r".*\bq\d+.*\[sp")


# CPU, kernel, the instruction that multiplies, how many of it at least in one of the innermost loops
CASES = [
    *(("haswell", name, r"vfmadd\d+ps\s.*%ymm", 12) for name in FLOAT),
    ("haswell", "panels Q4_K", r"vpmaddubsw\s.*%ymm", 6),
    ("haswell", "panels Q8_0 int16", r"vpmaddwd\s.*%ymm", 64),
    ("haswell", "decode q8", r"vpmaddubsw\s.*%ymm", 6),
    *(("haswell", name, r"vpmaddubsw\s.*%ymm", 0) for name in ("rows Q4_K", "rows Q8_0")),
    *(("alderlake", name, r"vpdpbusd\s.*%ymm", 6) for name in INT8 if name != "rows Q8_0"),
    ("alderlake", "rows Q8_0", r"vpdpbusd\s.*%ymm", 0),
    *(("apple-m1", name, r"fmla\sv\d+\.4s", 24) for name in FLOAT),
    *(("apple-m1", name, r"sdot\sv\d+\.4s", 8) for name in (*INT8, "rows Q4_K")),
    ("neoverse-n1", "decode f16", r"fmla\sv\d+\.4s", 24),
    *(("neoverse-n1", name, r"sdot\sv\d+\.4s", 8) for name in ("rows Q4_K", "panels Q8_0", "decode q8")),
    *(("neoverse-v1", name, r"usdot\sv\d+\.4s", 8) for name in ("rows Q8_0", "panels Q8_0", "decode q8")),
    *(
        (cpu, name, r"v?f", 0)
        for cpu in ("alderlake", "apple-m1")
        for name in ("store f16", "store bf16", "panels bf16")
    ),
]


@pytest.mark.parametrize("cpu, name, instruction, n", CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_the_instructions_are_those_intended(cpu: str, name: str, instruction: str, n: int) -> None:
    code = assembly(cpu)[name]
    assert n_of(instructions(code), instruction) > 0
    most = [(n_of(loop, instruction), spills(loop)) for loop in loops(code)]
    per_spill = 3 if "maddub" in instruction else 1000  # sums of pairs, of fours and of floats do not all fit
    assert n == 0 or any(found >= n and n_spills <= found // per_spill for found, n_spills in most), most


@pytest.mark.parametrize("cpu, name", [c[:2] for c in CASES], ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_nothing_else_is_called_and_no_register_is_wider(cpu: str, name: str) -> None:
    """No __truncsfbf2, no expf: the cache of compiled kernels could not link them everywhere."""
    code = assembly(cpu)[name]
    assert "zmm" not in code
    called = set(re.findall(r"\t(?:bl?|jmp|callq|movabsq)\s+\$?([A-Za-z_]\w*)", code))
    assert all(f"\n{name}:" in code for name in called), called
