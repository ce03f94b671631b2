import re

import numpy as np
import pytest

from fastclstm.convert.torch import DIALECTS, LegacyOrder, from_torch, to_torch
from fastclstm.layers import ConvLSTM2D, MaxPooling3D
from fastclstm.nn.normalization import Normalization

C, FRAME = 3, (6, 5)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def dialects(torch):
    import dialects_torch

    torch.manual_seed(0)
    return dialects_torch


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


def stack(dialects, cell, filters, sizes, *options):
    channels = [C, *filters]
    return dialects.Stack([cell(*pair, size, *options) for *pair, size in zip(channels, filters, sizes, strict=False)])


MODULES = {
    "ndrplz": ("ndrplz", lambda d: stack(d, d.JointCell, [4], [(3, 3)], True)),
    "ndrplz, stacked": ("ndrplz", lambda d: stack(d, d.JointCell, [4, 2, 3], [(3, 5), (1, 1), (5, 3)], False)),
    "kl4805": ("kl4805", lambda d: stack(d, d.PeepholeCell, [4], [(3, 3)], True)),
    "kl4805, stacked": ("kl4805", lambda d: stack(d, d.PeepholeCell, [2, 3], [(3, 5), (3, 3)], False)),
    "openstl": ("openstl", lambda d: stack(d, d.OpenSTLCell, [4], [(5, 5)])),
    "openstl, normalized": ("openstl", lambda d: stack(d, d.OpenSTLCell, [4, 2], [(3, 3)] * 2, FRAME)),
    "seyongk": ("seyongk", lambda d: d.Seyongk(C, 4, (3, 3))),
    "seyongk, one way": ("seyongk", lambda d: d.Seyongk(C, 4, (3, 1), bias=False, bidirectional=False)),
    "kimuyen": ("kimuyen", lambda d: d.KimUyen(C, 4, (3, 3), FRAME)),
    "kimuyen, one way": ("kimuyen", lambda d: d.KimUyen(C, 4, (3, 5), FRAME, bias=False, bidirectional=False)),
}


@pytest.fixture(params=MODULES)
def named(request, torch, dialects):
    """A dialect and a module of it, with random weights in float64."""
    dialect, make = MODULES[request.param]
    module = make(dialects).double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and "layer_norm" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 2)
    return dialect, module


def sequence(torch):
    return torch.randn(2, 4, C, *FRAME, dtype=torch.float64)


def run(module, x, **options):
    """What a module computes, its states as pairs of arrays."""
    y, states = module(x, **options)
    return y.detach().numpy(), [tuple(s.detach().numpy() for s in pair) for pair in states]


def right(module):
    """The options with which the published order of a module is put right."""
    return {"right": True} if type(module).__name__ == "Seyongk" else {}


def close(a, b, rtol=1e-9):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def check(layer, module, x, rtol=1e-9):
    y, states = layer(x.numpy())
    expected, expected_states = run(module, x, **right(module))
    close(y, expected, rtol)
    assert len(states) == len(expected_states)
    for pair, expected_pair in zip(states, expected_states, strict=True):
        for state, expected_state in zip(pair, expected_pair, strict=True):
            close(state, expected_state, rtol)


# Numbers


@pytest.mark.torch
def test_outputs_and_states(torch, named, engine):
    dialect, module = named
    x = sequence(torch)
    layer = from_torch(module.state_dict(), return_state=True, engine=engine)
    assert (layer.dtype, layer.data_format) == ("float64", "channels_first")
    check(layer, module, x)
    assert np.abs(layer(x.numpy())[0]).max() > 1e-2
    check(from_torch(module, dialect, return_state=True, engine=engine), module, x)
    single = from_torch(module.float().state_dict(), return_state=True, engine=engine)
    assert single.dtype == "float32"
    check(single, module, x.float(), 2e-5)


@pytest.mark.torch
def test_channels_last(torch, named):
    _, module = named
    x = sequence(torch)
    layer = from_torch(module.state_dict(), data_format="channels_last", engine="reference")
    y = layer(np.moveaxis(x.numpy(), 2, -1))
    close(np.moveaxis(y, -1, 2), run(module, x, **right(module))[0])


