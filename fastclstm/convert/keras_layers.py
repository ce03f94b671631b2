"""Keras's layers, one by one: what ours are made of their configs and arrays; the table is at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

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
    ConvLSTM1D,
    ConvLSTM2D,
    ConvLSTM3D,
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
from fastclstm.nn import constraints, regularizers
from fastclstm.nn.activations import LEAKY_RELU_SLOPE
from fastclstm.nn.described import plain

Config = Mapping[str, Any]
Custom = Mapping[str, Callable[[Any], Any]]
Arrays = Sequence[np.ndarray]
Made = tuple[type[Layer], dict[str, Any]]
"""Our class and its options."""


class Common(NamedTuple):
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
            return activation_name(spec)
        if spec.get("class_name") in ("LeakyReLU", "ReLU"):
            cls, options = ROWS[spec["class_name"]].make(config, (), None)
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


def leaf(spec: Config, arrays: Arrays, rank: int | None, common: Common) -> Layer:
    """Return the layer of the table that a config and its arrays describe, for an input of `rank` axes."""
    class_name, config = spec["class_name"], spec["config"]
    own = spec.get("registered_name") in (None, "", class_name if spec.get("module") == "keras.layers" else None)
    if class_name not in ROWS or not own:  # Keras tells of its own layers so where adapters.keras stands for them
        raise ValueError(f"not supported; supported are TimeDistributed, {next(iter(ROWS))} and what else "
                         f"help(from_keras) names; or give custom={{{class_name!r}: factory}}, called with its config "
                         f"for a layer")  # fmt: skip
    cls, options = ROWS[class_name].make(config, arrays, rank)
    fields = cls.__dataclass_fields__
    options |= {"dtype": common.dtype or _dtype(config.get("dtype")), "engine": common.engine}
    options |= {key: common.activation(value) for key, value in options.items() if key.endswith("activation")}
    options["name"] = own_name(spec)
    for key, value in config.items():
        if value is not None and (module := _TABLES.get(key.rpartition("_")[2])):
            if key not in fields:
                raise ValueError(f"{key}={value!r} is not supported; remove it from the model")
            options[key] = _object(module, value)
    with uninitialized(len(arrays)):
        layer = cls(**{name: plain(value) for name, value in options.items() if name in fields})
    ((_, names),) = parameter_slots(layer) or [("", [])]
    return filled(layer, names, arrays, config)


def own_name(spec: Config) -> str | None:
    """Return a layer's name in Keras, as ours may be called."""
    name = spec["config"].get("name")
    return re.sub(r"[./]", "_", name) if isinstance(name, str) and name else None


def filled(layer: Layer, names: Sequence[str], arrays: Arrays, config: Config) -> Layer:
    """Give a layer its arrays, and freeze it where Keras's is."""
    if len(names) != len(arrays):
        raise ValueError(f"has {len(arrays)} arrays of weights but needs {len(names)} ({shown(names)}); was the model "
                         f"built?")  # fmt: skip
    layer.set_parameters(fitted(layer, dict(zip(names, arrays, strict=True))))
    layer.trainable = bool(config.get("trainable", True))
    return layer


def parameter_slots(layer: Layer, prefix: str = "") -> list[tuple[str, list[str]]]:
    """Return Keras's classes for a layer, and their parameters' names here, in the order of Keras's ``get_weights``."""
    own = list(layer.parameters)
    if isinstance(layer, TimeDistributed):
        ((_, names),) = parameter_slots(layer.layer, f"{prefix}layer.") or [("", [])]
        return [("TimeDistributed", names)] if names else []
    if isinstance(layer, ConvLSTM2D | ConvLSTM3D):
        known = ("kernel", "recurrent_kernel", "bias")
        if unknown := [name for name in own if name.rpartition(".")[2] not in known]:
            raise ValueError(f"Keras's {type(layer).__name__} has no {', '.join(unknown)}")
        class_name = "Bidirectional" if layer.bidirectional else type(layer).__name__
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


def activation_name(spec: Any) -> Any:
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


_CONVLSTM = {"ConvLSTM2D": ConvLSTM2D, "ConvLSTM1D": ConvLSTM1D, "ConvLSTM3D": ConvLSTM3D}


def _convlstm(class_name: str, config: Config, arrays: Arrays, rank: int | None) -> Made:
    names = ("use_bias", "unit_forget_bias", "dropout", "recurrent_dropout", "return_sequences", "return_state",
             "go_backwards", "stateful", "zero_output_for_mask")  # fmt: skip
    options = {name: config[name] for name in names if name in config}
    options |= {"recurrent_activation": config["recurrent_activation"]}
    return _CONVLSTM[class_name], options | _convolution(config, arrays)


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
    if inner["class_name"] not in _CONVLSTM:
        raise ValueError(f"of {inner['class_name']} is not supported, only of {', '.join(_CONVLSTM)}")
    cls, options = _convlstm(inner["class_name"], inner["config"], arrays, rank)
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
        names = ("units", "activation", "recurrent_activation", "use_bias", "unit_forget_bias", "dropout",
                 "recurrent_dropout", "return_sequences", "return_state", "go_backwards", "stateful")  # fmt: skip
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


