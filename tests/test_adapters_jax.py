"""Our operations in JAX beside themselves in NumPy: under jit, grad and vmap."""

import numpy as np
import pytest

from fastclstm import functional

B, T, H, W, C, F = 2, 3, 5, 4, 2, 3
ENGINE = {"engine": "reference"}


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


@pytest.fixture(scope="module")
def ours(jax):
    from fastclstm.adapters import jax as adapter

    return adapter


def draw(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


WEIGHTS = (3, 3, C, 4 * F), (3, 3, F, 4 * F), (4 * F,)


def close(found, expected):
    found, expected = list(map(np.asarray, found)), list(map(np.asarray, expected))
    assert [a.shape for a in found] == [a.shape for a in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max(initial=0)))
    return True


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_convlstm2d_and_its_gradients(jax, ours, jitted, engine):
    x, kernel, recurrent, bias, h, c, peephole, dy, dc = draw(
        (B, T, H, W, C), *WEIGHTS, (B, H, W, F), (B, H, W, F), (3, F), (B, T, H, W, F), (B, H, W, F)
    )
    mask = np.array([[True, False, True], [True, True, False]])
    dropout = {"x": np.random.default_rng(1).integers(0, 2, (4, B, H, W, C)).astype(np.float32)}
    options = {"mask": mask, "dropout_masks": dropout, "engine": engine, "return_state": True}

    def loss(x, kernel, recurrent, bias, h, c, peephole):
        given = {"initial_state": (h, c), "peephole": dict(zip("ifo", peephole, strict=True))}
        y, _, last = ours.convlstm2d(x, kernel, recurrent, bias, **given, **options)
        return (y * dy).sum() + (last * dc).sum()

    arguments = x, kernel, recurrent, bias, h, c, peephole
    pull = jax.grad(loss, tuple(range(7)))
    found = (jax.jit(pull) if jitted else pull)(*arguments)
    _, pullback = functional.convlstm2d_vjp(
        x, kernel, recurrent, bias, initial_state=(h, c), peephole=dict(zip("ifo", peephole, strict=True)), **options
    )
    g = pullback((dy, None, dc))
    states_and_peephole = [*g["initial_state"], np.stack(list(g["peephole"].values()))]
    assert close(found, [g["x"], g["kernel"], g["recurrent_kernel"], g["bias"], *states_and_peephole])


@pytest.mark.parametrize(("op", "G", "options"), [
    ("convgru2d", 3, {"reset_after": True}),
    ("convgru2d", 3, {"reset_after": False, "normalization": "group", "go_backwards": True}),
    ("convrnn2d", 1, {"return_sequences": False, "activation": "softsign"}),
])  # fmt: skip
def test_other_cells_under_jit_grad_and_vmap(jax, ours, op, G, options):
    both, normalized = options.get("reset_after", False), "normalization" in options
    xs, kernel, recurrent, bias, h, gamma = draw(
        (2, B, T, H, W, C), (3, 3, C, G * F), (3, 3, F, G * F), (2, G * F) if both else (G * F,), (B, H, W, F), (G * F,)
    )
    mask = np.array([[True, False, True], [True, True, False]])
    options = options | ENGINE | {"mask": mask, "return_state": True}

    def computed(function, x, kernel, recurrent, bias, h, gamma):
        norm = {"normalization_weights": {"gamma": gamma, "beta": gamma}} if normalized else {}
        return function(x, kernel, recurrent, bias, initial_state=h, **norm, **options)

    def loss(*arguments):
        y, last = computed(getattr(ours, op), *arguments)
        return (y**2).sum() + last.sum()

    weights = kernel, recurrent, bias, h, gamma
    found = jax.jit(jax.vmap(jax.grad(loss, tuple(range(6))), (0, *(None,) * 5)))(xs, *weights)
    for n, x in enumerate(xs):
        (y, last), pullback = computed(getattr(functional, f"{op}_vjp"), x, *weights)
        g = pullback((2 * y, np.ones_like(last)))
        norm = g["normalization_weights"] if normalized else {"gamma": gamma * 0, "beta": gamma * 0}
        expected = [g["x"], g["kernel"], g["recurrent_kernel"], g["bias"], *g["initial_state"], sum(norm.values())]
        assert close([one[n] for one in found], expected)
        assert close(computed(getattr(ours, op), x, *weights), (y, last))
    with pytest.raises(ValueError, match=rf"{op}: initial_state must be \(h\), got 2 items"):
        getattr(ours, op)(xs[0], kernel, recurrent, bias, initial_state=(h, h))