@pytest.mark.torch
def test_our_own_files(torch, named, tmp_path):
    _, module = named
    layer, x = from_torch(module.state_dict(), engine="reference"), sequence(torch).numpy()
    layer.save(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(ConvLSTM2D.load(tmp_path / "w.safetensors")(x), layer(x))


@pytest.mark.torch
def test_files(torch, named, tmp_path):
    dialect, module = named
    x = sequence(torch)
    state = {f"module.encoder.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.ckpt")
    layer = from_torch(tmp_path / "w.ckpt", return_state=True, engine="reference")
    check(layer, module, x)
    torch.save({"ema": state}, tmp_path / "w.ckpt")
    layer = from_torch(str(tmp_path / "w.ckpt"), dialect, key="ema", return_state=True, engine="reference")
    check(layer, module, x)


@pytest.mark.torch
def test_there_and_back(torch, named):
    dialect, module = named
    x = sequence(torch)
    expected = run(module, x)[0]
    layer = from_torch(module.state_dict())
    written = to_torch(layer, dialect)
    own = module.state_dict()
    missing = {name for name in own if name not in written}
    assert all(any(n in name for n in ("layer_norm", "conv_o", "conv_last", "_state")) for name in missing)
    assert set(written) <= set(own)
    for tensor in own.values():
        tensor.zero_()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in written.items()}, strict=False)
    close(run(module, x)[0], expected)
    again = from_torch(written, dialect)
    assert again.parameters.keys() == layer.parameters.keys()
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(array, again.parameters[name])


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients(torch, named, engine, dtype):
    dialect, module = named
    module = module.to(getattr(torch, dtype)).train()
    x = sequence(torch).to(getattr(torch, dtype)).requires_grad_()
    layer = from_torch(module, dialect, return_state=True, engine=engine)
    layer(x.detach().numpy(), training=True)
    y, states = module(x, **right(module))
    outputs = [y, *(state for pair in states for state in pair)]
    cotangents = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, cotangents)
    dy, *dstates = (d.numpy() for d in cotangents)
    dx = layer.backward(dy, [*zip(dstates[::2], dstates[1::2], strict=True)])

    def agree(ours, tensor):
        expected = tensor.numpy()
        bound = {"float64": 1e-11, "float32": 5e-6}[dtype] * max(1, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=bound)

    agree(dx, x.grad)
    layer.set_parameters(layer.parameters | layer.get_gradients())  # to have them under the dialect's names
    ours = to_torch(layer, dialect)
    learned = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(learned) >= len(layer.trainable_parameters) // 2
    for name, gradient in learned.items():
        if not re.search(r"(conv_h|rnn_conv)\.bias", name):  # added to another bias, whose gradient is the same
            agree(ours[name], gradient)


