import argparse
import collections
import datetime
import functools
import io
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastclstm.io import torch_files

LEFT_BEHIND = []


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


def equal(arrays, tensors):
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected)


# What torch.save writes


@pytest.mark.torch
def test_a_module(torch, path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    torch.save(module.state_dict(), path)
    arrays = torch_files.read(path)
    equal(arrays, module.state_dict())
    assert not any(array.flags.writeable for array in arrays.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
                                  "complex64", "complex128"])  # fmt: skip
def test_dtypes(torch, path, name):
    tensor = (torch.arange(6).reshape(2, 3) - int(name not in ("uint8", "bool"))).to(getattr(torch, name))
    torch.save({"a": tensor, "scalar": tensor[0, 0], "none": tensor[:0]}, path)
    equal(torch_files.read(path), {"a": tensor, "scalar": tensor[0, 0], "none": tensor[:0]})


@pytest.mark.torch
def test_bfloat16_is_float32(torch, path):
    tensor = torch.tensor([1.5, -3.140625, float("inf"), float("nan"), 1e-40]).to(torch.bfloat16)
    torch.save({"a": tensor}, path)
    equal(torch_files.read(path), {"a": tensor.float()})


@pytest.mark.torch
def test_views_share_a_storage(torch, path):
    whole = torch.randn(4, 5, 6)
    tensors = {
        "whole": whole,
        "turned": whole.permute(2, 0, 1),
        "part": whole[1:3, ::2, 4:],
        "expanded": whole[:1, :1].expand(3, 7, 6),
        "parameter": torch.nn.Parameter(whole[2]),
        "flat": whole.view(-1)[7:],
    }
    torch.save(tensors, path)
    equal(torch_files.read(path), tensors)


@pytest.mark.torch
def test_checkpoints(torch, path):
    weights = {"module.a": torch.ones(2), "module.b": torch.zeros(3)}
    plain = {"a": torch.ones(2), "b": torch.zeros(3)}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    for key in ("state_dict", "model", "model_state_dict"):
        extra = {"epoch": 3, "loss": torch.tensor(0.1), "optimizer": optimizer.state_dict(), "lr": [1e-3, None]}
        torch.save({**extra, key: weights}, path)
        equal(torch_files.read(path), plain)
        equal(torch_files.read(path, key), plain)
    torch.save({"ema": weights, "state_dict": {"c": torch.ones(1)}}, path)
    equal(torch_files.read(path, "ema"), plain)
    with pytest.raises(ValueError, match=r"has no tensors under 'emma'; its entries are 'ema', 'state_dict'"):
        torch_files.read(path, "emma")


@pytest.mark.torch
def test_module_prefix_stays_where_not_all_have_it(torch, path):
    weights = {"module.a": torch.ones(2), "b": torch.zeros(3)}
    torch.save(weights, path)
    equal(torch_files.read(path), weights)


@pytest.mark.torch
def test_which_state_dict(torch, path):
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"tensors under 'state_dict' and 'model'; say which with key="):
        torch_files.read(path)
    torch.save({"net": {"a": torch.ones(1)}, "epoch": 1}, path)
    with pytest.raises(ValueError, match=r"no state_dict at the top .*entries are 'net', 'epoch': say which with key="):
        torch_files.read(path)
    torch.save(torch.ones(1), path)
    with pytest.raises(ValueError, match="holds a Tensor, not a state_dict"):
        torch_files.read(path)


