"""Sequential models from Keras's, out of files or live; Keras itself is not needed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastclstm.io import keras_files
from fastclstm.io.bounds import shown
from fastclstm.layers import (
    GRU,
    LSTM,
    Activation,
    AdaptiveAveragePooling2D,
    Add,
    Average,
    AveragePooling2D,
    AveragePooling3D,
    BatchNormalization,
    Concatenate,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    ConvLSTM2D,
    Cropping2D,
    Cropping3D,
    Dense,
    DepthwiseConv2D,
    Dropout,
    Embedding,
    Flatten,
    GaussianNoise,
    GlobalAveragePooling,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
    GlobalMaxPooling,
    GlobalMaxPooling2D,
    GlobalMaxPooling3D,
    GroupNormalization,
    Layer,
    LayerNormalization,
    LeakyReLU,
    Maximum,
    MaxPooling2D,
    MaxPooling3D,
    Minimum,
    Multiply,
    Permute,
    PReLU,
    ReLU,
    RepeatVector,
    Rescaling,
    Reshape,
    SeparableConv2D,
    Softmax,
    SpatialDropout2D,
    SpatialDropout3D,
    Subtract,
    TimeDistributed,
    UpSampling2D,
    UpSampling3D,
    ZeroPadding2D,
    ZeroPadding3D,
)
from fastclstm.layers.base import uninitialized
from fastclstm.layers.global_pooling import GlobalPooling
from fastclstm.layers.recurrent import Recurrent
from fastclstm.models import Sequential
from fastclstm.nn import constraints, regularizers
from fastclstm.nn.activations import LEAKY_RELU_SLOPE
from fastclstm.nn.described import plain

Config = Mapping[str, Any]
Custom = Mapping[str, Callable[[Any], Any]]
Arrays = Sequence[np.ndarray]


def from_keras(
    source: Any, *, dtype: str | None = None, engine: str | None = None, custom: Custom | None = None
) -> Sequential:
    """Return the Sequential model that computes what a Keras model computes.

    Parameters
    ----------
    source : path or model
        A .keras file, an .h5 file with a whole model, or a live model: keras.Sequential, or a functional model in
        which every layer takes the output of one other. Its layers may be ConvLSTM2D and Bidirectional(ConvLSTM2D)
        with all their options but return_state, TimeDistributed, LSTM, GRU, Embedding, Dense,
        Conv2D, Conv3D, Conv2DTranspose, Conv3DTranspose, DepthwiseConv2D, SeparableConv2D, BatchNormalization,
        LayerNormalization, GroupNormalization, Dropout, SpatialDropout, GaussianNoise, Activation, ReLU, LeakyReLU,
        PReLU, Softmax, Rescaling, Flatten, Reshape, Permute, RepeatVector, MaxPooling, AveragePooling,
        GlobalAveragePooling, GlobalMaxPooling, UpSampling, ZeroPadding and Cropping, of 2D and 3D.
    dtype : "float32" or "float64", optional
        Of all layers; None: each as in the model, half precision as float32.
    engine : str, optional
        Of all layers that have one.
    custom : dict from str to callable, optional
        What to make of classes and functions that are not Keras's own, or not known here, by their names in Keras
        (class_name, registered_name, a function's name or "<lambda>"). Each is called with the config that Keras saved,
        a dict. For a layer it returns a layer of ours, whose parameters, in their order, are given the Keras layer's
        arrays; for an activation what ``activation=`` takes: a name or a pair of functions (forward, derivative).

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
    try:
        return Sequential(list(_layers(config, arrays, _Common(dtype, engine, custom or {}))))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        told = error if isinstance(error, ValueError) else f"from_keras: the model's description is damaged: {error!r}"
        where = f" (in {os.fspath(source)})" if isinstance(source, str | os.PathLike) else ""
        raise ValueError(f"{told}{where}") from error


def load_weights(layer: Layer, path: str | os.PathLike[str]) -> None:
    """Give an existing layer or Sequential model the weights in a .weights.h5, .keras or .h5 file.

    The file's layers must be those of `layer`, in the same order, each with arrays of the same shapes; a ConvLSTM2D
    with num_layers=n stands for n layers of Keras. After an error nothing is changed.

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
    config, arrays, version = keras_files.read(path)
    slots = [slot for part, prefix in _parts(layer) for slot in _slots(part, prefix)]
    places = [place for place, values in arrays.items() if values]
    fits = len(slots) == len(places)
    among_layers = sum(place.startswith("layers/") for place in places) if config is None else 0
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
    parameters: dict[str, np.ndarray] = {}
    for place, (class_name, names) in zip(places, slots, strict=True):
        if len(arrays[place]) != len(names):
            raise ValueError(f"load_weights: {place} in {name} has {len(arrays[place])} arrays, but {class_name} needs "
                             f"{len(names)}: {', '.join(names)}")  # fmt: skip
        parameters |= dict(zip(names, arrays[place], strict=True))
    try:
        layer.set_parameters(parameters)
    except ValueError as error:
        raise ValueError(f"load_weights: {name} does not fit: {error}") from error
    _warn_of_activations(name, layer, config, version)


def _warn_of_activations(name: str, layer: Layer, config: Config | None, version: str) -> None:
    """Warn where the weights of `layer` were trained with another recurrent activation, or may have been."""
    own = [part.recurrent_activation for part, _ in _parts(layer) if isinstance(part, ConvLSTM2D)
           for _ in range(part.num_layers)]  # fmt: skip
    if config is not None:
        modern = _modern(config) if version.startswith("2") else config
        theirs = [_activation(found) for found in _found(modern, "recurrent_activation")]
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


def _read(source: Any) -> tuple[Config, Mapping[str, Arrays]]:
    """Return a model's config and the arrays of its layers, by name."""
    if isinstance(source, str | os.PathLike):
        config, arrays, _ = keras_files.read(source)
        if config is None:
            raise ValueError(f"from_keras: {os.fspath(source)} holds weights alone; build the layers, then "
                             f"fastclstm.convert.keras.load_weights(layer, path)")  # fmt: skip
        return config, arrays
    if not (hasattr(source, "get_config") and hasattr(source, "layers")):
        raise TypeError(f"from_keras: source must be a path or a Keras model, got {type(source).__name__}")
    config = {"class_name": type(source).__name__, "config": source.get_config(), "keras_version": _version(source)}
    return config, {layer.name: layer.get_weights() for layer in source.layers}


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


def _chain(model: Config) -> list[Config]:
    """Return the configs of a model's layers, each taking the output of the one before."""
    config = model["config"]
    if not isinstance(config, Mapping) or "layers" not in config:
        raise ValueError(f"from_keras: a {model['class_name']} tells nothing of its layers; only Sequential and "
                         f"functional models do")  # fmt: skip
    layers = {layer["config"].get("name"): layer for layer in config["layers"]}
    if "input_layers" not in config:
        return list(layers.values())
    sources = {name: list(_tensors(layer.get("inbound_nodes", []))) for name, layer in layers.items()}
    follower = {feeding[0]: name for name, feeding in sources.items() if feeding}
    chain = [name for name, feeding in sources.items() if not feeding][:1]
    while chain and chain[-1] in follower:
        chain.append(follower[chain[-1]])
    branching = [name for name, feeding in sources.items() if name not in chain or len(feeding) > 1]
    outputs = list(_tensors([config["output_layers"]]))
    if branching or outputs != chain[-1:]:
        raise ValueError(f"from_keras: the model is no chain of layers with one input and one output (see "
                         f"{', '.join(map(repr, branching)) or 'its outputs'}); load its parts one by one")  # fmt: skip
    return [layers[name] for name in chain]


def _tensors(node: Any) -> Iterator[str]:
    """Yield the names of the layers whose outputs a node of a functional model takes."""
    if isinstance(node, Mapping):
        if "keras_history" in node:
            yield node["keras_history"][0]
        else:
            for value in node.values():
                yield from _tensors(value)
    elif isinstance(node, list | tuple):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            yield node[0]
        else:
            for value in node:
                yield from _tensors(value)


# Layers


def _layers(model: Config, arrays: Mapping[str, Arrays], common: _Common) -> Iterator[Layer]:
    """Yield the layers of a model."""
    rank = None
    for spec in _chain(model):
        name, class_name = spec["config"].get("name", "?"), spec["class_name"]
        try:
            rank = _rank(spec) or rank
            if class_name != "InputLayer":
                layer = _layer(spec, arrays.get(name, []), rank, common)
                rank = _rank_after(layer, rank)
                yield layer
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError | IndexError) else error
            raise ValueError(f"from_keras: layer {name!r} ({class_name}): {what}") from error


