"""What the tests of reading Keras's models share: weights, and the comparison of ours with Keras's model."""

import numpy as np

from fastclstm.convert.keras import from_keras


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def shuffle(model, seed=0):
    """Give all weights random values; what is a variance stays positive."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        layer.set_weights([
            rng.uniform(0.5, 2, w.shape) if "variance" in v.path else rng.normal(0, 0.4, w.shape)
            for v, w in zip(layer.weights, layer.get_weights(), strict=True)
        ])  # fmt: skip
    return model


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def outputs(model, x, **options):
    return numpy(model(np.asarray(x, model.layers[-1].dtype), **options))


def close(a, b, rtol=1e-9):
    assert np.shape(a) == np.shape(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def check(keras, tmp_path, layers, shape, engine="reference", rtol=1e-9, **call):
    """Save a model of `layers`, load it with ours, and compare; the live model too, and a graph in an .h5 file."""
    model = shuffle(keras.Sequential([keras.layers.Input(shape), *layers]))
    model.save(tmp_path / "model.keras")
    ours = from_keras(tmp_path / "model.keras", engine=engine)
    x = normal(2, *shape)
    close(ours(x, **call), outputs(model, x, **call), rtol)
    live = from_keras(model, engine=engine)
    np.testing.assert_array_equal(live(x, **call), ours(x, **call))
    assert live.parameters.keys() == ours.parameters.keys()
    keras.Model(model.inputs, model.outputs).save(tmp_path / "graph.h5")
    graph = from_keras(tmp_path / "graph.h5", engine=engine)
    np.testing.assert_array_equal(graph(x, **call), ours(x, **call))
    return model, ours
