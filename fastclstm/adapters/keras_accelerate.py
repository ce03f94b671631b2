"""accelerate: our kernels in the ConvLSTM2Ds of a model of Keras."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastclstm.adapters.keras_layers import DTYPES, ConvLSTM2D, kernel_options, refusal  # first: says what to install
from fastclstm.adapters.report import Report
from fastclstm.spec import ConvSpec

import keras  # isort: skip

_B, _T = 2, 3
_TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
"""How far outputs and gradients may be from Keras's own, as a share of their largest value."""


def accelerate(model: Any, *, return_report: bool = False) -> Any:
    """Let our kernels compute the ConvLSTM2Ds in a model of Keras, which stays what it is in every other way.

    Every `keras.layers.ConvLSTM2D` in it is found, also in models within, in subclassed models, TimeDistributed and
    Bidirectional. A layer of the same options with drawn weights is called with drawn frames, states and a mask, as
    Keras computes it and as our kernels do, for inference and for training; only where outputs and gradients agree the
    layer's class becomes `fastclstm.adapters.keras.ConvLSTM2D`: the layer, its weights and their names, the model's
    graph, its config and what it is saved as are as before. Functions that Keras has compiled for the model are made
    anew when they are next called; a program of your own that was traced before must be traced again.

    Parameters
    ----------
    model : keras.Model or keras.Layer
        Changed where it is.
    return_report : bool
        Return ``(model, report)``. The report is printed in any case.

    Returns
    -------
    keras.Model or keras.Layer
        The model itself: ``accelerate(model).fit(…)``.

    Raises
    ------
    TypeError
        A model that is none, or one of another Keras.

    Examples
    --------
    ``accelerate(keras.models.load_model("model.keras"))`` prints, say,
    ``conv_lstm2d  swapped  over whole sequences``.
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"accelerate: model must be a model or layer of Keras {keras.__version__}, got {type(model).__name__}"
        )
    report = Report(nothing="no ConvLSTM2D was found")
    _visit(model, "", report, set())
    print(report)
    return (model, report) if return_report else model


def _visit(layer: Any, name: str, report: Report, seen: set[int]) -> None:
    """Swap a layer, or else what is in it."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if isinstance(layer, ConvLSTM2D):
        report.swapped[name] = "it was before"
        return
    if isinstance(layer, _KINDS):
        told = _obstacle(layer)
        if told is not None:
            report.left[name] = told
            return
        object.__setattr__(layer, "__class__", ConvLSTM2D)
        report.swapped[name] = "over whole sequences"
        return
    for part in layer._flatten_layers(include_self=False, recursive=False):
        _visit(part, f"{name}/{part.name}".lstrip("/"), report, seen)
    if isinstance(layer, keras.Model):
        _forget_compiled(layer)


_KINDS = tuple(getattr(keras.layers, f"ConvLSTM{rank}D") for rank in (1, 2, 3))


