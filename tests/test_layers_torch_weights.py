import warnings

import numpy as np
import pytest

from fastclstm import (
    Activation,
    BatchNormalization,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    ConvLSTM2D,
    Dense,
    Embedding,
    Flatten,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    MaxPooling2D,
    PReLU,
    Sequential,
)
from fastclstm.layers import torch_weights

RNG = np.random.default_rng(0)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def randomized(torch, module):
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return module


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1, np.abs(b).max()))


LAYERS = {
    "Conv2d": (lambda n: n.Conv2d(3, 4, (3, 5), padding=(1, 2)), lambda o: Conv2D(3, 4, (3, 5), (1, 2), **o), 4),
    "Conv2d, strided": (lambda n: n.Conv2d(3, 2, 4, 2, 1, bias=False),
                        lambda o: Conv2D(3, 2, 4, 1, 2, use_bias=False, **o), 4),
    "Conv3d": (lambda n: n.Conv3d(3, 2, (1, 3, 2), padding="valid"),
               lambda o: Conv3D(3, 2, (1, 3, 2), "valid", **o), 5),
    "BatchNorm2d": (lambda n: n.BatchNorm2d(3), lambda o: BatchNormalization(3, epsilon=1e-5, **o), 4),
    "BatchNorm2d, plain": (lambda n: n.BatchNorm2d(3, affine=False, eps=1e-3),
                           lambda o: BatchNormalization(3, center=False, scale=False, **o), 4),
    "ConvTranspose2d": (lambda n: n.ConvTranspose2d(3, 2, (3, 4), 2, (1, 0), (1, 0)),
                        lambda o: Conv2DTranspose(3, 2, (3, 4), (1, 0), 2, output_padding=(1, 0), **o), 4),
    "ConvTranspose3d": (lambda n: n.ConvTranspose3d(3, 2, (2, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
                        lambda o: Conv3DTranspose(3, 2, (2, 3, 3), (0, 1, 1), (1, 2, 2), use_bias=False, **o), 5),
    "GroupNorm": (lambda n: n.GroupNorm(3, 3), lambda o: GroupNormalization(3, 3, epsilon=1e-5, **o), 4),
    "InstanceNorm2d": (lambda n: n.InstanceNorm2d(3, affine=True),
                       lambda o: InstanceNormalization(3, epsilon=1e-5, **o), 4),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_layers_of_frames(torch, name, data_format):
    make, ours, axes = LAYERS[name]
    module = randomized(torch, make(torch.nn))
    x = RNG.normal(size=(2, 3, 4, 7, 6)[:axes])
    layer = ours({"data_format": data_format, "dtype": "float64", "engine": "reference"} if "Norm" not in name
                 else {"data_format": data_format, "dtype": "float64"})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "plain" in name else "error")
        assert layer.load_torch({f"a.{n}": t for n, t in module.state_dict().items()}, "a") is layer
    given = torch.from_numpy(x).requires_grad_()
    expected = module(given)
    last = data_format == "channels_last"

    def ordered(array):
        return np.moveaxis(array, 1, -1) if last else array

    close(layer(ordered(x), training="Norm" not in name), ordered(expected.detach().numpy()))
    if "Norm" in name:
        return
    dy = torch.randn_like(expected)
    expected.backward(dy)
    close(layer.backward(ordered(dy.numpy())), ordered(given.grad.numpy()))


@pytest.mark.torch
def test_linear_and_layer_norm(torch):
    linear = randomized(torch, torch.nn.Linear(3, 2))
    x = RNG.normal(size=(5, 3))
    layer = Dense(3, 2, dtype="float64").load_torch(linear)
    close(layer(x), linear(torch.from_numpy(x)).detach().numpy())
    norm = randomized(torch, torch.nn.LayerNorm([3, 4, 5]))
    frames = RNG.normal(size=(2, 3, 4, 5))
    expected = norm(torch.from_numpy(frames)).detach().numpy()
    last = LayerNormalization((4, 5, 3), epsilon=1e-5, dtype="float64").load_torch(norm.state_dict())
    close(last(np.moveaxis(frames, 1, -1)), np.moveaxis(expected, 1, -1))
    first = LayerNormalization((3, 4, 5), epsilon=1e-5, dtype="float64").load_torch(norm.state_dict())
    close(first(frames), expected)
    norm = randomized(torch, torch.nn.LayerNorm(3))
    close(LayerNormalization(3, epsilon=1e-5, dtype="float64").load_torch(norm)(x),
          norm(torch.from_numpy(x)).detach().numpy())  # fmt: skip


@pytest.mark.torch
def test_prelu_and_embedding(torch):
    x = RNG.normal(size=(5, 3))
    prelu = randomized(torch, torch.nn.PReLU(3))
    close(PReLU(3, dtype="float64").load_torch(prelu)(x), prelu(torch.from_numpy(x)).detach().numpy())
    embedding = randomized(torch, torch.nn.Embedding(7, 3))
    numbers = RNG.integers(0, 7, (2, 4))
    layer = Embedding(7, 3, dtype="float64").load_torch(embedding.state_dict())
    close(layer(numbers), embedding(torch.from_numpy(numbers)).detach().numpy())


@pytest.mark.torch
@pytest.mark.parametrize("time", [(), (2,)])
def test_linear_after_flatten(torch, time):
    """PyTorch flattens channels first, so the features stand otherwise in a channels_last network."""
    sizes = (*time, 3, 4, 5)
    linear = randomized(torch, torch.nn.Linear(60 * int(np.prod(time)), 2))
    x = RNG.normal(size=(2, *sizes))
    expected = linear(torch.from_numpy(x).flatten(1)).detach().numpy()
    features = linear.in_features
    last = Sequential([Flatten(), Dense(features, 2, dtype="float64").load_torch(linear, flattened=sizes)])
    close(last(np.moveaxis(x, -3, -1)), expected)
    first = Sequential([Flatten(), Dense(features, 2, dtype="float64").load_torch(linear)])
    close(first(x), expected)
    for wrong in ((3, 4, 6), (features,), 3, (3.0, 4, 5)):
        with pytest.raises(ValueError, match=rf"flattened must be the sizes .* layer's {features} features, got"):
            Dense(features, 2).load_torch(linear, flattened=wrong)
    with pytest.raises(ValueError, match="flattened=… is for a Dense that stands after Flatten; leave it out"):
        Conv2D(1, 1, 1).load_torch({}, flattened=sizes)


@pytest.mark.torch
def test_a_network_by_its_prefixes(torch, tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                              torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 5, 3))  # fmt: skip
    net = randomized(torch, net)
    torch.save({"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, tmp_path / "net.pt")
    path, dtype = tmp_path / "net.pt", {"dtype": "float64"}
    model = Sequential([
        Conv2D(2, 4, 3, engine="reference", **dtype).load_torch(path, "0"),
        BatchNormalization(4, epsilon=1e-5, **dtype).load_torch(path, "module.1."),
        Activation("relu"),
        Flatten(),
        Dense(120, 3, **dtype).load_torch(path, "4.", key="state_dict", flattened=(4, 6, 5)),
    ])  # fmt: skip
    x = RNG.normal(size=(2, 2, 6, 5))
    close(model(np.moveaxis(x, 1, -1)), net(torch.from_numpy(x)).detach().numpy())


def test_what_does_not_fit_is_named():
    conv = {"head.weight": np.zeros((8, 3, 3, 3)), "head.bias": np.zeros(8)}
    before = Conv2D(3, 8, 3, seed=0)
    for layer, state, message in (
        (Conv2D(3, 16, 3), conv, r"head\.weight has shape \(8, 3, 3, 3\), but the layer's options ask for \(16, 3, 3, "
                                 r"3\), \(out, in, height, width\)"),
        (Conv2D(3, 8, 3), conv | {"head.bias": np.zeros(9)}, r"head\.bias has shape \(9,\), .* ask for \(8,\)$"),
        (Conv2D(3, 8, 3, use_bias=False), conv, r"missing none, unknown head\.bias under prefix='head\.'; perhaps use"),
        (before, {"head.weight": conv["head.weight"]}, r"missing head\.bias, unknown none under .*; it has weight;"),
        (before, {"tail.weight": np.zeros(3)}, r"missing head\.weight, head\.bias, unknown none .* it has none"),
        (before, {"head.weight_g": np.zeros(3), "head.weight_v": np.zeros(3)}, r"unknown head\.weight_g, head\.weight"),
        (MaxPooling2D(2), conv, r"MaxPooling2D\.load_torch: only BatchNormalization, .*load PyTorch's weights by"),
        (ConvLSTM2D(3, 2, 3), conv, "a ConvLSTM is made by from_torch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            layer.load_torch(state, "head.")
    np.testing.assert_array_equal(before.kernel, Conv2D(3, 8, 3, seed=0).kernel)
    with pytest.raises(TypeError, match=r"Conv2D\.load_torch: source must be a path"):
        before.load_torch(3)
    with pytest.raises(TypeError, match=r"Conv2D\.load_torch: head\.bias has dtype complex128"):
        before.load_torch(conv | {"head.bias": np.zeros(8, complex)}, "head")


def test_an_epsilon_that_is_not_pytorch_s_is_told():
    state = {name: np.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    state["num_batches_tracked"] = np.array(7)
    with pytest.warns(UserWarning, match=r"epsilon is 0\.001, and PyTorch's is 1e-05") as told:
        BatchNormalization(3).load_torch(state)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchNormalization(3, epsilon=1e-5).load_torch(state)


def test_every_row_names_parameters_of_its_layer():
    import fastclstm

    made = {"BatchNormalization": (3,), "Conv2D": (2, 3, 1), "Conv3D": (2, 3, 1), "Dense": (2, 3),
            "LayerNormalization": (3,)}  # fmt: skip
    for name, row in torch_weights.ROWS.items():
        if name in made:
            assert set(getattr(fastclstm, name)(*made[name]).parameters) == set(row)
        assert all(weight.name for weight in row.values())
