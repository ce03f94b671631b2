import array
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from fastclstm import ConvLSTM2D, dispatch, functional
from fastclstm.engines.cuda import devices


@pytest.mark.parametrize("name", dispatch.ENGINES)
def test_an_engine_has_the_six_functions_and_its_algorithms(name):
    engine = dispatch.get_engine(name)
    assert all(callable(getattr(engine, operation)) for operation in dispatch.OPERATIONS)
    assert ("simt" if name == "cuda" else "direct") in engine.ALGORITHMS
    assert "auto" not in engine.ALGORITHMS


def test_no_name_means_the_cpu():
    assert dispatch.get_engine() is dispatch.get_engine("cpu")


def test_unknown_engine():
    with pytest.raises(ValueError, match="unknown engine 'gpu'; this version of fastclstm has 'cpu', 'cuda' and"):
        dispatch.get_engine("gpu")


def test_engine_whose_library_is_missing(monkeypatch):
    monkeypatch.setitem(dispatch.ENGINES, "cpu", "fastclstm.engines.absent")
    with pytest.raises(ImportError, match=r"engine 'cpu' cannot be used: No module .*; install numba, or pass engine="):
        dispatch.get_engine("cpu")


def test_algorithm_unknown_to_the_engine():
    reference = dispatch.get_engine("reference")
    dispatch.check_algorithm("conv2d", reference, "auto")
    dispatch.check_algorithm("conv2d", reference, "direct")
    with pytest.raises(ValueError, match=r"^conv2d: algorithm must be one of 'auto', 'direct' on engine 'reference', "
                                         r"got 'winograd'$"):  # fmt: skip
        dispatch.check_algorithm("conv2d", reference, "winograd")


# Arrays in.


def test_numpy_arrays_come_in_as_they_are():
    x = np.arange(6.0).reshape(2, 3)[:, ::-1]
    assert dispatch.as_numpy("op", "x", x) is x


class Exporter:
    """An array that speaks DLPack alone."""

    def __init__(self, device=(1, 0)):
        self.values, self.device = np.arange(3.0), device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)


@pytest.mark.parametrize(
    "value", [[0.0, 1.0, 2.0], (0, 1, 2), range(3), array.array("d", [0, 1, 2]), memoryview(np.arange(3.0)), Exporter()]
)
def test_other_arrays_come_in(value):
    x = dispatch.as_numpy("op", "x", value)
    assert type(x) is np.ndarray
    np.testing.assert_array_equal(x, [0, 1, 2])


def test_dlpack_is_not_copied():
    exporter = Exporter()
    assert np.shares_memory(dispatch.as_numpy("op", "x", exporter), exporter.values)


def test_subclasses_come_in_as_plain_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3.0))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert type(dispatch.as_numpy("op", "x", mapped)) is np.ndarray


def test_scalars_are_arrays_of_no_dimension():
    assert dispatch.as_numpy("op", "x", 3).shape == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(2, complex), r"op: x has dtype complex128 but must hold real numbers \(float32 or float64\)"),
        (np.array([1, None]), "op: x has dtype object but must hold real numbers"),
        (np.array(["a"]), "op: x has dtype <U1 but must hold real numbers"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"op: x has dtype datetime64\[D\] but must hold real numbers"),
        (None, "op: x has dtype object but must hold real numbers"),
        ([[1.0], [1.0, 2.0]], "op: x is not a rectangular array: "),
        (np.ma.masked_array([1.0, 2.0], [False, True]),
         r"op: x is a masked array, whose mask would be lost; pass x\.filled\(value\)"),
        (Exporter((2, 0)), "op: x lives on DLPack device 2, not in the processor's memory; move it to the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_come_in(value, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        dispatch.as_numpy("op", "x", value)


def test_an_export_that_fails_is_explained():
    exporter = Exporter()
    exporter.values = exporter.values.astype(">f8")  # DLPack knows no byte order
    with pytest.raises(TypeError, match=r"^op: x cannot be read as a NumPy array: "):
        dispatch.as_numpy("op", "x", exporter)


def test_short_floats_come_in_as_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.linspace(-2, 2, 9)
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        x = dispatch.as_numpy("op", "x", values.astype(dtype))
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, values.astype(dtype).astype(np.float64))
    with pytest.raises(TypeError, match=r"op: x has dtype \[.*\] but must hold real numbers"):
        dispatch.as_numpy("op", "x", np.zeros(2, [("a", np.float32)]))


# Tensors of PyTorch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


X = np.random.default_rng(0).standard_normal((1, 2, 5, 4, 1)).astype("f4")
WEIGHTS = [np.random.default_rng(1).standard_normal(shape).astype("f4") for shape in ((3, 3, 1, 8), (3, 3, 2, 8))]