def fitted(layer: Layer, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Keras's arrays as ours are: kernels of rows are those of frames of height 1."""
    own = layer.parameters
    return {name: array[np.newaxis] if name in own and own[name].shape == (1, *array.shape) else array
            for name, array in named.items()}  # fmt: skip


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


def _elu(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "only 1 is", alpha=1.0)
    return Activation, {"activation": "elu"}


def _softmax(config: Config, arrays: Arrays, rank: int | None) -> Made:
    _expect(config, "only the last axis is", axis=-1)
    return Softmax, {}


Counts = tuple[int, int]
"""How many arrays of weights a layer has: those that are trained, and statistics."""


def _kernels(count: int) -> Callable[[Config], Counts]:
    return lambda config: (count + bool(config.get("use_bias", True)), 0)


def _scales(statistics: int) -> Callable[[Config], Counts]:
    return lambda config: (bool(config["center"]) + bool(config["scale"]), statistics)


def _both(config: Config) -> Counts:
    return 2 * _kernels(2)(config["layer"]["config"])[0], 0


def _one(config: Config) -> Counts:
    return 1, 0


def _none(config: Config) -> Counts:
    return 0, 0


class Row(NamedTuple):
    """What is known of a class of Keras."""

    make: Callable[[Config, Arrays, int | None], Made]
    """Makes our class and its options out of the config, the arrays and the input's rank."""
    counted: Callable[[Config], Counts] = _none


ROWS: dict[str, Row] = {
    **{name: Row(partial(_convlstm, name), _kernels(2)) for name in _CONVLSTM},
    "Bidirectional": Row(_bidirectional, _both),
    "Conv2D": Row(_conv(Conv2D), _kernels(1)),
    "Conv3D": Row(_conv(Conv3D), _kernels(1)),
    "Conv2DTranspose": Row(_transposed(Conv2DTranspose), _kernels(1)),
    "Conv3DTranspose": Row(_transposed(Conv3DTranspose), _kernels(1)),
    "DepthwiseConv2D": Row(_depthwise(DepthwiseConv2D), _kernels(1)),
    "SeparableConv2D": Row(_depthwise(SeparableConv2D), _kernels(2)),
    "Dense": Row(_dense, _kernels(1)),
    "BatchNormalization": Row(_batch_normalization, _scales(2)),
    "LayerNormalization": Row(_layer_normalization, _scales(0)),
    "GroupNormalization": Row(_group_normalization, _scales(0)),
    "Dropout": Row(_named(Dropout, "rate", "noise_shape")),
    "SpatialDropout2D": Row(_named(SpatialDropout2D, "rate", "data_format")),
    "SpatialDropout3D": Row(_named(SpatialDropout3D, "rate", "data_format")),
    "GaussianNoise": Row(_named(GaussianNoise, "stddev")),
    "Activation": Row(_named(Activation, "activation")),
    "ReLU": Row(_relu),
    "ELU": Row(_elu),
    "LeakyReLU": Row(_leaky_relu),
    "PReLU": Row(_prelu, _one),
    "Softmax": Row(_softmax),
    "Rescaling": Row(_named(Rescaling, "scale", "offset")),
    "Masking": Row(_masking),
    "Embedding": Row(_embedding, _one),
    "LSTM": Row(_recurrent(LSTM), _kernels(2)),
    "GRU": Row(_recurrent(GRU), _kernels(2)),
    "Flatten": Row(_flatten),
    "Reshape": Row(_named(Reshape, "target_shape")),
    "Permute": Row(_named(Permute, "dims")),
    "RepeatVector": Row(_named(RepeatVector, "n")),
    "MaxPooling2D": Row(_pooling(MaxPooling2D)),
    "MaxPooling3D": Row(_pooling(MaxPooling3D)),
    "AveragePooling2D": Row(_pooling(AveragePooling2D)),
    "AveragePooling3D": Row(_pooling(AveragePooling3D)),
    "AdaptiveAveragePooling2D": Row(_named(AdaptiveAveragePooling2D, "output_size", "data_format")),
    "GlobalAveragePooling1D": Row(_global(GlobalAveragePooling)),
    "GlobalAveragePooling2D": Row(_global(GlobalAveragePooling2D)),
    "GlobalAveragePooling3D": Row(_global(GlobalAveragePooling3D)),
    "GlobalMaxPooling1D": Row(_global(GlobalMaxPooling)),
    "GlobalMaxPooling2D": Row(_global(GlobalMaxPooling2D)),
    "GlobalMaxPooling3D": Row(_global(GlobalMaxPooling3D)),
    "UpSampling2D": Row(_named(UpSampling2D, "size", "interpolation", "data_format")),
    "UpSampling3D": Row(_named(UpSampling3D, "size", "data_format")),
    "ZeroPadding2D": Row(_named(ZeroPadding2D, "padding", "data_format")),
    "ZeroPadding3D": Row(_named(ZeroPadding3D, "padding", "data_format")),
    "Cropping2D": Row(_named(Cropping2D, "cropping", "data_format")),
    "Cropping3D": Row(_named(Cropping3D, "cropping", "data_format")),
    "Concatenate": Row(_named(Concatenate, "axis")),
    "Add": Row(_named(Add)),
    "Subtract": Row(_named(Subtract)),
    "Multiply": Row(_named(Multiply)),
    "Average": Row(_named(Average)),
    "Maximum": Row(_named(Maximum)),
    "Minimum": Row(_named(Minimum)),
}
"""By the classes' names in Keras."""
