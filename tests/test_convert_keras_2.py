"""Files and live models of Keras 2."""

import json
import warnings
import zipfile

import numpy as np
import pytest
from keras_2_files import LSTM_ARRAYS, as_keras_2, old_lstm, write_old
from keras_models import close, normal, outputs, shuffle

from fastclstm.convert.keras import from_keras, load_weights
from fastclstm.layers import ConvLSTM2D

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("seeded_keras"),
]


@pytest.mark.keras
def test_old_format(double, tmp_path):
    L = double.layers
    layers = [L.ConvLSTM2D(2, 3, return_sequences=True), L.Bidirectional(L.ConvLSTM2D(2, 3)), L.LeakyReLU(0.1)]
    model = shuffle(double.Sequential([L.Input((3, 6, 5, 2)), *layers]))
    model.save(tmp_path / "m.h5")
    x = normal(2, 3, 6, 5, 2)
    close(from_keras(tmp_path / "m.h5")(x), outputs(model, x))


class OldModel:
    """A live model as Keras 2 describes it."""

    __module__ = "tf_keras.engine.sequential"

    def __init__(self, layers, arrays):
        self.config, self.arrays = layers, arrays

    def get_config(self):
        return {"name": "sequential", "layers": self.config}

    @property
    def layers(self):
        return [
            type("Layer", (), {"name": name, "get_weights": lambda self, a=a: a})() for name, a in self.arrays.items()
        ]


@pytest.mark.parametrize(("version", "expected"), [("2.15.0", "hard_sigmoid_keras2"), ("3.1.0", "hard_sigmoid")])
def test_keras_2_has_another_hard_sigmoid(monkeypatch, version, expected):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "tf_keras", types.SimpleNamespace(__version__=version))
    lstm = {
        "name": "lstm", "trainable": True, "batch_input_shape": (None, None, 8, 8, 1), "dtype": "float32",
        "return_sequences": True, "return_state": False, "go_backwards": False, "stateful": False, "unroll": False,
        "time_major": False, "filters": 2, "kernel_size": (3, 3), "strides": (1, 1), "padding": "same",
        "data_format": "channels_last", "dilation_rate": (1, 1), "activation": "tanh",
        "recurrent_activation": "hard_sigmoid", "use_bias": True, "unit_forget_bias": True, "dropout": 0.0,
        "recurrent_dropout": 0.0, "kernel_regularizer": None,
    }  # fmt: skip
    norm = {"name": "bn", "axis": [4], "momentum": 0.9, "epsilon": 0.01, "center": True, "scale": True}
    relu = {"name": "leaky", "alpha": 0.25}
    arrays = {"lstm": [normal(3, 3, 1, 8), normal(3, 3, 2, 8), normal(8)], "bn": [normal(2) for _ in range(3)] + [
        np.ones(2)], "leaky": []}  # fmt: skip
    specs = [("ConvLSTM2D", lstm), ("BatchNormalization", norm), ("LeakyReLU", relu)]
    model = OldModel([{"class_name": name, "config": config} for name, config in specs], arrays)
    ours = from_keras(model, engine="reference")
    assert [layer.options.get("recurrent_activation") for layer in ours] == [expected, None, None]
    assert ours[2].negative_slope == 0.25
    own = ConvLSTM2D(1, 2, 3, recurrent_activation=expected, engine="reference")
    own.set_parameters(dict(zip(own.parameters, arrays["lstm"], strict=True)))
    x = normal(1, 3, 8, 8, 1)
    np.testing.assert_array_equal(ours[0](x), own(x))
    assert ours(x).shape == (1, 3, 8, 8, 2)


def old_norm(name, axis):
    return {"class_name": "LayerNormalization", "config": {"name": name, "trainable": True, "dtype": "float32",
            "axis": axis, "epsilon": 0.01, "center": True, "scale": True}}  # fmt: skip


@pytest.mark.parametrize("carried", ["on the first layer", "on an input layer"])
def test_layer_normalization_of_keras_2(tmp_path, carried):
    """Its axes are counted from the first, so that the number of axes is needed; only the first layer tells it."""
    import h5py

    shape = {"batch_input_shape": [None, 4, 6, 5, 1]}
    entry = {"class_name": "InputLayer", "config": {"name": "input", "dtype": "float32"} | shape}
    specs = [
        old_norm("n1", [4]), old_lstm(), old_norm("n2", [3, 4]),
        {"class_name": "TimeDistributed", "config": {"name": "td", "layer": old_norm("n3", [3])}},
        old_lstm(name="last", return_sequences=False), old_norm("n4", [1, 2, 3]),
        {"class_name": "GlobalAveragePooling2D", "config": {"name": "gap", "data_format": "channels_last"}},
        old_norm("n5", [1]),
    ]  # fmt: skip
    specs[0]["config"] |= shape if carried == "on the first layer" else {}
    specs = specs if carried == "on the first layer" else [entry, *specs]
    sizes = {"n1": (1,), "n2": (5, 2), "td": (2,), "n4": (6, 5, 2), "n5": (2,)}
    arrays = {spec["config"]["name"]: [] for spec in specs}
    arrays |= {name: [normal(*s), normal(*s, seed=2)] for name, s in sizes.items()}
    arrays |= {"lstm": LSTM_ARRAYS, "last": [normal(3, 3, 2, 8), *LSTM_ARRAYS[1:]]}
    write_old(tmp_path / "old.h5", h5py, specs, arrays)
    ours = from_keras(tmp_path / "old.h5", engine="reference")
    names = [spec["config"]["name"] for spec in specs if spec["class_name"] != "InputLayer"]
    found = {name: layer.parameters for name, layer in zip(names, ours, strict=True)}
    for name, size in sizes.items():
        assert [a.shape for a in found[name].values()] == [size, size]
        np.testing.assert_array_equal(next(iter(found[name].values())), arrays[name][0].astype("f4"))
    assert ours(normal(2, 4, 6, 5, 1)).shape == (2, 2)
    bad = [specs[-1] | {"config": specs[-1]["config"] | {"axis": [0]}}]
    write_old(tmp_path / "bad.h5", h5py, [*specs[:-1], *bad], arrays)
    with pytest.raises(ValueError, match=r"layer 'n5' .*axis=\[0\] is not supported, only the last axes are"):
        from_keras(tmp_path / "bad.h5")