def network(torch):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ModuleDict({"a": torch.nn.BatchNorm2d(2)}))
    module[0].register_buffer("kept", torch.ones(2))
    module[0].register_buffer("passing", torch.ones(3), persistent=False)
    return module


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False])
def test_a_whole_module_is_read_as_its_state_dict(torch, path, new):
    module = network(torch)
    torch.save(module, path, _use_new_zipfile_serialization=new)
    equal(torch_files.read(path), module.state_dict())
    torch.save({"model": module, "epoch": 3}, path, _use_new_zipfile_serialization=new)
    equal(torch_files.read(path), module.state_dict())
    torch.save(torch.nn.DataParallel(module), path, _use_new_zipfile_serialization=new)
    equal(torch_files.read(path), module.state_dict())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_read_as_its_state_dict(torch, path):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).eval()
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 1, 4, 4)), path)
    arrays = torch_files.read(path)
    equal({name: arrays[name] for name in module.state_dict() if name in arrays}, {
        name: tensor for name, tensor in module.state_dict().items() if name in arrays})  # fmt: skip
    assert {"0.weight", "0.bias", "1.weight", "1.running_var"} <= set(arrays)


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
def test_the_format_before_1_6(torch, path, dtype, protocol):
    whole = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    tensors = {"a": whole, "turned": whole.T, "part": whole[1:, 2], "other": torch.randn(5), "none": whole[:0]}
    checkpoint = {"epoch": 1, "state_dict": tensors, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    equal(torch_files.read(path), {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()})
    data = path.read_bytes()
    for damaged in (data[:-1], data[:200], data + data[-1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.pt is damaged or not a PyTorch file: "):
            torch_files.read(path)


def extras(torch):
    """What checkpoints hold beside weights."""
    from torch import nn

    yield "device", torch.device("cpu")
    yield "size", torch.Size([2, 3])
    yield "dtype", torch.float16
    yield "set", {1, "a", (2, 3)}
    yield "frozenset", frozenset({1})
    yield "scalar", np.float64(0.5)
    yield "array", np.arange(3)
    yield "generator", np.random.default_rng(0).bit_generator.state
    yield "namespace", argparse.Namespace(lr=0.1, device=torch.device("cpu"))
    yield "path", pathlib.PurePosixPath("a/b")
    yield "partial", functools.partial(max, 3)
    yield "function", np.mean
    yield "loss", nn.CrossEntropyLoss(weight=torch.ones(3))
    yield "module", nn.Conv2d(1, 1, 1)
    yield "defaultdict", collections.defaultdict(list, a=[1])
    yield "counter", collections.Counter("aab")
    yield "keys", {(1, 2): "a", None: 1, 2.5: 3, 7: {"a": 1}}
    yield "sparse", torch.eye(2).to_sparse()
    yield "complex", torch.zeros(2, dtype=torch.complex64)
    yield "float8", torch.zeros(3).to(torch.float8_e4m3fn)
    yield "quantized", torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    yield "date", datetime.datetime(2020, 1, 1)
    yield "tensor with attributes", torch.nn.Parameter(torch.ones(2))


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_else_checkpoints_hold(torch, path, new, protocol):
    weights = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(3))}
    weights["b"].note = "attributes have their own way into a file"
    for name, thing in extras(torch):
        for content in ({name: thing, "state_dict": weights}, {name: [thing, {"x": thing}], **weights}):
            torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
            equal(torch_files.read(path), weights)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sparse", "float8", "quantized"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensors_that_numpy_has_not_are_refused_by_name(torch, path, kind):
    make = {
        "sparse": lambda: torch.eye(2).to_sparse(),
        "float8": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    }
    torch.save({"a": torch.ones(1), "odd": make[kind]()}, path)
    with pytest.raises(ValueError, match=r"weights\.pt: the tensor 'odd' is made by .*readable are dense tensors"):
        torch_files.read(path)


@pytest.mark.torch
def test_keys_of_several_levels(torch, path):
    weights = {"x": torch.ones(2)}
    torch.save({"a": {"b": weights, "c.d": {"e": weights}}, "f.g": weights, "ema": network(torch)}, path)
    for key in ("a.b", "a.c.d.e", "f.g"):
        equal(torch_files.read(path, key), weights)
    assert list(torch_files.read(path, "ema")) == list(network(torch).state_dict())
    for key in ("a", "a.c", "a.b.x", "b", "", "."):
        with pytest.raises(
            ValueError, match=rf"has no tensors under '{re.escape(key)}'; its entries are 'a', 'f.g', 'ema'"
        ):
            torch_files.read(path, key)


# Files made by hand: no PyTorch in these


class Global:
    """Pickled as the global `module.name`."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as the call of a global."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Build:
    """Pickled as the setting of an object's attributes."""

    def __init__(self, target, state):
        self.target, self.state = target, state


class Pickler(pickle._Pickler):
    dispatch = pickle._Pickler.dispatch.copy()

    def save_global_by_name(self, obj):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(b"R")

    def save_build(self, obj):
        self.save(obj.target)
        self.save(obj.state)
        self.write(b"b")

    dispatch |= {Global: save_global_by_name, Call: save_call, Build: save_build}

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, types.SimpleNamespace) else None


FLOAT = Global("torch", "FloatStorage")
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def storage(size=6, kind=FLOAT, record="0"):
    return types.SimpleNamespace(pid=("storage", kind, record, "cpu", size))


def tensor(shape=(2, 3), strides=(3, 1), offset=0, of=None):
    return Call(REBUILD, of or storage(), offset, shape, strides, False, Call(Global("collections", "OrderedDict")))


