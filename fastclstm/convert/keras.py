"""Models from Keras's, out of files or live; Keras itself is not needed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastclstm.convert.keras_graphs import Tree, model_of, picked, tree_of
from fastclstm.convert.keras_layers import Common, Config, Custom, activation_name, fitted, parameter_slots
from fastclstm.io import keras_files
from fastclstm.io.bounds import shown
from fastclstm.layers import ConvLSTM2D, ConvLSTM3D, Layer, TimeDistributed
from fastclstm.layers.container import parts
from fastclstm.models import Model, Sequential


def from_keras(
    source: Any, *, dtype: str | None = None, engine: str | None = None, custom: Custom | None = None,
    layer: str | None = None,
) -> Any:  # fmt: skip
    """Return the model that computes what a Keras model computes: Sequential of a chain of layers, else a Model.

    Layers keep Keras's names, as ``name``; a chain within a model is a Sequential in it, a graph a Model.

    Parameters
    ----------
    source : path or model
        A .keras file, an .h5 file with a whole model, or a live model, of Keras 2 or 3: keras.Sequential, or a
        functional model of any graph, with several inputs and outputs, layers that are called more than once, models
        within, states that one layer hands to another. Its layers may be ConvLSTM1D, ConvLSTM2D, ConvLSTM3D and
        Bidirectional of them with all their options, TimeDistributed of a layer or a model, LSTM, GRU, Embedding,
        Dense, Conv2D, Conv3D, Conv2DTranspose, Conv3DTranspose, DepthwiseConv2D, SeparableConv2D, BatchNormalization,
        LayerNormalization, GroupNormalization, Dropout, SpatialDropout, GaussianNoise, Activation, ReLU, ELU,
        LeakyReLU, PReLU, Softmax, Rescaling, Flatten, Reshape, Permute, RepeatVector, MaxPooling, AveragePooling,
        GlobalAveragePooling, GlobalMaxPooling, UpSampling, ZeroPadding and Cropping, of 2D and 3D, Concatenate, Add,
        Subtract, Multiply, Average, Maximum, Minimum; and sums, differences and products of symbols.
    dtype : "float32" or "float64", optional
        Of all layers; None: each as in the model, half precision as float32.
    engine : str, optional
        Of all layers that have one.
    custom : dict from str to callable, optional
        What to make of classes and functions that are not Keras's own, or not known here, such as Lambda, by their
        names in Keras
        (class_name, registered_name, a function's name or "<lambda>"). Each is called with the config that Keras saved,
        a dict. For a layer it returns a layer of ours, whose parameters, in their order, are given the Keras layer's
        arrays; for an activation what ``activation=`` takes: a name or a pair of functions (forward, derivative).
    layer : str, optional
        Return only the layer of this name, with its weights; the others may then be of any class. One within a model
        is named by its path too, "encoder/conv_lstm2d_1".

    Raises
    ------
    ImportError
        A file, and h5py is missing.
    OSError
        The file cannot be read.
    ValueError
        A damaged file, a file of weights alone, a subclassed model, a layer or an option that is not supported; it is
        named.
    TypeError
        A source that is none.

    Examples
    --------
    ``from_keras("model.keras", custom={"mish": lambda config: (mish, mish_derivative)})`` reads a model that has the
    function mish as an activation.
    """
    config, arrays = _read(source)
    if str(config.get("keras_version", "3")).startswith("2"):
        config = _modern(config)
    common = Common(dtype, engine, custom or {})
    try:
        return model_of(config, arrays, None, common) if layer is None else picked(config, arrays, layer, common)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        told = error if isinstance(error, ValueError) else f"the model's description is damaged: {error!r}"
        where = f" (in {os.fspath(source)})" if isinstance(source, str | os.PathLike) else ""
        raise ValueError(f"from_keras: {told}{where}") from error


def load_weights(layer: Layer, path: str | os.PathLike[str]) -> None:
    """Give an existing layer or model the weights in a .weights.h5, .keras or .h5 file.

    The file's layers must be those of `layer`, in the same order, each with arrays of the same shapes; a ConvLSTM2D
    with num_layers=n stands for n layers of Keras. Those of a Model, or of a Sequential with models in it, are found
    by their names instead, which must be Keras's, as in what `from_keras` returns; in a .weights.h5 file Keras 3 keeps
    names. After an error nothing is changed.

    Weights do not tell the activations. Keras 2's ConvLSTM2D has recurrent_activation="hard_sigmoid" unless told
    otherwise, which is "hard_sigmoid_keras2" here; Keras 3's, and the default here, is "sigmoid". A warning says so
    where the file is of Keras 2, or holds another recurrent_activation than the layer has.

    Raises
    ------
    ImportError
        h5py is missing.
    OSError
        The file cannot be read.
    ValueError
        A damaged file, other layers or shapes in it, a layer that Keras has no weights for.
    """
    name = os.fspath(path)
    config, arrays, version, names = keras_files.read(path)
    if any(isinstance(part, Model) or (part is not layer and isinstance(part, Sequential)) for part in parts(layer)):
        if config is not None:
            arrays = dict(tree_of(config, arrays, Common(None, None, {})))
        arrays = {names.get(place, place): values for place, values in arrays.items()}
        parameters = dict(_named(name, layer, arrays, ""))
    else:
        parameters = _in_order(name, layer, arrays, config is None)
    try:
        layer.set_parameters(fitted(layer, parameters))
    except ValueError as error:
        raise ValueError(f"load_weights: {name} does not fit: {error}") from error
    _warn_of_activations(name, layer, config, version)


def _in_order(name: str, layer: Layer, arrays: Mapping[str, Any], paths: bool) -> dict[str, np.ndarray]:
    """Return the parameters of a layer or a chain from those of the file's layers, in the same order."""
    slots = [slot for part, prefix in _parts(layer) for slot in parameter_slots(part, prefix)]
    places = [place for place, values in arrays.items() if values]
    fits = len(slots) == len(places) and not any(isinstance(values, Mapping) for values in arrays.values())
    among_layers = sum(place.startswith("layers/") for place in places) if paths else 0
    if among_layers:
        new = keras_files.numbered(places)  # layers without weights count where they stand, but not here
        ordered = keras_files.layer_paths(class_name for class_name, _ in slots)
        fits = fits and set(ordered) == set(new.values())
        old = {new_place: place for place, new_place in new.items()}
        places = [old[place] for place in ordered] if fits else places
    if not fits:
        own = shown((class_name for class_name, _ in slots), 20)
        outside = " (not all among the layers: a subclassed model)" if 0 < among_layers < len(places) else ""
        raise ValueError(f"load_weights: {name} holds the weights of {shown(sorted(places), 20)}{outside}, but "
                         f"{type(layer).__name__} has {own}")  # fmt: skip
    pairs = zip(places, slots, strict=True)
    return {key: array for place, slot in pairs for key, array in _paired(name, place, arrays[place], *slot).items()}


def _named(name: str, layer: Layer, arrays: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters of a model, and of those within, from those of the file's layers of the same names."""
    for key, part in layer._sublayers.items():
        if not part.parameters:
            continue
        if part.name not in arrays:
            raise ValueError(f"load_weights: {name} holds no layer {part.name!r}; it has {shown(arrays, 20)}; give the "
                             f"layers Keras's names, as from_keras does")  # fmt: skip
        values, own = arrays[part.name], f"{prefix}{key}."
        inner = part.layer if isinstance(part, TimeDistributed) else part
        if isinstance(inner, Model | Sequential) and isinstance(values, Mapping):
            yield from _named(name, inner, values, own if inner is part else f"{own}layer.")
            continue
        if isinstance(inner, Model | Sequential) or isinstance(values, Mapping):
            has = "layers within it" if isinstance(values, Mapping) else "none"
            needs = type(inner).__name__ + (" has none" if isinstance(values, Mapping) else " has layers")
            raise ValueError(f"load_weights: {part.name} has {has} in {name}, but {needs}")
        slots = parameter_slots(part, own)
        names = [each for _, names in slots for each in names]
        yield from _paired(name, str(part.name), values, slots[0][0], names).items()


def _paired(
    name: str, place: str, arrays: Sequence[np.ndarray], class_name: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    if len(arrays) != len(names):
        raise ValueError(f"load_weights: {place} in {name} has {len(arrays)} arrays, but {class_name} needs "
                         f"{len(names)}: {', '.join(names)}")  # fmt: skip
    return dict(zip(names, arrays, strict=True))


def _warn_of_activations(name: str, layer: Layer, config: Config | None, version: str) -> None:
    """Warn where the weights of `layer` were trained with another recurrent activation, or may have been."""
    own = [part.recurrent_activation for part in parts(layer) if isinstance(part, ConvLSTM2D | ConvLSTM3D)
           for _ in range(part.num_layers)]  # fmt: skip
    if config is not None:
        modern = _modern(config) if version.startswith("2") else config
        theirs = [activation_name(found) for found in _found(modern, "recurrent_activation")]
        differ = len(theirs) == len(own) and any(
            a != b and isinstance(a, str) for a, b in zip(theirs, own, strict=True)
        )
        why = f"its model has recurrent_activation {shown(dict.fromkeys(map(repr, theirs)))}"
    else:
        differ = version.startswith("2") and any(activation != "hard_sigmoid_keras2" for activation in own)
        why = (
            "it is of Keras 2, where recurrent_activation is 'hard_sigmoid_keras2' unless the model was built otherwise"
        )
    if differ:
        warnings.warn(f"load_weights: {name}: {why}, but the layer has {shown(dict.fromkeys(map(repr, own)))}",
                      stacklevel=3)  # fmt: skip


def _found(node: Any, key: str) -> Iterator[Any]:
    """Yield what `node` has under `key` in the configs of layers, of a bidirectional one for its forward layer."""
    if isinstance(node, Mapping):
        if key in node:
            yield node[key]
        for name, value in node.items():
            if name not in (key, "backward_layer"):
                yield from _found(value, key)
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _found(item, key)


# Sources


def _read(source: Any) -> tuple[Config, Mapping[str, Any]]:
    """Return a model's config and the arrays of its layers, by name."""
    if isinstance(source, str | os.PathLike):
        config, arrays, *_ = keras_files.read(source)
        if config is None:
            raise ValueError(f"from_keras: {os.fspath(source)} holds weights alone; build the layers, then "
                             f"fastclstm.convert.keras.load_weights(layer, path)")  # fmt: skip
        return config, arrays
    if not (hasattr(source, "get_config") and hasattr(source, "layers")):
        raise TypeError(f"from_keras: source must be a path or a Keras model, got {type(source).__name__}")
    config = {"class_name": type(source).__name__, "config": source.get_config(), "keras_version": _version(source)}
    return config, {layer.name: _live(layer) for layer in source.layers}


def _live(layer: Any) -> Tree:
    """Return the arrays of a live layer, of a model by its layers."""
    if hasattr(layer, "layers"):
        return {inner.name: _live(inner) for inner in layer.layers}
    return _live(layer.layer) if type(layer).__name__ == "TimeDistributed" else layer.get_weights()


def _parts(layer: Layer) -> list[tuple[Layer, str]]:
    """Return the layers of a model, or the layer itself, and what their parameters' names start with."""
    if isinstance(layer, Sequential):
        return [(part, f"{index}.") for index, part in enumerate(layer)]
    return [(layer, "")]


def _version(model: Any) -> str:
    """Return the version of Keras that a live model belongs to."""
    for base in type(model).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("keras", "tf_keras"):
            return getattr(sys.modules.get(root), "__version__", "3")
    return "3"


def _modern(node: Any) -> Any:
    """Return a config of Keras 2 with its hard sigmoid, another than Keras 3's, called by our name for it."""
    if isinstance(node, Mapping):
        return {
            key: "hard_sigmoid_keras2" if key.endswith("activation") and value == "hard_sigmoid" else _modern(value)
            for key, value in node.items()
        }
    return [_modern(item) for item in node] if isinstance(node, list | tuple) else node
