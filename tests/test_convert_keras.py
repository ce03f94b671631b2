"""from_keras and load_weights: sources, custom classes and functions, weights alone."""

import numpy as np
import pytest
from keras_2_files import LSTM_ARRAYS, old_lstm, write_old
from keras_models import close, normal, numpy, outputs, shuffle

from fastclstm.convert.keras import from_keras, load_weights
from fastclstm.layers import BatchNormalization, ConvLSTM2D, Dense, Flatten, TimeDistributed
from fastclstm.models import Sequential

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("seeded_keras"),
]


@pytest.mark.keras
def test_unbuilt_models(keras):
    with pytest.raises(ValueError, match="has no weights; build the model"):
        from_keras(keras.Sequential([keras.layers.ConvLSTM2D(2, 3)]))


def test_wrong_sources():
    with pytest.raises(TypeError, match="source must be a path or a Keras model, got int"):
        from_keras(3)
    with pytest.raises(FileNotFoundError):
        from_keras("nothing.keras")


# Custom classes and functions


def soft(x):
    return x / 2


def halves(x):
    return np.full_like(x, 0.5)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("soft", "soft"),
        (
            {"module": "builtins", "class_name": "function", "config": "mine>soft", "registered_name": "function"},
            "soft",
        ),
        ({"class_name": "function", "config": "mine>soft"}, "mine>soft"),
        ({"module": None, "class_name": "Soft", "config": {"slope": 0.5}, "registered_name": "mine>Soft"}, "mine>Soft"),
        ({"value": ["4wEAAA", None, None]}, "<lambda>"),
    ],
)
def test_activations_given_as_objects(tmp_path, spec, name):
    import h5py

    write_old(tmp_path / "m.h5", h5py, [old_lstm(activation=spec)], {"lstm": LSTM_ARRAYS}, "3.1.0")
    with pytest.raises(
        ValueError, match=r"from_keras: layer 'lstm' \(ConvLSTM2D\): .*(activation must be|unknown act)"
    ):
        from_keras(tmp_path / "m.h5")
    seen = []
    ours = from_keras(tmp_path / "m.h5", engine="reference",
                      custom={name: lambda config: seen.append(config) or (soft, halves)})  # fmt: skip
    assert seen == [spec["config"] if isinstance(spec, dict) and name == "mine>Soft" else {}]
    own = ConvLSTM2D(1, 2, 3, activation=(soft, halves), recurrent_activation="hard_sigmoid", engine="reference")
    own.set_parameters(dict(zip(own.parameters, LSTM_ARRAYS, strict=True)))
    x = normal(1, 3, 6, 5, 1)
    np.testing.assert_array_equal(ours(x), own(x))


@pytest.mark.keras
def test_layers_of_keras_as_activations(double, tmp_path):
    L = double.layers
    activations = (L.LeakyReLU(0.3), L.ReLU(), L.LeakyReLU(0.2), L.ReLU(negative_slope=0.1))
    model = shuffle(double.Sequential([L.Input((6, 5, 2)), *(L.Conv2D(2, 1, activation=a) for a in activations)]))
    model.save(tmp_path / "model.keras")
    x = normal(2, 6, 5, 2)
    close(from_keras(tmp_path / "model.keras", engine="reference")(x), outputs(model, x), 1e-6)


@pytest.mark.keras
def test_custom_layers(double, tmp_path):
    @double.saving.register_keras_serializable("mine")
    class Twice(double.layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    model = shuffle(double.Sequential([double.layers.Input((3,)), Twice(2, name="t")]))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"layer 't' \(Twice\): not supported.*custom=\{'Twice': "):
        from_keras(tmp_path / "m.keras")

    def make(config):
        return Dense(3, config["units"], activation=(lambda x: 2 * x, lambda x: 2 + 0 * x), dtype="float64")

    for name in ("mine>Twice", "Twice"):
        ours = from_keras(tmp_path / "m.keras", custom={name: make})
        x = normal(4, 3)
        close(ours(x), outputs(model, x), 1e-6)
    with pytest.raises(ValueError, match=r"custom\['Twice'\] must return a layer of fastclstm, got int"):
        from_keras(tmp_path / "m.keras", custom={"Twice": lambda config: 3})
    with pytest.raises(ValueError, match=r"layer 't' \(Twice\): has 2 arrays of weights but needs 1 \(kernel\)"):
        from_keras(tmp_path / "m.keras", custom={"Twice": lambda config: Dense(3, 2, use_bias=False)})


def test_the_layer_within_is_named(tmp_path):
    import h5py

    inner = {"class_name": "UnitNormalization", "config": {"name": "unit"}}
    spec = {"class_name": "TimeDistributed", "config": {"name": "td", "layer": inner}}
    write_old(tmp_path / "m.h5", h5py, [spec], {"td": []})
    with pytest.raises(
        ValueError, match=r"layer 'td' \(TimeDistributed\): UnitNormalization in it: not supp"
    ) as caught:
        from_keras(tmp_path / "m.h5")
    assert len(str(caught.value)) - len(str(tmp_path)) < 300
    assert str(tmp_path / "m.h5") in str(caught.value)


