"""Pieces of LLVM code that several formats share: unpacking bits, and integer products. Imports Numba."""

from __future__ import annotations

from llvmlite import ir

from ..isa import ISA
from ..microkernel import dot, pair_sums, quad_sums
from ..simd import F16, F32, I8, I16, I32, I64, VF, VI, V, call, concat, const_i, load, offset, shuffle


def halves(b, *addresses):
    """The f16 at one or two addresses as <2 x f32>, at four as <4 x f32>.

    Put together as an integer: for a plain f16 load LLVM 22 emits vpinsrw into whatever register is at hand, often
    the accumulator, and the loop then waits for itself. One Zen 5 core, 256 rows of 2048, G weights/s:
    Q4_1 12.6 -> 22.1, Q5_0 17.4 -> 22.5.
    """
    word = I64 if len(addresses) == 4 else I32
    bits = None
    for i, a in enumerate(addresses):
        part = b.shl(b.zext(load(b, a, I16), word), ir.Constant(word, 16 * i))
        bits = part if bits is None else b.or_(bits, part)
    return b.fpext(b.bitcast(bits, V(F16, word.width // 16)), V(F32, word.width // 16))


def half(b, address):
    """The f16 at an address as f32."""
    return b.extract_element(halves(b, address), ir.Constant(I32, 0))


def take(b, x, index):
    """Lanes of a vector, by constant index."""
    return shuffle(b, x, x, index)


def unsigned(b, v):
    """<16 x i8>, 0..255 -> 16 floats."""
    return b.sitofp(b.zext(v, VI), VF)


def signed(b, v):
    """<16 x i8>, -128..127 -> 16 floats."""
    return b.sitofp(b.sext(v, VI), VF)


def fields(b, packed, shifts, mask, then_or=False):
    """Bit fields of bytes: part i of `packed` (of len(shifts) equal parts) shifted right by shifts[i], and masked.

    Negative shifts go left. Shifted as 32-bit lanes (x86 has no shifts of bytes): what crosses into a byte from its
    neighbour must be masked away, so mask << shift must fit a byte. then_or: an `or` follows, of which x86 makes one
    instruction together with the mask.
    """
    n = packed.type.count
    if n == 64 and ISA.gfni512 and (len(set(shifts)) > 1 or (any(shifts) and not then_or)):
        return affine(b, packed, [_shift_and_mask(s, mask) for s in shifts for _ in range(8 // len(shifts))])
    lanes = V(I32, n // 4)
    x = b.bitcast(packed, lanes)
    per = [s for s in shifts for _ in range(n // 4 // len(shifts))]
    if any(s > 0 for s in per):
        x = b.lshr(x, ir.Constant(lanes, [max(s, 0) for s in per]))
    if any(s < 0 for s in per):
        x = b.shl(x, ir.Constant(lanes, [max(-s, 0) for s in per]))
    return b.and_(b.bitcast(x, packed.type), const_i(mask, n, I8))


def affine(b, x, matrices):
    """64 bytes, each times the bit matrix of its eight: byte 7 - i of that says which bits make bit i. ISA.gfni512.

    One instruction that shifts bytes and masks them, in pipes that unpacking leaves free. One Zen 4 core out of the
    second cache, one token, cycles for 256 weights: Q5_0 28.8 -> 23.8, Q3_K 27.3 -> 24.2, Q4_0 21.3 -> 19.1.
    """
    matrices = b.bitcast(ir.Constant(V(I64, 8), matrices), x.type)
    return call(b, "llvm.x86.vgf2p8affineqb.512", x.type, [x, matrices, ir.Constant(I8, 0)])


def _shift_and_mask(shift, mask):
    """The bit matrix of (byte >> shift) & mask."""
    bits = [i for i in range(8) if mask >> i & 1 and 0 <= i + shift < 8]
    return sum(1 << i + shift + 8 * (7 - i) for i in bits)


def nibbles(b, *addresses):
    """16 bytes at each of one, two or four addresses -> 32 codes each: the low nibbles, then the high ones."""
    q = [load(b, a, V(I8, 16)) for a in addresses for _ in range(2)]
    return fields(b, concat(b, *q), (0, 4) * len(addresses), 15)


def lookup(b, table, index):
    """<n x i8> index, 0..15 -> bytes of a table of 16 ints; n = 16, 32 or 64."""
    n = index.type.count
    width, name = 16, "llvm.aarch64.neon.tbl1.v16i8"
    if ISA.x86:
        width, name = 16, "llvm.x86.ssse3.pshuf.b.128"
        if n >= 32 and ISA.avx2:
            width, name = 32, "llvm.x86.avx2.pshuf.b"
        if n == 64 and ISA.avx512:
            width, name = 64, "llvm.x86.avx512.pshuf.b.512"
    values = ir.Constant(V(I8, width), list(table) * (width // 16))
    parts = [take(b, index, range(i, i + width)) for i in range(0, n, width)]
    return concat(b, *[call(b, name, V(I8, width), [values, p]) for p in parts])


# ------------------------------------------------------------------------------------- integer products, q8_256


def add_scaled_sums(b, total, u, x, scales, group):
    """total, 16 i32 or None, + sums of code * x * its scale, for 64 codes 0..127 (signed ones if ISA.dotprod).

    scales are i16, and group(j) is the scale of codes 4j..4j+3
    """
    if ISA.dotprod:
        sums = b.mul(dot_signed(b, u, x), b.sext(take(b, scales, [group(j) for j in range(16)]), VI))
        return sums if total is None else b.add(total, sums)
    return quad_sums(b, pair_sums(b, u, x), take(b, scales, [group(j // 2) for j in range(32)]), total)


def scaled_quads(b, codes, x, scales, group, total=None):
    """codes: vectors of 64, 0..63, times the activations at x and scales <n x i16> -> total, 16 i32, plus their sums.

    group(i, j) is the scale of codes 4j..4j+3 of vector i. A sum of four products fits 16 bits, so those of two vectors
    are packed together before they meet their scales: 3 multiplications and 1 shuffle of scales per 128 codes, where
    add_scaled_sums has 4 and 2. Q4_K out of the second cache of a Zen 4 core, with minima summed apart: 23.1 -> 25.8
    GB/s. Only if ISA.vnni512.
    """
    quads = [dot_unsigned(b, u, load(b, offset(b, x, 64 * i), V(I8, 64))) for i, u in enumerate(codes)]
    for i in range(0, len(quads), 2):
        packed = call(b, "llvm.x86.avx512.packssdw.512", V(I16, 32), quads[i : i + 2])
        lanes = [group(i + e // 4 % 2, e // 8 * 4 + e % 4) for e in range(32)]
        total = quad_sums(b, packed, take(b, scales, lanes), total)
    return total


def widen(b, v):
    """<8 x T> -> <16 x T>, zeros above."""
    return concat(b, v, ir.Constant(v.type, None))


def magnitude(b, q, x):
    """Signed x signed as unsigned x signed: |q| and x with the sign of q; -128 becomes 128."""
    zero = ir.Constant(q.type, None)
    negative = b.icmp_signed("<", q, zero)
    return b.select(negative, b.sub(zero, q), q), b.select(negative, b.sub(zero, x), x)


# -------------------------------------------------------------------------------------- integer products, q8_32


def dot_unsigned(b, u, s, acc=None):
    """64 u8 * s8 -> 16 i32, sums of four neighbours; u <= 128."""
    return dot(b, "u8s8", const_i(0) if acc is None else acc, b.bitcast(u, VI), b.bitcast(s, VI))


def dot_signed(b, q, x):
    if ISA.dotprod:
        return dot(b, "s8s8", const_i(0), b.bitcast(q, VI), b.bitcast(x, VI))
    return dot_unsigned(b, *magnitude(b, q, x))


def columns(v):
    """(first, lanes) of the 16-value parts of a vector."""
    return [(c, range(c, c + 16)) for c in range(0, v.type.count, 16)]
