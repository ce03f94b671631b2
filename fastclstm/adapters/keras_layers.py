"""ConvLSTM2D as a layer of Keras 3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from fastclstm.adapters.host import HostCall
from fastclstm.convert.keras_layers import activation_name
from fastclstm.nn import activations

try:
    import keras
except ImportError as error:
    raise ImportError(f"fastclstm.adapters.keras needs Keras 3: pip install 'fastclstm[keras]' ({error})") from error
if not keras.__version__.startswith("3"):
    raise ImportError(f"fastclstm.adapters.keras is for Keras 3, found {keras.__version__}: pip install 'keras>=3.3'")
try:
    from keras.src.backend.common.variables import AutocastScope
except ImportError:  # before Keras 3.6
    from keras.src.backend.common.variables import AutoCastScope as AutocastScope
if keras.backend.backend() == "jax":
    import fastclstm.adapters.jax  # noqa: F401 (sets an option that JAX reads when it first computes)


DTYPES = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""For each dtype that a layer computes in, the one that our kernels do."""


class _Call(NamedTuple):
    """What goes through Keras's own ``call`` as its argument training."""

    training: Any
    from_zero: bool
    """Whether the states that Keras makes are zeros."""


class ConvLSTM2D(keras.layers.ConvLSTM2D):
    """`keras.layers.ConvLSTM2D`, computed by our kernels: the same options, weights, config, numbers and files.

    It runs on Keras's backends torch, jax, tensorflow and numpy; models with it train and predict as any other. On
    torch a GPU's tensors are computed there; jax and tensorflow call back to the processor. TensorFlow's XLA cannot
    compile it, so that there Keras's jit_compile="auto" means no, and True gives Keras's warning. On jax, import this
    before a model is built: see `fastclstm.adapters.jax`.

    In half or mixed precision, as of the policies "mixed_bfloat16" and "mixed_float16", it takes and returns what
    Keras's layer does, and computes between them in float32, with the weights as they are kept. Losses are scaled as
    ever.

    A layer that our kernels do not compute as it is meant is computed by Keras, and a warning says why: one with an
    activation that is not one of Keras's own, or with a mask that is not (batch, time).

    A model with this layer is saved as one with Keras's, and a Keras without fastclstm loads it as that. Where this
    module has been imported such a file gives this layer again (as do .h5 files with Keras's layer, which do not tell
    them apart); `accelerate` makes Keras's layers in a loaded model to this one. So it is with pickles. What is
    exported as ONNX, or traced by `torch.jit.trace`, holds Keras's own steps, as our operators are not known there; a
    program of `torch.export` holds ours, and needs this module where it runs. JAX exports no program with a callback
    ("serialization of host_callbacks is not yet implemented"): export what a file gives where this module has not been
    imported. ``model.quantize`` leaves the layer as it is, as it does Keras's.

    Parameters
    ----------
    filters, kernel_size, **options
        All of `keras.layers.ConvLSTM2D`.

    Raises
    ------
    ValueError, TypeError
        As Keras's layer.
    """

    @property
    def supports_jit(self) -> bool:
        """Whether Keras may compile a model with this layer."""
        return keras.backend.backend() != "tensorflow"

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        pass  # Keras's constructor says True

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        """Run the layer as Keras's does; `inner_loop` is what is ours."""
        if sequences.shape[1] == 0:
            raise ValueError(
                f"{self.name}: sequences have no time steps {tuple(sequences.shape)}; at least one is needed"
            )
        if isinstance(initial_state, list | tuple) and len(initial_state) != 2:
            raise ValueError(f"{self.name}: initial_state must be [h, c], got {len(initial_state)} items")
        from_zero = initial_state is None and not self.stateful
        return super().call(sequences, initial_state=initial_state, mask=mask, training=_Call(training, from_zero))

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        """Return the last output, the outputs and the states, as Keras's loop over the steps does."""
        call = training if isinstance(training, _Call) else _Call(training, False)
        if _is_traced():
            return super().inner_loop(sequences, initial_state, mask, training=call.training)
        told = refusal(self)
        if told is None and mask is not None and len(mask.shape) != 2:
            told = f"its mask has shape {tuple(mask.shape)}, not (batch, time)"
        if told is not None:
            warnings.warn(f"{self.name}: Keras computes this ConvLSTM2D itself, for {told}", stacklevel=2)
            return super().inner_loop(sequences, initial_state, mask, training=call.training)
        arrays = self._arrays(sequences, initial_state, mask, call)
        options = kernel_options(self) | {
            "go_backwards": self.go_backwards, "return_sequences": self.return_sequences
        }  # fmt: skip
        y, h, c = BACKENDS[keras.backend.backend()](arrays, options, call.training)
        if self.zero_output_for_mask and mask is not None:
            y = self._zeroed(y, arrays["mask"])
        y, h, c = (self._written(keras.ops.cast(value, self.cell.compute_dtype)) for value in (y, h, c))
        return y[:, -1] if self.return_sequences else y, y, [h, c]

    def __reduce__(self) -> Any:
        made, arguments = super().__reduce__()
        return (keras.layers.ConvLSTM2D._unpickle_model if type(self) is ConvLSTM2D else made), arguments

    def _arrays(self, sequences: Any, initial_state: Any, mask: Any, call: _Call) -> dict[str, Any]:
        """Return the operation's arrays by name, channels-last."""
        cell, inside = self.cell, DTYPES[self.cell.compute_dtype]
        arrays = {"x": self._channels_last(sequences)}
        weights = {"kernel": cell.kernel, "recurrent_kernel": cell.recurrent_kernel, "bias": cell.bias}
        with AutocastScope(None):  # as they are kept
            arrays |= {name: keras.ops.convert_to_tensor(w) for name, w in weights.items() if w is not None}
        if not call.from_zero:
            # A stateful layer's variables are written over where they are, before the way back reads them.
            states = [keras.ops.copy(state) for state in initial_state] if self.stateful else initial_state
            arrays |= {name: self._channels_last(state) for name, state in zip("hc", states, strict=True)}
        if call.training:
            draws = {"x": (cell.dropout, cell.get_dropout_mask, sequences[:, 0]),
                     "h": (cell.recurrent_dropout, cell.get_recurrent_dropout_mask, initial_state[0])}  # fmt: skip
            for name, (rate, draw, like) in draws.items():
                if 0 < rate < 1:
                    masks = [self._channels_last(mask) for mask in draw(like)]
                    arrays[f"dropout_masks.{name}"] = keras.ops.stack(masks)
        arrays = {name: keras.ops.cast(array, inside) for name, array in arrays.items()}
        return arrays if mask is None else arrays | {"mask": keras.ops.cast(mask, "bool")}

    def _channels_last(self, value: Any) -> Any:
        return value if self.data_format == "channels_last" else keras.ops.moveaxis(value, -3, -1)

    def _written(self, value: Any) -> Any:
        return value if self.data_format == "channels_last" else keras.ops.moveaxis(value, -1, -3)

    def _zeroed(self, y: Any, mask: Any) -> Any:
        """Set an output to zero where its step is masked."""
        kept = keras.ops.flip(mask, 1) if self.go_backwards else mask
        kept = kept if self.return_sequences else kept[:, -1]
        for _ in range(3):
            kept = keras.ops.expand_dims(kept, -1)
        return keras.ops.where(kept, y, keras.ops.zeros_like(y))


