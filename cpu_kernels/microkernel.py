"""The one microkernel behind attention and matrix products: acc[m, n].lane += w[n].lane . broadcast32(x + m * stride).

One operand lives in a *panel*, [steps][lanes][g]: g values of one lane in its 32 bits (1 f32, 2 bf16, 4 int8). The
other is broadcast 4 bytes at a time from where it lies, so it needs no packing. `Regs(kind, M, N)` is a block of
accumulators; LLVM keeps it in registers (24 zmm on AVX-512: see ISA.n_acc), and the inner loop is what one would
write by hand: one load per panel vector, one broadcasting dot product per accumulator.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .isa import ISA
from .simd import (
    BF16,
    F32,
    I8,
    I16,
    I32,
    VF,
    VI,
    A,
    I,
    V,
    Vector,
    W,
    call,
    concat,
    const_i,
    fma_,
    llvm_vector,
    load,
    offset,
    round_bf16,
    shuffle,
    splat,
    store,
)


class Regs(types.Type):
    """M x N vectors; kind 'f' or 'i'."""

    def __init__(self, kind, M, N):
        self.kind, self.M, self.N = kind, M, N
        super().__init__(f"simd.{kind}x{W}[{M},{N}]")


@register_model(Regs)
class _RegsModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.ArrayType(llvm_vector(fe_type.kind), fe_type.M * fe_type.N))


# --------------------------------------------------------------------- dot products: acc.lane += sum_g x[g] * y[g]


def _high(b, x):
    return b.bitcast(b.and_(x, const_i(0xFFFF0000 - (1 << 32))), VF)


def _low(b, x):
    return b.bitcast(b.shl(x, const_i(16)), VF)


def dot(b, mode, acc, x, y):
    """mode 'f32', 'bf16', or of bytes, where y is signed:

    u8s8    x is unsigned; at most 127 unless ISA.u8s8
    s8s8    x is signed; ISA.dotprod only
    pairs   as u8s8, but acc is 32 i16, sums of pairs, which must not overflow
    words   two int16 a lane
    """
    if mode == "f32":
        return fma_(b, b.bitcast(x, VF), b.bitcast(y, VF), acc)
    if mode == "bf16":
        if ISA.bf16:
            ty = V(BF16, 32)
            return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF, [acc, b.bitcast(x, ty), b.bitcast(y, ty)])
        return fma_(b, _high(b, x), _high(b, y), fma_(b, _low(b, x), _low(b, y), acc))
    if mode == "words":
        return quad_sums(b, b.bitcast(x, V(I16, 32)), b.bitcast(y, V(I16, 32)), acc)
    x, y = b.bitcast(x, V(I8, 64)), b.bitcast(y, V(I8, 64))
    if mode == "pairs":
        return b.bitcast(b.add(b.bitcast(acc, V(I16, 32)), pair_sums(b, x, y)), VI)
    if mode == "s8s8" or (ISA.dotprod and not ISA.i8mm):
        return _dot_parts(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, x, y, 4)
    assert mode == "u8s8"
    if ISA.vnni512:
        return _dot_parts(b, "llvm.x86.avx512.vpdpbusd.512", acc, x, y, 1)
    if ISA.avxvnni:
        return _dot_parts(b, "llvm.x86.avx512.vpdpbusd.256", acc, x, y, 2)
    if ISA.i8mm:
        return _dot_parts(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc, x, y, 4)
    return quad_sums(b, pair_sums(b, x, y), const_i(1, 32, I16), acc)


def _dot_parts(b, name, acc, x, y, n):
    """An instruction (acc, x, y) on 1/n of the lanes."""
    part = lambda v, i: shuffle(b, v, v, range(i * v.type.count // n, (i + 1) * v.type.count // n))  # noqa: E731
    return concat(b, *[call(b, name, V(I32, W // n), [part(v, i) for v in (acc, x, y)]) for i in range(n)])


def pair_sums(b, u, s):
    """64 u8 * s8 -> 32 i16, sums of two neighbours; u <= 127, since x86 saturates."""
    if ISA.avx512:
        return call(b, "llvm.x86.avx512.pmaddubs.w.512", V(I16, 32), [u, s])
    if ISA.avx2:
        part = lambda v, h: shuffle(b, v, v, range(h, h + 32))  # noqa: E731
        name = "llvm.x86.avx2.pmadd.ub.sw"
        return concat(b, *[call(b, name, V(I16, 16), [part(u, h), part(s, h)]) for h in (0, 32)])
    p = b.mul(b.zext(u, V(I16, 64)), b.sext(s, V(I16, 64)))
    return b.add(shuffle(b, p, p, range(0, 64, 2)), shuffle(b, p, p, range(1, 64, 2)))


def quad_sums(b, x, y, acc=None):
    """n i16 * i16 -> n / 2 i32, sums of two neighbours, added to acc; n = 16 or 32."""
    n = x.type.count
    if n == 32 and acc is not None and ISA.vnni512:
        return call(b, "llvm.x86.avx512.vpdpwssd.512", VI, [acc, x, y])
    if n == 32 and ISA.avx512:
        p = call(b, "llvm.x86.avx512.pmaddw.d.512", VI, [x, y])
    elif n == 16 and ISA.avx2:
        p = call(b, "llvm.x86.avx2.pmadd.wd", V(I32, 8), [x, y])
    elif n == 32:
        p = concat(b, *[quad_sums(b, shuffle(b, x, x, h), shuffle(b, y, y, h)) for h in (range(16), range(16, 32))])
    else:
        p = b.mul(b.sext(x, V(I32, n)), b.sext(y, V(I32, n)))
        p = b.add(shuffle(b, p, p, range(0, n, 2)), shuffle(b, p, p, range(1, n, 2)))
    return p if acc is None else b.add(acc, p)


def _rank1(mode, w_first, less_128=False, w_type=A):
    """w_first: the panel is the dot's first operand (for u8s8: the unsigned one); less_128: of broadcast bytes.

    w_type I: the panel's vector itself, of a block with N = 1.
    """

    @intrinsic
    def rank1(_context, acc, w, x, stride):
        def emit(context, b, sig, args):
            regs, w, x, stride = args
            panel = [w] if w_type == I else [load(b, offset(b, w, 64 * n), VI, 4) for n in range(acc.N)]
            for m in range(acc.M):
                value = splat(b, load(b, x, I32, 4))
                if less_128:
                    value = b.xor(value, const_i(0x80808080 - (1 << 32)))
                for n in range(acc.N):
                    k = m * acc.N + n
                    pair = (panel[n], value) if w_first else (value, panel[n])
                    regs = b.insert_value(regs, dot(b, mode, b.extract_value(regs, k), *pair), k)
                if m + 1 < acc.M:
                    x = b.add(x, stride)
            return regs

        return acc(acc, w_type, A, A), emit

    return rank1


rank1_f32 = _rank1("f32", True)
rank1_bf16 = _rank1("bf16", True)
rank1_wu8 = _rank1("u8s8", True)  # panel unsigned, broadcast signed
rank1_ws8 = _rank1("u8s8", False)  # panel signed, broadcast unsigned
rank1_s8 = _rank1("s8s8", False, less_128=True)  # panel signed, broadcast a byte that is 128 more than its value
rank1_of_bf16 = _rank1("bf16", True, w_type=I)  # the panel is one register
rank1_pairs = _rank1("pairs", True)  # as rank1_wu8, to sums of pairs
rank1_words = _rank1("words", True)


@intrinsic
def add_pairs(_context, acc, pairs):
    """acc[m, n] += the two halves of each lane of pairs[m, n]"""

    def emit(context, b, sig, args):
        def add(m, n, v):
            x = b.bitcast(b.extract_value(args[1], m * acc.N + n), V(I16, 2 * W))
            return quad_sums(b, x, const_i(1, 2 * W, I16), v)

        return _each(b, args[0], acc, add)

    return acc(acc, pairs), emit


# ------------------------------------------------------------------------------------------- blocks of accumulators


def _literal(ty):
    return ty.literal_value if isinstance(ty, types.IntegerLiteral) else None


def _zeros(kind):
    @intrinsic(prefer_literal=True)
    def zeros(_context, M, N):
        if _literal(M) is None or _literal(N) is None:
            return None
        ty = Regs(kind, _literal(M), _literal(N))
        return ty(M, N), lambda context, b, sig, args: ir.Constant(ir.ArrayType(llvm_vector(kind), ty.M * ty.N), None)

    return zeros


zeros_f, zeros_i = _zeros("f"), _zeros("i")


@intrinsic(prefer_literal=True)
def get(_context, acc, k):
    """Register k of a block (a literal)."""
    if _literal(k) is None:
        return None
    index = _literal(k)
    return Vector(acc.kind)(acc, types.literal(index)), lambda context, b, sig, args: b.extract_value(args[0], index)


def _each(b, regs, ty, f):
    """Replace every register: f(m, n, value)."""
    for m in range(ty.M):
        for n in range(ty.N):
            k = m * ty.N + n
            regs = b.insert_value(regs, f(m, n, b.extract_value(regs, k)), k)
    return regs


def _rows(b, address, stride, M):
    """Addresses of M rows."""
    rows = [address]
    for _ in range(M - 1):
        rows.append(b.add(rows[-1], stride))
    return rows


@intrinsic
def load_regs(_context, acc, p, stride):
    """acc[m, n] = *(p + m * stride + 64 n)"""

    def emit(context, b, sig, args):
        rows = _rows(b, args[1], args[2], acc.M)
        return _each(b, args[0], acc, lambda m, n, _: load(b, offset(b, rows[m], 64 * n), llvm_vector(acc.kind), 4))

    return acc(acc, A, A), emit


@intrinsic
def store_regs(_context, acc, p, stride):
    """*(p + m * stride + 64 n) = acc[m, n]"""

    def emit(context, b, sig, args):
        rows = _rows(b, args[1], args[2], acc.M)
        for m in range(acc.M):
            for n in range(acc.N):
                store(b, b.extract_value(args[0], m * acc.N + n), offset(b, rows[m], 64 * n), 4)

    return types.void(acc, A, A), emit


@intrinsic
def store_regs_bf16(_context, acc, p, stride):
    """*(p + m * stride + 32 n) = acc[m, n] as 16 bf16"""

    def emit(context, b, sig, args):
        rows = _rows(b, args[1], args[2], acc.M)
        for m in range(acc.M):
            for n in range(acc.N):
                value = round_bf16(b, b.extract_value(args[0], m * acc.N + n))
                store(b, value, offset(b, rows[m], 32 * n), 4)

    return types.void(acc, A, A), emit


@intrinsic
def mul_regs(_context, acc, p):
    """acc[m, n] *= *(p + 64 n): a factor per lane"""

    def emit(context, b, sig, args):
        factor = [load(b, offset(b, args[1], 64 * n), VF, 4) for n in range(acc.N)]
        return _each(b, args[0], acc, lambda m, n, v: b.fmul(v, factor[n]))

    return acc(acc, A), emit


@intrinsic
def mul_rows(_context, acc, p):
    """acc[m, n] *= broadcast(f32 at p + 4 m): a factor per row"""

    def emit(context, b, sig, args):
        factor = [splat(b, load(b, offset(b, args[1], 4 * m), F32, 4)) for m in range(acc.M)]
        return _each(b, args[0], acc, lambda m, n, v: b.fmul(v, factor[m]))

    return acc(acc, A), emit


@intrinsic
def fold_regs(_context, acc, ints, p, stride):
    """acc[m, n] += float(ints[m, n]) * broadcast(f32 at p + m * stride)"""

    def emit(context, b, sig, args):
        factor = [splat(b, load(b, row, F32, 4)) for row in _rows(b, args[2], args[3], acc.M)]

        def fold(m, n, v):
            return fma_(b, b.sitofp(b.extract_value(args[1], m * acc.N + n), VF), factor[m], v)

        return _each(b, args[0], acc, fold)

    return acc(acc, ints, A, A), emit