class _Common(NamedTuple):
    """What all layers of a model are made with."""

    dtype: str | None
    engine: str | None
    custom: Custom

    def factory(self, *names: Any) -> Callable[[Any], Any] | None:
        """Return what the caller gave under one of `names`, those of a class or function in Keras."""
        return next((self.custom[name] for name in names if isinstance(name, str) and name in self.custom), None)

    def activation(self, spec: Any) -> Any:
        """Return what our layers take as `activation` for what a config has there."""
        names, config = _names(spec)
        if (factory := self.factory(*names)) is not None:
            return factory(config)
        if not isinstance(spec, Mapping):
            return _activation(spec)
        if spec.get("class_name") in ("LeakyReLU", "ReLU"):
            cls, options = _MAKERS[spec["class_name"]](config, (), None)
            return _leaky(options["negative_slope"]) if cls is LeakyReLU else options["activation"]
        raise ValueError(f"an activation must be a name of Keras, got {names[-1]!r}; give custom={{{names[-1]!r}: "
                         f"…}}, called for a name or a pair of functions (forward, derivative)")  # fmt: skip


def _names(spec: Any) -> tuple[list[Any], Any]:
    """Return the names of an activation in Keras, and its config."""
    if not isinstance(spec, Mapping):
        return [spec], {}
    config = spec.get("config", {})
    if spec.get("class_name") == "function":
        return [config, str(config).rpartition(">")[2]], {}
    return [spec.get("registered_name"), spec.get("class_name", "<lambda>")], config


