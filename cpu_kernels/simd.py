"""Vector registers for Numba: LLVM vectors as Numba types, and the instructions on them as intrinsics.

One shape is used, 16 lanes of 32 bits; LLVM splits it into two ymm (AVX2) or four q registers (NEON) by itself.
Values are SSA registers: no memory, no reference counts. Addresses are plain int64.

    F   16 x f32           I   16 x i32, or any 64 bytes: 32 bf16 or i16, 64 i8

Only what has no generic LLVM form is chosen per CPU (`dot` in microkernel.py, `pause` here). Importing this module
imports Numba: only kernel factories do.
"""

from __future__ import annotations

import operator
import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic, models, overload, register_model

from ._jit import OPTIONS
from .isa import ISA

W = 16
F32, F16, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
V = ir.VectorType
VF, VI = V(F32, W), V(I32, W)
POINTER = ir.PointerType()
A = types.intp  # an address

device = njit(**OPTIONS)  # a helper function of kernels


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    _name = "bfloat"
    _intrinsic_name = "bf16"
    null = "0.0"

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
BF16 = _BFloat()


class Vector(types.Type):
    def __init__(self, kind):
        self.kind = kind
        super().__init__(f"simd.{kind}x{W}")


F, I = Vector("f"), Vector("i")  # noqa: E741


def llvm_vector(kind):
    return VF if kind == "f" else VI


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, llvm_vector(fe_type.kind))


# ------------------------------------------------------------------- helpers that emit LLVM, for intrinsics' bodies


def pointer(b, address, ty=I8):
    return b.inttoptr(address, ir.PointerType(ty))


def load(b, address, ty, align=1):
    value = b.load(pointer(b, address, ty), typ=ty)
    value.align = align
    return value


def store(b, value, address, align=1):
    b.store(value, pointer(b, address, value.type)).align = align


def splat(b, scalar, n=W):
    ty = V(scalar.type, n)
    undefined = ir.Constant(ty, ir.Undefined)
    one = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(V(I32, n), [0] * n))


def call(b, name, result, args):
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def const_i(value, n=W, ty=I32):
    return ir.Constant(V(ty, n), [value] * n)


def const_f(value, n=W):
    return ir.Constant(V(F32, n), [value] * n)


def offset(b, address, n_bytes):
    return address if n_bytes == 0 else b.add(address, ir.Constant(address.type, n_bytes))


def shuffle(b, x, y, index):
    index = list(index)
    return b.shuffle_vector(x, y, ir.Constant(V(I32, len(index)), index))


def concat(b, *xs):
    """Concatenate a power of two of equal vectors."""
    xs = list(xs)
    while len(xs) > 1:
        n = xs[0].type.count
        xs = [shuffle(b, xs[i], xs[i + 1], range(2 * n)) for i in range(0, len(xs), 2)]
    return xs[0]


def fma_(b, x, y, z):
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])


def round_bf16(b, v):
    """<n x f32> -> <n x bfloat>, round to nearest even: vcvtneps2bf16, or what LLVM would call a library for."""
    n = v.type.count
    if ISA.bf16:
        return b.fptrunc(v, V(BF16, n))
    bits = b.bitcast(v, V(I32, n))
    high = b.lshr(bits, const_i(16, n))
    rounded = b.lshr(b.add(b.add(bits, const_i(0x7FFF, n)), b.and_(high, const_i(1, n))), const_i(16, n))
    bits = b.select(b.fcmp_unordered("uno", v, v), b.or_(high, const_i(0x40, n)), rounded)
    return b.bitcast(b.trunc(bits, V(I16, n)), V(BF16, n))


def to_bf16(b, lo, hi):
    """Two <16 x f32> -> <32 x bfloat>, round to nearest even"""
    return round_bf16(b, concat(b, lo, hi))


