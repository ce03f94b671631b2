import re
import warnings

import numpy as np
import pytest

from fastclstm.convert.torch import DIALECTS, Dialect, LegacyOrder, from_torch, to_torch
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
def engine(request, directly):
    return request.param


def stack(dialects, cell, filters, sizes, *options):
    channels = [C, *filters]
    return dialects.Stack([cell(*pair, size, *options) for *pair, size in zip(channels, filters, sizes, strict=False)])


MODULES = {
    "ndrplz": ("ndrplz", lambda d: stack(d, d.JointCell, [4], [(3, 3)], True)),
    "ndrplz, stacked": ("ndrplz", lambda d: stack(d, d.JointCell, [4, 2, 3], [(3, 5), (1, 1), (3, 5)], False)),
    "kl4805": ("kl4805", lambda d: stack(d, d.PeepholeCell, [4], [(3, 3)], True)),
    "kl4805, stacked": ("kl4805", lambda d: stack(d, d.PeepholeCell, [2, 3], [(3, 5), (3, 3)], False)),
    "openstl": ("openstl", lambda d: stack(d, d.OpenSTLCell, [4], [(5, 5)])),
    "openstl, normalized": ("openstl", lambda d: stack(d, d.OpenSTLCell, [4, 2], [(3, 3)] * 2, FRAME)),
    "seyongk": ("seyongk", lambda d: d.Seyongk(C, 4, (3, 3))),
    "seyongk, one way": ("seyongk", lambda d: d.Seyongk(C, 4, (3, 5), bias=False, bidirectional=False)),
    "kimuyen": ("kimuyen", lambda d: d.KimUyen(C, 4, (3, 3), FRAME)),
    "kimuyen, one way": ("kimuyen", lambda d: d.KimUyen(C, 4, (3, 5), FRAME, bias=False, bidirectional=False)),
    "aserdega": ("aserdega", lambda d: hadamard_stack(d, [4, 2])),
    "automan000": ("automan000", lambda d: d.Numbered([d.GatesCell(C, 4, (3, 3)), d.GatesCell(4, 2, (3, 5))])),
    "automan000, peepholes": ("automan000", lambda d: d.Numbered([d.GatesCell(C, 4, (3, 3), FRAME)])),
    "sladewinter": ("sladewinter", lambda d: hadamard(d, "convLSTMcell", SEEN)),
    "sladewinter, modules": ("sladewinter-hadamard", lambda d: hadamard(d, "convLSTMcell", SEEN, modules=True)),
    "tsugumi": ("tsugumi", lambda d: hadamard(d, "ConvLSTMCell", SEEN)),
    "tsugumi, without": ("tsugumi", lambda d: hadamard(d, "ConvLSTMCell", ())),
    "hzzone": ("hzzone", lambda d: d.HzzoneLayer(C, 4, (3, 3), FRAME)),
    "hzzone, without": ("hzzone", lambda d: d.HzzoneLayer(C, 4, (5, 5))),
    "jhhuang96, 1 group": ("jhhuang96", lambda d: d.jhhuang96(C, 8, (5, 5))),
    "jhhuang96, 3 groups": ("jhhuang96", lambda d: d.jhhuang96(C, 24, (3, 3))),
    "czifan": ("czifan", lambda d: d.czifan(C, 4, (3, 3))),
    "holmdk": ("holmdk", lambda d: d.PlainLayer(C, 4, (3, 3), order="ifog")),
    "satflow": ("satflow", lambda d: d.PlainLayer(C, 2, (5, 3), order="ifog")),
    "snntorch": ("snntorch", lambda d: d.SpikingLayer(C, 4, (3, 3))),
}
SEEN = "W_ci", "W_cf", "W_co"
SPIKING = "threshold", "graded_spikes_factor", "reset_mechanism_val"


def hadamard(dialects, place, names, modules=False):
    """A module with one cell that has peepholes (F, H, W)."""
    cell = dialects.HadamardCell(C, 4, (3, 3), names=names, shape=(4, *FRAME), modules=modules)
    return dialects.Alone(cell, place)


def hadamard_stack(dialects, filters):
    return dialects.Stack([
        dialects.HadamardCell(c, f, (3, 3), names=("Wci", "Wcf", "Wco"), shape=(f, *FRAME), order="ifog")
        for c, f in zip([C, *filters], filters, strict=False)
    ])  # fmt: skip


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
    prefix = "" if DIALECTS[dialect].cells else "encoder."  # such names might be those of any convolution
    layer = from_torch(tmp_path / "w.ckpt", prefix=prefix, return_state=True, engine="reference")
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
    assert all(any(n in name for n in ("layer_norm", "conv_o", "conv_last", "_state", *SPIKING)) for name in missing)
    assert set(written) <= set(own)
    for name, tensor in own.items():
        if name not in SPIKING:
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
    close(layer(arranged[1]), y[1])  # another algorithm may be the fastest for one
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