def _leaky(slope: float) -> Any:
    """Return the function of LeakyReLU, and its derivative."""

    def leaky_relu(x: np.ndarray) -> np.ndarray:
        return np.where(x < 0, slope * x, x)

    def derivative(x: np.ndarray) -> np.ndarray:
        return np.where(x < 0, slope, 1.0)

    return "leaky_relu" if slope == LEAKY_RELU_SLOPE else (leaky_relu, derivative)


def _rank(spec: Config) -> int | None:
    """Return how many axes a layer's input has, as far as its config tells."""
    shapes = ((spec.get("build_config") or {}).get("input_shape"), spec["config"].get("batch_input_shape"),
              spec["config"].get("batch_shape"))  # fmt: skip
    return next((len(shape) for shape in shapes if shape), None)


def _rank_after(layer: Layer, rank: int | None) -> int | None:
    """Return how many axes a layer's output has, for an input of `rank`."""
    if rank is None:
        return None
    if isinstance(layer, TimeDistributed):
        inner = _rank_after(layer.layer, rank - 1)
        return None if inner is None else inner + 1
    if isinstance(layer, Flatten) or (isinstance(layer, GlobalPooling) and not layer.keep_dims):
        return 2
    if isinstance(layer, Reshape):
        return 1 + len(layer.target_shape)
    if isinstance(layer, Embedding | RepeatVector):
        return rank + 1
    if isinstance(layer, Recurrent):
        return 2 + layer.return_sequences
    return rank - 1 if isinstance(layer, ConvLSTM2D) and not layer.return_sequences else rank


