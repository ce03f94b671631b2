import builtins
import json
import zipfile

import numpy as np
import pytest
from keras_2_files import as_keras_2

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
    config, arrays, *_ = keras_files.read(path)
    assert config["class_name"] == "Sequential"
    assert config["keras_version"] == keras.__version__
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    equal({name: arrays[name] for name in weights}, weights)


@pytest.mark.keras
def test_weights(model, tmp_path):
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    config, arrays, *_ = keras_files.read(path)
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
    _, arrays, *_ = keras_files.read(tmp_path / "m.keras")
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


# Keras 2.12 to 2.14


@pytest.mark.parametrize("doubled", [True, False], ids=["2.13", "2.14"])
def test_layers_of_keras_2_are_numbered_anew(tmp_path, h5py, doubled):
    layers = [("conv_lstm2d", {"cell/vars/0": [n]}) for n in range(12)]
    layers[3:3] = [("dropout", {}), ("time_distributed", {}), ("dropout", {})]
    layers += [("time_distributed", {"layer/vars/0": [50], "layer/vars/1": [51]}), ("dense", {"vars/0": [60]})]
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        as_keras_2(file, layers, doubled)
        file["optimizer/vars/0"] = [7]
        file.create_group("metrics/mean/vars")
    config, arrays, version, _ = keras_files.read(tmp_path / "m.weights.h5")
    assert (config, version) == (None, "2")
    found = {place: [int(a[0]) for a in values] for place, values in arrays.items()}
    lstm = {f"layers/conv_lstm2d_{n}" if n else "layers/conv_lstm2d": [n] for n in range(12)}
    assert found == lstm | {"layers/dropout": [], "layers/dropout_1": [], "layers/time_distributed": [],
                            "layers/time_distributed_1": [50, 51], "layers/dense": [60]}  # fmt: skip


@pytest.mark.parametrize("count", [3, 3_000])
def test_long_lists_of_names_are_cut(tmp_path, h5py, count):
    """Keras cuts lists of names of more than 64 KiB into several attributes."""
    names = [f"layer{n}".encode() for n in range(count)]
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["keras_version"] = b"2.11.0"
        parts = [names[n : n + 1_000] for n in range(0, count, 1_000)]
        for n, part in enumerate(parts):
            file.attrs["layer_names" if count == 3 else f"layer_names{n}"] = part
        for name in names:
            file.create_group(name).attrs["weight_names"] = np.array([], "S1")
    _, arrays, version, _ = keras_files.read(tmp_path / "old.h5")
    assert version == "2.11.0"
    assert list(arrays) == [name.decode() for name in names]


# What is read besides, and what is said of what is not


def write_weights(path, h5py, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.arange(6000, dtype="f4").reshape(60, 100), **options)


@pytest.mark.parametrize(
    "options",
    [{"chunks": (7, 30)}, {"compression": 9}, {"compression": 4, "shuffle": True, "chunks": (60, 7)},
     {"compression": 4, "fletcher32": True, "shuffle": True}],
)  # fmt: skip
def test_compressed_weights(tmp_path, h5py, options):
    """As h5repack makes them."""
    write_weights(tmp_path / "m.weights.h5", h5py, **options)
    (array,) = keras_files.read(tmp_path / "m.weights.h5").arrays["layers/dense"]
    np.testing.assert_array_equal(array, np.arange(6000).reshape(60, 100))


def test_other_filters(tmp_path, h5py):
    write_weights(tmp_path / "m.weights.h5", h5py, compression="lzf")
    with pytest.raises(ValueError, match=r"m\.weights\.h5 is damaged .*of which only deflate, shuffle and checksum"):
        keras_files.read(tmp_path / "m.weights.h5")


def test_bfloat16(tmp_path, h5py):
    """Keras keeps it as two bytes without meaning."""
    values = np.array([[1.0, -2.5, 3.140625], [0.0, np.inf, 2.0**-130]], "f4")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        stored = (values.view("u4") >> 16).astype("<u2").view("V2")
        file.create_dataset("layers/dense/vars/0", data=stored).attrs["dtype"] = "bfloat16"
        file["layers/dense/vars/1"] = np.float16([1, 2])
    first, second = keras_files.read(tmp_path / "m.weights.h5").arrays["layers/dense"]
    assert (first.dtype, second.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(first, values)


def test_what_is_no_file_of_layers_is_named(tmp_path, h5py):
    """None of these is damaged."""

    def told(path):
        with pytest.raises(ValueError, match=path.name) as caught:
            keras_files.read(path)
        assert "damaged" not in str(caught.value)
        assert len(str(caught.value)) - len(str(path)) < 300
        return str(caught.value)

    write(tmp_path / "s.keras", h5py, lambda file: None, {"class_name": "Mine", "config": {"dtype": "float32"}})
    assert "holds a subclassed model, Mine, whose layers only its class knows" in told(tmp_path / "s.keras")
    with h5py.File(tmp_path / "s.weights.h5", "w") as file:
        file["head/vars/0"], file["encoder/cell/vars/0"] = [1], [2]
    assert "holds the weights of a subclassed model (encoder, head)" in told(tmp_path / "s.weights.h5")
    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    assert "is a JSON description, which has no weights" in told(tmp_path / "m.json")
    (tmp_path / "saved").mkdir()
    with pytest.raises(IsADirectoryError):
        keras_files.read(tmp_path / "saved")
    (tmp_path / "saved" / "saved_model.pb").touch()
    assert "is a SavedModel folder of TensorFlow" in told(tmp_path / "saved")


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
    with pytest.raises(ImportError, match=r"w\.h5 needs h5py: pip install 'fastclstm\[h5\]'"):
        keras_files.read(tmp_path / "w.h5")


@pytest.mark.parametrize("filters", [{"shuffle": True}, {"fletcher32": True}, {"shuffle": True, "fletcher32": True}])
def test_filters_that_pack_nothing(tmp_path, filters):
    h5py = pytest.importorskip("h5py")
    numbers = np.arange(24.0).reshape(4, 6)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=numbers, chunks=(3, 4), **filters)
    (array,) = keras_files.read(tmp_path / "w.h5").arrays["layers/dense"]
    np.testing.assert_array_equal(array, numbers)
