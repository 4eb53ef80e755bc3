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
    F,
    I,
    V,
    Vector,
    W,
    call,
    const_i,
    fma_,
    instruction,
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
    """mode 'f32', 'bf16' or 'u8s8' (x unsigned, y signed; x <= 127 on AVX2 without VNNI: pairs saturate)."""
    if mode == "f32":
        return fma_(b, b.bitcast(x, VF), b.bitcast(y, VF), acc)
    if mode == "bf16":
        if ISA.bf16:
            ty = V(BF16, 32)
            return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF, [acc, b.bitcast(x, ty), b.bitcast(y, ty)])
        return fma_(b, _high(b, x), _high(b, y), fma_(b, _low(b, x), _low(b, y), acc))
    assert mode == "u8s8"
    if ISA.vnni512:
        ty = V(I8, 64)
        return call(b, "llvm.x86.avx512.vpdpbusd.512", VI, [acc, b.bitcast(x, ty), b.bitcast(y, ty)])
    if ISA.avx2:
        return _dot_u8s8_ymm(b, acc, x, y)
    x, y = b.bitcast(x, V(I8, 64)), b.bitcast(y, V(I8, 64))  # NEON: LLVM finds udot/sdot-like reductions or mul-adds
    product = b.mul(b.zext(x, V(I32, 64)), b.sext(y, V(I32, 64)))
    for g in range(4):
        acc = b.add(acc, shuffle(b, product, product, range(g, 64, 4)))
    return acc


def _dot_u8s8_ymm(b, acc, x, y):
    halves = []
    for h in (0, 8):
        part = lambda v: b.bitcast(shuffle(b, v, v, range(h, h + 8)), V(I8, 32))  # noqa: B023, E731
        part_acc = shuffle(b, acc, acc, range(h, h + 8))
        if ISA.avxvnni:
            halves.append(call(b, "llvm.x86.avx512.vpdpbusd.256", V(I32, 8), [part_acc, part(x), part(y)]))
            continue
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", V(I16, 16), [part(x), part(y)])
        quads = call(b, "llvm.x86.avx2.pmadd.wd", V(I32, 8), [pairs, const_i(1, 16, I16)])
        halves.append(b.add(part_acc, quads))
    return shuffle(b, halves[0], halves[1], range(W))


@instruction(F, F, I, I)
def dot_bf16(b, acc, x, y):
    return dot(b, "bf16", acc, x, y)


@instruction(I, I, I, I)
def dot_u8s8(b, acc, x, y):
    return dot(b, "u8s8", acc, x, y)


def _rank1(mode, w_first):
    """w_first: the panel is the dot's first operand (for u8s8: the unsigned one)."""

    @intrinsic
    def rank1(_context, acc, w, x, stride):
        def emit(context, b, sig, args):
            regs, w, x, stride = args
            panel = [load(b, offset(b, w, 64 * n), VI, 4) for n in range(acc.N)]
            for m in range(acc.M):
                value = splat(b, load(b, x, I32, 4))
                for n in range(acc.N):
                    k = m * acc.N + n
                    pair = (panel[n], value) if w_first else (value, panel[n])
                    regs = b.insert_value(regs, dot(b, mode, b.extract_value(regs, k), *pair), k)
                if m + 1 < acc.M:
                    x = b.add(x, stride)
            return regs

        return acc(acc, A, A, A), emit

    return rank1


rank1_f32 = _rank1("f32", True)
rank1_bf16 = _rank1("bf16", True)
rank1_wu8 = _rank1("u8s8", True)  # panel unsigned, broadcast signed
rank1_ws8 = _rank1("u8s8", False)  # panel signed, broadcast unsigned


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
