"""Graphs against PyTorch's automatic differentiation, in float64."""

import numpy as np
import pytest
from graph_models import forecaster, leaf_list, shared, skip, two_tasks
from layer_checks import normal

torch = pytest.importorskip("torch")


def convolved(x, weights, name):
    """Channels-last frames (…, H, W, C) through a 'same' convolution with our kernel (KH, KW, C, F)."""
    kernel = weights[f"{name}.kernel"].permute(3, 2, 0, 1)
    frames = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(frames, kernel, weights[f"{name}.bias"], padding="same").permute(0, 2, 3, 1)
    return y.reshape(*x.shape[:-1], -1)


def recurrent(x, weights, name, layers, states=None):
    """Stacked ConvLSTM layers, gates i, f, g, o; the sequence and the last states."""
    last = []
    for index in range(layers):
        own = {key.removeprefix(f"{name}.layers.{index}."): w for key, w in weights.items()}
        hidden = {"h.kernel": own["recurrent_kernel"], "h.bias": torch.zeros_like(own["bias"])}
        given = {"x.kernel": own["kernel"], "x.bias": own["bias"]}
        B, T, H, W, _ = x.shape
        F = own["bias"].shape[0] // 4
        h, c = states[index] if states else (torch.zeros(B, H, W, F, dtype=x.dtype),) * 2
        steps = []
        for t in range(T):
            i, f, g, o = (convolved(x[:, t], given, "x") + convolved(h, hidden, "h")).split(F, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            steps.append(h)
        x = torch.stack(steps, 1)
        last.append((h, c))
    return x, last


def skip_in_torch(frames, w):
    a = recurrent(frames, w, "conv_lstm2d", 1)[0]
    b = torch.tanh(convolved(a, w, "conv2d"))
    return [convolved(torch.cat([a, b, frames], -1), w, "conv2d_1")]


def shared_in_torch(x, w):
    a = torch.tanh(convolved(x, w, "one"))
    return [torch.tanh(convolved(a, w, "one")) + a + x]


def forecaster_in_torch(frames, later, w):
    sequence, states = recurrent(frames, w, "conv_lstm2d", 2)
    y = recurrent(later, w, "conv_lstm2d_1", 2, states)[0]
    return [convolved(y, w, "conv2d"), convolved(sequence[:, -1], w, "conv2d_1")]


def two_tasks_in_torch(x, w):
    trunk = torch.tanh(convolved(x, w, "trunk"))
    return [convolved(trunk, w, "conv2d"), trunk.mean((1, 2)) @ w["dense.kernel"] + w["dense.bias"]]


def two_tasks_without_dropout():
    model = two_tasks()
    model.get_layer("dropout").rate = 0.0
    return model


@pytest.mark.torch
@pytest.mark.parametrize(
    ("build", "twin"),
    [
        (skip, skip_in_torch),
        (shared, shared_in_torch),
        (forecaster, forecaster_in_torch),
        (two_tasks_without_dropout, two_tasks_in_torch),
    ],
    ids=["skip", "shared", "forecaster", "two_tasks"],
)
def test_values_and_gradients_are_those_of_autograd(build, twin):
    model = build()
    for layer in model.layers:  # penalties are not part of this
        layer._regularizers = {}
    xs = [normal(2, *(n or 3 for n in s.shape[1:]), seed=i) for i, s in enumerate(leaf_list(model.inputs))]
    w = {name: torch.tensor(array, requires_grad=True) for name, array in model.parameters.items()}
    tensors = [torch.tensor(x, requires_grad=True) for x in xs]
    expected = twin(*tensors, w)
    made = model(xs if len(xs) > 1 else xs[0], training=True)
    dys = [normal(*y.shape, seed=7 + i) for i, y in enumerate(expected)]
    for y, e in zip(leaf_list(made), expected, strict=True):
        np.testing.assert_allclose(y, e.detach().numpy(), rtol=1e-10, atol=1e-12)
    sum((e * torch.tensor(dy)).sum() for e, dy in zip(expected, dys, strict=True)).backward()
    dy = dict(zip(made, dys, strict=True)) if isinstance(made, dict) else dys if isinstance(made, list) else dys[0]
    for dx, x in zip(leaf_list(model.backward(dy)), tensors, strict=True):
        np.testing.assert_allclose(dx, x.grad.numpy(), rtol=1e-10, atol=1e-12)
    gradients = model.get_gradients()
    assert list(gradients) == list(w)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, w[name].grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=name)