@pytest.mark.torch
def test_gradients_in_flax_s_order(torch, dialects, engine):
    """Flax has no reader: i, g, f, o and a forget gate with 1 added at run time are put in our order by hand."""
    F, k = 4, 3
    joint = torch.randn(4 * F, C + F, k, k, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4 * F, dtype=torch.float64).requires_grad_()
    x = sequence(torch).requires_grad_()
    h = c = x.new_zeros(len(x), F, *FRAME)
    for t in range(x.shape[1]):
        z = torch.nn.functional.conv2d(torch.cat([x[:, t], h], 1), joint, bias, padding=k // 2)
        one = torch.cat([z.new_zeros(2 * F), z.new_ones(F), z.new_zeros(F)]).reshape(-1, 1, 1)
        h, c = dialects.advance(z + one, c, "igfo")
    dh, dc = torch.randn_like(h), torch.randn_like(c)
    torch.autograd.backward([h, c], [dh, dc])

    def native(array):
        return array.reshape(4, F, *array.shape[1:])[[0, 2, 1, 3]].reshape(array.shape)

    kernel = native(joint.detach().numpy()).transpose(2, 3, 1, 0)
    layer = ConvLSTM2D(C, F, k, dtype="float64", data_format="channels_first", return_sequences=False, engine=engine)
    forget = np.repeat([0.0, 1, 0, 0], F)
    named = {"kernel": kernel[:, :, :C], "recurrent_kernel": kernel[:, :, C:], "bias": native(bias.detach().numpy())}
    layer.set_parameters({f"layers.0.{n}": a + (forget if n == "bias" else 0) for n, a in named.items()})
    close(layer(x.detach().numpy(), training=True), h.detach().numpy())
    close(layer.backward(dh.numpy(), [(None, dc.numpy())]), x.grad.numpy())
    gradients, expected = layer.get_gradients(), native(joint.grad.numpy()).transpose(2, 3, 1, 0)
    close(gradients["layers.0.kernel"], expected[:, :, :C])
    close(gradients["layers.0.recurrent_kernel"], expected[:, :, C:])
    close(gradients["layers.0.bias"], native(bias.grad.numpy()))


@pytest.mark.torch
@pytest.mark.parametrize("bidirectional", [False, True])
def test_batch_normalization_while_training(torch, dialects, engine, bidirectional):
    module = dialects.Seyongk(C, 4, (3, 3), bidirectional=bidirectional).double()
    layer = from_torch(module, return_state=True, engine=engine)
    module.train()
    x = sequence(torch)
    x.requires_grad_()
    y, _ = module(x, right=True)
    ours, _ = layer(x.detach().numpy(), training=True)
    close(ours, y.detach().numpy())
    dy = torch.randn_like(y)
    y.backward(dy)
    close(layer.backward(dy.numpy()), x.grad.numpy())
    gradients = layer.get_gradients()
    way = "forward." if bidirectional else ""
    gate = module.conv_lstm_cells[0].gates[0]
    close(gradients[f"layers.0.{way}gamma"], gate.bn2d.weight.grad.numpy())
    close(gradients[f"layers.0.{way}kernel"], gate.conv_x.weight.grad.numpy().transpose(2, 3, 1, 0))
    module.eval()
    close(layer.cells[0].moving_mean, gate.bn2d.running_mean.numpy())
    close(layer.cells[0].moving_variance, gate.bn2d.running_var.numpy())
    check(layer, module, sequence(torch))


@pytest.mark.torch
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_legacy_order(torch, dialects, engine, data_format, tmp_path):
    module = dialects.Seyongk(C, 4, (3, 3)).double().eval()
    x = sequence(torch)
    expected, _ = module(x)
    h, c = module(x)[1]
    options = {"legacy_order": True, "engine": engine, "data_format": data_format}
    layer = from_torch(module.state_dict(), return_state=True, **options)
    last = data_format == "channels_last"
    arranged = np.moveaxis(x.numpy(), 2, -1) if last else x.numpy()
    y, states = layer(arranged)
    assert layer.output_shape(arranged.shape) == y.shape
    close(np.moveaxis(y, -1, 2) if last else y, expected.detach().numpy())
    for state, published in zip(states, (h, c), strict=True):
        close(np.moveaxis(state, -1, 1) if last else state, published.detach().numpy())
    ordinary = from_torch(module.state_dict(), engine=engine, data_format=data_format)
    assert np.abs(ordinary(arranged) - y).max() > 1e-3
    layer = from_torch(module.state_dict(), **options)
    np.testing.assert_array_equal(layer(arranged), y)
    np.testing.assert_array_equal(layer(arranged[1]), y[1])
    layer.save(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(LegacyOrder.load(tmp_path / "w.safetensors")(arranged), y)


@pytest.mark.torch
def test_gradients_of_the_legacy_order(torch, dialects):
    module = dialects.Seyongk(C, 2, (3, 3), bias=False).double().eval()
    for parameter in module.conv_lstm_cells[1].parameters():
        parameter.requires_grad_()
    x = sequence(torch).requires_grad_()
    layer = from_torch(module.state_dict(), legacy_order=True, engine="reference")
    module.train()
    y, _ = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    close(layer(x.detach().numpy(), training=True), y.detach().numpy())
    close(layer.backward(dy.numpy()), x.grad.numpy())
    kernel = module.conv_lstm_cells[1].gates[0].conv_h.weight.grad.numpy()
    close(layer.get_gradients()["layer.layers.0.backward.recurrent_kernel"], kernel.transpose(2, 3, 1, 0))


@pytest.mark.torch
def test_half_precision_and_gradients_do_not_hinder(torch, dialects):
    module = stack(dialects, dialects.JointCell, [2], [(3, 3)], True)
    parameters = dict(module.named_parameters())
    x = sequence(torch).float()
    close(from_torch(parameters)(x.numpy()), run(module, x)[0], 1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        layer = from_torch({name: p.to(dtype) for name, p in parameters.items()})
        assert layer.dtype == "float32"
        close(layer(x.numpy()), run(module.to(dtype).float(), x)[0], 1e-5)


# Names: no PyTorch needed


def joint(C=3, F=4, k=3, layers=1, bias=True, prefix="", seed=0):
    rng = np.random.default_rng(seed)
    state = {}
    for n in range(layers):
        state[f"{prefix}cell_list.{n}.conv.weight"] = rng.normal(size=(4 * F, (F if n else C) + F, k, k))
        if bias:
            state[f"{prefix}cell_list.{n}.conv.bias"] = rng.normal(size=4 * F)
    return state


def test_shapes_decide():
    layer = from_torch(joint(5, 6, 3, 2, False), leaky_relu_slope=0.2, dtype="float32", seed=3)
    assert (layer.in_channels, layer.out_channels, layer.num_layers, layer.use_bias) == (5, 6, 2, False)
    assert (layer.kernel_size, layer.padding, layer.dtype, layer.leaky_relu_slope) == ((3, 3), "same", "float32", 0.2)


def test_gates_are_in_their_places():
    state = joint(1, 1, 1)
    weight, bias = state["cell_list.0.conv.weight"], state["cell_list.0.conv.bias"]
    weights = from_torch(state).weights
    for gate, row in zip("ifoc", range(4), strict=True):
        assert weights[f"W_x{gate}"].item() == weight[row, 0].item()
        assert weights[f"W_h{gate}"].item() == weight[row, 1].item()
        assert weights[f"b_{gate}"].item() == bias[row]


def test_a_submodule_is_found_by_its_prefix():
    state = joint(prefix="encoder.") | joint(C=4, prefix="decoder.convlstm.", seed=1) | {"head.weight": np.zeros(3)}
    with pytest.raises(
        ValueError, match=r"several ConvLSTMs fit: 'ndrplz' at prefix='encoder\.', 'ndrplz' at prefix='de"
    ):
        from_torch(state)
    for prefix, channels in (("encoder", 3), ("encoder.", 3), ("decoder.convlstm.", 4), ("decoder", 4)):
        assert from_torch(state, prefix=prefix).in_channels == channels
    with pytest.raises(ValueError, match=r"no ConvLSTM is recognized by its names under 'enc\.'.*got none"):
        from_torch(state, prefix="enc")


def test_what_is_expected_is_said():
    with pytest.raises(ValueError, match=r"no ConvLSTM is recognized") as caught:
        from_torch({"conv.weight": np.zeros(3)})
    for words in (
        "'ndrplz': cell_list.{layer}.(conv.weight, [conv.bias])", "conv_cnext.weight", "bn2d.running_var",
        "'seyongk': conv_lstm_cells.{0|1}.gates.0.(", "'kimuyen': cell_{fw|bw}.(", "got conv.weight",
    ):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ValueError, match=r"Expected, after any prefix, are 'kl4805': cell_list") as caught:
        from_torch(joint(), "kl4805")
    assert "seyongk" not in str(caught.value)
    with pytest.raises(ValueError, match="dialect must be one of 'ndrplz', 'kl4805'"):
        from_torch(joint(), "keras")
    assert set(DIALECTS) == {"ndrplz", "kl4805", "seyongk", "openstl", "kimuyen"}


def test_unknown_weights_in_a_cell_are_not_passed_over():
    with pytest.raises(ValueError, match="no ConvLSTM is recognized"):
        from_torch(joint() | {"cell_list.0.Wci": np.zeros(3)})


def test_missing_cells():
    state = {name.replace("cell_list.1", "cell_list.2"): array for name, array in joint(layers=2).items()}
    with pytest.raises(ValueError, match=r"has the weights of some cells only, numbers 0, 2"):
        from_torch(state)
    backward = {name.replace("cell_list.0.conv", "cell_bw.input_conv"): a for name, a in joint().items()}
    backward |= {name.replace("cell_list.0.conv", "cell_bw.rnn_conv"): a for name, a in joint().items()}
    with pytest.raises(ValueError, match=r"has the weights of some cells only"):
        from_torch(backward)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("cell_list.0.conv.weight", np.zeros((16, 4, 3, 3)), "none of a ConvLSTM"),
        ("cell_list.0.conv.weight", np.zeros((15, 7, 3, 3)), "do not fit one another"),
        ("cell_list.0.conv.weight", np.zeros((16, 7, 3)), "do not fit one another"),
        ("cell_list.0.conv.weight", np.zeros((16, 7, 2, 3)), "kernels must be odd"),
        ("cell_list.0.conv.bias", np.zeros(12), "bias has shape"),
    ],
)
def test_wrong_shapes(name, array, message):
    with pytest.raises(ValueError, match=message):
        from_torch(joint() | {name: array})


