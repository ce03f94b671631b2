import sys
import warnings

import numpy as np
import pytest

from fastclstm import ConvLSTM2D, from_flax, to_flax
from fastclstm.layers import MaxPooling3D

C, F, FRAME = 3, 4, (6, 5)


def cell(C=C, F=F, k=3, bias=True, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    k = (k, k) if isinstance(k, int) else k
    tree = {}
    for name, inputs in (("ih", C), ("hh", F)):
        tree[name] = {"kernel": (rng.normal(size=(*k, inputs, 4 * F)) / 2).astype(dtype)}
        if bias:
            tree[name]["bias"] = rng.normal(size=4 * F).astype(dtype)
    return tree


@pytest.fixture(params=["reference", "cpu"])
def engine(request, directly):
    return request.param


def published(torch, params, x):
    """What flax.linen.ConvLSTMCell computes over x (B, T, H, W, C), as a formula of PyTorch: h and c of every step."""

    def convolved(name, frame):
        kernel, bias = params[name]["kernel"], params[name].get("bias")
        KH, KW = kernel.shape[:2]
        padding = ((KW - 1) // 2, KW // 2, (KH - 1) // 2, KH // 2)  # SAME
        padded = torch.nn.functional.pad(frame, padding)
        return torch.nn.functional.conv2d(padded, kernel.permute(3, 2, 0, 1), bias)

    h = c = x.new_zeros(len(x), params["hh"]["kernel"].shape[2], *x.shape[2:4])
    steps = []
    for frame in x.unbind(1):
        i, g, f, o = (convolved("ih", frame.movedim(-1, 1)) + convolved("hh", h)).chunk(4, 1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append((h, c))
    return [torch.stack(one, 1).movedim(2, -1) for one in zip(*steps, strict=True)]


def tensors(torch, tree):
    return {name: {n: torch.from_numpy(a).requires_grad_() for n, a in conv.items()} for name, conv in tree.items()}


@pytest.mark.torch
@pytest.mark.parametrize(("options", "dtype", "bound"), [
    ({}, np.float64, 1e-10), ({"bias": False}, np.float64, 1e-10), ({"k": (2, 4)}, np.float64, 1e-10),
    ({"k": (3, 5)}, np.float32, 1e-5),
])  # fmt: skip
def test_outputs_and_gradients(engine, options, dtype, bound):
    torch = pytest.importorskip("torch")
    tree = cell(dtype=dtype, **options)
    params, x = tensors(torch, tree), torch.randn(2, 4, *FRAME, C, dtype=getattr(torch, np.dtype(dtype).name))
    x.requires_grad_()
    y, c = published(torch, params, x)
    layer = from_flax({"params": {"RNN_0": {"cell": tree}}}, return_state=True, engine=engine)
    assert (layer.dtype, layer.data_format, layer.use_bias) == (np.dtype(dtype).name, "channels_last", True)
    ours, ((h_last, c_last),) = layer(x.detach().numpy(), training=True)

    def close(a, b):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=bound * max(1, float(b.detach().abs().max())))

    for a, b in ((ours, y), (h_last, y[:, -1]), (c_last, c[:, -1])):
        close(a, b)
    dy, dc = torch.randn_like(y), torch.randn_like(c[:, -1])
    torch.autograd.backward([y, c[:, -1]], [dy, dc])
    close(layer.backward(dy.numpy(), [(None, dc.numpy())]), x.grad)
    offset = np.repeat([0.0, 1, 0, 0], F)
    layer.set_parameters({n: g + (offset if n.endswith("bias") else 0) for n, g in layer.get_gradients().items()})
    gradients = to_flax(layer)
    for name in ("ih", "hh"):
        close(gradients[name]["kernel"], params[name]["kernel"].grad)
    if options.get("bias", True):
        close(gradients["ih"]["bias"], params["ih"]["bias"].grad)


def test_against_flax_itself(engine):
    """Where Flax is installed."""
    nn = pytest.importorskip("flax.linen")
    jax = sys.modules["jax"]
    jax.config.update("jax_enable_x64", True)
    x = np.random.default_rng(1).normal(size=(2, 4, *FRAME, C))
    for k, bias in ((3, True), ((2, 3), False)):
        tree = cell(k=k, bias=bias)
        k = (k, k) if isinstance(k, int) else k
        module = nn.RNN(nn.ConvLSTMCell(F, k, use_bias=bias, param_dtype=np.float64), return_carry=True)
        (c, h), y = module.apply({"params": {"cell": tree}}, x)
        layer = from_flax({"params": {"cell": tree}}, return_state=True, engine=engine)
        ours, ((h_last, c_last),) = layer(x)
        for a, b in ((ours, y), (h_last, h), (c_last, c)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
        module = nn.RNN(nn.ConvLSTMCell(F, k, param_dtype=np.float64))
        np.testing.assert_allclose(module.apply({"params": {"cell": to_flax(layer)}}, x), y, rtol=0, atol=1e-10)


def test_there_and_back():
    tree = cell()
    layer = from_flax(tree, engine="reference")
    again = from_flax(to_flax(layer), engine="reference")
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(array, again.parameters[name])
    plain = ConvLSTM2D(C, F, 3, use_bias=False, seed=0, engine="reference")
    x = np.random.default_rng(0).normal(size=(1, 2, *FRAME, C))
    np.testing.assert_allclose(from_flax(to_flax(plain), engine="reference")(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("spelled", [
    lambda tree: tree,
    lambda tree: {"params": {"encoder": tree}},
    lambda tree: {f"params/encoder/{a}/{b}": v for a, conv in tree.items() for b, v in conv.items()},
    lambda tree: {("params", "encoder", a, b): v for a, conv in tree.items() for b, v in conv.items()},
    lambda tree: {f"encoder.{a}.{b}": v.tolist() for a, conv in tree.items() for b, v in conv.items()},
])  # fmt: skip
def test_nested_and_flat(spelled):
    tree = cell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = from_flax(spelled(tree))
    np.testing.assert_array_equal(to_flax(layer)["hh"]["kernel"], tree["hh"]["kernel"])


def test_several_cells():
    params = {"a": {"cell": cell()}, "b": {"cell": cell(F, 2, seed=1)}, "head": {"kernel": np.zeros((4, 2))}}
    with pytest.raises(ValueError, match=r"^from_flax: several ConvLSTMs fit: 'flax' at prefix='a\.cell\.', 'flax' at"):
        from_flax(params)
    one = from_flax(params, "b/cell")
    assert (one.in_channels, one.out_channels) == (F, 2)
    with pytest.warns(UserWarning, match=r"^from_flax: .*1 other tensors were left: head"):
        stacked = from_flax(params, cells=["a/cell", "b.cell"])
    assert (stacked.num_layers, stacked.out_channels) == (2, (F, 2))
    written = to_flax(stacked, ["a/cell", "b/cell"])
    assert written.keys() == {"a", "b"}
    np.testing.assert_array_equal(written["b"]["cell"]["ih"]["kernel"], params["b"]["cell"]["ih"]["kernel"])
    assert to_flax(stacked).keys() == {"ConvLSTMCell_0", "ConvLSTMCell_1"}
    with pytest.raises(ValueError, match=r"to_flax: cells must be the places of 2 cell\(s\), got \['a'\]"):
        to_flax(stacked, ["a"])


def test_what_is_none():
    with pytest.raises(TypeError, match="from_flax: params must be a mapping, got list"):
        from_flax([])
    with pytest.raises(ValueError, match=r"^from_flax: no ConvLSTM is recognized .*'flax' has ih\.kernel, hh\.kernel"):
        from_flax({"ih": {"kernel": np.zeros((3, 3, 2, 8))}})
    half = cell()
    del half["hh"]["bias"]
    with pytest.raises(ValueError, match=r"^from_flax: a weight is missing .*'hh\.bias'"):
        from_flax(half)
    with pytest.raises(ValueError, match=r"^from_flax: kernel_size follow from the weights"):
        from_flax(cell(), kernel_size=3)
    with pytest.raises(ValueError, match=r"^to_flax: the dialect 'flax' has no bidirectional=True"):
        to_flax(ConvLSTM2D(1, 2, 3, bidirectional=True))
    with pytest.raises(TypeError, match="to_flax: layer must be a ConvLSTM2D, got MaxPooling3D"):
        to_flax(MaxPooling3D())