def test_signs_that_torch_has_put_off(torch):
    later = torch.complex(torch.zeros(X.shape), torch.from_numpy(X)).conj().imag
    assert later.is_neg()
    np.testing.assert_array_equal(dispatch.as_numpy("op", "x", later), -X)
    expected = functional.convlstm2d(-X, *WEIGHTS)
    np.testing.assert_array_equal(functional.convlstm2d(later, *WEIGHTS).numpy(), expected)
    with pytest.raises(TypeError, match="op: x has dtype complex64 but must hold real numbers"):
        dispatch.as_numpy("op", "x", torch.zeros(2, dtype=torch.complex64).conj())


def test_bfloat16_of_torch_comes_in_as_float32(torch):
    x = torch.from_numpy(X).bfloat16()
    expected = functional.convlstm2d(x.float().numpy(), *WEIGHTS)
    np.testing.assert_array_equal(functional.convlstm2d(x, *WEIGHTS).numpy(), expected)


def test_no_gradient_is_cut_off_unasked(torch):
    x = torch.from_numpy(X).requires_grad_()
    with pytest.raises(TypeError, match=r"^convlstm2d: x requires grad, .* no part of PyTorch's graph; to train, use "
                                        r"fastclstm.adapters.torch or wrap convlstm2d_vjp .*; for inf"):  # fmt: skip
        functional.convlstm2d(x, *WEIGHTS)
    with pytest.raises(TypeError, match=r"^ConvLSTM2D: x requires grad, "):
        ConvLSTM2D(1, 2, kernel_size=3)(x)
    with torch.no_grad():
        np.testing.assert_array_equal(functional.convlstm2d(x, *WEIGHTS).numpy(), functional.convlstm2d(X, *WEIGHTS))


def test_the_way_to_train_that_the_error_names(torch):
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, ctx.pullback = functional.convlstm2d_vjp(x, *WEIGHTS)
            return y

        @staticmethod
        def backward(ctx, dy):
            return ctx.pullback(dy)["x"]

    x = torch.from_numpy(X).requires_grad_()
    (Differentiable.apply(x) ** 2).sum().backward()
    y, pullback = functional.convlstm2d_vjp(X, *WEIGHTS)
    np.testing.assert_allclose(x.grad.numpy(), pullback(2 * y)["x"], rtol=1e-6)


def test_tensors_without_values(torch):
    message = "^op: x is a tensor without values .* from a function under torch.compiler.disable"
    with pytest.raises(TypeError, match=message):
        dispatch.as_numpy("op", "x", torch.zeros(3, device="meta"))
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake_tensor.FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(TypeError, match=message):
        dispatch.as_numpy("op", "x", fake)


def test_what_transforms_tensors_is_refused(torch):
    """It would see constants, or DLPack the memory of what merely stands for the values."""
    x = torch.from_numpy(X)

    def call(x):
        return functional.convlstm2d(x, *WEIGHTS)

    message = r"^convlstm2d: x is transformed by torch\.func .* wrap convlstm2d_vjp or its like"
    for transformed in (
        lambda: torch.vmap(call)(x[np.newaxis]),
        lambda: torch.func.functionalize(call)(x),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.jacfwd(call)(x),
    ):
        with pytest.raises(TypeError, match=message):
            transformed()
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        with pytest.raises(TypeError, match=message):
            call(forward_ad.make_dual(x, x))
        np.testing.assert_array_equal(call(x).numpy(), functional.convlstm2d(X, *WEIGHTS))  # x has no tangent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_would_keep_one_output(torch):
    with pytest.raises(
        TypeError, match=r"torch\.jit\.trace, and ONNX exports by it, would keep the output of this one"
    ):
        torch.jit.trace(lambda x: functional.convlstm2d(x, *WEIGHTS), torch.from_numpy(X))


def test_float8_is_float32(torch):
    x = torch.from_numpy(X).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(dispatch.as_numpy("op", "x", x), x.float().numpy())


COMPILED = """
import numpy as np, torch
from fastclstm import ConvLSTM2D, functional

layer, x = ConvLSTM2D(1, 2, kernel_size=3), torch.randn(1, 3, 5, 4, 1)
call = lambda x: layer(x * 2) + functional.max_pool3d(x, 1)
try:
    torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(x)
except Exception as error:
    assert "call it from a function under torch.compiler.disable" in str(error), error
else:
    raise AssertionError("one graph of what cannot be traced")
for _ in range(2):
    assert torch.equal(torch.compile(call, backend="eager")(x), call(x))
disabled = torch.compiler.disable(call)
assert torch.equal(torch.compile(lambda x: disabled(x) + 1, backend="eager")(x), call(x) + 1)
"""


