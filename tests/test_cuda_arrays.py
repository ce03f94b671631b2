"""Arrays in a GPU's memory come in and go out where they are; here their memory is the processor's."""

import gc
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cuda_emulator
import numpy as np
import pytest
from cuda_cases import Exchanged, Interfaced

from fastclstm import Conv2D, dispatch, functional
from fastclstm.engines import reference
from fastclstm.engines.cuda import arrays, devices, dlpack
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.dlpack import CUDA
from fastclstm.engines.cuda.views import View
from fastclstm.functional import volumes

pytestmark = pytest.mark.usefixtures("only_young_garbage")


class Host(Device):
    """A device in the processor's memory that writes down in which order streams get their work."""

    architecture, multiprocessors, shared_bytes = 80, 4, 99 << 10

    def __init__(self):
        self.log, self.entered = [], [1000]

    def empty(self, shape, dtype):
        return self.put(np.empty(shape, dtype))

    def zeros(self, shape, dtype):
        return self.put(np.zeros(shape, dtype))

    def put(self, array):
        self.log.append("put")
        array = array.copy()
        return DeviceArray(array.ctypes.data, array.shape, array.dtype, array, self, self.entered[-1])

    def get(self, array):
        self.log.append("get")
        return view(array).copy()

    @contextmanager
    def on(self, stream):
        self.entered.append(self.entered[-1] if stream is None else stream)
        yield
        self.entered.pop()

    def order(self, stream, after):
        self.log.append(("order", stream, after))

    def stream_handle(self):
        return self.entered[-1]

    def finish(self):
        self.log.append(("finish", self.entered[-1]))