def test_layers_must_be_of_one_kind():
    state = joint(layers=2)
    del state["cell_list.1.conv.bias"]
    with pytest.raises(ValueError, match=r"cell_list\.1\. is of another kind than the cells before it"):
        from_torch(state)


def test_half_of_the_biases_is_missing():
    state = {f"cell_fw.{name}.weight": np.zeros((8, 2, 3, 3)) for name in ("input_conv", "rnn_conv")}
    assert from_torch(state).num_parameters == 288
    with pytest.raises(ValueError, match=r"a weight is missing .*rnn_conv\.bias"):
        from_torch(state | {"cell_fw.input_conv.bias": np.zeros(8)})


def test_options_that_the_weights_decide():
    with pytest.raises(ValueError, match="kernel_size, use_bias follow from the weights; leave them out"):
        from_torch(joint(), kernel_size=3, use_bias=True, engine="cpu")
    with pytest.raises(ValueError, match=r"legacy_order=True is for bidirectional .*got 1 layer of 'ndrplz'"):
        from_torch(joint(), legacy_order=True)


def test_kimuyen_s_normalization_is_refused():
    state = {f"cell_fw.{name}.weight": np.zeros((8, 2, 3, 3)) for name in ("input_conv", "rnn_conv")}
    norm = {"cell_fw.layer_norm_cnext.weight": np.ones((2, 4, 4)), "cell_fw.layer_norm_cnext.bias": np.zeros((2, 4, 4))}
    assert isinstance(from_torch(state | norm), ConvLSTM2D)
    for name, array in norm.items():
        with pytest.raises(ValueError, match=rf"layer_norm=True or peephole=True.*\({name.removeprefix('cell_fw.')}\)"):
            from_torch(state | norm | {name: array + 0.1})
    with pytest.raises(ValueError, match=r"leaves the peepholes' weights out of the state_dict"):
        from_torch(state | {"cell_fw.layer_norm_ci.weight": np.ones((2, 4, 4))})


