"""convgru2d, convrnn2d and convlstm3d against PyTorch, written from the equations, and the laws of recurrences."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines import reference
from fastclstm.functional.cells import VolumeConvolution
from fastclstm.nn.activations import get
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import CellSpec

torch = pytest.importorskip("torch")

FORMS = {
    "rnn": ("convrnn2d", 1, {}),
    "gru": ("convgru2d", 3, {}),
    "gru-before": ("convgru2d", 3, {"reset_after": False}),
    "lstm3d": ("convlstm3d", 4, {}),
}
"""The operation, its gates and options."""
GROUPS = {"rnn": 1, "gru-before": 6, "lstm3d": 2}

every_form = pytest.mark.parametrize("form", FORMS)
ENGINES = [("reference", np.float64, 1e-10), ("cpu", np.float64, 1e-10), ("cpu", np.float32, 1e-5)]
every_engine = pytest.mark.parametrize(("engine", "dtype", "tolerance"), ENGINES)


def problem(form, *, B=2, T=4, C=3, F=4, seed=0, space=(6, 7)):
    """Arguments by name, and the shape of a state."""
    _, G, _ = FORMS[form]
    space = (3, *space) if form == "lstm3d" else space
    normal = np.random.default_rng(seed).standard_normal
    kernels = {"kernel": 0.3 * normal((*(3,) * len(space), C, G * F)),
               "recurrent_kernel": 0.3 * normal((*(3,) * len(space), F, G * F))}  # fmt: skip
    bias = normal((2, G * F) if form == "gru" else G * F)
    state = B, *space, F
    states = tuple(0.5 * normal(state) for _ in range(2 if form == "lstm3d" else 1))
    return {"x": normal((B, T, *space, C)), **kernels, "bias": bias, "initial_state": states}


def convolved(x, kernel):
    function = torch.conv2d if kernel.ndim == 4 else torch.conv3d
    return function(x, torch.movedim(kernel, (-1, -2), (0, 1)).contiguous(), padding=1)


def in_torch(form, x, kernel, recurrent_kernel, bias, initial_state, mask=None, groups=None, affine=None):
    """The output and the last states, of tensors with channels last, by the equations alone."""
    F = recurrent_kernel.shape[-2]
    states = [torch.movedim(state, -1, 1) for state in initial_state]
    output, outputs = torch.zeros_like(states[0]), []

    def biased(z, b):
        return z + b.reshape(1, -1, *(1,) * (z.ndim - 2))

    def normed(z, first):
        if groups is None:
            return z
        weight, shift = (w[first : first + z.shape[1]] for w in affine)
        return torch.nn.functional.group_norm(z, groups * z.shape[1] // kernel.shape[-1], weight, shift)

    for t in range(x.shape[1]):
        frame, h = torch.movedim(x[:, t], -1, 1), states[0]
        if form == "gru":
            of_x, of_h = (biased(convolved(a, k), b).chunk(3, 1)
                          for a, k, b in ((frame, kernel, bias[0]), (h, recurrent_kernel, bias[1])))  # fmt: skip
            z, r = (torch.sigmoid(of_x[n] + of_h[n]) for n in range(2))
            new = [z * h + (1 - z) * torch.tanh(of_x[2] + r * of_h[2])]
        elif form == "gru-before":
            of_x = biased(convolved(frame, kernel), bias)
            sums = of_x[:, : 2 * F] + convolved(h, recurrent_kernel[..., : 2 * F])
            z, r = torch.sigmoid(normed(sums, 0)).chunk(2, 1)
            sums = of_x[:, 2 * F :] + convolved(r * h, recurrent_kernel[..., 2 * F :])
            new = [z * h + (1 - z) * torch.tanh(normed(sums, 2 * F))]
        else:
            sums = normed(biased(convolved(frame, kernel) + convolved(h, recurrent_kernel), bias), 0)
            if form == "rnn":
                new = [torch.tanh(sums)]
            else:
                i, f, g, o = sums.chunk(4, 1)
                c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
                new = [torch.sigmoid(o) * torch.tanh(c), c]
        if mask is not None:
            valid = torch.from_numpy(mask[:, t]).reshape(-1, *(1,) * (h.ndim - 1))
            output = torch.where(valid, new[0], output)
            states = [torch.where(valid, a, b) for a, b in zip(new, states, strict=True)]
        else:
            output, states = new[0], new
        outputs.append(torch.movedim(output, 1, -1))
    return torch.stack(outputs, 1), [torch.movedim(state, 1, -1) for state in states]


def check_against_torch(form, engine, dtype, tolerance, *, backwards=False, mask=None, normalized=False, **sizes):
    operation, _, options = FORMS[form]
    arguments = problem(form, **sizes)
    names = ("x", "kernel", "recurrent_kernel", "bias")
    arrays = [arguments[name] for name in names] + list(arguments["initial_state"])
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    frames = tensors[0].flip(1) if backwards else tensors[0]
    further, affine = {}, None
    if normalized:
        width = arguments["kernel"].shape[-1]
        weights = np.random.default_rng(5).standard_normal((2, width)) + 1
        affine = [torch.tensor(w, requires_grad=True) for w in weights]
        further = {"groups": GROUPS[form], "affine": affine}
        options = options | {
            "normalization": Normalization("group", groups=GROUPS[form]),
            "normalization_weights": dict(zip(("gamma", "beta"), weights.astype(dtype), strict=True)),
        }
    told = mask[:, ::-1].copy() if mask is not None and backwards else mask
    y, last = in_torch(form, frames, *tensors[1:4], tensors[4:], told, **further)
    cotangents = [np.random.default_rng(9).standard_normal(part.shape) for part in (y, *last)]
    sum((torch.from_numpy(c) * part).sum() for c, part in zip(cotangents, (y, *last), strict=True)).backward()

    cast = [array.astype(dtype) for array in arrays]
    options = options | {"initial_state": tuple(cast[4:]), "mask": mask, "go_backwards": backwards, "engine": engine,
                         "return_state": True}  # fmt: skip
    outputs, pullback = getattr(functional, f"{operation}_vjp")(*cast[:4], **options)
    alone = getattr(functional, operation)(*cast[:4], **options)
    at_the_end = getattr(functional, operation)(*cast[:4], **options | {"return_sequences": False})
    d = tuple(cotangent.astype(dtype) for cotangent in cotangents)
    gradients, again = pullback(d), pullback(d)  # the second time what was kept is used up
    pairs = [(f"output {n}", a, b) for n, (a, b) in enumerate(zip(outputs, (y, *last), strict=True))]
    pairs += [(f"without keeping {n}", a, b) for n, (a, b) in enumerate(zip(alone, (y, *last), strict=True))]
    pairs += [("last output", at_the_end[0], y[:, -1])]
    pairs += [(name, gradients[name], tensor.grad) for name, tensor in zip(names, tensors, strict=False)]
    pairs += [(f"state {n}", gradients["initial_state"][n], tensor.grad) for n, tensor in enumerate(tensors[4:])]
    if affine is not None:
        pairs += [(name, gradients["normalization_weights"][name], tensor.grad)
                  for name, tensor in zip(("gamma", "beta"), affine, strict=True)]  # fmt: skip
    for name, result, expected in pairs:
        expected = expected.detach().numpy()
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() <= tolerance * np.abs(expected).max(), name
    for name in names:
        np.testing.assert_array_equal(gradients[name], again[name])


@every_form
@every_engine
def test_against_torch(form, engine, dtype, tolerance):
    check_against_torch(form, engine, dtype, tolerance)


@every_form
@every_engine
def test_against_torch_backwards_with_a_mask(form, engine, dtype, tolerance):
    mask = np.array([[True, True, False, True], [False, True, True, False]])
    check_against_torch(form, engine, dtype, tolerance, backwards=True, mask=mask)


@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_group_normalization_against_torch(form, engine):
    check_against_torch(form, engine, np.float64, 1e-10, normalized=True)


@pytest.mark.parametrize("dropout", [False, True])
@every_form
def test_oracle_by_complex_steps(form, dropout):
    """Gradients of the sequence and of the last states, at once, in a random direction, to rounding."""
    operation, G, options = FORMS[form]
    arguments = problem(form, T=3, space=(2, 3), F=2, C=2)
    cell = {"rnn": "rnn", "lstm3d": "lstm"}.get(form, "gru")
    shapes = {name: arguments[name].shape for name in ("x", "kernel", "recurrent_kernel", "bias")}
    activations = {"activation": get("tanh"), "recurrent_activation": get("sigmoid"), "output_activation": get("tanh")}
    spec = CellSpec.infer(
        cell, *shapes.values(), rank=len(shapes["kernel"]) - 2, op=operation, **activations, **options
    )
    rng, mask = np.random.default_rng(2), np.array([[True, False, True], [True, True, False]])
    frames = {"x": (2, *shapes["x"][2:]), "h": arguments["initial_state"][0].shape}
    masks = {name: rng.random((G, *shape)) for name, shape in frames.items()} if dropout else None
    convolution = VolumeConvolution.of(reference, operation) if form == "lstm3d" else None

    def run(arrays, save=False):
        return reference.recurrent(spec, *arrays[:4], tuple(arrays[4:]), mask, dropout=masks, save=save,
                                   convolution=convolution)  # fmt: skip

    arrays = [*(arguments[name] for name in shapes), *arguments["initial_state"]]
    y, states, saved = run(arrays, save=True)
    cotangents = [rng.standard_normal(part.shape) for part in (y, *states)]
    gradients = reference.recurrent_backward(spec, saved, cotangents[0], cotangents[1:])
    for n, name in enumerate((*shapes, "h", "c")[: len(arrays)]):
        step = rng.standard_normal(arrays[n].shape)
        moved = [array.astype(complex) for array in arrays]
        moved[n] += 1e-30j * step
        y, states, _ = run(moved)
        slope = sum(np.sum(c * part.imag) for c, part in zip(cotangents, (y, *states), strict=True)) / 1e-30
        np.testing.assert_allclose(np.sum(gradients[name] * step), slope, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("F", [1, 20])
@every_form
def test_any_number_of_filters_fills_the_vectors(form, F):
    check_against_torch(form, "cpu", np.float32, 1e-5, F=F, space=(1, 9), T=2)


def arguments_of(form, dtype=np.float64, **sizes):
    operation, _, options = FORMS[form]
    arguments = {name: tuple(a.astype(dtype) for a in value) if isinstance(value, tuple) else value.astype(dtype)
                 for name, value in problem(form, **sizes).items()}  # fmt: skip
    return getattr(functional, operation), arguments | options | {"return_state": True}


@every_form
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_sequence_may_be_split(form, engine):
    function, arguments = arguments_of(form, T=5)
    y, *last = function(**arguments, engine=engine)
    x = arguments.pop("x")
    first, *arguments["initial_state"] = function(x[:, :2], **arguments, engine=engine)
    second, *ends = function(x[:, 2:], **arguments, engine=engine)
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, rtol=0, atol=1e-13)
    for a, b in zip(ends, last, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@every_form
def test_many_steps_go_through_pieces_of_memory(form, monkeypatch):
    function, arguments = arguments_of(form, T=7)
    expected = function(**arguments, go_backwards=True, engine="reference")
    monkeypatch.setattr("fastclstm.engines.cells.PIECE_BYTES", 1)
    for result, one in zip(function(**arguments, go_backwards=True, engine="reference"), expected, strict=True):
        np.testing.assert_array_equal(result, one)


@every_form
def test_dropout_masks_are_factors_of_what_each_gate_sees(form):
    """With the same factor for all of a frame they scale the kernels."""
    function, arguments = arguments_of(form)
    _, G, _ = FORMS[form]
    F = arguments["recurrent_kernel"].shape[-2]
    factors = {"x": np.arange(1, G + 1) / 2, "h": np.arange(2, G + 2) / 3}
    frames = {"x": (arguments["x"].shape[0], *arguments["x"].shape[2:]), "h": arguments["initial_state"][0].shape}
    masks = {name: np.stack([np.full(frames[name], f) for f in factors[name]]) for name in factors}
    y, *_ = function(**arguments, dropout_masks=masks, engine="cpu")
    scaled = arguments | {"kernel": arguments["kernel"] * np.repeat(factors["x"], F),
                          "recurrent_kernel": arguments["recurrent_kernel"] * np.repeat(factors["h"], F)}  # fmt: skip
    np.testing.assert_allclose(y, function(**scaled, engine="reference")[0], rtol=0, atol=1e-12)


@every_form
def test_gradients_with_dropout_masks(form):
    """The derivative in a random direction, by central differences."""
    _, arguments = arguments_of(form, T=3)
    operation, G, _ = FORMS[form]
    rng = np.random.default_rng(3)
    frames = {"x": (arguments["x"].shape[0], *arguments["x"].shape[2:]), "h": arguments["initial_state"][0].shape}
    masks = {name: rng.integers(0, 2, (G, *shape)) / 0.5 for name, shape in frames.items()}
    vjp = getattr(functional, f"{operation}_vjp")
    outputs, pullback = vjp(**arguments, dropout_masks=masks, engine="cpu")
    cotangents = tuple(rng.standard_normal(part.shape) for part in outputs)
    gradients = pullback(cotangents)
    for name in ("x", "kernel", "recurrent_kernel", "bias"):
        step = 1e-6 * rng.standard_normal(arguments[name].shape)
        ends = [getattr(functional, operation)(**arguments | {name: arguments[name] + sign * step},
                                               dropout_masks=masks, engine="cpu") for sign in (1, -1)]  # fmt: skip
        slope = sum(np.sum(c * (a - b)) for c, a, b in zip(cotangents, *ends, strict=True)) / 2
        np.testing.assert_allclose(np.sum(gradients[name] * step), slope, rtol=1e-6, atol=1e-11)


@every_form
def test_own_activations_are_called(form):
    function, arguments = arguments_of(form)
    own = (np.tanh, lambda x: 1 - np.tanh(x) ** 2)
    named, called = (function(**arguments, activation=tanh, engine="cpu")[0] for tanh in ("tanh", own))
    np.testing.assert_allclose(called, named, rtol=0, atol=1e-13)


@every_form
def test_an_empty_batch_makes_empty_results(form):
    operation, _, _ = FORMS[form]
    _, arguments = arguments_of(form, B=0)
    outputs, pullback = getattr(functional, f"{operation}_vjp")(**arguments, engine="cpu")
    assert outputs[0].shape[0] == 0
    assert np.all(pullback(outputs)["kernel"] == 0)


def test_bits_do_not_depend_on_the_threads():
    from fastclstm import get_num_threads, set_num_threads

    _, arguments = arguments_of("gru", np.float32, F=16, space=(24, 24))
    before, results = get_num_threads(), []
    try:
        for count in (1, 2):
            set_num_threads(count)
            outputs, pullback = functional.convgru2d_vjp(**arguments, engine="cpu")
            results.append((outputs[0], *(pullback(outputs)[name] for name in ("x", "recurrent_kernel", "bias"))))
    finally:
        set_num_threads(before)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_nan_in_a_masked_frame_is_not_seen():
    _, arguments = arguments_of("gru", np.float32)
    mask = np.ones(arguments["x"].shape[:2], bool)
    mask[0, 1] = False
    arguments["x"][0, 1] = np.nan
    outputs, pullback = functional.convgru2d_vjp(**arguments, mask=mask, engine="cpu")
    assert np.isfinite(outputs[0]).all()
    assert all(np.isfinite(pullback(outputs)[name]).all() for name in ("x", "kernel", "recurrent_kernel"))


class OnAGPU:
    """What looks like an array on a GPU."""

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("gru", {"x": np.zeros((2, 6, 7, 3))}, r"convgru2d: x must be \(batch, time, height, width, channels\), got"),
        ("lstm3d", {"x": np.zeros((2, 4, 6, 7, 3))}, r"x must be \(batch, time, depth, height, width, channels\)"),
        ("gru", {"x": np.zeros((2, 0, 6, 7, 3))}, "x has no time steps"),
        ("gru", {"kernel": np.zeros((3, 3, 3, 8))}, "must end in 3 × filters, one block for each gate z, r, n; 8"),
        ("gru", {"recurrent_kernel": np.zeros((3, 3, 4, 8))}, r"must be \(KH, KW, 4, 12\) to go with kernel"),
        ("gru", {"bias": np.zeros(12)}, r"bias has shape \(12,\) but must be \(2, 12\) \(of the input and of the hid"),
        ("gru-before", {"bias": np.zeros((2, 12))}, r"bias has shape \(2, 12\) but must be \(12,\)"),
        ("gru", {"initial_state": np.zeros((2, 6, 7, 3))}, r"initial state h has shape"),
        ("lstm3d", {"initial_state": np.zeros((2, 6, 7, 3))}, r"initial_state must be \(h, c\), got 1 items"),
        ("gru", {"mask": np.ones((2, 3), bool)}, r"mask has shape \(2, 3\) but must be \(2, 4\)"),
        ("gru", {"dropout_masks": {"x": np.zeros((4, 2, 6, 7, 3))}}, r"dropout mask 'x' has shape"),
        ("gru", {"normalization": "group"}, "normalization goes with reset_after=False only"),
        ("gru-before", {"normalization": "layer"}, "normalization must be 'group'"),
        ("gru-before", {"normalization": Normalization("group", groups=2)}, "none of them with a part of gates that"),
        ("rnn", {"normalization_weights": {"gamma": np.ones(4)}}, "normalization_weights need a normalization"),
    ],
)
def test_wrong_arguments_are_named(form, change, told):
    function, arguments = arguments_of(form)
    with pytest.raises(ValueError, match=told):
        function(**arguments | change, engine="reference")


def test_arrays_on_a_gpu_are_refused_with_a_way_out():
    function, arguments = arguments_of("gru")
    with pytest.raises(TypeError, match=r"convgru2d: x is on a GPU.* move x to the processor.*engine='cpu'"):
        function(**arguments | {"x": OnAGPU()})


def test_unknown_options_are_named():
    _, arguments = arguments_of("rnn")
    with pytest.raises(TypeError, match=r"convrnn2d_vjp: unknown option 'reset_after'"):
        functional.convrnn2d_vjp(**arguments, reset_after=True)