def test_no_weights_are_drawn(tmp_path, monkeypatch):
    """Only to be replaced: the orthogonal ones take seconds."""
    import h5py

    from fastclstm.nn import initializers

    write_old(tmp_path / "m.h5", h5py, [old_lstm()], {"lstm": LSTM_ARRAYS})
    monkeypatch.setattr(initializers.Orthogonal, "__call__", lambda *_: pytest.fail("drawn"))
    np.testing.assert_array_equal(from_keras(tmp_path / "m.h5")[0].cells[0].bias, LSTM_ARRAYS[2].astype("f4"))


@pytest.mark.keras
def test_pure_bfloat16(keras, tmp_path):
    L = keras.layers
    layers = [L.ConvLSTM2D(2, 3, recurrent_initializer="glorot_uniform", dtype="bfloat16"), L.Flatten(), L.Dense(2)]
    model = keras.Sequential([L.Input((3, 6, 5, 2)), *layers])
    expected = [numpy(weight.value.float()) for weight in model.weights]
    for ending in ("keras", "h5"):
        model.save(tmp_path / f"m.{ending}")
        ours = from_keras(tmp_path / f"m.{ending}")
        for array, value in zip(ours.parameters.values(), expected, strict=True):
            np.testing.assert_array_equal(array, value)


@pytest.mark.keras
def test_subclassed_models(keras, tmp_path):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = keras.layers.ConvLSTM2D(2, 3), keras.layers.Dense(2)

        def call(self, x):
            return self.head(self.lstm(x))

    model = Mine()
    model(np.zeros((1, 2, 5, 5, 1), "f4"))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"m\.keras holds a subclassed model, Mine"):
        from_keras(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    ours = Sequential([ConvLSTM2D(1, 2, 3), Dense(2, 2)])
    with pytest.raises(ValueError, match=r"m\.weights\.h5 holds the weights of .*subclassed model"):
        load_weights(ours, tmp_path / "m.weights.h5")


# Weights alone


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
def test_weights_into_layers_that_are_there(double, tmp_path, ending):
    L = double.layers
    model = shuffle(double.Sequential([
        L.Input((3, 6, 5, 2)), L.ConvLSTM2D(2, 3, return_sequences=True), L.BatchNormalization(),
        L.Bidirectional(L.ConvLSTM2D(2, 3, return_sequences=True)), L.ReLU(), L.ConvLSTM2D(3, 1),
        L.Flatten(), L.Dense(2), L.Dense(2),
    ]))  # fmt: skip
    path = tmp_path / f"m.{ending}"
    (model.save_weights if ending == "weights.h5" else model.save)(path)
    ours, other = from_keras(model), from_keras(shuffle(model, 1))
    load_weights(other, path)
    for name, array in ours.parameters.items():
        np.testing.assert_array_equal(array, other.parameters[name])


@pytest.mark.keras
def test_weights_into_stacked_layers(double, tmp_path):
    L = double.layers
    layers = [L.ConvLSTM2D(2, 3, padding="same", return_sequences=True) for _ in range(3)]
    model = shuffle(double.Sequential([L.Input((3, 6, 5, 2)), *layers]))
    model.save_weights(tmp_path / "m.weights.h5")
    ours = ConvLSTM2D(2, 2, 3, num_layers=3, dtype="float64")
    load_weights(ours, tmp_path / "m.weights.h5")
    x = normal(2, 3, 6, 5, 2)
    close(ours(x), outputs(model, x))


@pytest.mark.keras
def test_weights_that_do_not_fit(keras, tmp_path):
    L, path = keras.layers, tmp_path / "m.weights.h5"
    model = keras.Sequential([L.Input((3, 6, 5, 2)), L.ConvLSTM2D(2, 3), L.Flatten(), L.Dense(2)])
    model.save_weights(path)
    with pytest.raises(ValueError, match="holds weights alone; build the layers, then"):
        from_keras(path)
    layer = ConvLSTM2D(2, 2, 3, seed=0)
    before = layer.cells[0].kernel
    with pytest.raises(
        ValueError, match="holds the weights of layers/conv_lstm2d, layers/dense, but ConvLSTM2D has ConvL"
    ):
        load_weights(layer, path)
    wrong = Sequential([layer, Flatten(), Dense(24, 3)])
    with pytest.raises(ValueError, match=r"m\.weights\.h5 does not fit: .*2\.kernel has shape \(24, 2\)"):
        load_weights(wrong, path)
    wrong = Sequential([layer, Flatten(), Dense(24, 2, use_bias=False)])
    with pytest.raises(ValueError, match=r"layers/dense in .* has 2 arrays, but Dense needs 1: 2\.kernel"):
        load_weights(wrong, path)
    assert layer.cells[0].kernel is before
    with pytest.raises(ValueError, match=r"Keras's ConvLSTM2D has no layers\.0\.peephole_i"):
        load_weights(ConvLSTM2D(2, 2, 3, peephole="channel"), path)


@pytest.mark.keras
def test_weights_of_distributed_layers(keras, tmp_path):
    """Those without weights, too, count where Keras numbers them."""
    L, path = keras.layers, tmp_path / "m.weights.h5"
    model = shuffle(keras.Sequential([L.Input((3, 4)), L.TimeDistributed(L.Flatten()), L.TimeDistributed(L.Dense(2)),
                                      L.BatchNormalization()]))  # fmt: skip
    model.save_weights(path)
    ours = Sequential([TimeDistributed(Flatten()), TimeDistributed(Dense(4, 2)), BatchNormalization(2)])
    load_weights(ours, path)
    x = normal(2, 3, 4)
    close(ours(x), outputs(model, x), 1e-6)