def test_wrong_sources():
    with pytest.raises(TypeError, match="source must be a path, a mapping of names to tensors or arrays"):
        from_torch(3)
    with pytest.raises(ValueError, match="key='model' is for files"):
        from_torch(joint(), key="model")
    with pytest.raises(TypeError, match=r"cell_list\.0\.conv\.bias has dtype complex128"):
        from_torch(joint() | {"cell_list.0.conv.bias": np.zeros(16, complex)})
    with pytest.raises(FileNotFoundError):
        from_torch("nothing.pt")


# What a dialect can hold


@pytest.mark.parametrize(
    ("dialect", "options", "message"),
    [
        ("ndrplz", {"peephole": "channel"}, "'ndrplz' has no peephole='channel'; it has None"),
        ("kl4805", {}, "'kl4805' has no peephole=None; it has 'conv'"),
        ("kl4805", {"peephole": "conv", "peephole_size": 1}, r"one odd kernel size .* layers.0.peephole_i of \(1, 1\)"),
        ("ndrplz", {"bidirectional": True}, "has no bidirectional=True"),
        ("ndrplz", {"normalization": "layer"}, "has no normalization=Normalization"),
        ("openstl", {}, "'openstl' has no use_bias=True; it has False"),
        ("openstl", {"use_bias": False, "normalization": "layer"}, "'openstl' has no normalization"),
        ("seyongk", {}, "'seyongk' has no normalization=None; it has Normalization"),
        ("seyongk", {"normalization": Normalization("batch", epsilon=1e-3)}, "'seyongk' has no normalization"),
        ("seyongk", {"normalization": "batch", "num_layers": 2}, "'seyongk' has no num_layers=2"),
        ("kimuyen", {"bidirectional": True, "merge_mode": "sum"}, "no merge_mode='sum'; it has 'concat' or None"),
        ("ndrplz", {"padding": "valid"}, r"keeps the frame \(padding='same'\), got 'valid'"),
        ("ndrplz", {"padding": 2}, "keeps the frame"),
        ("ndrplz", {"kernel_size": 2}, "odd kernel size"),
        ("ndrplz", {"recurrent_kernel_size": 5}, "one odd kernel size"),
        ("ndrplz", {"stride": 2}, "has no stride=2"),
        ("ndrplz", {"dilation": 2}, "has no dilation=2"),
        ("ndrplz", {"recurrent_dilation": 2}, "has no recurrent_dilation=2"),
        ("ndrplz", {"padding_mode": "circular"}, "has no padding_mode='circular'"),
        ("ndrplz", {"cell_clip": 1.0}, "has no cell_clip=1.0"),
        ("ndrplz", {"activation": "relu"}, "has no activation='relu'; it has 'tanh'"),
        ("ndrplz", {"recurrent_activation": "hard_sigmoid"}, "has no recurrent_activation"),
        ("ndrplz", {"output_activation": "relu"}, "has no output_activation"),
        ("ndrplz", {"go_backwards": True}, "has no go_backwards=True"),
        ("ndrplz", {"leaky_relu_slope": 0.1, "num_layers": 2}, "has no leaky_relu_slope=0.1"),
    ],
)
def test_what_a_dialect_has_no_place_for(dialect, options, message):
    layer = ConvLSTM2D(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options)
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        to_torch(layer, dialect)