def _layer(spec: Config, arrays: Arrays, rank: int | None, common: _Common) -> Layer:
    """Return the layer that a config and its arrays describe, for an input of `rank` axes."""
    class_name, config = spec["class_name"], spec["config"]
    if (factory := common.factory(spec.get("registered_name"), class_name)) is not None:
        layer = factory(config)
        if not isinstance(layer, Layer):
            raise TypeError(f"custom[{class_name!r}] must return a layer of fastclstm, got {type(layer).__name__}")
        return _filled(layer, list(layer.parameters), arrays, config)
    if class_name == "TimeDistributed":
        inner = config["layer"]
        try:
            return TimeDistributed(_layer(inner, arrays, _rank(inner) or (rank and rank - 1), common))
        except ValueError as error:
            raise ValueError(f"{inner['class_name']} in it: {error}") from error
    if class_name not in _MAKERS or spec.get("registered_name"):
        raise ValueError(f"not supported; supported are TimeDistributed, {', '.join(list(_MAKERS)[:5])} and what else "
                         f"help(from_keras) names; or give custom={{{class_name!r}: …}}")  # fmt: skip
    cls, options = _MAKERS[class_name](config, arrays, rank)
    fields = cls.__dataclass_fields__
    options |= {"dtype": common.dtype or _dtype(config.get("dtype")), "engine": common.engine}
    options |= {key: common.activation(value) for key, value in options.items() if key.endswith("activation")}
    for key, value in config.items():
        if value is not None and (module := _TABLES.get(key.rpartition("_")[2])):
            if key not in fields:
                raise ValueError(f"{key}={value!r} is not supported; remove it from the model")
            options[key] = _object(module, value)
    with uninitialized(len(arrays)):
        layer = cls(**{name: plain(value) for name, value in options.items() if name in fields})
    ((_, names),) = _slots(layer) or [("", [])]
    return _filled(layer, names, arrays, config)


def _filled(layer: Layer, names: Sequence[str], arrays: Arrays, config: Config) -> Layer:
    """Give a layer its arrays, and freeze it where Keras's is."""
    if len(names) != len(arrays):
        raise ValueError(f"has {len(arrays)} arrays of weights but needs {len(names)} ({shown(names)}); was the model "
                         f"built?")  # fmt: skip
    layer.set_parameters(dict(zip(names, arrays, strict=True)))
    layer.trainable = bool(config.get("trainable", True))
    return layer


def _parts(layer: Layer) -> list[tuple[Layer, str]]:
    """Return the layers of a model, or the layer itself, and what their parameters' names start with."""
    if isinstance(layer, Sequential):
        return [(part, f"{index}.") for index, part in enumerate(layer)]
    return [(layer, "")]


def _slots(layer: Layer, prefix: str = "") -> list[tuple[str, list[str]]]:
    """Return Keras's classes for a layer, and their parameters' names here, in the order of Keras's ``get_weights``."""
    own = list(layer.parameters)
    if isinstance(layer, TimeDistributed):
        ((_, names),) = _slots(layer.layer, f"{prefix}layer.") or [("", [])]
        return [("TimeDistributed", names)] if names else []
    if isinstance(layer, ConvLSTM2D):
        known = ("kernel", "recurrent_kernel", "bias")
        if unknown := [name for name in own if name.rpartition(".")[2] not in known]:
            raise ValueError(f"Keras's ConvLSTM2D has no {', '.join(unknown)}")
        class_name = "Bidirectional" if layer.bidirectional else "ConvLSTM2D"
        return [
            (class_name, [prefix + name for name in own if name.startswith(f"layers.{index}.")])
            for index in range(layer.num_layers)
        ]
    return [(type(layer).__name__, [prefix + name for name in own])] if own else []


_TABLES = {"regularizer": regularizers, "constraint": constraints}


def _object(module: Any, spec: Any) -> Any:
    """Return the regularizer or constraint that a config describes."""
    if isinstance(spec, str):
        return spec
    if spec["class_name"] not in ("L1", "L2", "L1L2", "OrthogonalRegularizer", "MaxNorm", "NonNeg", "UnitNorm",
                                  "MinMaxNorm"):  # fmt: skip
        raise ValueError(f"{spec['class_name']} is not supported")
    return getattr(module, spec["class_name"])(**spec["config"])