def instruction(result, *arguments):
    """Make an intrinsic of fixed types: the decorated body gets (builder, *llvm values) and returns an llvm value."""

    def decorate(emit):
        def typer(_context, *_types):
            return signature(result, *arguments), lambda context, b, sig, args: emit(b, *args)

        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope = {"typer": typer}  # Numba wants an intrinsic with as many named parameters as it is called with
        exec(f"def {emit.__name__}({', '.join(filter(None, ('context', names)))}): "
             f"return typer({', '.join(filter(None, ('context', names)))})", scope)  # fmt: skip
        function = scope[emit.__name__]
        function.__doc__ = emit.__doc__
        return intrinsic(function)

    return decorate


# ---------------------------------------------------------------------------------------------- loads and stores


@instruction(F, A)
def ld(b, a):
    return load(b, a, VF)


@instruction(I, A)
def ldi(b, a):
    return load(b, a, VI)


@instruction(F, A)
def ld_f16(b, a):
    """16 f16 -> F"""
    return b.fpext(load(b, a, V(F16, W)), VF)


@instruction(F, A)
def ld_bf16(b, a):
    """16 bf16 -> F"""
    return b.bitcast(b.shl(b.zext(load(b, a, V(I16, W)), VI), const_i(16)), VF)


@instruction(F, A)
def ld_u8_16(b, a):
    """16 uint8 -> F"""
    return b.uitofp(b.zext(load(b, a, V(I8, W)), VI), VF)


@instruction(types.void, A, F)
def st(b, a, v):
    store(b, v, a)


@instruction(types.void, A, I)
def sti(b, a, v):
    store(b, v, a)


@instruction(types.void, A, F)
def st_f16(b, a, v):
    """F -> 16 f16, round to nearest even"""
    store(b, b.fptrunc(v, V(F16, W)), a)


@instruction(types.void, A, F)
def st_bf16(b, a, v):
    """F -> 16 bf16, round to nearest even"""
    store(b, round_bf16(b, v), a)


@instruction(types.void, A, I)
def st_i8(b, a, v):
    """I -> 16 int8, the low byte of each lane"""
    store(b, b.trunc(v, V(I8, W)), a)


def _scalar_load(name, result, ty):
    def emit(b, a):
        return load(b, a, ty)

    emit.__name__ = name
    return instruction(result, A)(emit)


def _scalar_store(name, argument):
    def emit(b, a, v):
        store(b, v, a)

    emit.__name__ = name
    return instruction(types.void, A, argument)(emit)


ld_scalar = _scalar_load("ld_scalar", types.float32, F32)
ld_i32 = _scalar_load("ld_i32", types.int32, I32)
ld_i64 = _scalar_load("ld_i64", types.int64, I64)
st_scalar = _scalar_store("st_scalar", types.float32)
st_i32 = _scalar_store("st_i32", types.int32)
st_i64 = _scalar_store("st_i64", types.int64)


def prefetch_(b, a):
    ty = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, ty, "llvm.prefetch.p0")
    b.call(function, [pointer(b, a)] + [ir.Constant(I32, v) for v in (0, 2, 1)])


@instruction(types.void, A)
def prefetch(b, a):
    """Bring the cache line at an address towards L2."""
    prefetch_(b, a)


# -------------------------------------------------------------------------------------------------- rearranging


@instruction(types.void, A, A, A, A)
def transpose16(b, source, source_stride, target, target_stride):
    """16 rows of 16 x 32 bits become 16 columns."""
    rows = []
    for _ in range(16):
        rows.append(load(b, source, VI))
        source = b.add(source, source_stride)
    for s in (1, 2, 4, 8):  # swap the off-diagonal quarters of squares of 2s
        for i in range(16):
            if i & s == 0:
                x, y = rows[i], rows[i + s]
                rows[i] = shuffle(b, x, y, [16 + j - s if j & s else j for j in range(16)])
                rows[i + s] = shuffle(b, x, y, [16 + j if j & s else j + s for j in range(16)])
    for row in rows:
        store(b, row, target)
        target = b.add(target, target_stride)