def test_equivalent_options_are_no_obstacle():
    layer = ConvLSTM2D(2, 3, (3, 5), (1, 2), (1, 1), 0.3, output_activation="tanh", dropout=0.1, seed=0)
    back = from_torch(to_torch(layer, "ndrplz"))
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 6, 6))
    close(np.moveaxis(layer(np.moveaxis(x, 2, -1)), -1, 2), back(x), 1e-6)


def test_only_convlstms_are_written():
    with pytest.raises(TypeError, match="layer must be a ConvLSTM2D, got MaxPooling3D"):
        to_torch(MaxPooling3D(), "ndrplz")
    with pytest.raises(ValueError, match="dialect must be one of"):
        to_torch(ConvLSTM2D(1, 1, 1), "keras")


@pytest.mark.parametrize(
    "options", [{"merge_mode": "concat"}, {"bidirectional": False}, {"return_sequences": False}, {"time_major": True}]
)
def test_the_legacy_order_is_of_certain_layers(options):
    layer = ConvLSTM2D(1, 2, 3, **{"bidirectional": True, "merge_mode": None} | options)
    with pytest.raises(ValueError, match=rf"LegacyOrder: layer\.{next(iter(options))} must be"):
        LegacyOrder(layer)
    with pytest.raises(TypeError, match="layer must be a ConvLSTM2D, got MaxPooling3D"):
        LegacyOrder(MaxPooling3D())
