import builtins
import json
import zipfile

import numpy as np
import pytest

from fastclstm.io import keras_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


@pytest.fixture
def model(keras):
    L = keras.layers
    return keras.Sequential([
        L.Input((4, 8, 8, 2)),
        L.ConvLSTM2D(3, 3, return_sequences=True, dropout=0.1, recurrent_dropout=0.1, name="first"),
        L.Bidirectional(L.ConvLSTM2D(2, 3, return_sequences=True, use_bias=False), name="both"),
        L.TimeDistributed(L.Conv2D(2, 3), name="td"),
        L.BatchNormalization(name="bn"),
        L.Dropout(0.1, name="drop"),
        L.ConvLSTM2D(1, 1, name="last"),
    ])  # fmt: skip


def equal(arrays, expected):
    assert list(arrays) == list(expected)
    for name, values in expected.items():
        assert [a.shape for a in arrays[name]] == [v.shape for v in values]
        for a, v in zip(arrays[name], values, strict=True):
            np.testing.assert_array_equal(a, v)


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore")
def test_models(model, tmp_path, keras, ending):
    path = tmp_path / f"model.{ending}"
    model.save(path)
    config, arrays = keras_files.read(path)
    assert config["class_name"] == "Sequential"
    assert config["keras_version"] == keras.__version__
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    equal({name: arrays[name] for name in weights}, weights)


@pytest.mark.keras
def test_weights(model, tmp_path):
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    config, arrays = keras_files.read(path)
    assert config is None
    kept = {place: values for place, values in arrays.items() if values}
    first, both, td, bn, _, last = (layer.get_weights() for layer in model.layers)
    equal(dict(sorted(kept.items())), {
        "layers/batch_normalization": bn, "layers/bidirectional": both, "layers/conv_lstm2d": first,
        "layers/conv_lstm2d_1": last, "layers/time_distributed": td,
    })  # fmt: skip


@pytest.mark.keras
def test_paths_are_keras_s_own(keras):
    from keras.src.utils.naming import to_snake_case

    classes = ["ConvLSTM2D", "LeakyReLU", "ReLU", "UpSampling3D", "GlobalAveragePooling2D", "TimeDistributed", "ELU"]
    assert keras_files.layer_paths(classes) == [f"layers/{to_snake_case(name)}" for name in classes]


def test_equal_classes_are_counted():
    assert keras_files.layer_paths(["Dense", "ReLU", "Dense", "Dense"]) == [
        "layers/dense", "layers/re_lu", "layers/dense_1", "layers/dense_2",
    ]  # fmt: skip


# Files made by hand


CONFIG = {"class_name": "Sequential", "config": {"layers": [{"class_name": "Dense", "config": {"name": "d"}}]}}


def write(path, h5py, fill, config=CONFIG, metadata=None):
    weights = path.with_suffix(".tmp")
    with h5py.File(weights, "w") as file:
        fill(file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"} if metadata is None else metadata))
        archive.writestr("model.weights.h5", weights.read_bytes())


def test_many_arrays_are_in_the_order_of_their_numbers(tmp_path, h5py):
    def fill(file):
        for n in (11, 2, 0, 10, 1):
            file[f"layers/dense/vars/{n}"] = np.array([n])
        file["layers/dense/seed_generator/vars/0"] = np.array([99])
        file["layers/dense/backward_layer/vars/0"] = np.array([13])
        file["layers/dense/forward_layer/vars/0"] = np.array([12])

    write(tmp_path / "m.keras", h5py, fill)
    _, arrays = keras_files.read(tmp_path / "m.keras")
    assert [int(a[0]) for a in arrays["d"]] == [0, 1, 2, 10, 11, 12, 13]


def secret(tmp_path):
    (tmp_path / "secret").write_bytes(np.arange(4, dtype="<f4").tobytes())
    return str(tmp_path / "secret")


def external(file, h5py, tmp_path):
    file["layers/dense/vars"].create_dataset("0", (4,), "<f4", external=[(secret(tmp_path), 0, 16)])


def virtual(file, h5py, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = np.arange(4.0)
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "a", (4,))
    file["layers/dense/vars"].create_virtual_dataset("0", layout)


def linked(file, h5py, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = np.arange(4.0)
    file["layers/dense/vars/0"] = h5py.ExternalLink(tmp_path / "other.h5", "a")


def linked_group(file, h5py, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["vars/0"] = np.arange(4.0)
    file["layers/dense/cell"] = h5py.ExternalLink(tmp_path / "other.h5", "/")


@pytest.mark.parametrize("reach", [external, virtual, linked, linked_group])
def test_no_other_file_is_read(tmp_path, h5py, reach):
    def fill(file):
        file.create_group("layers/dense/vars")
        reach(file, h5py, tmp_path)

    write(tmp_path / "m.keras", h5py, fill)
    with pytest.raises(ValueError, match=r"m\.keras is damaged or no file of a Keras model .*not lie within it"):
        keras_files.read(tmp_path / "m.keras")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-30], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data.replace(b"config.json", b"confid.json"), id="no config"),
        pytest.param(lambda data: data.replace(b"class_name", b"clazz_name"), id="checksum"),
        pytest.param(lambda data: b"\x89HDF\r\n\x1a\n" + data, id="hdf5 magic"),
        pytest.param(lambda data: b"something else", id="something else"),
    ],
)
def test_damaged_files(tmp_path, h5py, damage):
    path = tmp_path / "m.keras"
    write(path, h5py, lambda file: file.create_group("layers/dense/vars"))
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match=r"m\.keras is damaged or no file of a Keras model"):
        keras_files.read(path)


@pytest.mark.parametrize(
    ("config", "metadata"),
    [([], None), ({"config": 3}, None), ({"config": {"layers": [3]}}, None), (CONFIG, [])],
)
def test_strange_configs(tmp_path, h5py, config, metadata):
    path = tmp_path / "m.keras"
    write(path, h5py, lambda file: file.create_group("layers"), config, metadata)
    with pytest.raises(ValueError, match=r"m\.keras is damaged or no file of a Keras model"):
        keras_files.read(path)


def test_other_hdf5_files(tmp_path, h5py):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"other\.h5 is damaged or no file of a Keras model \(layers is not in it\)"):
        keras_files.read(tmp_path / "other.h5")
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["keras_version"] = "2.4.0"
    with pytest.raises(ValueError, match=r"old\.h5 is damaged or no file of a Keras model"):
        keras_files.read(tmp_path / "old.h5")


def test_missing_file_and_h5py(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        keras_files.read(tmp_path / "nothing.keras")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ImportError, match=r"w\.h5 needs h5py: pip install 'fastclstm\[keras\]'"):
        keras_files.read(tmp_path / "w.h5")