@instruction(I, F, F)
def pair_bf16(b, x, y):
    """Lane i has bf16 of x[i] below that of y[i]."""
    both = b.bitcast(to_bf16(b, x, y), V(I16, 2 * W))
    return b.bitcast(shuffle(b, both, both, [i // 2 + W * (i % 2) for i in range(2 * W)]), VI)


# -------------------------------------------------------------------------------------------------- broadcasts


@instruction(F, types.float32)
def bc(b, x):
    """A float in all lanes"""
    return splat(b, x)


@instruction(I, types.int32)
def bci(b, x):
    """An int32 in all lanes"""
    return splat(b, x)


@instruction(F, A)
def bc_ld(b, a):
    """The f32 at an address in all lanes"""
    return splat(b, load(b, a, F32))


# -------------------------------------------------------------------------------------------------- arithmetic


def _operator(symbol, vector, emit):
    op = instruction(vector, vector, vector)(emit)

    @overload(symbol)
    def _(x, y):
        if x == vector and y == vector:
            return lambda x, y: op(x, y)


def _named(name, f):
    f.__name__ = name
    return f


for _symbol, _vector, _emit in (
    (operator.add, F, lambda b, x, y: b.fadd(x, y)),
    (operator.sub, F, lambda b, x, y: b.fsub(x, y)),
    (operator.mul, F, lambda b, x, y: b.fmul(x, y)),
    (operator.truediv, F, lambda b, x, y: b.fdiv(x, y)),
    (operator.add, I, lambda b, x, y: b.add(x, y)),
    (operator.sub, I, lambda b, x, y: b.sub(x, y)),
    (operator.mul, I, lambda b, x, y: b.mul(x, y)),
    (operator.and_, I, lambda b, x, y: b.and_(x, y)),
    (operator.or_, I, lambda b, x, y: b.or_(x, y)),
    (operator.xor, I, lambda b, x, y: b.xor(x, y)),
):
    _operator(_symbol, _vector, _named(_symbol.__name__.strip("_") + _vector.kind, _emit))


@instruction(F, F, F, F)
def fma(b, x, y, z):
    """x * y + z, rounded once"""
    return fma_(b, x, y, z)


@instruction(F, F, F)
def vmax(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@instruction(F, F, F)
def vmin(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@instruction(F, F)
def vabs(b, x):
    return call(b, "llvm.fabs.v16f32", VF, [x])


@instruction(F, I)
def to_f(b, x):
    return b.sitofp(x, VF)


@instruction(I, F)
def to_i(b, x):
    """Round to nearest even"""
    return b.fptosi(call(b, "llvm.rint.v16f32", VF, [x]), VI)


@instruction(I, I, types.int32)
def shl(b, x, n):
    return b.shl(x, splat(b, n))


@instruction(I, I, types.int32)
def shr(b, x, n):
    """Logical shift right"""
    return b.lshr(x, splat(b, n))


@instruction(F, I, I, F, F)
def where_lt(b, x, y, yes, no):
    """yes where x < y (signed), else no"""
    return b.select(b.icmp_signed("<", x, y), yes, no)


def reduce_add(b, x):
    ty = ir.FunctionType(F32, [F32, x.type])
    function = cgutils.get_or_insert_function(b.module, ty, f"llvm.vector.reduce.fadd.v{x.type.count}f32")
    return b.call(function, [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))


@instruction(types.float32, F)
def hsum(b, x):
    return reduce_add(b, x)


@instruction(types.float32, F)
def hmax(b, x):
    return call(b, "llvm.vector.reduce.fmax.v16f32", F32, [x])


@instruction(types.int32, I)
def hsumi(b, x):
    return call(b, "llvm.vector.reduce.add.v16i32", I32, [x])


def exp2_(b, x):
    """2**x, relative error 2e-7; 0 below -126 (so no denormals), inf from 128 on, NaN stays NaN."""
    low = b.fcmp_ordered("<", x, const_f(-126.0))
    clamped = b.select(low, const_f(-126.0), b.select(b.fcmp_ordered(">", x, const_f(128.0)), const_f(128.0), x))
    whole = call(b, "llvm.rint.v16f32", VF, [clamped])
    rest = b.fsub(clamped, whole)
    p = const_f(1.535336188319500e-4)
    for c in (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
              2.402264791363012e-1, 6.931472028550421e-1, 1.0):  # fmt: skip
        p = fma_(b, p, rest, const_f(c))
    exponent = b.shl(b.fptosi(whole, VI), const_i(23))
    y = b.bitcast(b.add(b.bitcast(p, VI), exponent), VF)
    y = b.select(b.fcmp_ordered(">=", x, const_f(128.0)), const_f(float("inf")), y)
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(low, const_f(0.0), y))


@instruction(F, F)
def vexp2(b, x):
    return exp2_(b, x)


@instruction(F, F)
def vexp2_down(b, x):
    """2**x for x <= 0, as softmax needs it: 0 at -inf, and without the checks of vexp2.

    0 below -126, but on AVX-512, where vscalefps does the end of it (its powers of 2 below -126 are denormal).
    """
    low = b.fcmp_ordered("<", x, const_f(-126.0))
    if not ISA.avx512:
        x = b.select(low, const_f(-126.0), x)
    whole = call(b, "llvm.rint.v16f32", VF, [x])
    rest = b.fsub(x, whole)  # NaN at -inf, of which vscalefps makes 0 as it should
    p = const_f(1.535336188319500e-4)
    for c in (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
              2.402264791363012e-1, 6.931472028550421e-1, 1.0):  # fmt: skip
        p = fma_(b, p, rest, const_f(c))
    if ISA.avx512:
        arguments = [p, whole, ir.Constant(VF, None), ir.Constant(I16, -1), ir.Constant(I32, 4)]
        return call(b, "llvm.x86.avx512.mask.scalef.ps.512", VF, arguments)
    exponent = b.shl(b.fptosi(whole, VI), const_i(23))
    return b.select(low, const_f(0.0), b.bitcast(b.add(b.bitcast(p, VI), exponent), VF))


# ------------------------------------------------------------------------- threads, addresses and kernel arguments


@instruction(types.int64, A, types.int64)
def atomic_add(b, a, v):
    """Returns the value before"""
    return b.atomic_rmw("add", pointer(b, a, I64), v, "seq_cst")


@instruction(types.int64, A, types.int64)
def atomic_exchange(b, a, v):
    return b.atomic_rmw("xchg", pointer(b, a, I64), v, "seq_cst")


@instruction(types.int64, A)
def atomic_load(b, a):
    return b.load_atomic(pointer(b, a, I64), "seq_cst", 8, typ=I64)


@instruction(types.void, A, types.int64)
def atomic_store(b, a, v):
    b.store_atomic(v, pointer(b, a, I64), "seq_cst", 8)


@instruction(types.void)
def pause(b):
    # not inline assembly: llvmlite has no assembly parser at run time, LLVM would abort the process
    if ISA.x86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
    else:
        call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])


@instruction(types.void)
def yield_thread(b):
    """Give the core to another thread of the system."""
    if sys.platform != "win32":
        call(b, "sched_yield", I32, [])


@instruction(types.int64)
def ticks(b):
    """A clock that only grows: the time stamp counter on x86, processor time of the process in us elsewhere."""
    if ISA.x86:
        return call(b, "llvm.readcyclecounter", I64, [])
    return call(b, "clock", I64, [])


@instruction(types.void, A, A, types.int64, A)
def call_kernel(b, entry, args, tile, scratch):
    """Call a compiled kernel by its address (the ABI of _jit.py; its status is always 0)."""
    result = cgutils.alloca_once(b, POINTER)
    excinfo = cgutils.alloca_once(b, POINTER)
    ty = ir.FunctionType(I32, [POINTER, POINTER, I64, I64, I64])
    function = b.inttoptr(entry, ir.PointerType(ty))
    b.call(function, [result, excinfo, args, tile, scratch])


def unpack(kinds):
    """An intrinsic address -> tuple of a kernel's arguments, 8 bytes each: 'i64', or 'f32' in the low four."""

    @intrinsic
    def arguments(_context, address):
        result = types.Tuple([types.float32 if k == "f32" else types.int64 for k in kinds])

        def emit(context, b, sig, args):
            values = [load(b, offset(b, args[0], 8 * i), F32 if k == "f32" else I64) for i, k in enumerate(kinds)]
            return context.make_tuple(b, result, values)

        return result(types.intp), emit

    return arguments