@pytest.mark.parametrize(("version", "doubled"), [("2.12.0", True), ("2.13.1", True), ("2.14.0", False)])
def test_models_of_the_first_keras_format(tmp_path, version, doubled):
    """Files of TF 2.12 to 2.14, rebuilt by hand: their group of layers, and numbers of layers that are left out."""
    import h5py

    def wrap(name, config):
        return {"module": "keras.layers", "class_name": name, "config": config, "registered_name": None}

    flatten = wrap("Flatten", {"name": "f", "data_format": "channels_last"})
    dense = wrap("Dense", {"name": "dense", "units": 3, "activation": "relu", "use_bias": True})
    specs = [
        wrap("InputLayer", {"name": "in", "batch_input_shape": [None, 4, 6, 5, 1]}),
        old_lstm(name="a"), wrap("Dropout", {"name": "drop", "rate": 0.5}), old_lstm(name="b"),
        wrap("TimeDistributed", {"name": "flat", "layer": flatten}),
        wrap("TimeDistributed", {"name": "td", "layer": dense}), old_norm("norm", [2]),
    ]  # fmt: skip
    second = [normal(3, 3, 2, 8), *LSTM_ARRAYS[1:]]
    weights = {"a": LSTM_ARRAYS, "b": second, "td": [normal(60, 3), normal(3)], "norm": [normal(3), normal(3, seed=2)]}
    stems = {"ConvLSTM2D": ("conv_lstm2d", "cell/vars"), "TimeDistributed": ("time_distributed", "layer/vars"),
             "LayerNormalization": ("layer_normalization", "vars"), "Dropout": ("dropout", ""),
             "InputLayer": ("input_layer", "")}  # fmt: skip
    layers = []
    for spec in specs:
        stem, place = stems[spec["class_name"]]
        own = weights.get(spec["config"]["name"], [])
        layers.append((stem, {f"{place}/{n}": array for n, array in enumerate(own)}))
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        as_keras_2(file, layers, doubled)
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "sequential", "layers": specs}}
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "m.weights.h5", "model.weights.h5")
    ours = from_keras(tmp_path / "m.keras", engine="reference")
    assert [layer.options.get("recurrent_activation") for layer in ours][:3:2] == 2 * ["hard_sigmoid_keras2"]
    expected = [array.astype("f4") for name in ("a", "b", "td", "norm") for array in weights[name]]
    for array, value in zip(ours.parameters.values(), expected, strict=True):
        np.testing.assert_array_equal(array, value)
    other = from_keras(tmp_path / "m.keras", engine="reference")
    other.set_parameters({name: np.zeros_like(array) for name, array in other.parameters.items()})
    load_weights(other, tmp_path / "m.weights.h5")
    x = normal(2, 4, 6, 5, 1)
    np.testing.assert_array_equal(other(x), ours(x))


@pytest.mark.parametrize("kind", ["weights of 2.13", "weights of 2.11", "model", "model of Keras 3"])
def test_weights_of_keras_2_warn_of_another_recurrent_activation(tmp_path, kind):
    import h5py

    path = tmp_path / "m.h5"
    if kind == "weights of 2.13":
        with h5py.File(path, "w") as file:
            as_keras_2(file, [("conv_lstm2d", {f"cell/vars/{n}": a for n, a in enumerate(LSTM_ARRAYS)})], True)
    else:
        write_old(path, h5py, [old_lstm()], {"lstm": LSTM_ARRAYS}, "3.1.0" if "3" in kind else "2.11.0")
        if "weights" in kind:
            with h5py.File(path, "a") as file:
                del file.attrs["model_config"]
    right = "hard_sigmoid" if "3" in kind and "model" in kind else "hard_sigmoid_keras2"
    layer = ConvLSTM2D(1, 2, 3, recurrent_activation=right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(layer, path)
    with pytest.warns(UserWarning, match=rf"m\.h5: .*{right}'.*but the layer has 'sigmoid'") as told:
        load_weights(ConvLSTM2D(1, 2, 3), path)
    assert told[0].filename == __file__