def test_what_is_known_is_said():
    with pytest.raises(
        ValueError, match=r"no ConvLSTM is recognized by its names: got conv\.weight; known are"
    ) as caught:
        from_torch({"conv.weight": np.zeros(3)})
    told = f"ndrplz, kl4805, aserdega, seyongk and {len(DIALECTS) - 4} more (DIALECTS, GRU_DIALECTS)"
    assert told in str(caught.value)
    assert "cells=" in str(caught.value)
    with pytest.raises(ValueError, match="dialect must be one of 'ndrplz', 'kl4805'") as caught:
        from_torch(joint(), "keras")
    assert all(repr(name) in str(caught.value) for name in DIALECTS)
    assert {dialect for dialect, _ in MODULES.values()} | {"stae", "seagochen"} == set(DIALECTS)


def without(state, *endings):
    return {name: array for name, array in state.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("state", "dialect", "miss"),
    [
        (joint() | {"cell_list.0.Wci": np.zeros(3)}, None, "cell_list.0 also has Wci, which 'ndrplz' has not;"),
        (joint(prefix="a.b.") | {"a.b.cell_list.0.c": np.zeros(3)}, None, "a.b.cell_list.0 also has c, which"),
        (joint(), "kl4805", "cell_list.0 has no conv_c.weight, conv_cnext.weight, which 'kl4805' has;"),
        ({f"m.cell_bw.{n}.weight": 0 for n in ("input_conv", "rnn")}, None,
         "m.cell_bw has no rnn_conv.weight, which 'kimuyen' has and also has rnn.weight, which 'kimuyen' has not;"),
        (joint() | {f"cell_list.0.{n}{'x' * 99}": 0 for n in range(99)}, None, " and 97 more, which 'ndrplz' has not"),
    ],
)  # fmt: skip
def test_near_misses_are_said_in_short(state, dialect, miss):
    state = {name: np.zeros(3) if isinstance(array, int) else array for name, array in state.items()}
    with pytest.raises(ValueError, match=re.escape(miss)) as caught:
        from_torch(state, dialect)
    assert len(str(caught.value)) <= 300


def test_fastclstm_s_own_weights_are_told(tmp_path):
    layer = ConvLSTM2D(1, 2, 3)
    with pytest.raises(ValueError, match="the parameters of a layer of fastclstm; hand them to its set_parameters"):
        from_torch(layer.parameters)
    layer.save(tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors holds a ConvLSTM2D of fastclstm; load it with ConvLSTM2D\.load"
    ):
        from_torch(tmp_path / "w.safetensors")
    with pytest.raises(TypeError, match=r"source must be a path.* got ConvLSTM2D"):
        from_torch(layer)


def test_what_is_left_over_is_told():
    rest = {f"{name}.weight": np.zeros(3) for name in ("encoder.head", "encoder.bn", "decoder.out")}
    state = joint(prefix="encoder.") | rest | {"scale": np.zeros(1)}
    message = (
        r"only the ConvLSTM at 'encoder\.' was taken, and 4 other tensors were left: "
        r"encoder\.head\., encoder\.bn\., decoder\.out\., scale; prefix="
    )
    with pytest.warns(UserWarning, match=message) as told:
        from_torch(state)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(state, prefix="encoder")
        from_torch(joint(prefix="encoder."))
        beside = {
            "hidden_state": np.zeros((1, 2, 4, 4)),
            "conv_lstm_cells.0.gates.0.bn2d.num_batches_tracked": np.zeros(()),
        }
        from_torch(to_torch(ConvLSTM2D(1, 2, 3, normalization="batch"), "seyongk") | beside)
    with pytest.warns(UserWarning, match=r"was taken, and 1 other tensors were left: head\.$"):
        from_torch(joint() | {"head.weight": np.zeros(3)})
    state = joint(prefix="a.encoder.") | {"a.head.weight": np.zeros(3), "head.weight": np.zeros(3)}
    with pytest.warns(UserWarning, match=r"1 other tensors were left: a\.head\.; prefix='a\.encoder\.' says"):
        from_torch(state, prefix="a")


