"""Run tests with the choices for a CPU that this one is not: python as_another_cpu.py dotprod|avxvnni, then pytest's.

The one instruction by which such a CPU differs is emulated, so that what is built around it can run here.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SIMPLEST = {"avx2": False, "avx512": False, "vnni512": False, "gfni512": False, "bf16": False}
CPUS = {"dotprod": SIMPLEST | {"dotprod": True}, "avxvnni": SIMPLEST | {"avx2": True, "avxvnni": True}}


def become(cpu: str) -> None:
    """Before the package is imported: its modules copy ISA."""
    package = importlib.util.find_spec("cpu_kernels")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("cpu_kernels.isa", Path(package.origin).with_name("isa.py"))
    assert spec is not None and spec.loader is not None
    isa = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isa)
    isa.ISA = replace(isa.ISA, **CPUS[cpu])

    from cpu_kernels import microkernel

    microkernel._dot_parts = dot


def dot(b, name, acc, x, y, n):
    """sdot or vpdpbusd: acc, 16 i32, + sums of four products of bytes."""
    from cpu_kernels.simd import I8, I16, I32, V, const_i, shuffle

    signed = name == "llvm.aarch64.neon.sdot.v4i32.v16i8"
    assert signed or name == "llvm.x86.avx512.vpdpbusd.256"
    if signed:  # as 128 + itself: to products of two signed bytes LLVM's x86 backend finds no end
        x = b.xor(x, const_i(-128, 64, I8))
    y = b.sext(y, V(I16, 64))
    products = b.mul(b.zext(x, V(I16, 64)), y)
    for g in range(4):
        part = lambda v: b.sext(shuffle(b, v, v, range(g, 64, 4)), V(I32, 16))  # noqa: B023, E731
        acc = b.add(acc, part(products))
        if signed:
            acc = b.sub(acc, b.shl(part(y), const_i(7)))
    return acc


if __name__ == "__main__":
    become(sys.argv[1])
    sys.exit(pytest.main(sys.argv[2:]))