def write(path, content, data=None, **entries):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    numbers = np.arange(6, dtype="<f4").tobytes() if data is None else data
    with zipfile.ZipFile(path, "w", entries.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, record in {"data.pkl": buffer.getvalue(), "data/0": numbers, **entries}.items():
            archive.writestr(f"archive/{name}", record)


def test_a_file_made_by_hand(path):
    write(path, {"a": tensor(), "t": tensor((3, 2), (1, 3)), "n": 3})
    arrays = torch_files.read(path)
    np.testing.assert_array_equal(arrays["a"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(arrays["t"], np.arange(6).reshape(2, 3).T)
    assert list(arrays) == ["a", "t"]


def test_byte_order(path):
    write(path, {"a": tensor()}, np.arange(6, dtype=">f4").tobytes(), byteorder=b"big")
    np.testing.assert_array_equal(torch_files.read(path)["a"], np.arange(6, dtype="f4").reshape(2, 3))


def test_booleans_are_booleans_whatever_the_byte(path):
    bools = Global("torch", "BoolStorage")
    write(path, {"a": tensor((3,), (1,), of=storage(3, bools))}, b"\x00\x02\xff")
    assert torch_files.read(path)["a"].tolist() == [False, True, True]


def test_what_python_2_and_the_first_pytorch_wrote(path):
    """Strings of bytes, an OrderedDict as a list of pairs, tensors without hooks, storages that might be views."""
    numbers = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x0212U\x03cpuK\x06NtQ"
    made = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00(K\x02K\x03t(K\x03K\x01ttR"
    content = b"\x80\x02ccollections\nOrderedDict\nq\x01](](U\x01a" + made + b"e](U\x01bNee\x85R."
    data = b"".join(pickle.dumps(n, 2) for n in numbers) + content + b"\x80\x02]U\x0212a."
    path.write_bytes(data + struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes())
    assert torch_files.read(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Reduced:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        Reduced(LEFT_BEHIND.append, 1),
        Reduced(eval, "LEFT_BEHIND.append(1)"),
        Call(Global("os", "system"), "true"),
        Call(Global("builtins", "getattr"), {}, "pop"),
        Call(Call(Global("builtins", "getattr"), {}, "pop"), "a"),
        Global("torch.storage", "_load_from_bytes"),
        Global("torch", "QInt8Storage"),
        Global("numpy", "dtype"),
        Build(Call(Global("a", "B")), {"__class__": 1, "__dict__": {}}),
        collections.Counter(a=1),
        Global("torch", "_StorageType"),
    ],
)
def test_nothing_is_run(path, content):
    write(path, {"a": tensor(), "b": content})
    assert list(torch_files.read(path)) == ["a"]
    assert not LEFT_BEHIND


@pytest.mark.parametrize("target", [REBUILD, FLOAT, Global("collections", "OrderedDict"), tensor(), storage()])
@pytest.mark.parametrize("state", [{"x": 1}, (None, {"__defaults__": (1,), "kind": "f8"}), (1, (2,), 3, False, "")])
def test_a_file_cannot_alter_what_reads_it(path, target, state):
    write(path, {"a": tensor(), "b": Build(target, state)})
    with pytest.raises(ValueError, match="is damaged or not a PyTorch file"):
        torch_files.read(path)


def test_metadata_of_a_state_dict_is_passed_over(path):
    ordered = Call(Global("collections", "OrderedDict"))
    write(path, {"state_dict": {"a": tensor()}, "b": Build(ordered, {"_metadata": {}})})
    assert list(torch_files.read(path)) == ["a"]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(tensor((2, 4), (3, 1)), id="one beyond"),
        pytest.param(tensor(offset=1), id="offset"),
        pytest.param(tensor((1 << 40, 1 << 40), (1 << 40, 1)), id="far beyond"),
        pytest.param(tensor((2, 3), (-3, -1), 5), id="negative strides"),
        pytest.param(tensor(offset=-1), id="negative offset"),
        pytest.param(tensor((-2, 3)), id="negative shape"),
        pytest.param(tensor((2, 3), (1,)), id="too few strides"),
        pytest.param(tensor((2.0, 3)), id="float shape"),
        pytest.param(tensor((True, 3)), id="bool shape"),
        pytest.param(tensor([2, 3], [3, 1]), id="lists"),
        pytest.param(tensor((1,) * 99, (1,) * 99), id="too many axes"),
        pytest.param(tensor((1 << 62, 1 << 62), (0, 0)), id="absurd expansion"),
        pytest.param(tensor(of=storage(7)), id="storage smaller than said"),
        pytest.param(tensor(of=storage(5)), id="storage larger than said"),
        pytest.param(tensor(of=storage(record="1")), id="storage missing"),
        pytest.param(tensor(of=storage(record="../data.pkl")), id="another entry"),
        pytest.param(tensor(of=storage(kind=Global("torch", "DoubleStorage"))), id="other kind"),
        pytest.param(tensor(of=storage(kind="FloatStorage")), id="kind by name"),
        pytest.param(tensor(of=3), id="number for a storage"),
        pytest.param(Call(REBUILD), id="no arguments"),
        pytest.param(types.SimpleNamespace(pid="storage"), id="strange reference"),
        pytest.param(Call({}), id="call of a dictionary"),
    ],
)
def test_no_tensor_reaches_beyond_its_storage(path, wrong):
    write(path, {"a": wrong})
    with pytest.raises(ValueError, match=r"weights\.pt is damaged or not a PyTorch file"):
        torch_files.read(path)


def test_empty_tensors_need_no_storage(path):
    write(path, {"a": tensor((0, 3), (3, 1), 99)})
    assert torch_files.read(path)["a"].shape == (0, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is damaged or neither"),
        (lambda data: data[:7], "is damaged or not a PyTorch file"),
        (lambda data: data[:-40], "is damaged or not a PyTorch file"),
        (
            lambda data: data.replace(b"archive/data.pkl", b"archive/dada.pkl"),
            r"it has 0 entries …/data\.pkl instead of one",
        ),
        (lambda data: data.replace(np.float32(5).tobytes(), np.float32(6).tobytes()), "Bad CRC-32"),
        (lambda data: data.replace(b"X\x01\x00\x00\x00a", b"X\xff\x00\x00\x00a"), "Bad CRC-32"),
        (lambda data: b"hello" * 20, "is damaged or neither a PyTorch nor a safetensors file; write one with"),
    ],
)
def test_damaged_files(path, damage, message):
    write(path, {"a": tensor()})
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match=rf"weights\.pt.*{message}"):
        torch_files.read(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"\x80\x02}", b"\x80\x63.", b"\x80\x02X\xff"])