def test_no_weights_are_drawn_to_be_replaced():
    def draw(shape, rng, dtype):
        raise AssertionError("drawn")

    layer = from_torch(joint(layers=2), kernel_initializer=draw, recurrent_initializer=draw, bias_initializer=draw)
    assert layer.num_parameters == sum(array.size for array in joint(layers=2).values())


# Orders of gates, and dialects of one's own


@pytest.mark.parametrize("gates", ["ifgo", "fiog", "gofi", "ifog"])
@pytest.mark.parametrize("dialect", [*DIALECTS])
def test_every_order_of_gates_there_and_back(dialect, gates):
    row = DIALECTS[dialect]
    options = {"normalization": row.normalization_of(12), "activation": row.activations[0],
               "output_activation": row.output_activation, "use_bias": bool(row.bias_names())}  # fmt: skip
    if row.peephole is not None:
        options["peephole"] = "conv" if dialect == "kl4805" else "elementwise"
    layer = ConvLSTM2D(2, 3, 3, frame_size=4, seed=0, **options)
    layer.set_parameters({n: np.random.default_rng(1).random(a.shape) for n, a in layer.parameters.items()})
    written = to_torch(layer, dialect, gates)
    again = from_torch(written, gates=gates, dialect=dialect)
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(array, again.parameters[name])
    convolution = row.joint or row.split[0]
    names = [f"{row.place(0, 0)}{convolution.replace('{gate}', gate)}.weight" for gate in gates]
    blocks = [written[name] for name in names] if "{gate}" in convolution else np.split(written[names[0]], 4)
    for gate, block in zip(gates, blocks, strict=True):
        expected = layer.weights[f"W_x{gate.replace('g', 'c')}"]
        np.testing.assert_array_equal(block[:, :2], expected)


class OwnCell:
    """Modules of other people, from their descriptions; none of them is in the table."""

    @staticmethod
    def per_gate(torch, dialects, C, F, peephole):
        """A convolution a gate of x, with biases, and one of h, without; peepholes."""
        from torch import nn

        class Cell(nn.Module):
            filters = F

            def __init__(self):
                super().__init__()
                for g in "ifco":
                    setattr(self, f"Wx{g}", nn.Conv2d(C, F, 3, padding=1))
                    setattr(self, f"Wh{g}", nn.Conv2d(F, F, 3, padding=1, bias=False))
                for g in "ifo":
                    shape = (1, F, *FRAME) if peephole == "elementwise" else (1, F, 1, 1)
                    self.register_parameter(f"Wc{g}", nn.Parameter(torch.randn(shape)))

            def forward(self, x, h, c):
                z = {g: getattr(self, f"Wx{g}")(x) + getattr(self, f"Wh{g}")(h) for g in "ifco"}
                i, f = (torch.sigmoid(z[g] + getattr(self, f"Wc{g}") * c) for g in "if")
                c = f * c + i * torch.tanh(z["c"])
                return torch.sigmoid(z["o"] + self.Wco * c) * torch.tanh(c), c

        row = {"split": ("Wx{gate}", "Wh{gate}"), "gates": "ifco", "biases": "x", "peephole": ("Wci", "Wcf", "Wco")}
        return Cell(), row

    @staticmethod
    def group_norm(torch, dialects, C, F, gates):
        """A joint convolution and group normalization of its result."""
        from torch import nn

        groups = 2 if gates == "ifgo" else 4

        class Cell(nn.Module):
            filters = F

            def __init__(self):
                super().__init__()
                self.conv = nn.Sequential(nn.Conv2d(C + F, 4 * F, 5, padding=2), nn.GroupNorm(groups, 4 * F))

            def forward(self, x, h, c):
                return dialects.advance(self.conv(torch.cat([x, h], 1)), c, gates)

        return Cell(), {"joint": "conv.0", "gates": gates, "norms": ["conv.1"],
                        "normalization": Normalization("group", groups=groups)}  # fmt: skip


OWN = [("per_gate", "elementwise"), ("per_gate", "channel"), ("group_norm", "ifgo"), ("group_norm", "fgio")]


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "variant"), OWN)
def test_a_dialect_of_one_s_own(torch, dialects, engine, kind, variant):
    make = getattr(OwnCell, kind)
    (first, row), (second, _) = make(torch, dialects, C, 4, variant), make(torch, dialects, 4, 2, variant)
    stacked = dialects.Stack([first, second]).double()
    with torch.no_grad():
        for tensor in stacked.parameters():
            tensor.copy_(torch.randn_like(tensor) / 2)
    x = sequence(torch)
    places = {"cell_list.0.": "enc.first.", "cell_list.1.": "enc.second."}
    state = {places[name[:12]] + name[12:]: tensor for name, tensor in stacked.state_dict().items()}
    own = {"cells": ["enc.first", "enc.second"], **row}
    layer = from_torch(state, return_state=True, engine=engine, **own)
    check(layer, stacked, x)
    with pytest.raises(ValueError, match="differs from check's y"):
        from_torch(state, engine=engine, check=(x, stacked(x)[0] + 1), **own)
    written = to_torch(layer, Dialect(**own))
    assert {name: array.shape for name, array in written.items()} == {n: tuple(t.shape) for n, t in state.items()}
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[name].numpy())
    found = from_torch(stacked, Dialect("cell_list.{layer}", **row), return_state=True, engine=engine)
    check(found, stacked, x)


