"""Calls out of others' graphs: what is kept for the way back, lent memory, and the axes that a vmap puts in front."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.adapters import host
from fastclstm.adapters.host import HostCall

B, T, H, W, C, F = 2, 3, 4, 5, 2, 3
SHAPES = {
    "x": (B, T, H, W, C),
    "kernel": (3, 3, C, 4 * F),
    "recurrent_kernel": (3, 3, F, 4 * F),
    "bias": (4 * F,),
    "h": (B, H, W, F),
    **{f"peephole.{gate}": (F,) for gate in "ifo"},
    "dropout_masks.x": (4, B, H, W, C),
    "mask": (B, T),
}
DIFFERENTIABLE = tuple(SHAPES)[:8]
OPTIONS = {"padding": ((1, 1), (1, 1)), "engine": "reference"}


def drawn(shapes, seed=0, lead=None):
    """Arrays by name; those that `lead` names have these axes in front."""
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal((lead or {}).get(name, ()) + shape) for name, shape in shapes.items()}
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"] > -0.5
    return arrays


def expected(arrays, cotangents):
    """What the function itself returns, and the gradients by our names."""
    single = {name: arrays[name] for name in ("x", "kernel", "recurrent_kernel", "bias", "mask")}
    outputs, pullback = functional.convlstm2d_vjp(
        **single, initial_state=(arrays["h"], None), peephole={gate: arrays[f"peephole.{gate}"] for gate in "ifo"},
        dropout_masks={"x": arrays["dropout_masks.x"]}, return_state=True, **OPTIONS,
    )  # fmt: skip
    pulled = pullback(cotangents)
    named = pulled | {"h": pulled["initial_state"][0], **{f"peephole.{k}": g for k, g in pulled["peephole"].items()}}
    return outputs, [named[name] for name in DIFFERENTIABLE]


def call_of(shapes):
    return HostCall.of("convlstm2d", {name: np.empty(shape) for name, shape in shapes.items()}, OPTIONS)


def equal(found, wanted):
    return len(found) == len(wanted) and all(
        np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, wanted, strict=True)
    )


def cotangents(call, lead=()):
    generator = np.random.default_rng(9)
    return [generator.standard_normal(lead + shape) for shape in call.shapes(*SHAPES.values())]


@pytest.mark.parametrize("how", ["kept", "twice", "crowded out", "lent memory"])
def test_the_way_back(how, monkeypatch):
    call, arrays = call_of(SHAPES), drawn(SHAPES)
    assert call.differentiable == DIFFERENTIABLE
    given = cotangents(call)
    outputs, gradients = expected(arrays, tuple(given))
    lent = [array.copy() for array in arrays.values()]
    *found, token = call.forward_saving(*lent)
    assert equal(found, outputs)
    if how == "lent memory":
        for array in lent:
            array[...] = 0
        monkeypatch.setattr(HostCall, "_vjp", None)
    if how == "kept":
        monkeypatch.setattr(HostCall, "_vjp", None)  # nothing is computed anew
    if how == "twice":
        call.backward(token, given, *arrays.values())
    if how == "crowded out":
        for _ in range(host.KEPT):
            call.forward_saving(*arrays.values())
        assert len(host._saved) == host.KEPT
    assert equal(call.backward(token, given, *arrays.values()), gradients)
    assert token[0] not in host._saved


def test_without_the_gradient_of_x():
    call, arrays = call_of(SHAPES), drawn(SHAPES)
    given = cotangents(call)
    *_, token = call.forward_saving(*arrays.values())
    found = call.backward(token, given, *arrays.values(), input_gradient=False)
    assert equal(found, expected(arrays, tuple(given))[1][1:])


@pytest.mark.parametrize("samples", [("x", "h", "mask", "dropout_masks.x"), ("x", "kernel", "mask")])
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_axes_in_front(samples, lead, monkeypatch):
    """One call where weights are the same for all, else one for each; gradients are always each one's own."""
    ones = (1,) * len(lead)
    arrays = drawn(SHAPES, lead={name: lead if name in samples else ones for name in SHAPES})
    call = call_of(SHAPES)
    given = cotangents(call, lead)
    calls = []
    forward = functional.convlstm2d
    counted = host.OPERATIONS["convlstm2d"]._replace(forward=lambda **options: calls.append(1) or forward(**options))
    monkeypatch.setitem(host.OPERATIONS, "convlstm2d", counted)
    outputs = call.forward(*arrays.values())
    assert len(calls) == (np.prod(lead) if "kernel" in samples else 1)
    *kept, token = call.forward_saving(*arrays.values())
    pulled = call.backward(token, given, *arrays.values())
    assert equal(kept, outputs)
    for index in np.ndindex(lead):
        member = {n: np.broadcast_to(a, lead + SHAPES[n])[index] for n, a in arrays.items()}
        wanted, gradients = expected(member, tuple(dy[index] for dy in given))
        assert equal([y[index] for y in outputs], wanted)
        assert equal([g[index] for g in pulled], gradients)


def test_no_samples_in_front():
    arrays = drawn({"x": (0, T, H, W, C), **{n: SHAPES[n] for n in ("kernel", "recurrent_kernel")}})
    call = HostCall.of("convlstm2d", arrays, {"engine": "reference"})
    x, *weights = arrays.values()
    assert call.forward(np.stack([x] * 3), *(w[None] for w in weights))[0].shape == (3, 0, T, H, W, F)


@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
def test_pooling(order):
    x = np.random.default_rng(0).standard_normal((B, 4, 4, 4, 4))
    call = HostCall.of("max_pool3d", {"x": x}, {"pool_size": [1, 2, 2], "data_format": order, "engine": "reference"})
    y, pullback = functional.max_pool3d_vjp(x, (1, 2, 2), data_format=order, engine="reference")
    found, token = call.forward_saving(x)
    assert [found.shape] == call.shapes(x.shape)
    assert equal([found, *call.backward(token, [y], x)], [y, pullback(y)["x"]])
    assert hash(call) == hash(HostCall.of("max_pool3d", {"x": x}, dict(call.options)))


def test_what_does_not_fit_is_refused_from_shapes():
    with pytest.raises(ValueError, match=r"conv2d: x has 2 channels but kernel .* takes 3"):
        HostCall.of("conv2d", drawn({"x": (1, 4, 4, 2), "kernel": (3, 3, 3, 1)}), {}).shapes((1, 4, 4, 2), (3, 3, 3, 1))
    with pytest.raises(ValueError, match="mask"):
        call_of(SHAPES).shapes(*{**SHAPES, "mask": (B, T + 1)}.values())
    with pytest.raises(ValueError, match="data_format"):
        HostCall.of("max_pool3d", drawn({"x": (1,) * 5}), {"data_format": "nearby"}).shapes((1,) * 5)