def view(array):
    """The memory of a device array that is the processor's, as a NumPy array."""
    interface = {"shape": array.shape, "typestr": array.dtype.str, "data": (array.pointer, False), "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface, owner=array))


BOTH = pytest.mark.parametrize("kind", [Exchanged, Interfaced])


@pytest.fixture
def host():
    with devices.using(Host()):
        yield devices.current()


@pytest.fixture
def engine(host, monkeypatch):
    """The cuda engine on `host`, where the operations are the reference's."""
    module = dispatch.get_engine("cuda")

    def on_host(operation):
        def run(spec, *arguments, **options):
            def there(value):
                if isinstance(value, dict):
                    return {name: there(item) for name, item in value.items()}
                return view(value) if isinstance(value, DeviceArray) else value

            def back(value):
                if isinstance(value, dict):
                    return {name: back(item) for name, item in value.items()}
                if isinstance(value, tuple):
                    return tuple(map(back, value))
                return host.put(value) if isinstance(value, np.ndarray) else value

            return back(operation(spec, *map(there, arguments), **options))

        return run

    for op in ("conv2d", "convlstm2d", "max_pool3d"):
        part = SimpleNamespace(**{name: on_host(getattr(reference, name)) for name in (op, f"{op}_backward")})
        monkeypatch.setattr(module, f"_{op}", part)
    monkeypatch.setattr(module, "_backward", module._convlstm2d)
    return module


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- In ---


@BOTH
def test_memory_is_read_where_it_is(host, kind):
    x = normal(2, 3)
    array = arrays.Reader("op", kind(x))("x", kind(x))
    assert (array.pointer, array.shape, array.dtype) == (x.ctypes.data, (2, 3), np.float32)
    np.testing.assert_array_equal(view(array), x)


def test_the_owner_lives_as_long(host):
    x = np.ones(3, np.float32)
    count = sys.getrefcount(x)
    array = arrays.Reader("op", Exchanged(x))("x", Exchanged(x))
    assert sys.getrefcount(x) > count
    del array
    gc.collect()
    assert sys.getrefcount(x) == count


@BOTH
@pytest.mark.parametrize("form", [lambda a: a[:, ::2], lambda a: a.T, lambda a: a[1:, :2]])
def test_gaps_are_refused(host, kind, form):
    x = kind(form(normal(4, 4)))
    message = r"^op: x is a CUDA array \(\d, \d\) that is not C-contiguous \(strides \(\d, \d\)\); pass a contiguous c"
    with pytest.raises(ValueError, match=message):
        arrays.Reader("op", x)("x", x)


@BOTH
@pytest.mark.parametrize(
    "x", [normal(3, 1, 4)[:, :, :], normal(1, 4)[::-1], normal(0, 3), normal(3, 4)[1:2], normal(5, 2)[2:]]
)
def test_what_has_no_gaps_is_read(host, kind, x):
    array = arrays.Reader("op", kind(x))("x", kind(x))
    assert array.shape == x.shape
    if x.size:
        np.testing.assert_array_equal(view(array), x)


@BOTH
@pytest.mark.parametrize("dtype", ["f2", "i4", "u1", "?"])
def test_other_dtypes_are_refused(host, kind, dtype):
    x = kind(np.ones(3, dtype))
    with pytest.raises(
        TypeError, match=rf"^op: x is a CUDA array of {np.dtype(dtype)} but must be one of float32 or flo"
    ):
        arrays.Reader("op", x)("x", x)


def test_other_dtypes_of_the_engine_itself_are_refused(host):
    x = host.put(np.ones(3, np.int64))
    with pytest.raises(TypeError, match=r"^op: x is a CUDA array of int64 but must be one of float32 or float64"):
        arrays.Reader("op", x)("x", x)


@BOTH
def test_masks_are_bytes(host, kind):
    read = arrays.Reader("op", kind(normal(2)))
    for dtype in ("?", "u1"):
        assert read("mask", kind(np.ones((2, 3), dtype))).dtype == np.dtype(dtype)
    with pytest.raises(TypeError, match=r"^op: mask is a CUDA array of int64 but must be one of bool or uint8$"):
        read("mask", kind(np.ones((2, 3), "i8")))


@pytest.mark.torch
def test_dtypes_that_numpy_has_not(host):
    torch = pytest.importorskip("torch")
    x = Exchanged(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(
        TypeError, match=r"^op: x cannot be read as a CUDA array: it has dtype bfloat16; convert it to fl"
    ):
        arrays.Reader("op", x)("x", x)


@pytest.mark.torch
def test_an_export_that_fails_is_explained(host):
    torch = pytest.importorskip("torch")
    x = Exchanged(torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match=r"^op: x cannot be read as a CUDA array: .*gradient"):
        arrays.Reader("op", x)("x", x)


def test_a_masked_array_is_refused(host):
    x = Interfaced(normal(3), mask=Interfaced(np.ones(3, bool)))
    with pytest.raises(TypeError, match=r"^op: x cannot be read as a CUDA array: it has a mask, which would be lost"):
        arrays.Reader("op", x)("x", x)


def test_two_gpus(host):
    read = arrays.Reader("op", Exchanged(normal(3)))
    with pytest.raises(ValueError, match=r"^op: kernel is on GPU 1 but x on GPU 0; put both on one GPU$"):
        read("kernel", Exchanged(normal(3), number=1))


# --- Streams ---


def of_library(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, name, module)
    return type("Tensor", (Exchanged,), {"__module__": f"{name}.tensors"})(normal(3))


@pytest.mark.parametrize(("handle", "expected"), [(42, 42), (0, 1)])
def test_the_stream_of_torch(host, monkeypatch, handle, expected):
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda n: SimpleNamespace(cuda_stream=handle + n)))
    x = of_library(monkeypatch, "torch", torch)
    read = arrays.Reader("op", x)
    assert (read.stream, read("x", x).stream, x.streams) == (expected, expected, [expected])


@pytest.mark.parametrize(("handle", "expected"), [(42, 42), (0, 1)])
def test_the_stream_of_cupy(host, monkeypatch, handle, expected):
    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=handle))
    x = of_library(monkeypatch, "cupy", SimpleNamespace(cuda=stream))
    assert arrays.Reader("op", x)("x", x).stream == expected


def test_an_unknown_stream(host):
    """Arrays are exported to the device's own stream."""
    x = Exchanged(normal(3))
    assert arrays.Reader("op", x)("x", x).stream is None
    assert x.streams == [1000]


