"""Files made to do harm, and files damaged at random: each is read or refused by name, at a cost that its size bounds.

They are read in processes of their own, with limits on memory and time. PyTorch's files have their attacks in
test_hostile_torch.
"""

import json
import os
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from keras_2_files import as_keras_2
from safetensors.numpy import save_file

from fastclstm.io import bounds, weights
from fastclstm.layers import ConvLSTM2D, Dense, LayerNormalization, TimeDistributed
from fastclstm.models import EncoderForecaster, Sequential

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")]

ROOT = Path(__file__).parents[1]
MB = 1 << 20
EXPANDED = 256 * MB
"""What the bombs unpack to."""
DAMAGED_FILES = 2_000
"""For each reader."""

READ = """
import faulthandler, json, resource, sys, time, warnings
from pathlib import Path

import numpy as np
from fastclstm.convert.keras import from_keras
from fastclstm.io import keras_files, numpy_files
from fastclstm.layers import ConvLSTM2D
from fastclstm.models import EncoderForecaster, Sequential

def keras(path):
    import h5py
    keras_files.read(path)
    if path.endswith(".keras") or "old" in path:
        from_keras(path, engine="reference")

def safetensors(path):
    for cls in (ConvLSTM2D, Sequential, EncoderForecaster):
        if cls.__name__ in path:
            cls.load(path)

def numpy(path):
    if path.endswith(".npz"):
        numpy_files.read_npz(path, numpy_files.names(path))
    else:
        np.array(numpy_files.read_npy(path))

read = globals()[sys.argv[1]]
warnings.simplefilter("ignore")
kept = resource.getrlimit(resource.RLIMIT_AS)[1]
there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (there + (1 << 30), kept))
for path in sys.stdin.read().split("\\0"):
    faulthandler.dump_traceback_later(30, exit=True)
    print(path, end="\\t", flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF)
    message = ""
    try:
        read(path)
    except (ValueError, OSError) as error:
        cause = error.__cause__
        message = "MemoryError" if isinstance(cause, MemoryError) else str(error)
    after = resource.getrusage(resource.RUSAGE_SELF)
    rise = (after.ru_maxrss - before.ru_maxrss) * 1024
    print(json.dumps([message, after.ru_utime - before.ru_utime, rise]), flush=True)
"""


def outcomes(reader, paths):
    """Read files in one process; for each the error's message, processor seconds and how far memory rose."""
    result = subprocess.run([sys.executable, "-c", READ, reader], input="\0".join(map(str, paths)), cwd=ROOT,
                            timeout=300, capture_output=True, text=True, check=False)  # fmt: skip
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"it died at {lines[-1:]}: {result.stderr[-2000:]}"
    assert len(lines) == len(paths)
    return [tuple(json.loads(line.split("\t", 1)[1])) for line in lines]


def check_refused(reader, attacks):
    """Assert that files, given with a word of the message, are refused by name, quickly and without much memory."""
    for (path, word), (message, seconds, memory) in zip(
        attacks, outcomes(reader, [p for p, _ in attacks]), strict=True
    ):
        assert word in message, f"{path}: {message!r}"
        assert path.name in message
        assert len(message) - len(str(path)) < 500
        assert seconds < 5, path
        assert memory < bounds.TIMES * path.stat().st_size + 2 * bounds.FREE, path


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


# Attacks on Keras's files

LSTM = {
    "name": "lstm", "trainable": True, "dtype": "float32", "return_sequences": True, "return_state": False,
    "filters": 2, "kernel_size": [3, 3], "strides": [1, 1], "padding": "same", "data_format": "channels_last",
    "dilation_rate": [1, 1], "activation": "tanh", "recurrent_activation": "hard_sigmoid", "use_bias": True,
}  # fmt: skip
CONFIG = {"class_name": "Sequential", "config": {"name": "s", "layers": [
    {"class_name": "ConvLSTM2D", "config": LSTM},
    {"class_name": "Dense", "config": {"name": "dense", "units": 3, "activation": "relu", "use_bias": True}},
]}}  # fmt: skip
SHAPES = {"lstm": [(3, 3, 1, 8), (3, 3, 2, 8), (8,)], "dense": [(2, 3), (3,)]}


