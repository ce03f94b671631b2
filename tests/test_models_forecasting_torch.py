"""Published networks, rebuilt of our layers: they take PyTorch's weights and give its values and gradients."""

import numpy as np
import pytest
from layer_checks import normal

from fastclstm import (
    Concatenate,
    Conv2D,
    Conv2DTranspose,
    ConvGRU2D,
    ConvLSTM2D,
    EncoderForecaster,
    Input,
    LeakyReLU,
    MaxPooling2D,
    Model,
    MultiscaleForecaster,
    PixelShuffle,
    PixelUnshuffle,
    Reshape,
    Sequential,
)
from fastclstm.nn.normalization import Normalization

torch = pytest.importorskip("torch")
networks = pytest.importorskip("networks_torch")
pytestmark = pytest.mark.torch

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}


def agree(a, b, dtype, what):
    error, size = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    assert error <= TOLERANCES[dtype] * size, f"{what}: {error / size}"


def check_against_theirs(net, carry, x, dtype, *, theirs=lambda net, x: net(x), **call):
    """Our network, carried over, against theirs: outputs, and gradients of x and of all weights.

    As `carry` takes weights to ours one by one, it takes gradients to ours too.
    """
    net = net.to(getattr(torch, dtype))
    given = torch.tensor(x.astype(dtype), requires_grad=True)
    expected = theirs(net, given)
    dy = normal(*expected.shape, seed=5).astype(dtype)
    (expected * torch.tensor(dy)).sum().backward()
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}
    model = carry(weights, dtype)
    assert model.num_parameters == sum(array.size for array in weights.values())
    y = model(x.astype(dtype), training=True, **call)
    agree(y, expected.detach().numpy(), dtype, "output")
    agree(model.backward(dy), given.grad.numpy(), dtype, "dx")
    gradients = carry({name: value.grad.numpy() for name, value in net.named_parameters()}, dtype).parameters
    made = model.get_gradients()
    assert set(made) == set(gradients)
    for name, array in made.items():
        agree(array, gradients[name], dtype, name)
    return model


def own(weights, prefix):
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in weights.items() if name.startswith(start)}


def split(weight, C):
    """A weight over x and h together as our kernels of each."""
    whole = weight.transpose(2, 3, 1, 0)
    return whole[:, :, :C], whole[:, :, C:]


def lstm(weights, C, F, dtype, **options):
    """Of networks_torch.LSTM; or of two for two directions."""
    cells = [own(weights, f"cells.{n}") for n in range(2)] if options.get("bidirectional") else [weights]
    if "conv.1.weight" in cells[0]:
        options["normalization"] = Normalization("group", groups=1)
    layer = ConvLSTM2D(C, F, 3, dtype=dtype, **options)
    for cell, w in zip(layer.cells, cells, strict=True):
        cell.kernel, cell.recurrent_kernel = split(w["conv.0.weight"], C)
        cell.bias = w["conv.0.bias"]
        if "conv.1.weight" in w:
            cell.gamma, cell.beta = w["conv.1.weight"], w["conv.1.bias"]
    return layer


def gru(weights, C, F, dtype, **options):
    """Of networks_torch.GRU, whose z is one minus ours: normalization keeps the sign, so its factors take the minus."""
    sign = np.repeat(np.array([-1, 1, 1], dtype), F)
    if "gates.1.weight" in weights:
        options["normalization"] = Normalization("group", groups=3)
    layer = ConvGRU2D(C, F, 3, reset_after=False, dtype=dtype, **options)
    (cell,) = layer.cells
    pairs = [split(weights[f"{part}.0.weight"], C) for part in ("gates", "new")]
    kernels = [np.concatenate(arrays, -1) for arrays in zip(*pairs, strict=True)]
    bias = np.concatenate([weights["gates.0.bias"], weights["new.0.bias"]])
    if "gates.1.weight" in weights:
        cell.gamma, cell.beta = (
            sign * np.concatenate([weights[f"{part}.1.{kind}"] for part in ("gates", "new")])
            for kind in ("weight", "bias")
        )
    else:
        kernels, bias = [sign * kernel for kernel in kernels], sign * bias
    cell.kernel, cell.recurrent_kernel = kernels
    cell.bias = bias
    return layer


