import copy
import math
import re

import numpy as np
import pytest

from fastclstm.nn import optimizers
from fastclstm.nn.described import describe, restore
from fastclstm.nn.optimizers import SGD, Adam, AdamW, RMSprop
from fastclstm.nn.schedules import CosineDecay

SHAPES = {"kernel": (3, 3, 2, 4), "layers.0.bias": (4,)}


def normals(seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def run(optimizer, steps=5, parameters=None, start=0):
    """Take steps with gradients that depend on the parameters."""
    parameters = parameters or normals(0)
    for step in range(start, start + steps):
        noise = normals(step + 1, parameters["kernel"].dtype)
        parameters = parameters | optimizer.step(parameters, {k: np.sin(v) + noise[k] for k, v in parameters.items()})
    return parameters


OPTIMIZERS = [
    (SGD(0.1), "SGD", {"lr": 0.1}),
    (SGD(0.1, 0.9, weight_decay=0.1), "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD(0.1, 0.9, True), "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (RMSprop(), "RMSprop", {"alpha": 0.9}),
    (RMSprop(0.02, 0.9, 0.8, 1e-3, True, weight_decay=0.1), "RMSprop",
     {"lr": 0.02, "alpha": 0.9, "momentum": 0.8, "eps": 1e-3, "centered": True, "weight_decay": 0.1}),
    (Adam(), "Adam", {}),
    (Adam(0.1, 0.8, 0.9, 1e-3, True, weight_decay=0.1), "Adam",
     {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1}),
    (AdamW(), "AdamW", {}),
    (AdamW(0.1, weight_decay=0.3), "AdamW", {"lr": 0.1, "weight_decay": 0.3}),
]  # fmt: skip
every_optimizer = pytest.mark.parametrize("optimizer", [case[0] for case in OPTIMIZERS], ids=lambda o: repr(o)[:70])


@pytest.mark.torch
@pytest.mark.parametrize(("optimizer", "name", "options"), OPTIMIZERS, ids=lambda x: str(x)[:40])
def test_against_torch(optimizer, name, options):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in normals(0).items()}
    theirs = getattr(torch.optim, name)(tensors.values(), **options)
    for step in range(5):
        noise = normals(step + 1)
        for k, tensor in tensors.items():
            tensor.grad = torch.sin(tensor.detach()) + torch.tensor(noise[k])
        theirs.step()
    for k, value in run(copy.deepcopy(optimizer)).items():
        np.testing.assert_allclose(value, tensors[k].detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("limit", [0.5, 1000.0])
def test_clip_norm_against_torch(limit):
    torch = pytest.importorskip("torch")
    parameters, gradients = normals(0), normals(1)
    new = SGD(1, clip_norm=limit).step(parameters, gradients)
    tensors = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES.values()]
    for tensor, gradient in zip(tensors, gradients.values(), strict=True):
        tensor.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(tensors, limit)
    for name, tensor in zip(SHAPES, tensors, strict=True):
        np.testing.assert_allclose(parameters[name] - new[name], tensor.grad.numpy(), rtol=1e-5)


class Seen(SGD):
    """Its steps return the gradients as they arrive, clipped; one of five numbers is a Ctrl-C."""

    def _update(self, parameter, gradient, rate, state):
        if parameter.size == 5:
            raise KeyboardInterrupt
        return gradient


@pytest.mark.parametrize(
    ("dtype", "size"), [("float64", 1e200), ("float64", 1e308), ("float32", 1e30), ("float32", 1e-30), ("float32", 1)]
)
@pytest.mark.parametrize("count", [1, 10**5])
def test_clip_norm_at_any_scale(dtype, size, count):
    gradients = {"a": np.full(count, -0.6 * size, dtype), "b": np.full(count, 0.8 * size, dtype)}
    limit = 1e-3 * size
    clipped = Seen(clip_norm=limit).step(gradients, gradients)
    np.testing.assert_allclose(clipped["a"], -0.6 * limit / count**0.5, rtol=2e-7)
    np.testing.assert_allclose(clipped["b"], 0.8 * limit / count**0.5, rtol=2e-7)


def test_clip_norm_of_both_dtypes():
    gradients = {"a": np.ones(2, "float32"), "b": np.array([3e200, 4e200])}
    with np.errstate(over="raise"):
        clipped = Seen(clip_norm=1.0).step(gradients, gradients)
    assert clipped["a"].dtype == np.float32
    np.testing.assert_allclose(clipped["b"], [0.6, 0.8], rtol=1e-15)
    np.testing.assert_array_equal(clipped["a"], 0)


def test_the_norm_of_many_single_numbers_is_taken_in_double():
    g = np.random.default_rng(0).standard_normal((1000, 1500)).astype("float32")
    for gradient in (g, g.T, g[::2, 1:]):
        clipped = Seen(clip_norm=1.0).step({"w": gradient}, {"w": gradient})["w"]
        assert math.sqrt(np.square(clipped.astype("float64")).sum()) == pytest.approx(1, rel=2e-7)


def test_gradients_below_the_norm_stay_as_they_are():
    for scale in (1, 1e200):
        gradients = {name: scale * g for name, g in normals(0).items()}
        limit = scale * math.sqrt(sum(float(np.square(g).sum()) for g in normals(0).values()))
        seen = Seen(clip_norm=1.001 * limit).step(gradients, gradients)
        assert all(seen[name] is g for name, g in gradients.items())
        assert not any(g is seen[n] for n, g in Seen(clip_norm=0.999 * limit).step(gradients, gradients).items())
    assert Seen(clip_norm=1).step({}, {}) == {}


def test_clip_value():
    new = SGD(1, clip_value=0.5).step({"w": np.zeros(3)}, {"w": np.array([-2.0, 0.25, 3.0])})
    np.testing.assert_array_equal(new["w"], [0.5, -0.25, -0.5])


def test_by_hand():
    optimizer = SGD(0.5, 0.5)
    w = {"w": np.array([1.0])}
    w = optimizer.step(w, {"w": np.array([2.0])})  # velocity 2
    w = optimizer.step(w, {"w": np.array([1.0])})  # velocity 2
    np.testing.assert_array_equal(w["w"], [-1.0])


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_given_is_modified_and_dtypes_stay(optimizer, dtype):
    optimizer = copy.deepcopy(optimizer)
    parameters, gradients = normals(0, dtype), normals(1, dtype)
    for array in (*parameters.values(), *gradients.values()):
        array.flags.writeable = False
    new = optimizer.step(parameters, {"kernel": gradients["kernel"]})
    assert list(new) == ["kernel"]
    assert new["kernel"].dtype == dtype
    assert all(array.dtype == dtype for key, array in optimizer.get_state().items() if key.endswith(optimizer.slots))
    kept = optimizer.get_state()
    copies = copy.deepcopy(kept)
    optimizer.step(parameters, gradients)
    assert all((kept[key] == copies[key]).all() for key in kept)


@every_optimizer
def test_training_goes_on_to_the_same_bits(optimizer):
    whole, first = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    expected = run(whole, 6)
    halfway = run(first, 3)
    for array in first.get_state().values():
        assert type(array) is np.ndarray
        array += 1  # of a copy, so that nobody is harmed
    second = restore(describe(optimizer))
    second.set_state(first.get_state())
    result = run(second, 3, halfway, 3)
    for name in SHAPES:
        np.testing.assert_array_equal(result[name], expected[name])
    assert second.steps == 6
    assert second.get_state().keys() == whole.get_state().keys()


def test_schedule_and_assigned_rate():
    optimizer = SGD(lambda step: 10.0**-step)
    w = {"w": np.zeros(1)}
    for _ in range(3):
        w = optimizer.step(w, {"w": -np.ones(1)})
    np.testing.assert_allclose(w["w"], 1.11)
    optimizer.learning_rate = 2
    np.testing.assert_allclose(optimizer.step(w, {"w": -np.ones(1)})["w"], 3.11)
    told = Adam(CosineDecay(0.1, 10))
    assert restore(describe(told)).options == told.options


def test_a_parameter_that_comes_late_starts_as_if_first():
    optimizer, w = Adam(0.1), {"a": np.zeros(1), "b": np.zeros(1)}
    for _ in range(20):
        w |= optimizer.step(w, {"a": np.ones(1)})
    w |= optimizer.step(w, {"a": np.ones(1), "b": np.ones(1)})
    np.testing.assert_allclose(w["b"], -0.1, rtol=1e-6)


@every_optimizer
def test_a_step_can_be_undone(optimizer):
    optimizer = copy.deepcopy(optimizer)
    parameters = run(optimizer, 2)
    before, copies = (optimizer.steps, optimizer.state), optimizer.get_state()
    expected = run(optimizer, 1, parameters, 2)
    optimizer.steps, optimizer.state = before
    assert all((optimizer.get_state()[key] == array).all() for key, array in copies.items())
    result = run(optimizer, 1, parameters, 2)
    assert all((result[name] == expected[name]).all() for name in SHAPES)


def test_an_interrupted_step_was_none():
    optimizer = Seen()
    good, bad = np.ones(2), np.ones(5)
    optimizer.step({"a": good}, {"a": good})
    before = optimizer.steps, optimizer.state, optimizer.get_state()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step({"a": good, "b": bad}, {"a": good, "b": bad})
    assert (optimizer.steps, optimizer.state) == before[:2]
    assert optimizer.get_state() == before[2] == {"steps": 1, "a/count": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(bad):
    optimizer = Adam()
    parameters = run(optimizer, 2)
    before = optimizer.get_state()
    gradients = normals(1)
    gradients["layers.0.bias"][2] = bad
    with pytest.raises(FloatingPointError, match=r"Adam: the gradient of layers\.0\.bias holds NaN or Inf"):
        optimizer.step(parameters, gradients)
    after = optimizer.get_state()
    assert before.keys() == after.keys()
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.parametrize(
    ("parameters", "gradients", "message"),
    [
        ({"a": np.ones(2)}, {"b": np.ones(2)}, "Adam: gradient of an unknown parameter 'b'; they are a"),
        ({"a": np.ones(2)}, {"a": np.ones(1)}, "Adam: gradient of a has shape (1,) but must be (2,)"),
        (
            {"a": np.ones(2, int)},
            {"a": np.ones(2)},
            "Adam: dtype of a must be one of 'float32', 'float64', got 'int64'",
        ),
    ],
)
def test_arrays_that_do_not_fit(parameters, gradients, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Adam().step(parameters, gradients)


def test_another_models_state():
    optimizer = Adam()
    optimizer.step({"a": np.ones(2)}, {"a": np.ones(2)})
    with pytest.raises(ValueError, match=r"Adam: mean of a has shape \(2,\) but must be \(3,\) .* take a new one"):
        optimizer.step({"a": np.ones(3)}, {"a": np.ones(3)})


def test_states_that_are_refused():
    optimizer = Adam()
    run(optimizer, 1)
    state = optimizer.get_state()
    for wrong in ({"kernel/mean": state.pop("kernel/mean")}, {"steps": 1, "kernel/velocity": 1}, {"steps": 1, "k": 1}):
        with pytest.raises(ValueError, match="Adam: a state has 'steps' and, of each parameter, count, mean, square;"):
            Adam().set_state(wrong)
    with pytest.raises(ValueError, match="missing or unknown: 'kernel/mean'"):
        Adam().set_state(state)
    before = optimizer.get_state()
    for name in ("steps", "kernel/count"):
        for wrong in (np.zeros(2), np.zeros(2, int), 1.5, -1, math.nan, "1", None):
            with pytest.raises(ValueError, match=rf"^Adam: {name} of a state must be an integer >= 0, got "):
                optimizer.set_state(before | {name: wrong})
    assert all((optimizer.get_state()[key] == array).all() for key, array in before.items())


def test_rates_that_are_refused():
    with pytest.raises(ValueError, match="SGD: the learning rate of step 0 must be a number >= 0, got nan"):
        SGD(lambda step: math.nan).step({"w": np.ones(1)}, {"w": np.ones(1)})
    with pytest.raises(TypeError, match="a learning rate must be a finite number or a function of the step"):
        SGD("fast")


def test_get():
    for name, cls in optimizers.TABLE.items():
        assert type(optimizers.get(name)) is cls
        assert optimizers.get(name) is not optimizers.get(name)
    own = Adam()
    assert optimizers.get(own) is own
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamm'; known are sgd, .*; did you mean 'adam'\?"):
        optimizers.get("adamm")
    with pytest.raises(TypeError, match="or an Optimizer, got 3"):
        optimizers.get(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-1), "ConstantSchedule: learning_rate must be a finite number >= 0, got -1"),
        (lambda: SGD(momentum=2), "SGD: momentum must be a finite number >= 0 and <= 1, got 2"),
        (lambda: SGD(nesterov=True), "SGD: nesterov needs a momentum above 0"),
        (lambda: Adam(beta_2=1), "Adam: beta_2 must be below 1, got 1"),
        (lambda: AdamW(weight_decay=-1), "AdamW: weight_decay must be a finite number >= 0, got -1"),
        (lambda: RMSprop(epsilon=0), "RMSprop: epsilon must be a finite number > 0, got 0"),
        (lambda: Adam(clip_norm=0), "Adam: clip_norm must be a finite number > 0, got 0"),
        (lambda: Adam(clip_norm=1, clip_value=1), "Adam: give clip_norm or clip_value, not both"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
