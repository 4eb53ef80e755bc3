"""Which CPU the kernels are compiled for, and what follows from it.

The host's by default; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another, for tests, and mean what they mean to
Numba: a name alone, but for `generic`, keeps the host's features. Nothing here imports Numba.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import llvmlite.binding as llvm


def _host() -> tuple[str, str]:
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name.lower() == "generic" else llvm.get_host_cpu_features().flatten()
    return name, features


CPU_NAME, CPU_FEATURES = _host()
FEATURES = frozenset(f[1:] for f in CPU_FEATURES.split(",") if f.startswith("+"))


@dataclass(frozen=True)
class Isa:
    """The instructions that have no generic LLVM form, and the register blocks that fit the register file."""

    x86: bool
    avx2: bool
    avx512: bool  # 512-bit vectors with byte and word operations
    vnni512: bool  # vpdpbusd and vpdpwssd on 512 bits
    gfni512: bool  # vgf2p8affineqb and vpermb on 512 bits
    avxvnni: bool  # vpdpbusd on 256 bits
    bf16: bool  # vdpbf16ps on 512 bits
    dotprod: bool  # sdot of bytes on 128 bits (AArch64)
    i8mm: bool  # usdot of bytes on 128 bits (AArch64)
    f16: bool  # f16 <-> f32; without it LLVM asks for a library function, and aborts the process where it is missing

    @property
    def n_acc(self) -> int:
        """16-lane f32 accumulators that a microkernel may hold: 24 of 32 zmm, 6 (as pairs) of 16 ymm or 32 q."""
        return 24 if self.avx512 else 6

    @property
    def u8s8(self) -> bool:
        """Dot products of four bytes, 0..255 times signed ones."""
        return self.vnni512 or self.avxvnni or self.i8mm

    @property
    def int8(self) -> bool:
        """Dot products of four bytes, signed or 0..255. Plain AVX2 has them for 0..127 only, else pairs saturate."""
        return self.u8s8 or self.dotprod

    @property
    def panel(self) -> str:
        """What quantised weights are decoded to for many rows: 'bf16' where the CPU multiplies it, else 'f32'."""
        return "bf16" if self.bf16 else "f32"


def _isa(name: str, features: frozenset[str]) -> Isa:
    x86 = llvm.get_process_triple().startswith("x86_64")
    avx512 = "avx512bw" in features and "avx512vl" in features
    return Isa(
        x86=x86,
        avx2="avx2" in features,
        avx512=avx512,
        vnni512=avx512 and "avx512vnni" in features,
        gfni512=avx512 and "gfni" in features and "avx512vbmi" in features,
        avxvnni="avxvnni" in features,
        bf16=avx512 and "avx512bf16" in features,
        dotprod="dotprod" in features or name.startswith("apple-m"),  # macOS may list no features
        i8mm="i8mm" in features,
        f16=not x86 or "f16c" in features,
    )


ISA = _isa(CPU_NAME, FEATURES)
