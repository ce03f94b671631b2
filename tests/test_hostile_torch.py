"""Files of PyTorch made to kill, to hang or to fill the memory, each read in a process of its own; and a fuzz."""

import collections
import io
import json
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest

from fastclstm.convert.torch import from_torch
from fastclstm.io import torch_files

pytestmark = pytest.mark.slow

LIMIT_S = 10
SLACK = 24 << 20
"""Bytes that reading may take beyond ten times the file's size: 16 MiB are free, the rest is the allocator's."""

READ = """
import os, resource, sys
from fastclstm.convert.torch import from_torch

def pages():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

paths, slack, seconds = sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])
start = pages()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in paths:
    resource.setrlimit(resource.RLIMIT_AS, (start + slack + 10 * os.path.getsize(path), -1))
    try:
        from_torch(path)
        print("read")
    except ValueError as error:
        assert path in str(error), error
        assert len(str(error).replace(path, "")) <= 300, error
        print("refused", error)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")


def outcome(*paths, code=READ, seconds=LIMIT_S):
    """What becomes of files, a line each, in a process that dies where they cost more than they may."""
    command = [sys.executable, "-c", code, str(SLACK), str(seconds), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * LIMIT_S, check=False)


def refused(*paths):
    result = outcome(*paths)
    assert result.returncode == 0, (result.returncode, result.stderr[-1000:])
    lines = result.stdout.splitlines()
    return len(lines) == len(paths) and all(line.startswith("refused") for line in lines)


def archive(path, content, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": content, "data/0": bytes(64), **entries}.items():
            file.writestr(f"archive/{name}", data)


def legacy(path, content, keys=b"\x80\x02].", data=b""):
    numbers = [pickle.dumps(thing, 2) for thing in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(numbers) + content + keys + data)


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def put(index):
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(shape, strides):
    return TENSOR + b"(" + STORAGE + b"K\x00" + shape + strides + b"\x89}tR"


def whole(number):
    return b"\x8a\x08" + struct.pack("<q", number)


ONE = tensor(b"K\x10\x85", b"K\x01\x85")
DEEP_TUPLE = b"N" + 200_000 * b"\x85"
DOUBLED = b"N\x85" + 40 * b"2\x86"
LONG = text("a" * 500_000)
CHILDREN = b"".join(  # a module whose one child stands in it twice, forty times over
    b"cx\nM\n)\x81}" + text("_modules") + b"}(" + (text("a") + get(n - 1) + text("b") + get(n - 1) if n else b"")
    + b"us" + b"b" + put(n) + b"0" for n in range(40)
)  # fmt: skip

PICKLES = {
    "a deep tuple as a key": b"}" + DEEP_TUPLE + b"K\x01s",
    "a deep tuple as a value": b"}" + text("a") + DEEP_TUPLE + b"s",
    "a deep tuple for a storage": DEEP_TUPLE + b"Q",
    "a deep tuple for a shape": tensor(DEEP_TUPLE, DEEP_TUPLE),
    "a deep tuple of modules": b"cx\nM\n)\x81" + DEEP_TUPLE + b"b",
    "a deep frozenset": b"(" * 100_000 + b"\x91" * 100_000,
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "deep dictionaries": 50_000 * (b"}" + text("a")) + b"N" + 50_000 * b"s",
    "deep calls": b"cx\nM\n" + 50_000 * b"(cx\nM\n" + b"N" + 50_000 * b"tR",
    "a tuple doubled as a key": b"}" + DOUBLED + b"K\x01s",
    "a tuple doubled in a set": b"\x8f(" + DOUBLED + b"\x90",
    "a tuple doubled for a storage": DOUBLED + b"Q",
    "a tuple doubled for a shape": tensor(DOUBLED, DOUBLED),
    "a tuple doubled for a name": DOUBLED + DOUBLED + b"\x93",
    "a tuple doubled for what is built": b"}" + text("state_dict") + DOUBLED + b"s",
    "many lists": b"(" + 300_000 * b"]" + b"t",
    "many marks": 300_000 * b"(" + b"N",
    "many memos": b"N" + b"".join(map(put, range(300_000))),
    "scattered memos": b"N" + b"".join(put(n * 999) for n in range(50_000)),
    "many objects": b"cx\nM\n" + put(0) + 200_000 * (get(0) + b")\x81"),
    "keys that collide": b"}(" + b"".join(
        b"\x8a\x12" + ((2**61 - 1) * n).to_bytes(18, "little") + b"N" for n in range(50_000)) + b"u",
    "long keys that are equal": b"}" + put(0) + LONG + put(1) + b"0" + LONG + put(2) + b"0"
        + 20_000 * (get(1) + b"Ns" + get(2) + b"Ns"),
    "long names": LONG + put(0) + b"0" + 100_000 * (get(0) + get(0) + b"\x93" + b"0") + b"N",
    "dictionaries of one long list": b"](" + 50_000 * b"NN\x86" + b"e\x85" + put(0) + b"0ccollections\nOrderedDict\n"
        + put(1) + b"0" + 50_000 * (get(1) + get(0) + b"R0") + b"N",
    "one state many times": b"}(" + b"".join(text(f"{n}") + b"N" for n in range(20_000)) + b"u" + put(0)
        + b"0cx\nM\n)\x81" + 100_000 * (get(0) + b"b"),
    "one long reference many times": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + 50_000 * b"N"
        + b"t" + put(0) + b"0" + 20_000 * (get(0) + b"Q0") + b"N",
    "long names of many modules": CHILDREN.replace(text("a"), text("a" * 900)) + get(39),
    "one long shape many times": b"(" + 50_000 * b"K\x01" + b"t" + put(0) + b"0"
        + 2_000 * (tensor(get(0), get(0)) + b"0") + b"N",
    "a long that is long": b"\x8b" + struct.pack("<i", 2_000_000) + 2_000_000 * b"\x7f",
    "a number in words": b"I" + 500_000 * b"7" + b"\n",
    "a string that says it is longer": b"\x8d" + struct.pack("<Q", 1 << 62) + b"a",
    "bytes that say they are longer": b"\x8e" + struct.pack("<Q", 1 << 40) + b"a",
    "a frame that says it is longer": b"\x95" + struct.pack("<Q", 1 << 60) + b"N",
    "a tensor without end": b"}" + text("a") + tensor(whole(1 << 40) + b"K\x10\x86", b"K\x00K\x01\x86") + b"s",
    "a tensor without end, empty": b"}" + text("a") + tensor(whole(1 << 59) + b"K\x00\x86", b"K\x00K\x01\x86") + b"s",
    "many tensors of one storage": b"}(" + b"".join(
        text(f"{n}") + tensor(whole(1 << 16) + b"K\x10\x86", b"K\x00K\x01\x86") for n in range(300)) + b"u",
    "modules doubled": CHILDREN + get(39),
    "a module in itself": b"cx\nM\n)\x81" + put(0) + b"}" + text("_modules") + b"}" + text("a") + get(0) + b"ssb",
    "cells without end": b"}(" + b"".join(text(f"cell_list.{n}.conv.weight") + ONE for n in (0, 10**9)) + b"u",
    "a number of digits": b"}(" + text(f"cell_list.{'9' * 900}.conv.weight") + ONE + text("cell_list.٣.conv.weight")
        + ONE + b"u",
    "many cells": ONE + put(0) + b"0}(" + b"".join(
        text(f"cell_list.{n}.x{'y' * 90}") + get(0) for n in range(2000)) + b"u",
}  # fmt: skip


@pytest.mark.parametrize("attack", PICKLES)
def test_pickles_that_cost_more_than_they_have(tmp_path, attack):
    content = b"\x80\x02" + PICKLES[attack] + b"."
    archive(tmp_path / "w.pt", content)
    legacy(tmp_path / "old.pt", content)
    assert refused(tmp_path / "w.pt", tmp_path / "old.pt")


def overlapping(path):
    """Two thousand entries that are all the same bytes of the file."""
    tensors = (text(f"{n}") + ONE.replace(text("0"), text(f"{n}")) for n in range(2000))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}(" + b"".join(tensors) + b"u.")
        file.writestr("archive/data/0", bytes(1 << 20))
        first = file.getinfo("archive/data/0")
        for n in range(1, 2000):
            other = zipfile.ZipInfo(f"archive/data/{n}")
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(other, name, getattr(first, name))
            file.filelist.append(other)


def declared(path, field):
    """An entry that says it is larger than it is."""
    archive(path, b"\x80\x02}" + text("a") + ONE + b"s.")
    with zipfile.ZipFile(path, "a") as file:
        for info in file.filelist:
            if info.filename.endswith("data/0"):
                setattr(info, field, 1 << 31)
        file._didModify = True


FILES = {
    "compressed": lambda path: archive(path, b"\x80\x02N" + bytes(1 << 28), zipfile.ZIP_DEFLATED),
    "entries that overlap": overlapping,
    "an entry that says it is longer": lambda path: declared(path, "file_size"),
    "an entry that says it is longer, packed too": lambda path: declared(path, "compress_size"),
    "an entry that lies elsewhere": lambda path: declared(path, "header_offset"),
    "many entries": lambda path: archive(path, b"\x80\x02N.", **{f"data/{n}": b"" for n in range(1, 20_000)}),
    "two lists": lambda path: archive(path, b"\x80\x02N.", **{"b/data.pkl": b""}),
    "legacy storage without end": lambda path: legacy(
        path, b"\x80\x02}" + text("a") + ONE + b"s.", b"\x80\x02]" + text("0") + b"a.", struct.pack("<q", 1 << 60)
    ),
    "legacy storage of another size": lambda path: legacy(
        path, b"\x80\x02}" + text("a") + ONE + b"s.", b"\x80\x02]" + text("0") + b"a.",
        struct.pack("<q", 15) + bytes(64),
    ),
    "legacy list without end": lambda path: legacy(
        path, b"\x80\x02}" + text("a") + ONE + b"s.", b"\x80\x02](" + 100_000 * text("0") + b"e.",
        struct.pack("<q", 16) + bytes(64),
    ),
    "legacy storage missing": lambda path: legacy(path, b"\x80\x02}" + text("a") + ONE + b"s."),
    "safetensors with deep metadata": lambda path: safetensors(path, '{"__metadata__":' + 100_000 * "["),
    "safetensors with our metadata, deep": lambda path: safetensors(
        path, json.dumps({"__metadata__": {"fastclstm": 100_000 * "["}})
    ),
    "safetensors of many axes": lambda path: safetensors(
        path, json.dumps({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}), bytes(4)
    ),
    "safetensors of a large shape": lambda path: safetensors(
        path, json.dumps({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}), bytes(4)
    ),
    "safetensors with a long header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "safetensors of many names": lambda path: safetensors(path, json.dumps(
        {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)})),
}  # fmt: skip


def safetensors(path, header, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


@pytest.mark.parametrize("attack", FILES)
def test_files_that_say_they_are_more_than_they_are(tmp_path, attack):
    path = tmp_path / "w.pt"
    FILES[attack](path)
    assert refused(path)


def test_the_limits_are_felt(tmp_path):
    """A file that is what it says is read within them, and a reader without bounds dies of them."""
    path = tmp_path / "w.pt"
    weight = tensor(b"(K\x04K\x02K\x01K\x01t", b"(K\x02K\x01K\x01K\x01t")
    archive(path, b"\x80\x02}" + text("cell_list.0.conv.weight") + weight + b"s.")
    assert outcome(path).stdout == "read\n"
    assert "MemoryError" in outcome(path, code=READ.replace("from_torch(path)", "bytearray(1 << 28)")).stderr
    assert outcome(path, code=READ.replace("from_torch(path)", "sum(iter(int, 1))"), seconds=1).returncode < 0


def test_large_checkpoints_are_not_taken_for_attacks(tmp_path):
    """Vocabularies, histories and optimizers are most of some files."""
    things = {
        "words": {f"word {n}": n for n in range(100_000)},
        "history": [{"loss": n / 7, "step": n, "note": None} for n in range(20_000)],
        "losses": [n / 7 for n in range(100_000)],
        "counts": [n % 100 for n in range(100_000)],
        "state": {n: {"step": n, "shape": (n, 1, 3)} for n in range(20_000)},
    }
    state = b"}" + text("state_dict") + b"}" + text("a") + ONE + b"ss"
    for protocol in (2, 4):
        content = pickle.dumps(things, protocol)
        archive(tmp_path / "w.pt", content[:2] + b"(" + content[2:-1] + b"1" + state + b".")
        assert list(torch_files.read(tmp_path / "w.pt")) == ["a"]


# A fuzz


def genuine(folder):
    """Small files as PyTorch writes them, without PyTorch: a state_dict, a checkpoint and a whole module."""
    rng = np.random.default_rng(0)
    weights = {"cell_list.0.conv.weight": rng.normal(size=(8, 3, 3, 3)), "cell_list.0.conv.bias": rng.normal(size=8)}

    def stored(n, array):
        pid = STORAGE.replace(text("0"), text(f"{n}")).replace(b"K\x10", b"K" + bytes([array.size]))
        strides = b"(" + b"".join(b"K" + bytes([s // 8]) for s in array.strides) + b"t"
        return (
            TENSOR
            + b"("
            + pid
            + b"K\x00("
            + b"".join(b"K" + bytes([s]) for s in array.shape)
            + b"t"
            + strides
            + b"\x89}tR"
        )

    tensors = [(name, stored(n, array)) for n, (name, array) in enumerate(weights.items())]
    state = b"}(" + b"".join(text(name) + made for name, made in tensors) + b"u"
    module = b"cx\nM\n)\x81}(" + text("_parameters") + b"}" + text("_modules") + b"}(" + b"".join(
        text(name.replace(".", "_")) + b"cx\nM\n)\x81}" + text("weight") + made + b"sb" for name, made in tensors
    ) + b"uub"  # fmt: skip
    checkpoint = b"}(" + text("state_dict") + state + text("epoch") + b"K\x03" + text("args") + b"cx\nN\n)\x81}" \
        + text("lr") + b"G" + struct.pack(">d", 0.5) + b"sb" + text("sizes") + b"](K\x01K\x02eu"  # fmt: skip
    numbers = [array.astype("<f4").tobytes() for array in weights.values()]
    for name, content in {"state": state, "checkpoint": checkpoint, "module": module}.items():
        data = b"\x80\x02" + content + b"."
        archive(folder / f"{name}.pt", data, **{f"data/{n}": raw for n, raw in enumerate(numbers)})
        raw = b"".join(struct.pack("<q", len(raw) // 4) + raw for raw in numbers)
        legacy(folder / f"{name}.old.pt", data, b"\x80\x02](" + text("0") + text("1") + b"e.", raw)
    from safetensors.numpy import save_file

    save_file(weights, folder / "w.safetensors")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def damaged(rng, files):
    """A file with bytes changed, cut out, doubled or taken from another; of an archive perhaps within its pickle."""
    data = rng.choice(files)
    if data[:2] == b"PK" and rng.random() < 0.7:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = {info.filename.removeprefix("archive/"): file.read(info) for info in file.filelist}
        entries["data.pkl"] = mutated(rng, entries["data.pkl"], entries["data.pkl"])
        buffer = io.BytesIO()
        archive(buffer, entries.pop("data.pkl"), **entries)
        return buffer.getvalue()
    return mutated(rng, data, rng.choice(files))


def mutated(rng, data, other):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
            case 2:
                del data[at : at + rng.choice([1, 4, 50])]
            case 3:
                data[at:at] = data[at : at + rng.choice([1, 4, 50])]
            case 4:
                start = rng.randrange(len(other))
                data[at : at + rng.choice([0, 8])] = other[start : start + rng.choice([1, 8, 60])]
            case 5 if rng.random() < 0.2:
                del data[at:]
        if not data:
            break
    return bytes(data)


def test_a_fuzz_of_damaged_files(tmp_path):
    (tmp_path / "genuine").mkdir()
    files = genuine(tmp_path / "genuine")
    outcomes = collections.Counter()
    rng = random.Random(14)
    for path in (tmp_path / "genuine").iterdir():
        assert len(torch_files.read(path)) == 2
    for number in range(2000):
        path = tmp_path / f"{number % 50}.pt"
        path.write_bytes(damaged(rng, files))
        for reader, good in ((torch_files.read, "read"), (from_torch, "converted")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(path)
                outcomes[good] += 1
            except (ValueError, OSError) as error:
                outcomes["refused" if str(path) in str(error) else f"file {number}: {error}"] += 1
    assert set(outcomes) == {"read", "refused", "converted"}
    assert all(count > 100 for count in outcomes.values()), outcomes