def test_outputs(jax, ours):
    x, *weights = draw((B, T, H, W, C), *WEIGHTS)
    for options in ({}, {"go_backwards": True, "return_sequences": False}, {"padding": [(1, 0), (0, 1)], "strides": 2},
                    {"activation": (np.sin, np.cos), "return_state": True}):  # fmt: skip
        expected = functional.convlstm2d(x, *weights, **options, **ENGINE)
        found = jax.jit(lambda x, options=options: ours.convlstm2d(x, *weights, **options, **ENGINE))(x)
        several = options.get("return_state", False)
        assert close(found if several else [found], expected if several else [expected])


def test_a_gradient_that_nobody_asks_for_is_not_computed(jax, ours, monkeypatch):
    x, *weights = draw((B, T, H, W, C), *WEIGHTS)
    asked = []
    pull = functional.ConvLSTMPullback.__call__

    def spied(self, cotangents, *, input_gradient=True):
        asked.append(input_gradient)
        return pull(self, cotangents, input_gradient=input_gradient)

    monkeypatch.setattr(functional.ConvLSTMPullback, "__call__", spied)
    loss = lambda x, kernel: ours.convlstm2d(x, kernel, *weights[1:], **ENGINE).sum()  # noqa: E731
    jax.block_until_ready(jax.jit(jax.grad(loss, 1))(x, weights[0]))
    jax.block_until_ready(jax.jit(jax.grad(loss, 0))(x, weights[0]))
    assert asked == [False, True]


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "vmap of vmap"])
def test_vmap(jax, ours, order):
    xs, *weights = draw((3, 2, B, T, H, W, C), *WEIGHTS)

    def loss(weights, x):
        return (ours.convlstm2d(x, *weights, **ENGINE) ** 2).sum()

    def expected(x):
        y, pullback = functional.convlstm2d_vjp(x, *weights, **ENGINE)
        g = pullback(2 * y)
        return [g["kernel"], g["recurrent_kernel"], g["bias"]]

    singles = [expected(x) for x in xs[:, 0]]
    if order == "vmap of grad":
        found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(weights, xs[:, 0])
        assert close(found, [np.stack(parts) for parts in zip(*singles, strict=True)])
    elif order == "grad of vmap":
        found = jax.grad(lambda w: jax.vmap(loss, (None, 0))(w, xs[:, 0]).sum())(weights)
        assert close(found, [sum(parts) for parts in zip(*singles, strict=True)])
    else:
        call = jax.vmap(jax.vmap(lambda x: ours.convlstm2d(x, *weights, **ENGINE)))
        joined = functional.convlstm2d(xs.reshape(-1, T, H, W, C), *weights, **ENGINE)
        assert close([call(xs)], [joined.reshape(3, 2, B, T, H, W, F)])


def test_vmap_over_samples_is_one_call(jax, ours, monkeypatch):
    from fastclstm.adapters import host

    shapes = []
    forward = functional.conv2d
    counted = host.OPERATIONS["conv2d"]._replace(forward=lambda **o: shapes.append(o["x"].shape) or forward(**o))
    monkeypatch.setitem(host.OPERATIONS, "conv2d", counted)
    x, kernel = draw((3, B, H, W, C), (3, 3, C, F))
    y = jax.vmap(lambda x: ours.conv2d(x, kernel, **ENGINE))(x)
    assert close([y], [forward(x.reshape(-1, H, W, C), kernel, **ENGINE).reshape(y.shape)])
    assert shapes == [(3 * B, H, W, C)]


def test_in_a_scan(jax, ours, monkeypatch):
    """More calls wait for their way back than are kept; with checkpoints, each is made twice."""
    from fastclstm.adapters import host

    x, *weights = draw((20, 1, 2, H, W, F), (3, 3, F, 4 * F), (3, 3, F, 4 * F))

    def loss(kernel, rematerialized):
        def step(carry, frames):
            y = ours.convlstm2d(frames + carry, kernel, weights[1], **ENGINE)
            return y * 0.5, y.sum()

        return jax.lax.scan(jax.checkpoint(step) if rematerialized else step, x[0] * 0, x)[1].sum()

    assert len(x) > host.KEPT
    found = [jax.jit(jax.grad(loss), static_argnums=1)(weights[0], rematerialized) for rematerialized in (False, True)]
    monkeypatch.setattr(host, "KEPT", 2 * len(x))
    assert close(found, [jax.jit(jax.grad(loss), static_argnums=1)(weights[0], False)] * 2)