def refusal(layer: Any) -> str | None:
    """Say why our kernels do not compute a ConvLSTM2D of Keras as it is, or None."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        return f"Keras's backend is {backend!r}, not {', '.join(map(repr, BACKENDS))}"
    dtype = layer.cell.compute_dtype
    if dtype not in DTYPES:
        return f"it computes in {dtype}, not {', '.join(DTYPES)}"
    for name in ("activation", "recurrent_activation"):
        function = getattr(layer, name)
        if _activation(function) is None:
            told = getattr(function, "__name__", type(function).__name__)
            return f"its {name} {told} is not one of Keras's that are known here: {', '.join(activations.TABLE)}"
    return None


def kernel_options(layer: Any) -> dict[str, Any]:
    """Return the options of `functional.convlstm2d` that the options of Keras's layer mean."""
    return {
        "strides": tuple(layer.strides),
        "padding": layer.padding,
        "dilation": tuple(layer.dilation_rate),
        "activation": _activation(layer.activation),
        "recurrent_activation": _activation(layer.recurrent_activation),
    }


def _activation(function: Any) -> str | None:
    """Return our name for one of Keras's own activations, or None."""
    given = getattr(function, "__name__", "")
    if getattr(keras.activations, given, None) is not function:
        return None
    name = activation_name(given)
    return name if name in activations.TABLE else None


def _is_traced() -> bool:
    """Whether a program is made that runs where our operators are not known: by `torch.jit.trace`, or as ONNX."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return bool(torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())


# How each backend calls the kernels: tensors by name and options in, the output, the last h and the last c out


def _torch(arrays: dict[str, Any], options: dict[str, Any], training: Any) -> tuple[Any, ...]:
    from fastclstm.adapters import torch_ops

    weights: dict[str, Any] = {name: arrays[name] for name in ("kernel", "recurrent_kernel", "bias") if name in arrays}
    geometry = {name: value for name, value in options.items() if name not in ("go_backwards", "return_sequences")}
    return torch_ops.OPERATORS["convlstm2d"](
        arrays["x"], torch_ops.Weights(None, None, [*weights.values()], lambda _: weights),
        (arrays.get("h"), arrays.get("c")), torch_ops.encode([], **geometry),
        mask=arrays.get("mask"), dropout=(arrays.get("dropout_masks.x"), arrays.get("dropout_masks.h")),
        go_backwards=options["go_backwards"], return_sequences=options["return_sequences"],
    )  # fmt: skip


def _jax(arrays: dict[str, Any], options: dict[str, Any], training: Any) -> Any:
    from fastclstm.adapters import jax

    return jax.run("convlstm2d", arrays, options)


def _tensorflow(arrays: dict[str, Any], options: dict[str, Any], training: Any) -> Any:
    from fastclstm.adapters import tensorflow_ops

    return tensorflow_ops.run(arrays, options, save=bool(training))


def _numpy(arrays: dict[str, Any], options: dict[str, Any], training: Any) -> Any:
    return HostCall.of("convlstm2d", arrays, options).forward(*arrays.values())


BACKENDS: dict[str, Callable[[dict[str, Any], dict[str, Any], Any], Any]] = {
    "torch": _torch,
    "jax": _jax,
    "tensorflow": _tensorflow,
    "numpy": _numpy,
}

# Keras writes a class's module and name into files, and looks for a class that is not its own under the name alone:
# so a file has Keras's layer in it, and comes back as ours only where this module has registered it.
ConvLSTM2D.__module__ = "keras.layers"
ConvLSTM2D.__qualname__ = "ConvLSTM2D of fastclstm"
keras.saving.get_custom_objects()["ConvLSTM2D"] = ConvLSTM2D
