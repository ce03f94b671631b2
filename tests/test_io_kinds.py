"""A file of another kind is named, with the way to read it, whichever reader it was given to."""

import zipfile

import numpy as np
import pytest

import fastclstm
from fastclstm.convert.keras import from_keras
from fastclstm.convert.torch import from_torch

FILES = {
    "a file of PyTorch": ("w.pt", {"archive/data.pkl": b"}."}),
    "a file of Keras": ("m.keras", {"config.json": b"{}", "model.weights.h5": b""}),
    "a .npz of NumPy": ("a.npz", {"x.npy": b""}),
    "a file of PyTorch,": ("old.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
    "a file of Keras (": ("m.h5", b"\x89HDF\r\n\x1a\n"),
    "a .npy of NumPy": ("a.npy", b"\x93NUMPY\x01\0"),
    "a page of the web": ("w.pth", b"<!DOCTYPE html>"),
    "a SavedModel of TensorFlow": ("saved_model.pb", b"\x08\x01\x12\x00"),
    "a file of ONNX": ("m.onnx", b"\x08\x0a\x12\x09fastclstm"),
    "a file of TensorFlow Lite": ("m.tflite", b"\x1c\0\0\0TFL3"),
    "a pointer of Git LFS": ("w.ckpt", b"version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("read", [fastclstm.load, from_torch, from_keras])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind(tmp_path, kind, read):
    name, content = FILES[kind]
    if (read.__name__, kind[10:17]) in (("from_torch", "PyTorch"), ("from_keras", "Keras"), ("from_keras", "Keras (")):
        pytest.skip("its own reader")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, data in content.items():
                archive.writestr(member, data)
    with pytest.raises(ValueError, match=name) as error:
        read(tmp_path / name)
    assert f"it is {kind}" in str(error.value)
    assert len(str(error.value)) - len(str(tmp_path)) <= 300


def test_our_own_file_cut_off(tmp_path):
    """Of a file that its reader was given nothing is said of readers, but that it is to be copied again."""
    fastclstm.ConvLSTM2D(1, 2, 3).save(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 3):
        (tmp_path / "w.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"w\.safetensors is damaged or .*; copy or write it anew$"):
            fastclstm.load(tmp_path / "w.safetensors")


def test_our_own_file_given_to_keras(tmp_path):
    fastclstm.ConvLSTM2D(1, 2, 3).save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"it is a safetensors file; fastclstm\.load reads its own"):
        from_keras(tmp_path / "w.safetensors")


def test_the_command_line_names_it_too(tmp_path):
    from fastclstm.commands.run import run_file

    for name in "x.npy", "w.npy":
        np.save(tmp_path / name, np.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"w\.npy .* it is a \.npy of NumPy"):
        run_file(tmp_path / "x.npy", tmp_path / "w.npy", tmp_path / "out.npy")