def test_conv2d_and_max_pool3d(jax, ours):
    x, kernel, bias, volume, dy = draw((B, H, W, C), (3, 3, C, F), (F,), (B, 4, 4, 4, C), (B, 2, 2, 2, C))
    y, pullback = functional.conv2d_vjp(x, kernel, bias, padding="valid", **ENGINE)
    found = jax.grad(lambda *a: (ours.conv2d(*a, padding="valid", **ENGINE) ** 2).sum(), (0, 1, 2))(x, kernel, bias)
    assert close(found, pullback(2 * y).values())
    pooled, pullback = functional.max_pool3d_vjp(volume, **ENGINE)
    assert close([ours.max_pool3d(volume, **ENGINE)], [pooled])
    found = jax.jit(jax.grad(lambda x: (ours.max_pool3d(x, **ENGINE) * dy).sum()))(volume)
    assert close([found], [pullback(dy)["x"]])


def test_callbacks_do_not_wait_for_the_thread_that_waits_for_them(jax, ours):
    assert jax.config.values["jax_cpu_enable_async_dispatch"] is False


def test_dtypes(jax, ours):
    x, kernel = draw((B, H, W, C), (3, 3, C, F))
    half = ours.conv2d(x.astype(jax.numpy.bfloat16), kernel.astype(jax.numpy.bfloat16), **ENGINE)
    assert half.dtype == jax.numpy.bfloat16
    assert ours.conv2d(np.ones((1, 3, 3, C), int), kernel, **ENGINE).dtype == np.float32
    with jax.enable_x64(True):
        wide = ours.conv2d(x.astype(float), kernel, **ENGINE)
        assert wide.dtype == np.float64
        np.testing.assert_allclose(wide, functional.conv2d(x.astype(float), kernel, **ENGINE), rtol=1e-12)


def test_what_does_not_fit_is_refused_when_traced(jax, ours):
    x, kernel = draw((B, H, W, C), (3, 3, C + 1, F))
    with pytest.raises(ValueError, match=r"conv2d: x has 2 channels but kernel \(3, 3, 3, 3\) takes 3"):
        jax.eval_shape(ours.conv2d, x, kernel)
    with pytest.raises(TypeError, match="complex"):
        ours.conv2d(x.astype(complex), kernel)
    with pytest.raises(TypeError, match="return_indices"):
        ours.max_pool3d(np.ones((1, 2, 2, 2, 1)), return_indices=True)


@pytest.mark.parametrize(("given", "told"), [
    ({"stride": 2}, r"convlstm2d: unknown option 'stride'; did you mean 'strides'\? The options are activation, "),
    ({"kernel": None}, "convlstm2d: kernel must be an array, got None"),
    ({"peephole": np.ones((3, F))}, "convlstm2d: peephole must map names to arrays, got ndarray"),
    ({"engine": "gpu"}, "unknown engine 'gpu'"),
    ({"algorithm": "fft", **ENGINE}, "convlstm2d: algorithm must be one of .* got 'fft'"),
], ids=["option", "None", "mapping", "engine", "algorithm"])  # fmt: skip
def test_errors_name_what_is_wrong_before_anything_runs(jax, ours, given, told):
    x, kernel, recurrent, _ = draw((B, T, H, W, C), *WEIGHTS)
    with pytest.raises((TypeError, ValueError), match=told):
        jax.eval_shape(lambda: ours.convlstm2d(x, **{"kernel": kernel, "recurrent_kernel": recurrent} | given))
    with pytest.raises(TypeError, match="unknown option 'recompute'"):
        ours.convgru2d(x, kernel, recurrent, recompute=True)


def test_a_jacobian_is_a_vmap_of_the_way_back(jax, ours):
    x, kernel = draw((1, H, W, C), (3, 3, C, F))
    found = jax.jacrev(lambda kernel: ours.conv2d(x, kernel, **ENGINE).sum((0, 1, 2)))(kernel)
    _, pullback = functional.conv2d_vjp(x, kernel, **ENGINE)
    assert close(found, [pullback(np.broadcast_to(one, (1, H, W, F)))["kernel"] for one in np.eye(F, dtype="f")])


def test_second_derivatives_are_refused_with_a_way_out(jax, ours):
    x, kernel = draw((1, H, W, C), (3, 3, C, F))
    with pytest.raises(TypeError, match=r"first derivatives in reverse mode alone .* difference of two jax\.grad"):
        jax.hessian(lambda kernel: (ours.conv2d(x, kernel, **ENGINE) ** 2).sum())(kernel)