def _forget_compiled(model: Any) -> None:
    """Have a model's functions made again when they are next called."""
    for name in ("train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if getattr(model, "compiled", False):
        model.jit_compile = model.jit_compile and all(part.supports_jit for part in model._flatten_layers())


def _obstacle(layer: Any) -> str | None:
    """Say why a layer is left, or None."""
    if type(layer) is not keras.layers.ConvLSTM2D:
        known = isinstance(layer, keras.layers.ConvLSTM2D)
        return f"{type(layer).__name__} is {'a class of its own' if known else 'not two-dimensional'}"
    told = refusal(layer)
    if told is not None:
        return told
    try:
        return _difference(layer)
    except Exception as error:  # whatever Keras raises for a layer like this one and a drawn input
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Exception encountered")]
        told = re.sub("\x1b\\[[0-9]*m", "", lines[0])[:120] if lines else ""
        return f"a call with a drawn input failed: {type(error).__name__}: {told}"


# What is compared


def _difference(layer: Any) -> str | None:
    """Say in what a layer like this one and ours differ, if they do."""
    generator = np.random.default_rng(0)
    config = {name: value for name, value in layer.get_config().items()
              if not name.endswith(("_initializer", "_regularizer", "_constraint"))}  # fmt: skip
    dtype = DTYPES[layer.cell.compute_dtype]  # which shows more than half precision would
    config |= {"stateful": False, "return_sequences": True, "return_state": True, "seed": 1, "dtype": dtype}
    twins = [cls.from_config(dict(config)) for cls in (keras.layers.ConvLSTM2D, ConvLSTM2D)]
    x, h, c, mask = _inputs(layer, generator, dtype)
    for twin in twins:
        twin.build(x.shape)
    weights = [generator.standard_normal(w.shape) / 2 for w in twins[0].get_weights()]
    for twin in twins:
        twin.set_weights(weights)
    tolerance = _TOLERANCES[dtype]
    expected, found = (_numpy(twin(x, initial_state=[h, c], mask=mask, training=False)) for twin in twins)
    if not _close(expected, found, tolerance):
        return "what it returns is not what our kernels return"
    if keras.backend.backend() not in _GRADIENTS:
        return None
    cotangents = [generator.standard_normal(y.shape).astype(y.dtype) for y in expected]
    expected, found = (_numpy(gradients(twin, x, [h, c], mask, cotangents)) for twin in twins)
    return None if _close(expected, found, tolerance) else "gradients in training are others"


def _inputs(layer: Any, generator: np.random.Generator, dtype: str) -> tuple[Any, ...]:
    """Draw frames that are larger than the layer's window, states and a mask."""
    channels = getattr(layer.cell, "input_dim", 2)
    window = zip(layer.kernel_size, layer.strides, layer.dilation_rate, (2, 3), strict=True)
    frame = tuple(d * (k - 1) + s * more for k, s, d, more in window)
    options = kernel_options(layer)
    kernel_shape = (*layer.kernel_size, channels, layer.filters)
    spec = ConvSpec.infer((_B, *frame, channels), kernel_shape,
                          **{name: options[name] for name in ("strides", "padding", "dilation")})  # fmt: skip
    shapes = [(_B, _T, *frame, channels), *[(_B, spec.HO, spec.WO, layer.filters)] * 2]
    x, h, c = (generator.standard_normal(shape).astype(dtype) for shape in shapes)
    if layer.data_format == "channels_first":
        x, h, c = (np.ascontiguousarray(np.moveaxis(array, -1, -3)) for array in (x, h, c))
    masks = keras.backend.backend() in ("torch", "tensorflow")  # elsewhere Keras's own layer raises for a mask
    return x, h, c, np.array([[True, False, True], [True, True, True]]) if masks else None


def _numpy(outputs: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(output) for output in outputs]


def _close(expected: list[np.ndarray], found: list[np.ndarray], tolerance: float) -> bool:
    return len(expected) == len(found) and all(
        a.shape == b.shape and np.abs(a - b).max(initial=0) <= tolerance * np.abs(a).max(initial=1e-3)
        for a, b in zip(expected, found, strict=True)
    )


def gradients(layer: Any, x: Any, state: Any, mask: Any, cotangents: list[np.ndarray]) -> Any:
    """Return the gradients of frames, initial states and weights in a call for training, by the backend's own way."""
    return _GRADIENTS[keras.backend.backend()](layer, x, state, mask, cotangents)


def _weighted(outputs: Any, cotangents: list[np.ndarray]) -> Any:
    given = map(keras.ops.convert_to_tensor, cotangents)
    return sum(keras.ops.sum(y * dy) for y, dy in zip(keras.tree.flatten(outputs), given, strict=True))


def _torch_gradients(layer: Any, x: Any, state: Any, mask: Any, cotangents: Any) -> Any:
    import torch

    given = [keras.ops.convert_to_tensor(array).requires_grad_() for array in (x, *state)]
    outputs = layer(given[0], initial_state=given[1:], mask=mask, training=True)
    weights = [weight.value for weight in layer.trainable_weights]
    return torch.autograd.grad(_weighted(outputs, cotangents), [*given, *weights])


def _jax_gradients(layer: Any, x: Any, state: Any, mask: Any, cotangents: Any) -> Any:
    import jax

    def loss(x: Any, state: Any, weights: Any) -> Any:
        fixed = [variable.value for variable in layer.non_trainable_variables]
        outputs, _ = layer.stateless_call(weights, fixed, x, initial_state=state, mask=mask, training=True)
        return _weighted(outputs, cotangents)

    weights = [weight.value for weight in layer.trainable_weights]
    return jax.tree.leaves(jax.grad(loss, (0, 1, 2))(*jax.tree.map(jax.numpy.asarray, (x, state)), weights))


def _tensorflow_gradients(layer: Any, x: Any, state: Any, mask: Any, cotangents: Any) -> Any:
    import tensorflow as tf

    given = [tf.convert_to_tensor(array) for array in (x, *state)]
    with tf.GradientTape() as tape:
        tape.watch(given)
        loss = _weighted(layer(given[0], initial_state=given[1:], mask=mask, training=True), cotangents)
    return tape.gradient(loss, [*given, *(weight.value for weight in layer.trainable_weights)])


_GRADIENTS: dict[str, Callable[..., Any]] = {
    "torch": _torch_gradients,
    "jax": _jax_gradients,
    "tensorflow": _tensorflow_gradients,
}
"""How each backend that has gradients takes them."""