def peephole_lstm(layer, index, weights):
    """Give a cell the weights of networks_torch.PeepholeLSTM."""
    cell = layer.cells[index]
    if "x.weight" in weights:
        cell.kernel = weights["x.weight"].transpose(2, 3, 1, 0)
    cell.recurrent_kernel, cell.bias = weights["h.weight"].transpose(2, 3, 1, 0), weights["h.bias"]
    cell.peephole_i, cell.peephole_f, cell.peephole_o = (weights[f"peepholes.{n}"] for n in range(3))


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("cell", "ours"), [("LSTM", lstm), ("GRU", gru)])
def test_encoder_forecaster_at_two_scales(cell, ours, dtype):
    def carry(w, dtype):
        def part(kind, name, *sizes, **options):
            return kind(*sizes, dtype=dtype, **options).load_torch(w, name)

        return MultiscaleForecaster(
            [
                part(Conv2D, "down.0", 1, 3, 3, padding=1), LeakyReLU(0.2),
                ours(own(w, "encoder.0"), 3, 8, dtype),
                part(Conv2D, "down.1", 8, 4, 3, stride=2, padding=1), LeakyReLU(0.2),
                ours(own(w, "encoder.1"), 4, 8, dtype),
            ],
            [
                ours(own(w, "forecaster.0"), 8, 8, dtype),
                part(Conv2DTranspose, "up.0", 8, 5, 4, stride=2, padding=1), LeakyReLU(0.2),
                ours(own(w, "forecaster.1"), 5, 8, dtype),
                part(Conv2D, "up.1", 8, 3, 3, padding=1), LeakyReLU(0.2),
            ],
            [part(Conv2D, "head", 3, 1, 1)], inputs="zeros", data_format="channels_first",
        )  # fmt: skip

    net = networks.Scales(lambda C, F, size: getattr(networks, cell)(C, F, size, groups=1))
    x = normal(2, 3, 1, 6, 8)
    model = check_against_theirs(net, carry, x, dtype, theirs=lambda net, x: net(x, 2), steps=2)
    agree(model.forecast(x.astype(dtype), 2), net(torch.tensor(x.astype(dtype)), 2).detach().numpy(), dtype, "forecast")