def _dtype(policy: Any) -> str:
    """Return the dtype of a layer's weights, as far as there is one here."""
    name = policy["config"]["name"] if isinstance(policy, Mapping) else policy
    return "float64" if name == "float64" else "float32"


def _activation(spec: Any) -> Any:
    """Return our name for an activation of Keras's."""
    return {None: "linear", "swish": "silu"}.get(spec, spec) if spec is None or isinstance(spec, str) else spec


def _expect(config: Config, why: str, **values: Any) -> None:
    """Raise ValueError unless the options, where they are given, have these values."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]!r} is not supported: {why}")


def _first(arrays: Arrays) -> np.ndarray:
    """Return a layer's first array, whose shape tells its sizes."""
    if not arrays:
        raise ValueError("has no weights; build the model before it is saved or handed over")
    return arrays[0]


Made = tuple[type[Layer], dict[str, Any]]


def _convlstm2d(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "a Sequential model has one output; take the state from the layer here", return_state=False)
    options = {name: config[name] for name in ("use_bias", "unit_forget_bias", "dropout", "recurrent_dropout",
               "return_sequences", "go_backwards", "stateful", "zero_output_for_mask") if name in config}  # fmt: skip
    return ConvLSTM2D, options | _convolution(config, arrays) | {
        "recurrent_activation": config["recurrent_activation"],
    }  # fmt: skip


def _convolution(config: Config, arrays: Arrays) -> dict[str, Any]:
    groups = config.get("groups", 1)
    return {
        "in_channels": _first(arrays).shape[-2] * groups,
        "out_channels": config.get("filters"),
        "groups": groups,
        "kernel_size": config["kernel_size"],
        "padding": config["padding"],
        "stride": config["strides"],
        "dilation": config["dilation_rate"],
        "data_format": config["data_format"],
        "activation": config["activation"],
        "use_bias": config["use_bias"],
    }


def _bidirectional(config: Config, arrays: Arrays, rank: int | None) -> Made:
    inner = config["layer"]
    if inner["class_name"] != "ConvLSTM2D":
        raise ValueError(f"of {inner['class_name']} is not supported, only of ConvLSTM2D")
    cls, options = _convlstm2d(inner["config"], arrays, rank)
    _expect(inner["config"], "the forward layer of both goes forwards", go_backwards=False)
    other = config.get("backward_layer")
    if other is not None and _characteristic(other["config"]) != _characteristic(inner["config"]):
        raise ValueError("both directions must have the same options")
    if config["merge_mode"] == "concat" and options["data_format"] == "channels_first":
        raise ValueError("Keras joins the directions on the last axis, which with data_format='channels_first' is the "
                         "width; use channels_last, or another merge_mode")  # fmt: skip
    extra = {key: value for key, value in inner["config"].items() if key.rpartition("_")[2] in _TABLES}
    for key, value in extra.items():
        if value is not None:
            options[key] = _object(_TABLES[key.rpartition("_")[2]], value)
    return cls, options | {"bidirectional": True, "merge_mode": config["merge_mode"]}


def _characteristic(config: Config) -> dict[str, Any]:
    """Return the options in which the two directions must agree."""
    ignored = (
        "name",
        "go_backwards",
        "seed",
        "kernel_initializer",
        "recurrent_initializer",
        "bias_initializer",
        "dtype",
    )
    return {key: value for key, value in config.items() if key not in ignored}


def _conv(cls: type[Layer]) -> Callable[..., Made]:
    return lambda config, arrays, rank: (cls, _convolution(config, arrays))


def _transposed(cls: type[Layer]) -> Callable[..., Made]:
    return lambda config, arrays, rank: (cls, _convolution(config, arrays) | {
        "in_channels": _first(arrays).shape[-1],
        "output_padding": config.get("output_padding"),
    })  # fmt: skip


def _depthwise(cls: type[Layer]) -> Callable[..., Made]:
    return lambda config, arrays, rank: (
        cls, _convolution(config, arrays) | {"depth_multiplier": config["depth_multiplier"]}
    )  # fmt: skip