def test_damaged_pickles(path, content):
    write(path, {}, **{"data.pkl": content})
    with pytest.raises(ValueError, match=r"its list of tensors cannot be read"):
        torch_files.read(path)


def test_compressed_entries_are_refused(path):
    write(path, {"a": tensor()}, np.zeros(10**7, "f4").tobytes(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        torch_files.read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_files.read(tmp_path / "nothing.pt")
    with pytest.raises(IsADirectoryError):
        torch_files.read(tmp_path)


# safetensors


def test_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    arrays = {"module.b": np.arange(6, dtype="f2").reshape(2, 3), "module.a": np.array(True), "module.c": np.zeros(0)}
    save_file(arrays, path)
    read = torch_files.read(path)
    assert set(read) == {"a", "b", "c"}
    for name, array in read.items():
        expected = arrays[f"module.{name}"]
        assert array.dtype == expected.dtype
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, expected)
    with pytest.raises(ValueError, match="no entry 'model'; leave key out"):
        torch_files.read(path, "model")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        torch_files.read(path)


def safetensors_file(path, dtype, shape, data):
    header = f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{len(data)}]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors_of_other_dtypes(path):
    safetensors_file(path, "BF16", [2], b"\xc0\x3f\x80\xff")
    np.testing.assert_array_equal(torch_files.read(path)["a"], np.array([1.5, -np.inf], "f4"))
    safetensors_file(path, "F8_E4M3", [2], b"\xc0\x3f")
    with pytest.raises(ValueError, match=r"a has dtype F8_E4M3; readable are F64, F32"):
        torch_files.read(path)


def test_no_torch_is_loaded(path):
    write(path, {"a": tensor()})
    code = (
        f"import sys; from fastclstm.io import torch_files as t; t.read({str(path)!r}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "weights.pt")
    with pytest.raises(OSError, match=r"weights\.pt: it is not a regular file; copy it into one$"):
        torch_files.read(tmp_path / "weights.pt")


@pytest.mark.torch
@pytest.mark.parametrize("history", [
    {"loss": [np.float64(n) for n in range(300_000)]},
    {"steps": [{"step": n, "loss": n / 3, "rate": 0.1, "seconds": n / 7, "epoch": 1} for n in range(200_000)]},
], ids=["numbers of NumPy", "dictionaries"])  # fmt: skip
def test_long_histories_are_not_taken_for_attacks(torch, path, history):
    torch.save({"state_dict": {"weight": torch.ones(2)}, **history}, path)
    equal(torch_files.read(path), {"weight": torch.ones(2)})


def test_what_costs_more_names_the_remedy(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"(" + 400_000 * b"]" + b"l.")
    with pytest.raises(ValueError, match=r"write the tensors alone: torch\.save\(model\.state_dict\(\), path\)$"):
        torch_files.read(path)