@pytest.mark.usefixtures("torch")
def test_calls_under_torch_compile():
    """In a process of its own: it leaves its marks on PyTorch."""
    environment = os.environ | {"PYTHONPATH": str(Path(dispatch.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True, timeout=300)


# Arrays of JAX.


def test_arrays_that_jax_traces(monkeypatch):
    """By a stand-in: JAX is a large thing to install for this."""

    class Tracer:
        __dlpack__ = None

    core = ModuleType("jax.core")
    core.Tracer = Tracer
    monkeypatch.setitem(sys.modules, "jax.core", core)
    with pytest.raises(TypeError, match=r"^op: x is traced by JAX .* has no values yet; call .* by jax.pure_callback"):
        dispatch.as_numpy("op", "x", Tracer())


def test_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(X)
    short = x.astype(jax.numpy.bfloat16)
    expected = functional.convlstm2d(np.asarray(short, np.float32), *WEIGHTS)
    np.testing.assert_array_equal(np.asarray(functional.convlstm2d(short, *WEIGHTS)), expected)
    with pytest.raises(TypeError, match=r"^convlstm2d: x is traced by JAX "):
        jax.jit(lambda x: functional.convlstm2d(x, *WEIGHTS))(x)


# Arrays on a GPU; tests/test_cuda_arrays.py has the rest.


class OnGPU:
    """An array that has __cuda_array_interface__ alone."""

    def __init__(self):
        values = np.arange(3.0)
        self.__cuda_array_interface__ = {
            "shape": (3,),
            "typestr": "<f8",
            "data": (values.ctypes.data, False),
            "version": 3,
        }


@pytest.mark.parametrize("x", [Exporter((2, 0)), Exporter((13, 0)), OnGPU()])
def test_what_is_on_a_gpu(x):
    assert dispatch.on_gpu(x)
    with pytest.raises(TypeError, match=r"^op: x lives on .*, not in the processor's memory; move it to the CPU"):
        dispatch.as_numpy("op", "x", x)


@pytest.mark.parametrize("x", [np.ones(3), [1.0], 2.0, None, Exporter(), Exporter((3, 0)), "cuda"])
def test_what_is_not(x):
    assert not dispatch.on_gpu(x)


def test_the_engine_is_that_of_x():
    assert dispatch.choose("op", None, np.ones(3))[0] is dispatch.get_engine("cpu")
    assert dispatch.choose("op", "cuda", np.ones(3))[0] is dispatch.get_engine("cuda")
    stand_in = SimpleNamespace(dlpack_device=(1, 0))
    with devices.using(stand_in):
        for name in (None, "cuda"):
            assert dispatch.choose("op", name, Exporter((2, 0)))[0] is dispatch.get_engine("cuda")


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_another_engine_than_that_of_x(name):
    message = (
        rf"^op: x is on a GPU, where engine '{name}' does not compute; pass engine='cuda' \(or none\), or move x to"
    )
    with pytest.raises(TypeError, match=message):
        dispatch.choose("op", name, Exporter((2, 0)))
    with pytest.raises(ValueError, match=r"^unknown engine 'gpu'"):
        dispatch.choose("op", "gpu", Exporter((2, 0)))


# Dtypes.


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["f4"], "f4"), (["f8"], "f8"), (["f2"], "f4"), (["i8"], "f4"), (["u1"], "f4"), (["?"], "f4"), ([">f4"], "f4"),
        ([">f8"], "f8"), ([np.longdouble], "f8"), (["f4", "f8"], "f8"), (["i8", "f4"], "f4"), (["i8", "f8"], "f8"),
        ([None, "f8"], "f8"), ([None, "f4"], "f4"),
    ],
)  # fmt: skip
def test_working_dtype(dtypes, expected):
    arrays = [None if dtype is None else np.zeros(1, dtype) for dtype in dtypes]
    assert dispatch.working_dtype(*arrays) == np.dtype(expected)
    assert dispatch.working_dtype(*arrays).isnative


def test_native_keeps_what_is_native():
    x = np.ones((2, 3), np.float32)
    assert dispatch.native(x, np.dtype("f4")) is x


@pytest.mark.parametrize(
    "x", [np.ones((2, 3), ">f4"), np.ones((3, 2), "f4").T, np.ones((2, 6), "f4")[:, ::2], np.ones((2, 3), "i2"),
          np.zeros(25, "u1")[1:].view("f4").reshape(2, 3)]
)  # fmt: skip
def test_native_converts_the_rest(x):
    before = x.copy()
    result = dispatch.native(x, np.dtype("f4"))
    assert result.flags.c_contiguous
    assert result.flags.aligned
    assert result.dtype == np.float32
    assert result.dtype.isnative
    np.testing.assert_array_equal(result, before)


# Arrays out.


@pytest.mark.parametrize("like", [np.zeros(1), [1.0], np.float32(1), 2])
def test_numpy_goes_out_as_numpy(like):
    result = np.ones(2)
    assert dispatch.restorer(like)(result) is result


def test_arrays_of_a_standard_namespace_go_out_by_it():
    class Standard(Exporter):
        def __array_namespace__(self):
            namespace = ModuleType("namespace")
            namespace.from_dlpack = lambda array: ("standard", array)
            return namespace

    assert dispatch.restorer(Standard())(5) == ("standard", 5)


def test_arrays_of_a_library_go_out_by_its_from_dlpack(monkeypatch):
    library = ModuleType("some_library")
    library.from_dlpack = lambda array: ("library", array)
    monkeypatch.setitem(sys.modules, "some_library", library)

    class Tensor(Exporter):
        __module__ = "some_library.tensors"

    assert dispatch.restorer(Tensor())(5) == ("library", 5)