def _recurrent(cls: type[Layer]) -> Callable[..., Made]:
    def make(config: Config, arrays: Arrays, rank: int | None) -> Made:
        _expect(config, "a Sequential model has one output; take the state from the layer here", return_state=False)
        names = ("units", "activation", "recurrent_activation", "use_bias", "unit_forget_bias", "dropout",
                 "recurrent_dropout", "return_sequences", "go_backwards", "stateful")  # fmt: skip
        options = {name: config[name] for name in names if name in config}
        return cls, options | {"in_features": _first(arrays).shape[0], "reset_after": config.get("reset_after", False)}

    return make


def _embedding(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "masks are not handed on; give them to the layers that are to skip steps", mask_zero=False)
    return Embedding, {"input_dim": config["input_dim"], "output_dim": config["output_dim"]}


def _masking(config: Config, arrays: Arrays, rank: int | None) -> Made:
    raise ValueError("is not supported, as masks are not handed on here; leave it out and give the layers behind it a "
                     "mask, or, where none of them looks at one, pass custom={'Masking': lambda config: "
                     "fastclstm.layers.Masking(config['mask_value'])}")  # fmt: skip


def _dense(config: Config, arrays: Arrays, rank: int | None) -> Made:
    return Dense, {
        "in_features": _first(arrays).shape[0],
        "out_features": config["units"],
        "activation": config["activation"],
        "use_bias": config["use_bias"],
    }


def _batch_normalization(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "leave it out", renorm=False)
    (axis,) = _axes(config["axis"])
    return BatchNormalization, {"num_features": _first(arrays).shape[0], "axis": axis} | _normal(config)


def _layer_normalization(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "leave it out", rms_scaling=False)
    axes = _axes(config["axis"])
    if any(axis >= 0 for axis in axes):
        if rank is None:
            raise ValueError(f"axis={config['axis']!r} is not supported; give negative axes, that count from the last")
        axes = [axis if axis < 0 else axis - rank for axis in axes]
    if sorted(axes) != list(range(-len(axes), 0)):
        raise ValueError(f"axis={config['axis']!r} is not supported, only the last axes are")
    if not (config["center"] or config["scale"]):
        raise ValueError("center=False with scale=False is not supported; its shape is that of beta or gamma")
    return LayerNormalization, {"shape": _first(arrays).shape} | _normal(config)


def _group_normalization(config: Config, arrays: Arrays, rank: int | None) -> Made:
    if not (config["center"] or config["scale"]):
        raise ValueError("center=False with scale=False is not supported; the channels are counted in beta or gamma")
    (axis,) = _axes(config["axis"])
    return GroupNormalization, {
        "num_features": _first(arrays).shape[0],
        "groups": config["groups"],
        "axis": axis,
    } | _normal(config)


def _axes(axis: Any) -> list[int]:
    return list(axis) if isinstance(axis, list | tuple) else [axis]


def _normal(config: Config) -> dict[str, Any]:
    return {name: config[name] for name in ("momentum", "epsilon", "center", "scale") if name in config}


def _pooling(cls: type[Layer]) -> Callable[..., Made]:
    return lambda config, arrays, rank: (cls, {
        "pool_size": config["pool_size"],
        "stride": config["strides"],
        "padding": config["padding"],
        "data_format": config["data_format"],
    })  # fmt: skip


def _global(cls: type[Layer]) -> Callable[..., Made]:
    return lambda config, arrays, rank: (
        cls, {"data_format": config["data_format"], "keep_dims": config.get("keepdims", False)}
    )  # fmt: skip


def _named(cls: type[Layer], *names: str) -> Callable[..., Made]:
    """Return what makes a class whose options are called as Keras's are; those that a config lacks are left out."""
    return lambda config, arrays, rank: (cls, {name: config[name] for name in names if name in config})


def _flatten(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "use channels_last", data_format="channels_last")
    return Flatten, {}