def test_rows_that_are_none():
    for fields, message in (
        ({}, "give either joint='name' of the one convolution or split="),
        ({"joint": "a", "split": ("b", "c")}, "give either joint="),
        ({"cells": 3, "joint": "a"}, "cells must be the place of the cells or a sequence of places, got 3"),
        ({"cells": [], "joint": "a"}, "cells must be the place"),
        ({"joint": "a", "gates": "ifg"}, "gates must be an order of the letters i, f, g"),
        ({"split": ("a",)}, "split must be two names"),
        ({"joint": "a", "peephole": ["b"]}, "peephole must be three names"),
        (
            {"joint": "a", "normalization": Normalization("group", groups=2), "norms": ["b"], "gates": "fgio"},
            "groups=2 mixes gates, which another order than 'ifgo' would mix otherwise",
        ),
        ({"joint": "a", "normalization": "batch"}, r"norms must name 1 module\(s\)"),
        ({"joint": "a", "norms": ("b",)}, r"norms must name 0 module\(s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Dialect(**{"cells": "cell"} | fields)
    with pytest.raises(ValueError, match=r"joint make a dialect of your own: give cells=… with them"):
        from_torch(joint(), joint="conv")
    for fields, message in (({"peephole_axes": 5}, "peephole_axes must be 3 or 4, got 5"),
                            ({"layout": "OHWI"}, "layout must be 'OIHW' or 'HWIO', got 'OHWI'"),
                            ({"group_size": 4}, "group_size=4 goes with normalization='group'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Dialect("cell", joint="a", **fields)


@pytest.mark.torch
def test_an_output_to_compare_with(torch, dialects, tmp_path):
    class OtherCell(dialects.JointCell):
        def forward(self, x, h, c):
            return dialects.advance(self.conv(torch.cat([x, h], 1)), c, "fiog")

    module = stack(dialects, OtherCell, [4, 2], [(3, 3)] * 2, True)
    x = sequence(torch).float()
    y, _ = module(x)
    options = {"engine": "reference", "return_state": True}
    with pytest.raises(ValueError, match=r"differs from check's y by up to 0\.\d+ .*gates='ifog'; gates='fiog' agrees"):
        from_torch(module, check=(x, y), **options)
    close(from_torch(module, check=(x, y), gates="fiog", **options)(x.numpy())[0], y.detach().numpy(), 1e-5)
    with pytest.raises(ValueError, match=r"no order of the gates agrees; perhaps activation=.*padding="):
        from_torch(module, check=(x, y.relu()), **options)
    with pytest.raises(
        ValueError, match=r"check's y has shape \(2, 2, 6, 5\), but the layer's output for its x \(2, 4, 2, 6"
    ):
        from_torch(module, check=(x, y[:, 0]), **options)
    for source, wrong in ((module.state_dict(), x), (module, 3)):
        with pytest.raises(TypeError, match=r"check must be \(x, y\).* or, where the source is a module, x alone; got"):
            from_torch(source, check=wrong, **options)
    with pytest.raises(ValueError, match=r"differs from check's y .*gates='ifog'; gates='fiog' agrees"):
        from_torch(module, check=sequence(torch), **options)


@pytest.mark.torch
def test_a_module_at_hand_is_called_where_names_do_not_tell(torch, dialects):
    """Gates in another order are found, another activation is refused, and the module stays what it was."""

    class OtherCell(dialects.JointCell):
        calls = 0

        def forward(self, x, h, c):
            self.calls += 1
            return dialects.advance(self.conv(torch.cat([x, h], 1)), c, "fiog")

    class ReluCell(dialects.JointCell):
        def forward(self, x, h, c):
            i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.relu()
            return o.sigmoid() * c.relu(), c

    x, options = sequence(torch).float(), {"engine": "reference"}
    module = stack(dialects, OtherCell, [4, 2], [(3, 3)] * 2, True)
    for source in (module, torch.nn.DataParallel(module)):
        random = torch.random.get_rng_state()
        layer = from_torch(source, **options)
        close(layer(x.numpy()), module(x)[0].detach().numpy(), 1e-5)
    assert from_torch(source, go_backwards=True, return_sequences=False, **options).go_backwards
    assert torch.equal(random, torch.random.get_rng_state())
    assert module.cell_list[0].calls == 2 * len(x[0])
    assert module.training
    with pytest.raises(ValueError, match="computes what gates='fiog' would, not 'ifog'; give that, or leave"):
        from_torch(module, "ndrplz", **options)
    module = stack(dialects, ReluCell, [4], [(3, 3)], True)
    with pytest.raises(ValueError, match=r"computes something else .* perhaps activation=.* state_dict\(\) is read by"):
        from_torch(module, **options)
    close(from_torch(module, activation="relu", **options)(x.numpy()), module(x)[0].detach().numpy(), 1e-5)
    module.cell_list[0].forward = module.forward = None
    with pytest.warns(UserWarning, match="told by its names alone, 'ifog'; check="):
        from_torch(module, **options)


@pytest.mark.torch
def test_what_a_module_does_around_its_cells_is_spoken_of(torch, dialects):
    class Between(dialects.Stack):
        def forward(self, x):
            y, states = super().forward(x)
            return y.relu(), states

    module = Between([dialects.JointCell(2, 4, (3, 3), True)])
    with pytest.warns(UserWarning, match="the cells agree, but Between itself returns something else"):
        from_torch(module, engine="reference")
    from_torch(module.state_dict(), engine="reference")
    torch.nn.utils.parametrizations.weight_norm(module.cell_list[0].conv)
    with pytest.raises(ValueError, match=r"parametrizations\.weight\.original0 is of a weight that is computed"):
        from_torch(module)
    torch.nn.utils.parametrize.remove_parametrizations(module.cell_list[0].conv, "weight")
    from_torch(module, go_backwards=True, engine="reference")


def spread(torch, module):
    """A module with weights that are large enough to tell orders of gates apart."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and name not in SPIKING and "var" not in name:
                tensor.copy_(torch.randn_like(tensor) / 2)
    return module


@pytest.mark.torch
def test_a_module_is_called_to_compare_with_it(torch, dialects):
    """However it wants to be called, wherever it is; its mode stays what it was."""
    x = torch.randn(2, 3, C, *FRAME)
    cell = dialects.HadamardCell(C, 4, (3, 3), names=SEEN, shape=(4, *FRAME))
    modules = {
        "ndrplz": stack(dialects, dialects.JointCell, [4, 2], [(3, 3)] * 2, True),
        "sladewinter": dialects.ChannelsBeforeTime(cell, "convLSTMcell"),
        "jhhuang96": dialects.TimeFirst(C, 8, (3, 3), torch.nn.GroupNorm(1, 32)),
        "snntorch": dialects.SpikingCell(C, 4, (3, 3)),
        "holmdk": dialects.PairCell(C, 4, (3, 3), order="ifog"),
        "automan000": dialects.GatesCell(C, 4, (3, 3)),
        "czifan": dialects.czifan(C, 4, (3, 3)).train(),
    }
    for dialect, module in modules.items():
        module = spread(torch, module)
        model = torch.nn.ModuleDict({"inner": module})
        before = [part.training for part in model.modules()]
        layer = from_torch(module, check=x, engine="reference")
        model.forward = None
        again = from_torch(Callable(model), prefix="model.inner", check=x.numpy(), engine="reference")
        assert [part.training for part in model.modules()] == before
        np.testing.assert_array_equal(layer(x.numpy()), again(x.numpy()))
        first = next(p for n, p in module.named_parameters() if "weight" in n and p.dim() == 4)
        with pytest.raises(ValueError, match="differs from check's y"):
            from_torch(Other(torch, module, first), prefix="other", check=x, engine="reference")
        assert dialect in DIALECTS
    with pytest.raises(ValueError, match=r"check must be \(batch, time, channels, height, width\), got shape \(3,"):
        from_torch(modules["ndrplz"], check=x[0, :, 0])
    with pytest.raises(
        ValueError, match=r"no call of Stack with check returns a sequence \(\w*Error: .*give check=\(x,"
    ):
        from_torch(modules["ndrplz"], check=torch.zeros(1, 2, C + 1, 5, 5) + 1)


def Callable(model):
    """A model that holds another."""
    import torch

    outer = torch.nn.Module()
    outer.model = model
    return outer


def Other(torch, module, weight):
    """A module whose state_dict is not what it computes with."""

    class Lying(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.other = module

        def state_dict(self):
            state = super().state_dict()
            name = next(n for n, p in self.named_parameters() if p is weight)
            return state | {name: state[name].flip(0)}

    return Lying()


@pytest.mark.torch
def test_an_order_that_names_do_not_tell(torch, dialects, engine):
    x = sequence(torch)
    for order in ("ifgo", "ifog"):
        module = spread(torch, dialects.SplitLayer(C, 4, (3, 3), order).double())
        state = {f"net.{name}": tensor for name, tensor in module.state_dict().items()}
        with pytest.raises(ValueError, match=r"'seagochen' \(conv_x.weight, conv_h.weight\) have their gates in diff"):
            from_torch(state)
        layer = from_torch(state, gates=order, return_state=True, engine=engine)
        check(layer, module, x)
        found = from_torch(module, check=x, engine=engine)
        np.testing.assert_array_equal(found(x.numpy()), layer(x.numpy())[0])
        with pytest.raises(ValueError, match=r"by up to .* no order of the gates agrees"):
            from_torch(state, check=(x, 1 - module(x)[0]))
        with pytest.raises(ValueError, match="to_torch: modules with the names of 'seagochen'"):
            to_torch(layer, "seagochen")
        written = to_torch(layer, "seagochen", gates=order)
        np.testing.assert_array_equal(written["conv_x.weight"], module.conv_x.weight.detach().numpy())
        del state["net.conv_h.bias"]
        assert from_torch(state, "seagochen", gates=order, biases="x").use_bias


def cells_of(names, C=2, F=3, k=3):
    rng = np.random.default_rng(0)
    return {f"{name}.conv.{kind}": rng.normal(size=shape) for name in names
            for kind, shape in (("weight", (4 * F, C + F, k, k)), ("bias", 4 * F))}  # fmt: skip


def test_a_joint_convolution_of_another_name_is_told_how_to_describe():
    weights = {
        f"net.cell.gates.{kind}": array for kind, array in zip(("weight", "bias"), joint().values(), strict=True)
    }
    with pytest.raises(ValueError, match=r"yourself with cells=\['net\.cell'\], joint='gates', if that .* gates=…$"):
        from_torch(weights)
    assert from_torch(weights, cells=["net.cell"], joint="gates", gates="ifgo").num_layers == 1


def test_cells_of_other_ranks_are_named():
    state = {"cell_list.0.conv.weight": np.zeros((8, 5, 3)), "cell_list.0.conv.bias": np.zeros(8)}
    with pytest.raises(ValueError, match=r"cell_list.0.conv.weight \(8, 5, 3\) is .* over 1 axes, .* a ConvLSTM1D by"):
        from_torch(state)


def test_single_cells_are_told_by_their_prefix():
    """A convolution called conv might be any: one that is meant is named."""
    state = cells_of(["encoder_1", "encoder_2"], C=3) | {"head.weight": np.zeros((1, 3, 1, 1))}
    message = (r"no ConvLSTM is recognized by its names: by their shapes these may be cells: 'holmdk' at "
               r"prefix='encoder_1\.', 'holmdk' at prefix='encoder_2\.'; say which with prefix=")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        from_torch(state)
    with pytest.raises(ValueError, match=r"several ConvLSTMs fit: 'holmdk' at prefix='encoder_1\.', 'holmdk' at"):
        from_torch(state, "holmdk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = from_torch(state, prefix="encoder_2")
    np.testing.assert_array_equal(to_torch(layer, "satflow")["conv.weight"], state["encoder_2.conv.weight"])
    with pytest.warns(UserWarning, match="1 other tensors were left: head"):
        stacked = from_torch(state, "holmdk", cells=["encoder_1", "encoder_2"])
    assert (stacked.num_layers, stacked.in_channels) == (2, 3)
    np.testing.assert_array_equal(stacked.cells[1].bias, layer.cells[0].bias)
    with pytest.warns(UserWarning, match="2 other tensors were left"):
        from_torch({n: a for n, a in state.items() if "encoder_2" not in n} | {"a": np.zeros(1)}, "holmdk")
    for shape in ((12, 3, 3, 3), (13, 9, 3, 3), (12, 6, 3)):  # those of other convolutions
        with pytest.raises(ValueError, match="no ConvLSTM is recognized by its names: got"):
            from_torch({"a.conv.weight": np.zeros(shape)})


def test_many_that_might_be_meant_are_said_in_short():
    state = cells_of([f"{'encoder.' * 9}block_{n}" for n in range(99)])
    with pytest.raises(ValueError, match=r"may be cells: .* and 97 more; say which") as caught:
        from_torch(state)
    assert len(str(caught.value)) <= 300


def test_several_dialects_that_fit_are_listed():
    state = {"conv_x.weight": np.zeros((8, 3, 3, 3)), "conv_h.weight": np.zeros((8, 2, 3, 3))}
    rows = [Dialect("", split=("conv_x", "conv_h"), gates=gates, name=gates) for gates in ("ifgo", "ifog")]
    from fastclstm.convert.torch_recognition import recognize

    with pytest.raises(ValueError, match=r"several ConvLSTMs fit: 'ifgo' at prefix='', 'ifog' at prefix=''; say whi"):
        recognize(state, rows, "")


@pytest.mark.torch
def test_weights_under_two_names(torch, dialects, engine):
    """STAE's modules have each cell in a list too."""
    cells = [dialects.GatesCell(C, 4, (3, 3)), dialects.GatesCell(4, 2, (3, 3))]
    module = spread(torch, dialects.Numbered(cells, listed=True).double())
    assert len(module.state_dict()) == 2 * 2 * 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dialect in (None, "stae"):
            layer = from_torch(module, dialect, return_state=True, engine=engine)
            check(layer, module, sequence(torch))
    module.load_state_dict({n: torch.from_numpy(a) for n, a in to_torch(layer, "stae").items()}, strict=False)


def test_a_spiking_cell_that_is_reset_is_refused():
    state = to_torch(ConvLSTM2D(2, 3, 3), "snntorch") | {"reset_mechanism_val": np.array(0)}
    with pytest.raises(
        ValueError, match=r"reset_mechanism than 'none' resets its hidden state: .*\(reset_mechanism_val"
    ):
        from_torch(state)


def test_what_a_module_was_made_with():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, *FRAME))
    options = {"peephole": "elementwise", "frame_size": FRAME, "data_format": "channels_first", "engine": "reference"}
    layer = ConvLSTM2D(3, 4, 3, activation="relu", **options)
    back = from_torch(to_torch(layer, "sladewinter"), activation="relu", engine="reference")
    np.testing.assert_array_equal(back(x), layer(x))
    assert from_torch(to_torch(layer, "sladewinter")).activation == "tanh"
    with pytest.raises(ValueError, match="'hzzone' has no activation='relu'; it has 'tanh'"):
        to_torch(layer, "hzzone")
    with pytest.raises(ValueError, match="'czifan' has no activation='tanh'; it has 'linear'"):
        to_torch(ConvLSTM2D(3, 4, 3, use_bias=False, normalization="batch"), "czifan")
    with pytest.raises(ValueError, match=r"'jhhuang96' has no normalization=.*groups=None.* it has .*groups=3"):
        to_torch(ConvLSTM2D(3, 24, 3, normalization="group"), "jhhuang96")
    layer = ConvLSTM2D(3, 4, 3, **options)
    written = {name: array for name, array in to_torch(layer, "tsugumi").items() if "W_co" not in name}
    with pytest.raises(ValueError, match=r"a weight is missing or has too few axes \('W_co'\)"):
        from_torch(written)


def test_a_forget_bias_of_run_time():
    state = {"a.W.weight": np.random.default_rng(0).normal(size=(8, 5, 3, 3))}
    row = {"cells": ["a"], "joint": "W", "gates": "ifgo", "forget_bias": 1.0}
    layer = from_torch(state, **row)
    np.testing.assert_array_equal(layer.cells[0].bias, [0, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(to_torch(layer, Dialect(**row))["a.W.bias"], np.zeros(8))


def test_activations_that_names_do_not_tell():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5, 5))
    layer = from_torch(joint(), activation="relu", recurrent_activation="hard_sigmoid", engine="reference")
    assert (layer.activation, layer.recurrent_activation) == ("relu", "hard_sigmoid")
    assert from_torch(joint(), activation="relu", recurrent_activation="hard_sigmoid", check=(x, layer(x))) is not layer
    with pytest.raises(ValueError, match="differs from check's y"):
        from_torch(joint(), check=(x, layer(x)), engine="reference")


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
        ("cell_list.0.conv.weight", np.zeros((16, 7, 3)), "over 1 axes"),
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
    for name, array in (("layer_norm_ci.weight", np.ones((2, 4, 4))), ("weight_ci.weights", np.ones((1, 2, 4, 4)))):
        with pytest.raises(ValueError, match=r"peepholes take the place of the gates' pre-activations, .* old cell st"):
            from_torch(state | {f"cell_fw.{name}": array})


def test_wrong_sources():
    with pytest.raises(TypeError, match="source must be a path, a mapping of names to tensors or arrays"):
        from_torch(3)
    with pytest.raises(ValueError, match="the source has no tensors under 'model'; its entries are 'cell_list"):
        from_torch(joint(), key="model")
    with pytest.raises(TypeError, match=r"cell_list\.0\.conv\.bias has dtype complex128"):
        from_torch(joint() | {"cell_list.0.conv.bias": np.zeros(16, complex)})
    with pytest.raises(FileNotFoundError):
        from_torch("nothing.pt")


def test_checkpoints_in_memory():
    weights = joint(seed=3)
    for source, key in (
        ({"epoch": 3, "state_dict": weights, "args": object()}, None),
        ({"model": weights, "loss": 0.1}, None),
        ({"a": {"b": weights}, "c": weights}, "a.b"),
        ({"a.b": weights}, "a.b"),
        (weights | {"epoch": 3}, None),
    ):
        np.testing.assert_array_equal(from_torch(source, key=key).cells[0].bias, from_torch(weights).cells[0].bias)
    with pytest.raises(ValueError, match=r"has tensors under 'state_dict' and 'model'; say which with key="):
        from_torch({"model": weights, "state_dict": weights})
    with pytest.raises(ValueError, match=r"no state_dict at the top nor under .*its entries are 'net', 'epoch'"):
        from_torch({"net": weights, "epoch": 1})


@pytest.mark.torch
def test_a_file_is_named_in_every_error(torch, tmp_path):
    for state in (joint() | {"cell_list.0.x": np.zeros(3)}, joint() | {"cell_list.0.conv.bias": np.zeros(12)},
                  joint() | {"cell_list.0.conv.weight": np.zeros((16, 7, 2, 3))}):  # fmt: skip
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"\(in .*w\.pt\)$"):
            from_torch(tmp_path / "w.pt")


@pytest.mark.torch
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bfloat16_in_files(torch, tmp_path, suffix):
    state = {name: torch.from_numpy(array).bfloat16() for name, array in joint().items()}
    if suffix == "pt":
        torch.save(state, tmp_path / "w.pt")
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / "w.safetensors")
    layer = from_torch(tmp_path / f"w.{suffix}")
    assert layer.dtype == "float32"
    np.testing.assert_array_equal(to_torch(layer, "ndrplz")["cell_list.0.conv.weight"],
                                  state["cell_list.0.conv.weight"].float().numpy())  # fmt: skip


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