def test_the_stream_of_the_interface(host):
    x, other = Interfaced(normal(3), stream=42), Interfaced(normal(3), stream=43)
    read = arrays.Reader("op", x)
    assert [read(name, a).stream for name, a in (("x", x), ("kernel", other))] == [42, 42]
    assert host.log == [("order", 42, 42), ("order", 42, 43)]


def test_arrays_of_the_engine_wait_for_each_other(host):
    with host.on(42):
        x = host.put(normal(3))
    with host.on(43):
        kernel = host.put(normal(3))
    host.log.clear()
    read = arrays.Reader("op", x)
    assert read("x", x) is x
    assert read("kernel", kernel) is kernel
    assert host.log == [("order", 42, 42), ("order", 42, 43)]


# --- Out ---


def test_numpy_reads_a_device_array(host):
    x = normal(2, 3)
    array = host.put(x)
    taken = np.from_dlpack(array)
    np.testing.assert_array_equal(taken, x)
    assert taken.ctypes.data == array.pointer
    del array
    gc.collect()
    np.testing.assert_array_equal(taken, x)
    del taken
    gc.collect()
    assert dlpack._exported == {}


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1", "?"])
def test_torch_reads_a_device_array(host, dtype):
    torch = pytest.importorskip("torch")
    x = np.arange(6).reshape(2, 3).astype(dtype)
    array = host.put(x)
    taken = torch.from_dlpack(array)
    assert taken.data_ptr() == array.pointer
    del array
    gc.collect()
    np.testing.assert_array_equal(taken.numpy(), x)
    taken += 1 if dtype != "?" else False
    del taken
    gc.collect()
    assert dlpack._exported == {}