def _relu(config: Config, arrays: Arrays, rank: int | None) -> Made:
    slope, largest, threshold = config.get("negative_slope") or 0.0, config.get("max_value"), config.get("threshold")
    if largest is not None or threshold:
        return ReLU, {"max_value": largest, "negative_slope": float(slope), "threshold": float(threshold or 0)}
    return (LeakyReLU, {"negative_slope": float(slope)}) if slope else (Activation, {"activation": "relu"})


def _prelu(config: Config, arrays: Arrays, rank: int | None) -> Made:
    return PReLU, {"shape": _first(arrays).shape}


def _leaky_relu(config: Config, arrays: Arrays, rank: int | None) -> Made:
    return LeakyReLU, {"negative_slope": float(config.get("negative_slope", config.get("alpha")))}


def _softmax(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "only the last axis is", axis=-1)
    return Softmax, {}


_MAKERS: dict[str, Callable[[Config, Arrays, int | None], Made]] = {
    "ConvLSTM2D": _convlstm2d,
    "Bidirectional": _bidirectional,
    "Conv2D": _conv(Conv2D),
    "Conv3D": _conv(Conv3D),
    "Conv2DTranspose": _transposed(Conv2DTranspose),
    "Conv3DTranspose": _transposed(Conv3DTranspose),
    "DepthwiseConv2D": _depthwise(DepthwiseConv2D),
    "SeparableConv2D": _depthwise(SeparableConv2D),
    "Dense": _dense,
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "GroupNormalization": _group_normalization,
    "Dropout": _named(Dropout, "rate", "noise_shape"),
    "SpatialDropout2D": _named(SpatialDropout2D, "rate", "data_format"),
    "SpatialDropout3D": _named(SpatialDropout3D, "rate", "data_format"),
    "GaussianNoise": _named(GaussianNoise, "stddev"),
    "Activation": _named(Activation, "activation"),
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "PReLU": _prelu,
    "Softmax": _softmax,
    "Rescaling": _named(Rescaling, "scale", "offset"),
    "Masking": _masking,
    "Embedding": _embedding,
    "LSTM": _recurrent(LSTM),
    "GRU": _recurrent(GRU),
    "Flatten": _flatten,
    "Reshape": _named(Reshape, "target_shape"),
    "Permute": _named(Permute, "dims"),
    "RepeatVector": _named(RepeatVector, "n"),
    "MaxPooling2D": _pooling(MaxPooling2D),
    "MaxPooling3D": _pooling(MaxPooling3D),
    "AveragePooling2D": _pooling(AveragePooling2D),
    "AveragePooling3D": _pooling(AveragePooling3D),
    "AdaptiveAveragePooling2D": _named(AdaptiveAveragePooling2D, "output_size", "data_format"),
    "GlobalAveragePooling1D": _global(GlobalAveragePooling),
    "GlobalAveragePooling2D": _global(GlobalAveragePooling2D),
    "GlobalAveragePooling3D": _global(GlobalAveragePooling3D),
    "GlobalMaxPooling1D": _global(GlobalMaxPooling),
    "GlobalMaxPooling2D": _global(GlobalMaxPooling2D),
    "GlobalMaxPooling3D": _global(GlobalMaxPooling3D),
    "UpSampling2D": _named(UpSampling2D, "size", "interpolation", "data_format"),
    "UpSampling3D": _named(UpSampling3D, "size", "data_format"),
    "ZeroPadding2D": _named(ZeroPadding2D, "padding", "data_format"),
    "ZeroPadding3D": _named(ZeroPadding3D, "padding", "data_format"),
    "Cropping2D": _named(Cropping2D, "cropping", "data_format"),
    "Cropping3D": _named(Cropping3D, "cropping", "data_format"),
    "Concatenate": _named(Concatenate, "axis"),
    "Add": _named(Add),
    "Subtract": _named(Subtract),
    "Multiply": _named(Multiply),
    "Average": _named(Average),
    "Maximum": _named(Maximum),
    "Minimum": _named(Minimum),
}
"""For each class of Keras, what makes our class and its options out of the config, the arrays and the input's rank."""