@pytest.mark.parametrize("prefix", ["encoder", "module.encoder", "encoder."])
def test_data_parallel_s_module_is_left_out_in_memory_too(prefix):
    plain = joint(prefix="encoder.") | {"head.weight": np.zeros(3)}
    state = {f"module.{name}": array for name, array in plain.items()}
    expected = from_torch(plain, prefix="encoder").parameters
    for name, array in from_torch(state, prefix=prefix).parameters.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(("x", "y"), [
    (np.zeros((0, 2, 1, 4, 4)), np.zeros((0, 2, 2, 4, 4))), (np.ones((1, 2, 1, 4, 4)), np.zeros((1, 2, 2, 4, 4))),
    (np.full((1, 2, 1, 4, 4), np.nan), np.full((1, 2, 2, 4, 4), np.nan)),
])  # fmt: skip
def test_a_check_that_tells_nothing(x, y):
    with pytest.raises(ValueError, match=r"^from_torch: check's x and y must be finite, and y not all 0"):
        from_torch(joint(), check=(x, y))
    with pytest.raises(TypeError, match=r"got tuple of 3$"):
        from_torch(joint(), check=(x, y, y))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_check_of_half_precision(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    state = {name: rng.normal(0, 0.5, np.shape(array)) for name, array in joint().items()}
    layer = from_torch(state)
    x = torch.from_numpy(rng.normal(size=(1, 3, layer.in_channels, 8, 8))).to(getattr(torch, dtype))
    y = torch.from_numpy(layer(x.double().numpy())).to(getattr(torch, dtype))
    from_torch(state, check=(x, y))
    with pytest.raises(ValueError, match="gates='ifog' agrees"):
        from_torch(state, gates="ifgo", check=(x, y))


def test_your_own_dialect_that_fits_nothing_is_shown():
    message = r"'your own' has conv\.weight in each of its cells cells\.\{layer\}$"
    with pytest.raises(ValueError, match=message):
        from_torch(joint(), cells="cells.{layer}", joint="conv")
