import numpy as np
import pytest
from layer_checks import check_gradients, check_layer, check_saving, close, equal, keras_values, normal

from fastclstm.layers import Embedding, GaussianNoise, Masking, Rescaling


def test_noise(tmp_path):
    layer, x = GaussianNoise(0.5, seed=0), normal(40, 50)
    equal(layer(x), x)
    noise = layer(x, training=True) - x
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 0.5) < 0.05
    assert not np.array_equal(layer(x, training=True) - x, noise)
    equal(GaussianNoise(0.5, seed=0)(x, training=True), x + noise)
    equal(layer.backward(x), x)
    check_gradients(GaussianNoise(0.5, seed=0), normal(3, 4))
    check_saving(GaussianNoise(0.5, seed=0), x, tmp_path / "layer")
    assert layer(x.astype(np.float32), training=True).dtype == np.float32
    equal(GaussianNoise(0)(x, training=True), x)
    with pytest.raises(ValueError, match="GaussianNoise: stddev must be a number >= 0, got -1"):
        GaussianNoise(-1)


RESCALINGS = [Rescaling(1 / 255), Rescaling(2, -1), Rescaling((1.0, 2.0, 3.0), (0.5, 0.0, 1.0))]


@pytest.mark.parametrize("layer", RESCALINGS, ids=repr)
def test_rescaling(layer, tmp_path):
    x = normal(2, 4, 3)
    check_layer(layer, x, tmp_path / "layer")
    close(layer(x), x * np.array(layer.scale) + np.array(layer.offset))


@pytest.mark.keras
@pytest.mark.parametrize("layer", RESCALINGS, ids=repr)
def test_rescaling_of_keras(layer):
    x, options = normal(2, 4, 3), {name: np.array(value).tolist() for name, value in layer.options.items()}
    close(layer(x), keras_values(lambda L: L.Rescaling(**options, dtype="float64"), x))


def test_errors_of_rescaling():
    with pytest.raises(ValueError, match="Rescaling: scale must be a finite number or a tuple of them, got 'a'"):
        Rescaling("a")
    with pytest.raises(ValueError, match="Rescaling: offset must be"):
        Rescaling(1, ())
    with pytest.raises(ValueError, match="Rescaling: scale has 2 numbers, which the last axis of x"):
        Rescaling((1, 2))(np.zeros((2, 3)))


def masked():
    x = normal(2, 4, 3, 2, 2)
    x[0, 1] = x[1, 2, 1, 0] = -1.0
    x[1, 3, 0, 0, 0] = -1.0  # one of two values only
    return x


def test_masking(tmp_path):
    layer, x = Masking(-1.0), masked()
    check_layer(layer, normal(2, 3, 2, 2), tmp_path / "layer")
    mask = layer.compute_mask(x)
    assert mask.shape == (2, 4, 3, 2)
    assert np.argwhere(~mask).tolist() == [[0, 1, i, j] for i in range(3) for j in range(2)] + [[1, 2, 1, 0]]
    kept = np.broadcast_to(mask[..., np.newaxis], x.shape)
    equal(layer(x, training=True), np.where(kept, x, 0))
    equal(layer.backward(np.ones_like(x)), kept)
    with pytest.raises(ValueError, match="Masking: mask_value must be a finite number, got None"):
        Masking(None)
    with pytest.raises(ValueError, match="Masking: x must be"):
        Masking()(np.zeros(3))


@pytest.mark.keras
def test_masking_of_keras():
    for x in (masked(), masked()[:, :, 0, 0]):
        equal(Masking(-1.0)(x), keras_values(lambda L: L.Masking(-1.0, dtype="float64"), x))


def test_embedding(tmp_path):
    layer = Embedding(5, 3, dtype="float64", seed=0)
    numbers = np.array([[0, 4, 4], [2, 0, 4]])
    y = layer(numbers, training=True)
    equal(y, layer.embeddings[numbers])
    assert layer.output_shape(numbers.shape) == y.shape == (2, 3, 3)
    dy = normal(*y.shape)
    equal(layer.backward(dy), np.zeros((2, 3)))
    gradient = layer.get_gradients()["embeddings"]
    for number in range(5):
        close(gradient[number], dy[numbers == number].sum(0))
    check_saving(layer, numbers, tmp_path / "layer")
    equal(layer(numbers.astype(np.float32)), y)
    assert layer(numbers[:0], training=True).shape == (0, 3, 3)
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(dy)


def test_embedding_of_more_numbers_than_float32_holds():
    layer = Embedding(2**24 + 3, 1, embeddings_initializer="zeros")
    layer.embeddings = np.arange(2.0**24 + 3)[:, np.newaxis] % 1000
    equal(layer([2**24 + 1])[0, 0], np.float32((2**24 + 1) % 1000))


@pytest.mark.keras
def test_embedding_of_keras():
    layer, numbers = Embedding(5, 3, dtype="float64", seed=0), np.array([[0, 4, 4], [2, 0, 1]])
    equal(layer(numbers), keras_values(lambda L: L.Embedding(5, 3, dtype="float64"), numbers, [layer.embeddings]))


@pytest.mark.parametrize("numbers", [[5], [-1], [0.5], [np.nan], [2.0**40]])
def test_wrong_numbers(numbers):
    with pytest.raises(ValueError, match="Embedding: x must hold integers from 0 to 4, as input_dim says, got"):
        Embedding(5, 3)(numbers)
