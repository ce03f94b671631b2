import json
import zipfile

import numpy as np
import pytest
from keras_2_files import as_keras_2_config

from fastclstm import load
from fastclstm.convert.keras import from_keras, load_weights
from fastclstm.layers import Cropping2D, Dense, GlobalAveragePooling, Input, Rescaling
from fastclstm.models import Model, Sequential

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("seeded_keras"),
]


def drawn(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def shuffle(model, seed=0):
    """Give all weights random values; what is a variance stays positive."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        shape = variable.shape
        variable.assign(rng.uniform(0.5, 2, shape) if "variance" in variable.path else rng.normal(0, 0.3, shape))
    return model


def flat(value):
    if isinstance(value, dict):
        return [array for key in sorted(value) for array in flat(value[key])]
    return [a for item in value for a in flat(item)] if isinstance(value, list | tuple) else [value]


def agree(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        b = b.detach().cpu().numpy()
        assert a.shape == b.shape
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def check(model, x, tmp_path, kind=Model, **options):
    """Compare ours with Keras's model, of both kinds of files and live; return that of the .keras file."""
    expected = shuffle(model)(x, training=False)
    made = []
    for source in (tmp_path / "m.keras", tmp_path / "m.h5", model):
        if source is not model:
            model.save(source)
        ours = from_keras(source, **options)
        assert type(ours) is kind
        agree(ours(x), expected)
        made.append(ours)
    model.save_weights(tmp_path / "m.weights.h5")
    return made[0]


# Architectures


def u_net(keras, state=False):
    """BCDU-Net's form: a U-Net whose skips meet what comes from below in bidirectional ConvLSTM2D."""
    L = keras.layers
    frame = L.Input((16, 16, 1), name="frame")

    def convolved(x, filters):
        x = L.Conv2D(filters, 3, activation="relu", padding="same")(x)
        return L.Conv2D(filters, 3, activation="relu", padding="same")(x)

    skips, x = [], frame
    for filters in (4, 6):
        skips.append(convolved(x, filters))
        x = L.MaxPooling2D(2)(skips[-1])
    x = L.Dropout(0.5)(convolved(x, 8))
    x = L.Concatenate(axis=3)([x, convolved(x, 8)])
    for size, filters in ((8, 6), (16, 4)):
        x = L.Conv2DTranspose(filters, 2, 2, padding="same")(x)
        x = L.Activation("relu")(L.BatchNormalization(axis=3)(x))
        pair = [L.Reshape((1, size, size, filters))(part) for part in (skips.pop(), x)]
        x = L.Concatenate(axis=1)(pair)
        x = L.Bidirectional(L.ConvLSTM2D(filters // 2, 3, padding="same", return_sequences=False))(x)
        x = convolved(x, filters)
    return keras.Model(frame, L.Conv2D(1, 1, activation="sigmoid", name="mask")(x))


def encoder_decoder(keras):
    L = keras.layers
    frames = L.Input((None, 8, 8, 1), name="frames")
    future = L.Input((3, 8, 8, 2), name="future")
    options = {"padding": "same", "return_sequences": True}
    hidden, h, c = L.ConvLSTM2D(3, 3, return_state=True, name="encoder", **options)(frames)
    both = L.Bidirectional(L.ConvLSTM2D(2, 3, return_state=True, **options), name="both")(hidden)
    y = L.ConvLSTM2D(3, 3, name="decoder", **options)(future, initial_state=[h, c])
    y = L.Bidirectional(L.ConvLSTM2D(2, 3, **options), merge_mode="sum", name="again")(y, initial_state=both[1:])
    return keras.Model([frames, future], [L.TimeDistributed(L.Conv2D(1, 1), name="head")(y), c])


def two_outputs(keras, rounded=True):
    """A map and a label; Keras computes the latter in float32, whatever its dtype: without, another map."""
    L = keras.layers
    frames = L.Input((4, 8, 8, 1), name="frames")
    a = L.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(frames)
    b = L.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(a)
    last = L.ConvLSTM2D(2, 3, padding="same")(L.Concatenate()([L.Add()([a, b]), frames]))
    label = L.Dense(3, "softmax", name="label")(L.GlobalAveragePooling2D()(last)) if rounded else L.Conv2D(2, 3)(last)
    return keras.Model(frames, [L.Conv2D(1, 1, name="next")(last), label])


def nested(keras):
    """Models within models, called twice, distributed over steps, with statistics in their midst."""
    L = keras.layers
    inner = keras.Sequential([L.Input((8, 8, 2)), L.Conv2D(3, 3, padding="same", name="one"), L.BatchNormalization(),
                              L.Conv2D(2, 1, name="two")], name="inner")  # fmt: skip
    a = L.Input((8, 8, 2))
    b = L.BatchNormalization()(L.Conv2D(2, 1, name="alone")(inner(a)))
    branching = keras.Model(a, [b, L.Multiply()([a, b])], name="branching")
    frames = L.Input((4, 8, 8, 2), name="frames")
    y = L.TimeDistributed(keras.models.clone_model(inner), name="each")(frames)
    y, h, c = L.ConvLSTM2D(2, 3, padding="same", return_state=True, name="lstm")(y)
    first, second = branching(h), branching(c)
    return keras.Model(frames, L.Average()([*first, second[1], y]), name="outer")


def shared(keras):
    L = keras.layers
    x, y = L.Input((6, 6, 2), name="x"), L.Input((6, 6, 2), name="y")
    conv, norm = L.Conv2D(2, 3, padding="same", name="conv"), L.BatchNormalization(name="norm")
    a, b = norm(conv(x)), conv(norm(conv(y)))
    return keras.Model({"x": x, "y": y}, {"z": L.Subtract()([a, b]), "a": a, "same": L.Maximum()([conv(b), a])})


def recurrent(keras):
    L = keras.layers
    words, numbers = L.Input((5,), name="words"), L.Input((4, 3), name="numbers")
    y, h, c = L.LSTM(3, return_sequences=True, return_state=True)(L.Embedding(7, 2)(words))
    z, s = L.GRU(3, return_sequences=True, return_state=True)(numbers, initial_state=h)
    z = L.LSTM(3)(z, initial_state=[s, c])
    return keras.Model([words, numbers], [L.Concatenate()([z, s]), L.Dense(2)(y)])


def by_name(keras):
    """A model within whose outputs Keras counts in the order of their sorted names; one of them is an output of all."""
    L = keras.layers
    a, b = L.Input((4,), name="a"), L.Input((4,), name="b")
    inner = keras.Model({"b": b, "a": a}, {"z": L.Dense(4)(a), "y": L.Subtract()([a, b]), "x": L.Add()([a, b])},
                        name="inner")  # fmt: skip
    p, q = L.Input((4,), name="p"), L.Input((4,), name="q")
    made = inner({"a": p, "b": L.Dense(4)(q)})
    again = inner({"a": q, "b": p})
    return keras.Model([p, q], [made["y"], L.Multiply()([made["z"], again["x"]])])


X = {
    by_name: [drawn(3, 4), drawn(3, 4, seed=2)],
    u_net: drawn(2, 16, 16, 1),
    encoder_decoder: [drawn(2, 4, 8, 8, 1), drawn(2, 3, 8, 8, 2, seed=2)],
    two_outputs: drawn(2, 4, 8, 8, 1),
    nested: drawn(2, 4, 8, 8, 2),
    shared: {"x": drawn(2, 6, 6, 2), "y": drawn(2, 6, 6, 2, seed=2)},
    recurrent: [np.arange(10).reshape(2, 5) % 7, drawn(2, 4, 3)],
}


@pytest.mark.keras
@pytest.mark.parametrize("make", list(X))
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_architectures(keras, tmp_path, make, engine):
    model = make(keras)
    ours = check(model, X[make], tmp_path, engine=engine)
    inner = [layer.name for layer in model.layers if type(layer).__name__ != "InputLayer"]
    assert [layer.name for layer in ours.layers] == inner
    ours.save(tmp_path / "ours.safetensors")
    for a, b in zip(flat(load(tmp_path / "ours.safetensors")(X[make])), flat(ours(X[make])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.keras
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_of_two_outputs(keras, dtype):
    torch = pytest.importorskip("torch")
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        model = shuffle(two_outputs(keras, rounded=False))
        x = torch.tensor(X[two_outputs].astype(dtype), requires_grad=True)
        expected = model(x)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    ours = from_keras(model, dtype=dtype)
    dys = [drawn(*y.shape, seed=3 + n).astype(dtype) for n, y in enumerate(expected)]
    sum((y * torch.tensor(dy)).sum() for y, dy in zip(expected, dys, strict=True)).backward()
    made = ours(X[two_outputs].astype(dtype), training=True)
    pairs = list(zip(made, (y.detach().numpy() for y in expected), strict=True))
    pairs.append((ours.backward(dys), x.grad.numpy()))
    for variable in model.weights:
        variable.assign(variable.value.grad)  # as weights come to ours one by one, so do gradients
    gradients = ours.get_gradients()
    theirs = from_keras(model, dtype=dtype).parameters
    assert list(gradients) == list(theirs)
    pairs += [(gradient, theirs[name]) for name, gradient in gradients.items()]
    for a, b in pairs:
        assert np.abs(a - b).max() <= {"float64": 1e-10, "float32": 1e-5}[dtype] * np.abs(b).max()


# Files of Keras 2, rewritten from Keras 3's


@pytest.mark.keras
@pytest.mark.parametrize("make", list(X))
def test_h5_of_keras_2(keras, tmp_path, make):
    import h5py

    expected = (model := shuffle(make(keras)))(X[make], training=False)
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        config = as_keras_2_config(json.loads(file.attrs["model_config"]))
        assert "__keras_tensor__" not in json.dumps(config)
        file.attrs["model_config"], file.attrs["keras_version"] = json.dumps(config), "2.15.0"
    agree(from_keras(tmp_path / "m.h5", engine="reference")(X[make]), expected)


@pytest.mark.keras
def test_first_keras_format_of_keras_2(keras, tmp_path):
    import h5py

    model, path = shuffle(nested(keras)), tmp_path / "m.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        config, weights = as_keras_2_config(json.loads(archive.read("config.json"))), archive.read("model.weights.h5")
    (tmp_path / "w.h5").write_bytes(weights)
    with h5py.File(tmp_path / "w.h5") as new, h5py.File(tmp_path / "old.h5", "w") as old:
        places = []
        new.visit(places.append)
        for place in places:
            renamed = place.replace("layers", "_layer_checkpoint_dependencies")
            if isinstance(new[place], h5py.Dataset):
                old[renamed] = new[place][()]
            else:
                old.create_group(renamed)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.14.0"}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "old.h5", "model.weights.h5")
    agree(from_keras(path, engine="reference")(X[nested]), model(X[nested], training=False))


# Chains, and models within


@pytest.mark.keras
def test_chains_stay_sequential(keras, tmp_path):
    L = keras.layers
    inner = keras.Sequential([L.Input((8, 8, 2)), L.Conv2D(2, 3, name="c"), L.BatchNormalization()], name="inner")
    inner.add(keras.Sequential([L.Input((6, 6, 2)), L.Dense(3), L.BatchNormalization(), L.Dense(2)], name="innermost"))
    model = keras.Sequential([L.Input((3, 8, 8, 1)), L.ConvLSTM2D(2, 3, padding="same", name="lstm"), inner,
                              L.Flatten(), L.Dense(2)])  # fmt: skip
    ours = check(model, drawn(2, 3, 8, 8, 1), tmp_path, Sequential)
    assert [layer.name for layer in ours] == [layer.name for layer in model.layers]
    assert isinstance(ours[1], Sequential)
    assert "1.2.0.kernel" in ours.parameters
    x = L.Input((3, 8, 8, 1))
    chained = keras.Model(x, L.Dense(2)(L.Flatten()(inner(L.ConvLSTM2D(2, 3, padding="same")(x)))))
    check(chained, drawn(2, 3, 8, 8, 1), tmp_path, Sequential)


@pytest.mark.keras
def test_branching_models_within_chains(keras, tmp_path):
    L = keras.layers
    a = L.Input((6, 6, 2))
    branching = keras.Model(a, L.Add()([a, L.Conv2D(2, 3, padding="same")(a)]), name="branching")
    model = keras.Sequential([L.Input((4, 6, 6, 2)), L.TimeDistributed(branching), L.LayerNormalization()])
    ours = check(model, drawn(2, 4, 6, 6, 2), tmp_path, Sequential)
    assert type(ours[0].layer) is Model


@pytest.mark.keras
@pytest.mark.parametrize("frozen", ["inner", "one", "batch_normalization"])
def test_frozen_layers_within(keras, tmp_path, frozen):
    """In an .h5 file, the arrays of a model within stand in another order then."""
    L = keras.layers
    inner = keras.Sequential([L.Input((4,)), L.Dense(4, name="one"), L.BatchNormalization(name="batch_normalization"),
                              L.Dense(4, name="two"), L.BatchNormalization()], name="inner")  # fmt: skip
    model = keras.Sequential([L.Input((4,)), inner, L.Dense(4)])
    (inner if frozen == "inner" else inner.get_layer(frozen)).trainable = False
    ours = check(model, drawn(3, 4), tmp_path, Sequential)
    assert len(ours.trainable_parameters) == len(model.trainable_weights)


@pytest.mark.keras
def test_functions_on_symbols(keras, tmp_path):
    L, ops = keras.layers, keras.ops
    x, y = L.Input((5, 3)), L.Input((5, 3))
    z = 1 - (x + y) * 0.5
    z = ops.relu(ops.maximum(z, x) - 0.25) / 3
    model = keras.Model([x, y], [ops.concatenate([z, x * y], axis=1), L.Dense(2)(ops.tanh(z))])
    check(model, [drawn(2, 5, 3), drawn(2, 5, 3, seed=2)], tmp_path)


@pytest.mark.keras
def test_dropout_that_was_told_to_train(keras, tmp_path):
    L = keras.layers
    x = L.Input((400,))
    ours = from_keras(keras.Model(x, L.Dropout(0.5)(x, training=True)))
    assert 0.3 < (ours(np.ones((1, 400))) == 0).mean() < 0.7


# One layer


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_one_layer(keras, tmp_path, ending):
    L = keras.layers
    model = nested(keras)
    y = L.UnitNormalization()(model.outputs[0])
    model = shuffle(keras.Model(model.inputs, L.Dense(1, name="two")(y)))
    model.save(path := tmp_path / f"m.{ending}")
    with pytest.raises(
        ValueError, match=r"layer 'unit_normalization.*not supported.*custom=\{'UnitNormalization': fac"
    ):
        from_keras(path)
    inner, each = model.get_layer("branching"), model.get_layer("each").layer
    for name, theirs in {
        "lstm": model.get_layer("lstm"),
        "each/one": each.get_layer("one"),
        "alone": inner.get_layer("alone"),
        "branching/inner/two": inner.get_layer("inner").get_layer("two"),
    }.items():
        found = from_keras(path, layer=name)
        assert found.name == theirs.name
        for a, b in zip(found.parameters.values(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert from_keras(path, layer="two").out_features == 1  # the outer one
    assert isinstance(from_keras(path, layer="branching"), Model)
    with pytest.raises(ValueError, match=r"there are several layers 'one'; give one of each/one, branching/inner/one"):
        from_keras(path, layer="one")
    with pytest.raises(ValueError, match=r"there is no layer 'three'; there are .*lstm"):
        from_keras(path, layer="three")


# Weights alone


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
@pytest.mark.parametrize("make", [u_net, nested, recurrent])
def test_weights_into_models_that_are_there(keras, tmp_path, make, ending):
    model, path = shuffle(make(keras)), tmp_path / f"m.{ending}"
    ours, other = from_keras(model), from_keras(shuffle(model, 1))
    before = other.parameters
    shuffle(model)
    (model.save_weights if ending == "weights.h5" else model.save)(path)
    load_weights(other, path)
    for name, array in ours.parameters.items():
        np.testing.assert_array_equal(array, other.parameters[name])
        assert not np.array_equal(array, before[name])


@pytest.mark.keras
def test_weights_that_do_not_fit_a_model(keras, tmp_path):
    model, path = nested(keras), tmp_path / "m.weights.h5"
    model.save_weights(path)
    x = Input((8, 8, 2))
    with pytest.raises(ValueError, match=r"holds no layer 'mine'; it has .*branching.*; give the layers Keras's names"):
        load_weights(Model(x, Dense(2, 2, name="mine")(x)), path)
    with pytest.raises(ValueError, match=r"branching has layers within it in .*, but Dense has none"):
        load_weights(Model(x, Dense(2, 2, name="branching")(x)), path)
    with pytest.raises(ValueError, match=r"lstm in .* has 3 arrays, but Dense needs 2: lstm.kernel, lstm.bias"):
        load_weights(Model(x, Dense(2, 2, name="lstm")(x)), path)
    wrong = from_keras(model)
    keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
    with pytest.raises(ValueError, match="holds no layer 'each'"):
        load_weights(wrong, path)
    model.save_weights(path)
    with pytest.raises(ValueError, match=r"layers/conv_lstm2d, layers/functional, .*Dense has Dense"):
        load_weights(Dense(3, 2), path)


# What is not supported


@pytest.mark.keras
def test_what_is_not_supported_is_named_with_its_place(keras, tmp_path):
    L = keras.layers
    a = L.Input((4, 3), name="a")

    def told(y, x=a, **options):
        with pytest.raises(ValueError, match=r"^from_keras: ") as caught:
            from_keras(keras.Model(x, y), **options)
        return str(caught.value)

    inner = keras.Sequential([L.Input((4, 3)), L.UnitNormalization(name="unit")], name="inner")
    assert "layer 'inner' (Sequential): layer 'unit' (UnitNormalization): not supported" in told([a, inner(a)])
    assert "custom={'UnitNormalization': factory}" in told([a, inner(a)])
    assert "layer 'twice' (Lambda): not supported" in told([a, L.Lambda(lambda x: 2 * x, name="twice")(a)])
    assert "(GetItem): not supported as it is called; give custom={'GetItem': factory}" in told([a, a[:, 1:]])
    assert "(Masking): is not supported, as masks" in told([a, L.Masking()(a)])
    mask = L.Input((4,), dtype="bool", name="mask")
    assert "(LSTM): is called with mask, which is not supported" in told(L.LSTM(2)(a, mask=mask), [a, mask])

    class Mine(keras.Model):
        def call(self, x):
            return x

    assert "layer 'own' (Mine): not supported" in told([a, Mine(name="own")(a)])
    assert "of (None, 4, 3) and (None, 3) is not supported" in told(a + a[:, 0], custom={
        "GetItem": lambda config: Sequential([GlobalAveragePooling()])})  # fmt: skip


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_custom_layers_in_graphs(keras, tmp_path, ending):
    @keras.saving.register_keras_serializable("mine")
    class Twice(keras.layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    L = keras.layers
    x = L.Input((6, 5, 3))
    inner = keras.Sequential([L.Input((6, 5, 3)), L.BatchNormalization(), Twice(3), L.Dense(2)])
    y = L.Lambda(lambda x: x * 2, name="lam")(inner(x))
    model = shuffle(keras.Model(x, [y[:, 1:-1], Twice(3)(x)]))
    model.save(tmp_path / f"m.{ending}")
    twice = lambda config: Dense(3, config["units"], activation=(lambda x: 2 * x, lambda x: 2 + 0 * x))  # noqa: E731
    ours = from_keras(tmp_path / f"m.{ending}", custom={
        "Twice": twice, "Lambda": lambda config: Rescaling(2.0), "GetItem": lambda config: Cropping2D(((1, 1), (0, 0))),
    })  # fmt: skip
    agree(ours(drawn(2, 6, 5, 3)), model(drawn(2, 6, 5, 3), training=False))


def test_damaged_graphs(tmp_path):
    h5py = pytest.importorskip("h5py")

    def told(**changes):
        layer = {"name": "act", "trainable": True, "activation": "relu", "dtype": "float32"}
        layers = [{"class_name": "InputLayer", "name": "x", "config": {"name": "x", "batch_input_shape": [None, 3]},
                   "inbound_nodes": []},
                  {"class_name": "Activation", "name": "act", "config": layer,
                   "inbound_nodes": changes.pop("nodes", [[["x", 0, 0, {}]]])}]  # fmt: skip
        config = {"name": "m", "layers": layers, "input_layers": [["x", 0, 0]], "output_layers": [["act", 0, 0]]}
        with h5py.File(tmp_path / "m.h5", "w") as file:
            model = {"class_name": "Functional", "config": config | changes}
            file.attrs["keras_version"], file.attrs["model_config"] = "2.11.0", json.dumps(model)
            group = file.create_group("model_weights")
            group.attrs["layer_names"] = np.array([], "S1")
        try:
            return from_keras(tmp_path / "m.h5")
        except ValueError as error:
            return str(error)

    assert isinstance(told(), Sequential)
    assert f"in a circle (in {tmp_path / 'm.h5'})" in told(nodes=[[["act", 0, 0, {}]]])
    assert "no call 3 of 'x'" in told(nodes=[[["x", 3, 0, {}]]])
    assert "refers to a layer 'y'" in told(nodes=[[["y", 0, 0, {}]]])
    assert "no array 5 of call 0 of 'x'" in told(nodes=[[["x", 0, 5, {}]]])
    assert "no call 5 of 'act'" in told(output_layers=[["act", 5, 0]])
    assert "damaged" in told(output_layers=3)
    assert "two layers" in told(layers=2 * [{"class_name": "InputLayer", "config": {"name": "x"}}])