def test_the_network_of_2015(dtype):
    def carry(w, dtype):
        model = EncoderForecaster(1, (4, 3, 2), 3, patch_size=2, inputs="nothing", peephole="channel", dtype=dtype,
                                  data_format="channels_first")  # fmt: skip
        for n, layer in enumerate(model.forecaster):
            peephole_lstm(model.encoder, n, own(w, f"encoder.{n}"))
            peephole_lstm(layer, 0, own(w, f"forecaster.{n}"))
        model.head.load_torch(w, "head")
        return model

    check_against_theirs(
        networks.Shi2015(), carry, normal(2, 3, 1, 6, 8), dtype, theirs=lambda net, x: net(x, 2), steps=2
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_one_chain_that_reads_and_goes_on(sampled, dtype):
    def carry(w, dtype):
        cells = [lstm(own(w, f"cell_list.{n}"), C, F, dtype) for n, (C, F) in enumerate(((4, 4), (4, 3)))]
        head = Conv2D(3, 4, 1, use_bias=False, dtype=dtype).load_torch(w, "conv_last")
        return MultiscaleForecaster(cells, head=[head], patch_size=2, data_format="channels_first")

    targets, forced = normal(2, 3, 1, 6, 4, seed=2).astype(dtype), np.array([[True, False], [False, False]])
    more = {"targets": targets, "forced": forced} if sampled else {}
    given = {name: torch.tensor(array) for name, array in more.items()}
    theirs = lambda net, x: net(x, 3, **given)  # noqa: E731
    check_against_theirs(networks.OpenSTL(), carry, normal(2, 3, 1, 6, 4), dtype, theirs=theirs, steps=3, **more)


def test_pixels_shuffled_behind_gated_units(dtype):
    def carry(w, dtype):
        def head(name, C, F):
            return Conv2D(C, F, 1, dtype=dtype).load_torch(w, f"{name}.0")

        model = MultiscaleForecaster(
            [
                PixelUnshuffle(2), gru(own(w, "encoder.0"), 4, 3, dtype, activation="relu"),
                PixelUnshuffle(2), gru(own(w, "encoder.1"), 12, 4, dtype, activation="relu"),
            ],
            [
                gru(own(w, "forecaster.0"), 2, 4, dtype, activation="relu"), head("up.0", 4, 8), PixelShuffle(2),
                gru(own(w, "forecaster.1"), 2, 3, dtype, activation="relu"), head("up.1", 3, 4), PixelShuffle(2),
            ],
            inputs="learnt", in_channels=1, data_format="channels_first",
        )  # fmt: skip
        model.set_parameters(model.parameters | {"inputs.value": w["value"]})
        return model

    check_against_theirs(
        networks.PixelShuffled(), carry, normal(2, 2, 1, 8, 12), dtype, theirs=lambda net, x: net(x, 2), steps=2
    )


def test_autoencoder_of_films(dtype):
    def carry(w, dtype):
        options = {"data_format": "channels_first", "dtype": dtype}
        up = {"stride": 2, "padding": 1, "output_padding": 1, **options}
        return Sequential([
            Conv2D(1, 4, 3, stride=2, padding=1, activation="tanh", **options).load_torch(w, "down.0"),
            Conv2D(4, 3, 3, stride=2, padding=1, activation="tanh", **options).load_torch(w, "down.1"),
            lstm(own(w, "cells.0"), 3, 4, **options),
            lstm(own(w, "cells.1"), 4, 3, **options),
            Conv2DTranspose(3, 4, 3, activation="tanh", **up).load_torch(w, "up.0"),
            Conv2DTranspose(4, 1, 3, activation="sigmoid", **up).load_torch(w, "up.1"),
        ])  # fmt: skip

    check_against_theirs(networks.Autoencoder(), carry, normal(2, 3, 1, 8, 8), dtype)


def test_u_net_with_layers_in_both_directions(dtype):
    def carry(w, dtype):
        def conv(name, *sizes, **options):
            layer = Conv2D(*sizes, data_format="channels_first", dtype=dtype, **options)
            return layer.load_torch(w, name)

        def both(name, C, F, a, b):
            """A layer over two maps, one after the other."""
            maps = [Reshape((1, *map_.shape[1:]))(map_) for map_ in (a, b)]
            options = {"bidirectional": True, "return_sequences": False, "data_format": "channels_first"}
            return lstm(own(w, name), C, F, dtype, **options)(Concatenate(axis=1)(maps))

        x = Input((1, 6, 8))
        a = conv("first", 1, 4, 3, activation="tanh")(x)
        b = conv("second", 4, 6, 3, activation="tanh")(MaxPooling2D(2, data_format="channels_first")(a))
        c = both("bottleneck", 6, 3, b, conv("third", 6, 6, 3, activation="tanh")(b))
        up = Conv2DTranspose(6, 4, 2, stride=2, padding=0, data_format="channels_first", dtype=dtype)
        d = both("skip", 4, 2, a, up.load_torch(w, "up")(c))
        return Model(x, conv("head", 4, 1, 1, activation="sigmoid")(d))

    check_against_theirs(networks.BCDUNet(), carry, normal(2, 1, 6, 8), dtype)