def arrays(name):
    rng = np.random.default_rng(len(name))
    return [rng.standard_normal(shape).astype("f4") for shape in SHAPES[name]]


def write_keras(path, config=None, weights=b"", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.1.0"}))
        archive.writestr("config.json", json.dumps(CONFIG) if config is None else config)
        archive.writestr("model.weights.h5", weights)
    return path


def write_lie(path):
    """An archive whose config.json says that it has 100 bytes, and unpacks to far more."""
    write_keras(path, bytes(EXPANDED))
    data = bytearray(path.read_bytes())
    for start in (data.find(b"PK\3\4", 40) + 22, data.find(b"PK\1\2", data.find(b"PK\1\2") + 1) + 24):
        assert data[start : start + 4] == struct.pack("<I", EXPANDED)
        data[start : start + 4] = struct.pack("<I", 100)
    path.write_bytes(data)
    return path


def test_archives_that_unpack_to_far_more(tmp_path, h5py):
    many = "[" + "{}," * 3_000_000 + "0]"
    check_refused("keras", [
        (write_keras(tmp_path / "config.keras", bytes(EXPANDED)), "with config.json it takes 268,435,"),
        (write_keras(tmp_path / "weights.keras", weights=bytes(EXPANDED)), "with model.weights.h5 it takes 268,43"),
        (write_lie(tmp_path / "lie.keras"), "damaged"),
        (write_keras(tmp_path / "deep.keras", "[" * 200_000), "more than 100 deep"),
        (write_keras(tmp_path / "nested.keras", '{"a":' * 150 + "0" + "}" * 150), "more than 100 deep"),
        (write_keras(tmp_path / "many.keras", many), "with config.json it takes"),
        (write_keras(tmp_path / "digits.keras", "9" * 5_000), "damaged"),
    ])  # fmt: skip


def chunk(group, name, shape, chunks, packed, **options):
    """Write one chunk as it is packed."""
    dataset = group.create_dataset(name, shape, "f4", chunks=chunks, compression=9, **options)
    dataset.id.write_direct_chunk(tuple(0 for _ in shape), packed)


BOMBS = {
    "nothing is stored": (lambda g: g.create_dataset("0", (EXPANDED // 4,), "f4"), "it takes 268,"),
    "little of nothing": (lambda g: g.create_dataset("0", (1000, 1000), "f4"), "has fewer bytes than its shape"),
    "no chunk is stored": (lambda g: g.create_dataset("0", (1000, 1000), "f4", chunks=(1, 1)), "has fewer bytes"),
    "a chunk of zeros": (
        lambda g: chunk(g, "0", (EXPANDED // 4,), (EXPANDED // 4,), zlib.compress(bytes(EXPANDED))), "it takes 268,"),
    "a chunk larger than all": (
        lambda g: chunk(g, "0", (4,), (EXPANDED // 4,), zlib.compress(bytes(EXPANDED)), maxshape=(None,)),
        "a chunk of 0 it takes 268,"),
    "a chunk that unpacks to more": (
        lambda g: chunk(g, "0", (4,), (4,), zlib.compress(bytes(EXPANDED))), "does not unpack to its 16 bytes"),
    "tiny chunks": (
        lambda g: g.create_dataset("0", (2_000_000,), "u1", chunks=(1,), compression=1), "lacks chunks"),
    "texts": (lambda g: g.create_dataset("0", data=["a" * 1000] * 10), "holds object, not numbers"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_arrays_that_expand(tmp_path, h5py):
    attacks = []
    for name, (fill, word) in BOMBS.items():
        path = tmp_path / f"{name}.weights.h5"
        with h5py.File(path, "w") as file:
            fill(file.create_group("layers/dense/vars"))
        assert path.stat().st_size < MB
        attacks.append((path, word))
    check_refused("keras", attacks)


def link_to_itself(group, h5py):
    group["cell"] = group


def link_softly(group, h5py):
    group["cell"] = h5py.SoftLink(f"{group.name}/cell")


def link_twice_each(group, h5py):
    """2^40 paths to the same array."""
    inner = group.file.create_group("tip/vars").parent
    inner["vars/0"] = np.zeros(3)
    for n in range(40):
        outer = group.file.create_group(f"steps{n}")
        outer["a"] = outer["b"] = inner
        inner = outer
    group["cell"] = inner


def repeat(group, h5py):
    """One array under 3,000 names."""
    group["vars/0"] = np.zeros(MB // 8)
    for n in range(1, 3_000):
        group[f"vars/{n}"] = group["vars/0"]


def link_outside(group, h5py):
    group["vars/0"] = h5py.ExternalLink("/etc/passwd", "/")


def nest(group, h5py):
    for _ in range(2_000):
        group = group.create_group("cell")


@pytest.mark.parametrize("kind", ["weights.h5", "keras"])
def test_links_that_lead_astray(tmp_path, h5py, kind):
    cases = {link_to_itself: "twice", link_softly: "does not lie within", link_twice_each: "twice",
             repeat: "is refused", link_outside: "does not lie within", nest: "recursion"}  # fmt: skip
    attacks = []
    for link, word in cases.items():
        path = tmp_path / f"{link.__name__}.weights.h5"
        with h5py.File(path, "w") as file:
            link(file.create_group("layers/dense"), h5py)
        if kind == "keras":
            path = write_keras(path.with_suffix(".keras"), weights=path.read_bytes())
        attacks.append((path, word))
    check_refused("keras", attacks)


def write_old(path, h5py, names=("lstm", "dense")):
    """Write the .h5 of Keras 2."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["model_config"] = "2.11.0", json.dumps(CONFIG)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = list(names)
        for name in SHAPES:
            own = group.create_group(name)
            own.attrs["weight_names"] = [f"{name}/w{n}:0".encode() for n in range(len(SHAPES[name]))]
            for n, array in enumerate(arrays(name)):
                own[f"{name}/w{n}:0"] = array
    return path


def test_texts_that_expand_or_never_end(tmp_path, h5py):
    """One text of a megabyte 3,000 times; and a heap of texts in which HDF5 itself would search for ever."""
    long = 1_000_000
    path = write_old(tmp_path / "old long.h5", h5py, ["L" * long, *(f"name{n}" for n in range(3_000))])
    data = bytearray(path.read_bytes())
    start = data.find(struct.pack("<I", long))
    while data[start + 16 : start + 20] != struct.pack("<I", 5):
        start = data.find(struct.pack("<I", long), start + 1)
    data[start : start + 16 * 3_001] = data[start : start + 16] * 3_001
    path.write_bytes(data)
    heap = write_old(tmp_path / "old heap.h5", h5py)
    data = bytearray(heap.read_bytes())
    start = data.find(b"GCOL") + 16
    data[start : start + 2_000] = bytes(2_000)
    heap.write_bytes(data)
    check_refused("keras", [(path, "with layer_names of /model_weights it takes 3,0"), (heap, "texts is damaged")])


# Attacks on safetensors


def test_layers_that_promise_more_than_there_is(tmp_path):
    path = tmp_path / "ConvLSTM2D.safetensors"
    ConvLSTM2D(1, 2, 3, num_layers=2).save(path)
    found, metadata = weights.load(path)
    attacks = []

    def attack(name, word, arrays=found, text=None, **options):
        header = metadata | {"options": metadata["options"] | options}
        target = tmp_path / f"ConvLSTM2D {name}.safetensors"
        save_file(arrays, target, {"fastclstm": json.dumps(header) if text is None else text})
        attacks.append((target, word))

    attack("layers", "far more parameters than there are arrays", num_layers=100_000_000)
    attack("one by one", "far more parameters than there are arrays", num_layers=90)
    attack("one layer", "missing layers.2.bias, layers.2.kernel", num_layers=3)
    attack("channels", "does not fit", in_channels=10**12)
    attack("kernel", "does not fit", kernel_size=[10**9, 10**9])
    attack("infinite", "does not fit", kernel_size=float("inf"))
    attack("code", "does not fit", dtype=",")
    attack("deep", "more than 100 deep", text='{"format_version": ' + "[" * 100_000)
    attack("nested", "more than 100 deep", text="[" * 150 + "]" * 150)
    attack("many", "metadata it takes", text="[" + "{}," * 1_000_000 + "0]")
    names = {f"layers.{n}.kernel": np.zeros(1, "f4") for n in range(60_000)}
    attack("names", "and 59,99", names)
    attack("version", "is in format", text='{"format_version": [' + "1," * 10_000 + '1], "fastclstm_version": 3}')
    check_refused("safetensors", attacks)


# Attacks on NumPy's files


def npy(header, data=b""):
    text = header.encode() if isinstance(header, str) else repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def told(shape, dtype="<f4"):
    return {"descr": dtype, "fortran_order": False, "shape": shape}


HEADERS = {
    "minus": "-" * 4_000, "brackets": "(" * 9_000, "text": "'" * 7, "sum": "+".join("1" * 4_000), "set": "{1, 2}",
    "zeros": told((10**12,)), "product": told((2**33, 2**33)), "negative": told((-2, -2)), "objects": told((1,), "|O"),
    "nothing": told((10**12,), "|S0"), "fields": told((1,), [("a", "|O")]),
}  # fmt: skip


def test_headers_of_arrays(tmp_path):
    attacks = []
    for name, header in HEADERS.items():
        path = tmp_path / f"{name}.npy"
        path.write_bytes(npy(header, b"cos\nsystem\n(S'touch /tmp/hostile'\ntR."))
        attacks.append((path, "cannot be read as a .npy array"))
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.write(path, "x.npy")
        attacks.append((tmp_path / f"{name}.npz", "is no .npz file"))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(told((EXPANDED // 4,)), bytes(EXPANDED)))
    attacks.append((tmp_path / "bomb.npz", "with x.npy it takes"))
    check_refused("numpy", attacks)


@pytest.mark.parametrize("command", ["run", "train"])
def test_commands_say_it_in_one_line(tmp_path, command):
    ConvLSTM2D(1, 2, 3).save(tmp_path / "w.safetensors")
    (tmp_path / "bad.npy").write_bytes(npy("-" * 4_000))
    arguments = {"run": ["bad.npy", "--weights", "w.safetensors", "--out", "y.npy"], "train": ["--data", "bad.npy"]}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "fastclstm", command, *arguments[command]], cwd=tmp_path, timeout=100,
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("fastclstm: error: ")
    assert "bad.npy" in done.stderr
    assert done.stderr.count("\n") == 1


# Files damaged at random


def damaged(rng, data, others, header):
    """Flip bytes of a file, cut it, splice it with others, or change the letters of its `header`."""
    made = bytearray(data)
    kind = rng.choice(["flip", "flip", "letters", "letters", "cut", "splice", "leave out", "double"])
    at = rng.randrange(len(made))
    if kind == "flip":
        for _ in range(rng.choice([1, 2, 4, 16, 64])):
            made[rng.randrange(len(made))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    elif kind == "letters":
        for _ in range(rng.choice([1, 1, 2, 3])):
            made[rng.randrange(*header)] = rng.choice(b"0123456789-\"{}[],:()eEaf.<>|O '\\")
    elif kind == "cut":
        del made[at:]
    elif kind == "splice":
        other, length = rng.choice(others), rng.randrange(1, 4096)
        start = rng.randrange(len(other))
        made[at : at + length] = other[start : start + length]
    elif kind == "leave out":
        del made[at : at + rng.randrange(1, 512)]
    else:
        made[at:at] = made[at : at + rng.randrange(1, 512)]
    return bytes(made)


def check_damaged(reader, tmp_path, bases, header=lambda data: (0, len(data))):
    """Assert that whole files are read, and damaged ones read or refused by name."""
    whole = [tmp_path / name for name in bases]
    for path in whole:
        path.write_bytes(bases[path.name])
    assert [message for message, _, _ in outcomes(reader, whole)] == [""] * len(whole)
    rng, paths = random.Random(7), []
    for n in range(DAMAGED_FILES):
        name, data = list(bases.items())[n % len(bases)]
        paths.append(tmp_path / f"{n} {name}")
        paths[-1].write_bytes(damaged(rng, data, list(bases.values()), header(data)))
    results = outcomes(reader, paths)
    for path, (message, seconds, _) in zip(paths, results, strict=True):
        assert message == "" or path.name in message, f"{path}: {message!r}"
        assert message != "MemoryError", path
        assert len(message) - len(str(path)) < 600, message
        assert seconds < 5, path
    assert 0 < sum(message == "" for message, _, _ in results) < DAMAGED_FILES / 2
    assert max(memory for _, _, memory in results) < 100 * MB


def test_damaged_keras_files(tmp_path, h5py):
    bases = {}
    for name, options in {"plain": {}, "packed": {"compression": 4}, "new": {}}.items():
        with h5py.File(tmp_path / "base", "w", libver="latest" if name == "new" else None) as file:
            for layer, place in (("lstm", "conv_lstm2d/cell/vars"), ("dense", "dense/vars")):
                for n, array in enumerate(arrays(layer)):
                    file.create_dataset(f"layers/{place}/{n}", data=array, **options)
        bases[f"{name}.weights.h5"] = (tmp_path / "base").read_bytes()
    with h5py.File(tmp_path / "base", "w") as file:
        layers = [("conv_lstm2d", {f"cell/vars/{n}": a for n, a in enumerate(arrays("lstm"))}), ("dropout", {})]
        as_keras_2(file, layers, True)
    bases["2.13.weights.h5"] = (tmp_path / "base").read_bytes()
    bases["old.h5"] = write_old(tmp_path / "base", h5py).read_bytes()
    for name, packing in {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}.items():
        path = write_keras(tmp_path / "base", None, bases["plain.weights.h5"], packing)
        bases[f"{name}.keras"] = path.read_bytes()
    check_damaged("keras", tmp_path, bases)


def test_damaged_safetensors(tmp_path):
    stack = Sequential(
        [ConvLSTM2D(1, 2, 3, kernel_regularizer="l2"), TimeDistributed(Dense(2, 3)), LayerNormalization(3)]
    )
    bases = {}
    for layer in (ConvLSTM2D(1, 2, 3, num_layers=2), stack, EncoderForecaster(1, (2, 2), 3)):
        name = f"{type(layer).__name__}.safetensors"
        layer.save(tmp_path / name)
        bases[name] = (tmp_path / name).read_bytes()
    check_damaged("safetensors", tmp_path, bases, lambda data: (8, 8 + int.from_bytes(data[:8], "little")))


def test_damaged_arrays(tmp_path):
    rng = np.random.default_rng(0)
    films = {
        "c": rng.standard_normal((2, 3, 4, 5)).astype("f4"), "f": np.asfortranarray(rng.standard_normal((4, 5, 6))),
        "bytes": rng.integers(0, 255, (3, 4, 4)).astype("u1"), "none": np.zeros((0, 3, 3)),
    }  # fmt: skip
    bases = {}
    for name, array in films.items():
        np.save(tmp_path / "base.npy", array)
        bases[f"{name}.npy"] = (tmp_path / "base.npy").read_bytes()
    for name, save in {"stored": np.savez, "deflated": np.savez_compressed}.items():
        save(tmp_path / "base.npz", x=films["c"], h0=np.zeros((9, 9)))
        bases[f"{name}.npz"] = (tmp_path / "base.npz").read_bytes()
    check_damaged("numpy", tmp_path, bases, lambda data: (6, 128))
