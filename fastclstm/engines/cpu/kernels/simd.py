"""A vector type for Numba: LLVM vectors as wide as the machine's registers, for kernels that read as ordinary code.

Pointers are Numba ``CPointer`` values of float32 or float64; ``load(p)`` gives a `Vector` of that scalar with as many
lanes as one register holds. ``+ - * /`` and unary minus work on vectors and between a vector and a number. Pointers are
not checked: whoever calls a kernel validates first.
"""

from __future__ import annotations

import operator

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, models, register_model


def _cpu_features() -> frozenset[str]:
    """Names of the features that Numba compiles for: those it was told, else the host's."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    if config.CPU_NAME not in (None, "host"):
        return frozenset()
    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


FEATURES = _cpu_features()
IS_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))
HAS_FMA = IS_ARM or "fma" in FEATURES or "avx512f" in FEATURES
VECTOR_BYTES = 64 if "avx512f" in FEATURES else 32 if {"avx2", "fma"} <= FEATURES else 16
HAS_SCALING = {"avx512f", "avx512dq"} <= FEATURES
REGISTERS = 32 if "avx512f" in FEATURES or IS_ARM else 16

INT32, INT64 = ir.IntType(32), ir.IntType(64)


def lanes(itemsize: int) -> int:
    """Count of scalars of `itemsize` bytes in one vector."""
    return VECTOR_BYTES // itemsize


class Vector(types.Type):
    """The Numba type of one register full of `scalar`."""

    def __init__(self, scalar: types.Float):
        self.scalar = scalar
        self.lanes = lanes(scalar.bitwidth // 8)
        super().__init__(f"vector({self.lanes} x {scalar})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, llvm_vector(fe_type.scalar))


def llvm_scalar(scalar: types.Float) -> ir.Type:
    """LLVM type of a float32 or float64."""
    return ir.FloatType() if scalar == types.float32 else ir.DoubleType()


def llvm_vector(scalar: types.Float) -> ir.VectorType:
    """LLVM type of one register full of `scalar`."""
    return ir.VectorType(llvm_scalar(scalar), lanes(scalar.bitwidth // 8))


# ------------------------------------------------------------------------------------- emitting LLVM instructions


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector with `value` in every lane."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def splat(builder: ir.IRBuilder, scalar: ir.Value, count: int | None = None) -> ir.Value:
    """Return a vector with `scalar` in each of `count` lanes; None: in those of one register."""
    if count is None:
        count = VECTOR_BYTES // (4 if scalar.type in (ir.FloatType(), INT32) else 8)
    vector = ir.VectorType(scalar.type, count)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, count), [0] * count))


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic `name` overloaded for the vector type of the arguments, which it also returns."""
    vector = args[0].type
    suffix = f".v{vector.count}f{32 if vector.element == ir.FloatType() else 64}"
    function_type = ir.FunctionType(vector, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}{suffix}"), args)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """A * b + c in one instruction where the machine has one, else in two."""
    return call(builder, "fma", a, b, c) if HAS_FMA else builder.fadd(builder.fmul(a, b), c)


def emit_load(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType, index: int = 0) -> ir.Value:
    """Load the `index`-th vector at a pointer to scalars, at any alignment."""
    address = builder.gep(builder.bitcast(pointer, vector.as_pointer()), [INT64(index)])
    return builder.load(address, align=_scalar_bytes(vector))


def emit_store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, index: int = 0) -> None:
    """Store a vector as the `index`-th one at a pointer to scalars, at any alignment."""
    address = builder.gep(builder.bitcast(pointer, value.type.as_pointer()), [INT64(index)])
    builder.store(value, address, align=_scalar_bytes(value.type))


def emit_prefetch(builder: ir.IRBuilder, pointer: ir.Value, locality: int) -> None:
    """Ask for a cache line that will be read: locality 3 into the first level, 2 into the second."""
    byte = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(pointer, byte), INT32(0), INT32(locality), INT32(1)])


def emit_loop(builder: ir.IRBuilder, start, stop, step: int, carried: list[ir.Value], body) -> list[ir.Value]:
    """Emit ``for index in range(start, stop, step): carried = body(builder, index, carried)``; return carried."""
    before = builder.block
    loop = builder.append_basic_block("loop")
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", start, stop), loop, done)
    builder.position_at_end(loop)
    index = builder.phi(INT64)
    index.add_incoming(start, before)
    phis = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    new = body(builder, index, list(phis))
    following = builder.add(index, INT64(step))
    latch = builder.block
    index.add_incoming(following, latch)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, latch)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    builder.position_at_end(done)
    results = []
    for value, after in zip(carried, new, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phi.add_incoming(after, latch)
        results.append(phi)
    return results


def _scalar_bytes(vector: ir.VectorType) -> int:
    return 4 if vector.element in (ir.FloatType(), INT32) else 8


# ------------------------------------------------------------------------------------------------------ operators


def _register_operator(function, emit):
    """Give `function` (an operator) its meaning on vectors, and between a vector and a number."""

    @infer_global(function)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [arg for arg in args if isinstance(arg, Vector)]
            others = [arg for arg in args if not isinstance(arg, Vector)]
            if vectors and len(set(vectors)) == 1 and all(isinstance(other, types.Number) for other in others):
                casts = [arg if isinstance(arg, Vector) else vectors[0].scalar for arg in args]
                return signature(vectors[0], *casts)
            return None

    def lower(context, builder, sig, args):
        wide = [arg if isinstance(kind, Vector) else splat(builder, arg)
                for kind, arg in zip(sig.args, args, strict=True)]  # fmt: skip
        return emit(builder, *wide)

    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(function, *kinds)(lower)


for _function, _emit in (
    (operator.add, lambda b, x, y: b.fadd(x, y)),
    (operator.sub, lambda b, x, y: b.fsub(x, y)),
    (operator.mul, lambda b, x, y: b.fmul(x, y)),
    (operator.truediv, lambda b, x, y: b.fdiv(x, y)),
):
    _register_operator(_function, _emit)


@infer_global(operator.neg)
class _Negation(AbstractTemplate):
    def generic(self, args, kws):
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _lower_negation(context, builder, sig, args):
    return builder.fneg(args[0])


# ------------------------------------------------------------------------------- intrinsics: pointers, loads, stores


def _vector_of(pointer: types.CPointer) -> Vector:
    return Vector(pointer.dtype)


@intrinsic
def pointer(typingctx, array):
    """Pointer to the first element of a contiguous array."""

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def at(typingctx, like, address):
    """Pointer to the scalars of the array `like` at an integer address."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(like.dtype)(like, types.uintp), codegen