@pytest.mark.torch
def test_what_is_still_taken_at_the_end_does_no_harm():
    pytest.importorskip("torch")
    code = """
        import numpy as np, torch
        from fastclstm.engines.cuda.device import Device, DeviceArray
        x = np.ones(3)
        taken = torch.from_dlpack(DeviceArray(x.ctypes.data, x.shape, x.dtype, x, type("Host", (Device,), {})()))
        torch.kept = np.kept = taken  # modules go late
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_nobody_takes_is_freed(host):
    exported = host.put(normal(3)).__dlpack__()
    assert len(dlpack._exported) == 1
    del exported
    gc.collect()
    assert dlpack._exported == {}


@pytest.mark.parametrize(("stream", "expected"), [(43, [("order", 43, 42)]), (None, [("order", 1, 42)]), (-1, [])])
def test_the_reader_waits_for_the_values(host, stream, expected):
    with host.on(42):
        array = host.put(normal(3))
    host.log.clear()
    array.__dlpack__(stream=stream, max_version=(1, 1), dl_device=(1, 0))
    assert host.log == expected


@pytest.mark.parametrize("options", [{"copy": True}, {"dl_device": (2, 0)}])
def test_no_export_elsewhere(host, options):
    with pytest.raises(BufferError, match=r"^a device array on \(1, 0\) is exported where it is, without a copy$"):
        host.put(normal(3)).__dlpack__(**options)


def test_the_interface(host):
    array = host.put(normal(2, 3))
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3), "typestr": "<f4", "data": (array.pointer, False), "strides": None, "stream": 1000, "version": 3
    }  # fmt: skip


# --- The functions ---


def arguments(B=2, T=3, H=5, W=4, C=3, F=2):
    return {
        "x": normal(B, T, H, W, C), "kernel": normal(3, 3, C, 4 * F, seed=1),
        "recurrent_kernel": normal(3, 3, F, 4 * F, seed=2), "bias": normal(4 * F, seed=3),
        "initial_state": (normal(B, H, W, F, seed=4), normal(B, H, W, F, seed=5)),
        "peephole": {gate: normal(F, seed=6) for gate in "ifo"}, "mask": np.array([[1, 0, 1], [1, 1, 0]], bool),
    }  # fmt: skip


def nested(value, change):
    if isinstance(value, dict):
        return {name: nested(item, change) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(nested(item, change) for item in value)
    return change(value) if isinstance(value, np.ndarray | Exchanged | DeviceArray) else value


def agree(result, expected, atol=0):
    assert type(result) is type(expected)
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for name in expected:
            agree(result[name], expected[name], atol)
    elif isinstance(expected, tuple):
        for one, other in zip(result, expected, strict=True):
            agree(one, other, atol)
    else:
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


def taken(value):
    """Results of an Exchanged input as NumPy arrays: all of them are Exchanged."""

    def values(array):
        assert isinstance(array, Exchanged)
        return array.values

    return nested(value, values)


CASES = {
    "conv2d": ({"x": normal(2, 5, 4, 3), "kernel": normal(3, 3, 3, 2), "bias": normal(2)}, normal(2, 5, 4, 2)),
    "convlstm2d": (
        arguments() | {"return_state": True},
        (normal(2, 3, 5, 4, 2), normal(2, 5, 4, 2), normal(2, 5, 4, 2)),
    ),
    "max_pool3d": ({"x": normal(2, 3, 5, 4, 3), "pool_size": 2, "return_indices": True}, (normal(2, 1, 2, 2, 3), None)),
}
each_op = pytest.mark.parametrize("op", CASES)


@each_op
def test_gpu_arrays_go_through_without_copies(engine, host, op):
    given, cotangents = CASES[op]
    expected, pull = getattr(functional, f"{op}_vjp")(**given, engine="reference")
    outputs, pullback = getattr(functional, f"{op}_vjp")(**nested(given, Exchanged))
    agree(taken(outputs), expected)
    agree(taken(pullback(nested(cotangents, Exchanged))), pull(cotangents))
    agree(taken(getattr(functional, op)(**nested(given, Exchanged))), expected)
    assert "get" not in host.log


@each_op
def test_numpy_arrays_are_put_there_and_got_back(engine, host, op):
    given, cotangents = CASES[op]
    expected, pull = getattr(functional, f"{op}_vjp")(**given, engine="reference")
    outputs, pullback = getattr(functional, f"{op}_vjp")(**given, engine="cuda")
    agree(outputs, expected)
    agree(pullback(cotangents), pull(cotangents))
    assert {"put", "get"} <= set(filter(lambda entry: isinstance(entry, str), host.log))


@each_op
def test_device_arrays_stay_device_arrays(engine, host, op):
    given, cotangents = CASES[op]
    expected, pull = getattr(functional, f"{op}_vjp")(**given, engine="reference")
    outputs, pullback = getattr(functional, f"{op}_vjp")(**nested(given, host.put))
    agree(nested(outputs, view), expected)
    agree(nested(pullback(nested(cotangents, host.put)), view), pull(cotangents))


def test_weights_may_be_numpy(engine, host):
    given, cotangents = CASES["convlstm2d"]
    expected, pull = functional.convlstm2d_vjp(**given, engine="reference")
    outputs, pullback = functional.convlstm2d_vjp(**given | {"x": Exchanged(given["x"])})
    agree(taken(outputs), expected)
    agree(taken(pullback(cotangents)), pull(cotangents))


def test_one_step(engine, host):
    given = arguments()
    del given["mask"]
    given["x"] = given["x"][:, 0].copy()
    expected = functional.convlstm2d_step(**given, engine="reference")
    agree(taken(functional.convlstm2d_step(**nested(given, Exchanged))), expected)
    agree(nested(functional.convlstm2d_step(**nested(given, host.put)), view), expected)
    out = np.empty_like(expected[0]), np.empty_like(expected[1])
    assert functional.convlstm2d_step(**given, engine="cuda", out=out)[0] is out[0]
    agree(out, expected)
    with pytest.raises(
        TypeError, match=r"^convlstm2d_step: out is for arrays in the processor's memory, but x is on a GPU"
    ):
        functional.convlstm2d_step(**given | {"x": Exchanged(given["x"])}, out=out)


def test_results_are_on_the_stream_of_the_caller(engine, host, monkeypatch):
    monkeypatch.setattr(arrays, "_stream", lambda value, ordinal: 42)
    seen = []
    monkeypatch.setattr(Exchanged, "__array_namespace__",
                        lambda self: SimpleNamespace(from_dlpack=lambda array: seen.append(array.stream)))  # fmt: skip
    functional.conv2d(Exchanged(normal(1, 3, 3, 1)), Exchanged(normal(3, 3, 1, 1)))
    assert seen == [42]
    assert ("finish", 42) not in host.log


def test_a_stream_of_ones_own(engine, host, monkeypatch):
    """Where arrays tell of none, work goes to the one that the caller has entered."""
    seen, conv2d = [], engine._conv2d.conv2d

    def spy(*given, **options):
        seen.append(host.stream_handle())
        return conv2d(*given, **options)

    monkeypatch.setattr(engine._conv2d, "conv2d", spy)
    x, kernel = normal(1, 3, 3, 1), normal(3, 3, 1, 1)
    exchanged = Exchanged(x)
    with host.on(42):
        functional.conv2d(x, kernel, engine="cuda")
        functional.conv2d(exchanged, kernel)
    assert seen == exchanged.streams * 2 == [42, 42]


def test_memory_of_an_unknown_stream_is_done_with_at_the_end(engine, host):
    functional.conv2d(Exchanged(normal(1, 3, 3, 1)), Exchanged(normal(3, 3, 1, 1)))
    assert ("finish", 1000) in host.log


@pytest.fixture
def emulated():
    """The kernels themselves, run on the processor."""
    if cuda_emulator.compiler() is None:
        pytest.skip("there is no C++ compiler for the emulator")

    class Emulated(cuda_emulator.EmulatedDevice, Device):
        pass

    with devices.using(Emulated()):
        yield


@each_op
def test_the_kernels_read_other_libraries_arrays(emulated, op):
    given, cotangents = CASES[op]
    expected, pull = getattr(functional, f"{op}_vjp")(**given, engine="reference")
    outputs, pullback = getattr(functional, f"{op}_vjp")(**nested(given, Exchanged))
    agree(taken(outputs), expected, atol=1e-5)
    agree(taken(pullback(nested(cotangents, Exchanged))), pull(cotangents), atol=1e-4)


def test_the_kernels_read_what_torch_has_put_off(emulated):
    """Signs; and no gradient is cut off."""
    torch = pytest.importorskip("torch")

    class OnGPU(torch.Tensor):
        def __dlpack_device__(self):
            return CUDA, 0

    x, kernel = normal(1, 4, 5, 2), normal(3, 3, 2, 3)
    later = torch.complex(torch.zeros(x.shape), torch.from_numpy(x)).conj().imag
    layer = Conv2D(2, 3, kernel_size=3, use_bias=False)
    layer.kernel = kernel
    expected = functional.conv2d(-x, kernel)
    for call in (lambda x: functional.conv2d(x, kernel), layer):
        y = call(later.as_subclass(OnGPU))
        np.testing.assert_allclose(np.from_dlpack(y), expected, atol=1e-5)
        with pytest.raises(TypeError, match=r": x requires grad, but .* torch.autograd.Function"):
            call(torch.from_numpy(x).requires_grad_().as_subclass(OnGPU))


VIEWED = {
    "max_pool3d": (
        {"x": normal(2, 3, 4, 5, 4), "pool_size": 2, "data_format": "channels_first"},
        normal(2, 3, 2, 2, 2),
    ),
    "max_pool3d with indices": (
        {"x": normal(2, 3, 4, 5, 4), "pool_size": 2, "data_format": "channels_first", "return_indices": True},
        (normal(2, 3, 2, 2, 2), None),
    ),
    "conv3d": (
        {"x": normal(2, 4, 5, 3, 2), "kernel": normal(3, 2, 3, 2, 3), "bias": normal(3), "strides": (2, 1, 1)},
        normal(2, 2, 5, 3, 3),
    ),
    "conv3d around": (
        {
            "x": normal(2, 4, 5, 3, 2),
            "kernel": normal(2, 2, 3, 2, 3),
            "padding_mode": "circular",
            "dilation": (3, 1, 1),
        },
        normal(2, 4, 5, 3, 3),
    ),
}
"""Operations whose arrays are seen in another order of axes."""


@pytest.mark.parametrize("case", VIEWED)
def test_views_of_other_libraries_arrays(emulated, monkeypatch, case):
    given, cotangents = VIEWED[case]
    op = case.partition(" ")[0]
    monkeypatch.setattr(volumes, "GATHERED_BYTES", 1000)  # a few frames at a time
    expected, pull = getattr(functional, f"{op}_vjp")(**given, engine="reference")
    there = devices.current()
    for change, back in ((Exchanged, taken), (there.put, lambda value: nested(value, there.get))):
        for weights in (change, lambda array: array):
            changed = {name: (change if name == "x" else weights)(value) if isinstance(value, np.ndarray) else value
                       for name, value in given.items()}  # fmt: skip
            outputs, pullback = getattr(functional, f"{op}_vjp")(**changed)
            agree(back(outputs), expected, atol=1e-5)
            agree(back(pullback(nested(cotangents, change))), pull(cotangents), atol=1e-4)
            agree(back(getattr(functional, op)(**changed)), expected, atol=1e-5)
        agree(back(pullback((None, None) if isinstance(cotangents, tuple) else None)),
             pull((None, None) if isinstance(cotangents, tuple) else None))  # fmt: skip
    agree(getattr(functional, op)(**given, engine="cuda"), expected, atol=1e-5)


def test_every_array_may_be_a_view(emulated):
    given, there = CASES["convlstm2d"][0], devices.current()
    outputs = functional.convlstm2d(**nested(given, lambda array: View.of(there.put(array))))
    agree(tuple(view.get() for view in outputs), functional.convlstm2d(**given, engine="reference"), atol=1e-5)


# --- What is refused ---


@each_op
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_another_engine_for_a_gpu_array(host, op, name):
    message = (
        f"^{op}: x is on a GPU, where engine '{name}' does not compute; pass engine='cuda' \\(or none\\), or move x to"
    )
    with pytest.raises(TypeError, match=message):
        getattr(functional, op)(**nested(CASES[op][0], Exchanged), engine=name)


@BOTH
@pytest.mark.parametrize("engine", [None, "cpu", "cuda"])
def test_gpu_weights_for_numpy_frames(host, engine, kind):
    with pytest.raises(
        TypeError, match=r"^conv2d: kernel lives on .*, not in the processor's memory; move it to the CPU"
    ):
        functional.conv2d(normal(1, 3, 3, 1), kind(normal(3, 3, 1, 1)), engine=engine)


def test_mixed_precision_on_a_gpu(host):
    x, kernel = normal(1, 3, 3, 1), normal(3, 3, 1, 1).astype("f8")
    for given in (Exchanged(kernel), kernel):
        with pytest.raises(
            TypeError, match=r"^arrays of float32 and float64 on a GPU are not brought together; pass one dt"
        ):
            functional.conv2d(Exchanged(x), given)


def test_shapes_are_checked_as_ever(host):
    with pytest.raises(ValueError, match=r"^conv2d: x has 2 channels but kernel \(3, 3, 1, 1\) takes 1"):
        functional.conv2d(Exchanged(normal(1, 3, 3, 2)), Exchanged(normal(3, 3, 1, 1)))


def test_what_the_kernels_do_not_know(engine, host, monkeypatch):
    """NumPy arrays take the recurrence over the engine's convolutions, arrays on a GPU are refused."""

    def refused(*given, **options):
        raise NotImplementedError("convlstm2d: this is not for the engine 'cuda'; pass engine='cpu'")

    monkeypatch.setattr(engine, "_convlstm2d", SimpleNamespace(convlstm2d=refused))
    given, cotangents = CASES["convlstm2d"]
    expected, pull = functional.convlstm2d_vjp(**given, engine="reference")
    outputs, pullback = functional.convlstm2d_vjp(**given, engine="cuda")
    agree(outputs, expected)
    agree(pullback(cotangents), pull(cotangents))
    with pytest.raises(NotImplementedError, match=r"pass engine='cpu'"):
        functional.convlstm2d(**nested(given, Exchanged))