@intrinsic
def address(typingctx, base):
    """Integer address of a pointer."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], INT64)

    return types.int64(base), codegen


@intrinsic(prefer_literal=True)
def number_or_zero(typingctx, array, index):
    """Integer in an array of int64; the constant 0 where it is an array of bool."""

    def codegen(context, builder, sig, args):
        if sig.args[0].dtype == types.boolean:
            return INT64(0)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [INT64(index.literal_value)]))

    return types.int64(array, index), codegen


@intrinsic
def shift(typingctx, base, count):
    """Pointer `count` elements after `base`."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return base(base, types.intp), codegen


@intrinsic
def prefetch(typingctx, base):
    """Ask for the cache line at a pointer; any address will do."""

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, args[0], 3)
        return context.get_dummy_value()

    return types.void(base), codegen


@intrinsic
def load(typingctx, base):
    """Vector at a pointer, at any alignment."""

    def codegen(context, builder, sig, args):
        return emit_load(builder, args[0], llvm_vector(sig.return_type.scalar))

    return _vector_of(base)(base), codegen


@intrinsic
def store(typingctx, base, value):
    """Write a vector to a pointer, at any alignment."""

    def codegen(context, builder, sig, args):
        emit_store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(base, value), codegen


@intrinsic(prefer_literal=True)
def copy_quarters(typingctx, quarters, target, origin):
    """Copy one, two or four quarters of a vector between pointers."""

    def codegen(context, builder, sig, args):
        whole = llvm_vector(origin.dtype)
        part = ir.VectorType(whole.element, max(1, whole.count * quarters.literal_value // 4))
        emit_store(builder, emit_load(builder, args[2], part), args[1])
        return context.get_dummy_value()

    return types.void(quarters, target, origin), codegen


def _lane_mask(builder: ir.IRBuilder, count: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Mask of the first `count` lanes."""
    narrow = ir.VectorType(INT32, vector.count)
    number = builder.trunc(count, INT32)
    first = builder.insert_element(ir.Constant(narrow, ir.Undefined), number, INT32(0))
    every = builder.shuffle_vector(first, first, ir.Constant(narrow, [0] * vector.count))
    return builder.icmp_signed("<", ir.Constant(narrow, list(range(vector.count))), every)


def _emit_masked(builder: ir.IRBuilder, kind: str, vector: ir.VectorType, result: ir.Type, *args: ir.Value) -> ir.Value:
    letter = "i" if isinstance(vector.element, ir.IntType) else "f"
    name = f"llvm.masked.{kind}.v{vector.count}{letter}{8 * _scalar_bytes(vector)}.p0"
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def emit_load_some(builder: ir.IRBuilder, base: ir.Value, vector: ir.VectorType, count: ir.Value) -> ir.Value:
    """Load the first `count` lanes, zeros in the others, without touching memory beyond them."""
    mask = _lane_mask(builder, count, vector)
    address = builder.bitcast(base, vector.as_pointer())
    align = INT32(_scalar_bytes(vector))
    return _emit_masked(builder, "load", vector, vector, address, align, mask, constant(vector, 0))


def emit_store_some(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, count: ir.Value) -> None:
    """Store the first `count` lanes, without touching memory beyond them."""
    mask, address = _lane_mask(builder, count, value.type), builder.bitcast(base, value.type.as_pointer())
    align = INT32(_scalar_bytes(value.type))
    _emit_masked(builder, "store", value.type, ir.VoidType(), value, address, align, mask)


@intrinsic
def load_some(typingctx, base, count):
    """Vector whose first `count` lanes come from a pointer, zeros in the others."""

    def codegen(context, builder, sig, args):
        return emit_load_some(builder, args[0], llvm_vector(sig.return_type.scalar), args[1])

    return _vector_of(base)(base, types.intp), codegen


@intrinsic
def store_some(typingctx, base, value, count):
    """Write the first `count` lanes of a vector to a pointer."""

    def codegen(context, builder, sig, args):
        emit_store_some(builder, args[1], args[0], args[2])
        return context.get_dummy_value()

    return types.void(base, value, types.intp), codegen


@intrinsic
def broadcast(typingctx, like, value):
    """Vector of the kind of `like` with a number in every lane."""

    def codegen(context, builder, sig, args):
        return splat(builder, args[1])

    return like(like, like.scalar), codegen


@intrinsic
def zeros(typingctx, base):
    """Vector of zeros of the scalar that the pointer `base` points to."""

    def codegen(context, builder, sig, args):
        return constant(llvm_vector(sig.return_type.scalar), 0.0)

    return _vector_of(base)(base), codegen


# ------------------------------------------------------------------------------------- intrinsics: arithmetic on lanes


@intrinsic
def fma(typingctx, a, b, c):
    """A * b + c."""

    def codegen(context, builder, sig, args):
        return emit_fma(builder, *args)

    return a(a, a, a), codegen


def _call_512(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an intrinsic of AVX-512 that makes vectors of float32 and ends with (vector, mask of 16 lanes, *rest)."""
    function_type = ir.FunctionType(args[0].type, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.avx512.{name}.ps.512")
    return builder.call(function, args)


_EVERY_LANE, _CURRENT_ROUNDING = ir.IntType(16)(-1), INT32(4)


@intrinsic
def quotient(typingctx, a, b):
    """Ratio a / b by the quickest way that errs by two roundings at most; 1 / b must be a normal number."""

    def codegen(context, builder, sig, args):
        a, b = args
        if not (HAS_SCALING and a.type.element == ir.FloatType()):
            return builder.fdiv(a, b)
        guess = _call_512(builder, "rcp14", b, constant(a.type, 0.0), _EVERY_LANE)
        error = emit_fma(builder, builder.fneg(b), guess, constant(a.type, 1.0))
        return builder.fmul(a, emit_fma(builder, guess, error, guess))

    return a(a, a), codegen


@intrinsic
def can_scale(typingctx, x):
    """Whether the machine has `fraction` and `scale` for a vector: a constant."""
    answer = HAS_SCALING and x.scalar == types.float32

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(1), int(answer))

    return types.boolean(x), codegen


@intrinsic
def fraction(typingctx, x):
    """Vector x less the nearest integer; 0 of infinities."""

    def codegen(context, builder, sig, args):
        x = args[0]
        if not HAS_SCALING or x.type.element != ir.FloatType():
            return x
        return _call_512(builder, "mask.reduce", x, INT32(0), x, _EVERY_LANE, _CURRENT_ROUNDING)

    return x(x), codegen


@intrinsic
def scale(typingctx, x, n):
    """Vector x · 2**n for integers n."""

    def codegen(context, builder, sig, args):
        x, n = args
        if not HAS_SCALING or x.type.element != ir.FloatType():
            return x
        return _call_512(builder, "mask.scalef", x, n, x, _EVERY_LANE, _CURRENT_ROUNDING)

    return x(x, x), codegen


def _bounded(predicate: str):
    """Codegen of min or max that keeps a NaN of the second argument (one instruction on x86)."""

    def codegen(context, builder, sig, args):
        bound = splat(builder, args[0]) if not isinstance(args[0].type, ir.VectorType) else args[0]
        return builder.select(builder.fcmp_ordered(predicate, bound, args[1]), bound, args[1])

    return codegen


@intrinsic
def minimum(typingctx, bound, value):
    """The smaller of each lane; a NaN in `value` stays."""
    return value(bound if isinstance(bound, Vector) else value.scalar, value), _bounded("<")


@intrinsic
def maximum(typingctx, bound, value):
    """The larger of each lane; a NaN in `value` stays."""
    return value(bound if isinstance(bound, Vector) else value.scalar, value), _bounded(">")


@intrinsic
def select_less(typingctx, a, b, yes, no):
    """`yes` where a < b, else `no` (also where either is NaN)."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return yes(a, a, yes, yes), codegen


@intrinsic
def absolute(typingctx, x):
    """|x|."""

    def codegen(context, builder, sig, args):
        return call(builder, "fabs", args[0])

    return x(x), codegen


@intrinsic
def copy_sign(typingctx, magnitude, sign):
    """`magnitude` with the sign of `sign`."""

    def codegen(context, builder, sig, args):
        return call(builder, "copysign", *args)

    return magnitude(magnitude, magnitude), codegen


@intrinsic
def power_of_two(typingctx, magic_sum):
    """2**n, where `magic_sum` is n plus the number (see `vmath.MAGIC`) that moves n + bias into the low bits."""

    def codegen(context, builder, sig, args):
        vector = args[0].type
        bits, fraction = (INT32, 23) if vector.element == ir.FloatType() else (INT64, 52)
        integers = ir.VectorType(bits, vector.count)
        moved = builder.shl(builder.bitcast(args[0], integers), ir.Constant(integers, [fraction] * vector.count))
        return builder.bitcast(moved, vector)

    return magic_sum(magic_sum), codegen


@intrinsic
def horizontal_sum(typingctx, x):
    """Sum of the lanes, pairwise, in a fixed order."""

    def codegen(context, builder, sig, args):
        value, count = args[0], args[0].type.count
        while count > 1:
            count //= 2
            narrow = ir.VectorType(INT32, count)
            undefined = ir.Constant(value.type, ir.Undefined)
            low = builder.shuffle_vector(value, undefined, ir.Constant(narrow, list(range(count))))
            high = builder.shuffle_vector(value, undefined, ir.Constant(narrow, list(range(count, 2 * count))))
            value = builder.fadd(low, high)
        return builder.extract_element(value, INT32(0))

    return x.scalar(x), codegen


@intrinsic
def is_double(typingctx, value):
    """Whether a vector or pointer holds float64: a constant, so that kernels can choose polynomials by type."""
    scalar = value.scalar if isinstance(value, Vector) else value.dtype
    answer = 1 if scalar == types.float64 else 0

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(1), answer)

    return types.boolean(value), codegen


@intrinsic
def vector_lanes(typingctx, base):
    """Count of lanes of a vector of the scalars that a pointer points to: a constant."""
    count = lanes(base.dtype.bitwidth // 8)

    def codegen(context, builder, sig, args):
        return INT64(count)

    return types.intp(base), codegen
