"""ConvLSTM2D, ConvGRU2D and ConvRNN2D as modules of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from fastclstm import layers
from fastclstm.adapters import torch_ops  # first: without PyTorch it says what to install
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.states import is_state
from fastclstm.nn import activations
from fastclstm.spec import ConvSpec, choice, expect_shape, flag

import torch  # isort: skip
from torch import Tensor  # isort: skip

_NOT_HERE = {
    "stateful": "hand the states on with return_state=True and initial_state",
    "time_dropout": "drop frames of x yourself",
    "activity_regularizer": "add the penalty to your loss",
} | {
    f"{weight}_{kind}": remedy
    for weight in ("kernel", "recurrent", "bias")
    for kind, remedy in (("regularizer", "add the penalty to your loss, or use the optimizer's weight_decay"),
                         ("constraint", "use torch.nn.utils.parametrize"))
}  # fmt: skip
"""Options of our own layer that PyTorch's ways replace, and what to do instead."""


class _Cell(torch.nn.Module):
    """One layer's weights in one direction, under the names and with the shapes that our own layer's cell has."""

    def __init__(self, cell: Any, device: Any, dtype: Any):
        super().__init__()
        self.names = tuple(cell.parameters)
        for name, array in cell.parameters.items():
            tensor = torch.from_numpy(np.array(array)).to(device, dtype)
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def tensors(self, dtype: Any) -> dict[str, Tensor]:
        """Return the weights in a dtype, the further ones last."""
        return {name: getattr(self, name).to(dtype) for name in self.names}  # a replica's are no Parameters

    def weights(self) -> torch_ops.Weights:
        """Return the weights as the operator takes them."""
        return torch_ops.Weights(self, None, [getattr(self, name) for name in self.names], self.tensors)


def further_name(name: str) -> str:
    """Return what the operator calls a weight of a cell beside kernels and bias."""
    if name.startswith("peephole_"):
        return f"peephole.{name.removeprefix('peephole_')}"
    return f"normalization_weights.{name}"


class _Recurrent(torch.nn.Module):
    """Stacked cells over whole sequences; a subclass says whose."""

    _layer: ClassVar[type[ConvRecurrent]]
    """Ours."""
    _operator: ClassVar[torch_ops.Operator]

    def __init__(
        self, in_channels: int, out_channels: Any, kernel_size: Any, padding: Any = "same", stride: Any = 1,
        leaky_relu_slope: float | None = None, num_layers: int = 1, *, return_state: bool = False,
        return_all_layers: bool = False, data_format: str = "channels_first", device: Any = None, dtype: Any = None,
        seed: int | None = None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        for name in options:
            if name in _NOT_HERE:
                raise TypeError(f"{self._op}: {name} is not for PyTorch; {_NOT_HERE[name]}")
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        dtype = torch.get_default_dtype() if dtype is None else dtype
        layer = self._layer(
            in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers, seed=seed,
            return_state=return_state, data_format=data_format,
            dtype="float64" if dtype == torch.float64 else "float32", **options,
        )  # fmt: skip
        flag(self._op, "return_all_layers", return_all_layers)
        if return_all_layers and not layer.return_sequences:
            raise ValueError(f"{self._op}: return_all_layers=True returns sequences; leave return_sequences=False out")
        self._adopt(layer, device, dtype)
        self.return_all_layers = return_all_layers

    @property
    def _op(self) -> str:
        """What messages begin with."""
        return f"adapters.torch.{type(self).__name__}"

    def _adopt(self, layer: Any, device: Any, dtype: Any) -> None:
        """Take a layer's options and copies of its parameters."""
        if layer.normalization is not None and layer.normalization.kind == "batch":
            raise ValueError(f"{self._op}: normalization='batch' is not for PyTorch yet; choose 'layer' or 'group'")
        named = {name: getattr(layer, name) for name in layer._activations}
        for name, value in named.items():
            if value is not None and not (isinstance(value, str) and activations.is_named(value)):
                raise TypeError(f"{self._op}: {name} must be the name of an activation, got {value!r}")
        self.options = {name: value for name, value in layer.options.items() if name != "seed"}
        for name in ("num_layers", "bidirectional", "merge_mode", "return_sequences", "return_state", "go_backwards",
                     "zero_output_for_mask", "time_major", "data_format", "leaky_relu_slope", "in_channels", "dropout",
                     "recurrent_dropout"):  # fmt: skip
            setattr(self, name, getattr(layer, name))
        self.frame_size = getattr(layer, "frame_size", None)
        self._state_names = tuple(layer._state_names)
        self.cells = torch.nn.ModuleList(_Cell(cell, device, dtype) for cell in layer.cells)
        own = {name: getattr(layer, name) for name in ("cell_clip", "recompute", "reset_after") if hasattr(layer, name)}
        further = [name for name in self.cells[0].names if name not in ("kernel", "recurrent_kernel", "bias")]
        self._geometry = {"strides": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode,
                          "dilation": layer.dilation}  # fmt: skip
        self._encoded = torch_ops.encode(
            [further_name(name) for name in further], layer.normalization, recurrent_dilation=layer.recurrent_dilation,
            algorithm=layer.algorithm, engine=layer.engine, **self._geometry, **named, **own,
        )  # fmt: skip

    @classmethod
    def from_layer(cls, layer: Any, device: Any = None) -> Self:
        """Return the module with the options of our own layer of this name and copies of its parameters."""
        if type(layer) is not cls._layer:
            raise TypeError(f"adapters.torch.{cls.__name__}: layer must be a fastclstm.{cls._layer.__name__}, got "
                            f"{type(layer).__name__}")  # fmt: skip
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        given = [name for name in _NOT_HERE if getattr(layer, name)]
        if given:
            raise TypeError(f"{module._op}: {given[0]} is not for PyTorch; {_NOT_HERE[given[0]]}")
        module._adopt(layer, device, getattr(torch, layer.dtype))
        module.return_all_layers = False
        return module

    def to_layer(self) -> Any:
        """Return our own layer of this name with these options and copies of these parameters."""
        wide = self.cells[0].kernel.dtype == torch.float64
        layer = self._layer(**self.options | {"dtype": "float64" if wide else "float32"})
        for cell, ours in zip(self.cells, layer.cells, strict=True):
            weights = cell.tensors(torch.float64 if wide else torch.float32)
            ours.set_parameters({name: tensor.detach().cpu().numpy().copy() for name, tensor in weights.items()})
        return layer

    def extra_repr(self) -> str:
        """Return the options that are not the usual ones."""
        shown = {"in_channels", "out_channels", "kernel_size"}
        usual = {name: field.default for name, field in self._layer.__dataclass_fields__.items()}
        usual |= {"data_format": "channels_first", "dtype": self.options["dtype"]}
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items()
                         if name in shown or value != usual.get(name))  # fmt: skip

    def forward(self, x: Tensor, initial_state: Any = None, mask: Tensor | None = None,
                lengths: Tensor | None = None) -> Any:  # fmt: skip
        """Return the hidden sequence, or what return_sequences, return_state and the like make of it.

        Parameters
        ----------
        x : tensor (B, T, C, H, W), or (B, T, H, W, C) with data_format="channels_last"
            With time_major T stands before B.
        initial_state : list of states, optional
            Of each cell (h, c), or (h,) where cells carry h alone, of tensors (B, F, HO, WO); for a single cell its
            state will do, and h itself for (h,). None is zeros.
        mask : tensor of bool (B, T), optional
            Where False, the step is skipped; with time_major (T, B).
        lengths : tensor of int (B,), optional
            Instead of a mask: the number of valid steps at the start of each sequence.

        Raises
        ------
        ValueError, RuntimeError
            Shapes that do not fit the module; both mask and lengths.
        """
        if x.dim() != 5:
            raise ValueError(f"{self._op}: x must have 5 axes, got {tuple(x.shape)}; a single sequence is x[None]")
        kernel = self.cells[0].kernel
        result, inside = dtypes(self._op, x, kernel)
        sequence = self._channels(x.to(inside), inward=True)
        if self.time_major:
            sequence = sequence.transpose(0, 1)
        if sequence.shape[-1] != self.in_channels:
            raise ValueError(f"{self._op}: x {tuple(x.shape)} has {sequence.shape[-1]} channels with data_format="
                             f"{self.data_format!r}, but in_channels is {self.in_channels}")  # fmt: skip
        if self.frame_size is not None:
            expect_shape(self._op, "a frame of x", tuple(sequence.shape[2:4]), self.frame_size, "frame_size")
        steps = self._steps(sequence, mask, lengths)
        outputs, states = self._layers(sequence, self._states(initial_state, inside), steps)
        written = [tuple(self._written(part, result) for part in output) for output in outputs]
        several = [output if len(output) > 1 else output[0] for output in written]
        output = several if self.return_all_layers else several[-1]
        if not self.return_state:
            return output
        return output, [tuple(self._channels(state.to(result)) for state in cell) for cell in states]

    def _layers(
        self, sequence: Tensor, states: Sequence[Any], mask: Tensor | None
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """Return each layer's outputs, two where they are not merged, and each cell's last states."""
        outputs: list[tuple[Tensor, ...]] = []
        last_states: list[tuple[Tensor, ...]] = []
        ways = 1 + self.bidirectional
        for index in range(self.num_layers):
            last = index == self.num_layers - 1
            backwards = self.go_backwards and index == 0  # what layer 0 hands on is in processing order
            if index == 1 and self.go_backwards and mask is not None:
                mask = mask.flip(1)
            parts = []
            for way in range(ways):
                cell = index * ways + way
                y, *after = self._cell(cell, sequence, states[cell], mask, bool(way) != backwards, not last)
                parts.append(self._zeroed(y, mask, backwards, bool(way)) if last else y)
                last_states.append(tuple(after))
            outputs.append(self._merged(parts))
            sequence = outputs[-1][0]
            if self.leaky_relu_slope is not None and not last:
                sequence = torch.nn.functional.leaky_relu(sequence, self.leaky_relu_slope)
        return outputs, last_states

    def _cell(
        self, index: int, sequence: Tensor, state: Any, mask: Tensor | None, backwards: bool, whole: bool
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Run a cell; a second direction's output is turned round into the order of the first."""
        cell = self.cells[index]
        dropout = (None, None)
        if self.training and (self.dropout or self.recurrent_dropout):
            dropout = self._dropout(sequence, cell)
        sequences = whole or self.return_sequences
        y, *after = self._operator(sequence, cell.weights(), state, self._encoded, mask=mask, dropout=dropout,
                                   go_backwards=backwards, return_sequences=sequences)  # fmt: skip
        return (y.flip(1) if sequences and self.bidirectional and index % 2 else y), *after

    def _dropout(self, sequence: Tensor, cell: Any) -> Any:
        """Draw the inverted masks of x and of h, one a gate."""
        B, _, *frame = sequence.shape
        spec = ConvSpec.infer((B, *frame), cell.kernel.shape, **self._geometry)
        _, _, F, width = cell.recurrent_kernel.shape
        G = width // F
        shapes = ((self.dropout, (G, B, *frame)), (self.recurrent_dropout, (G, B, spec.HO, spec.WO, F)))
        return tuple(torch.nn.functional.dropout(sequence.new_ones(shape), rate) if rate else None
                     for rate, shape in shapes)  # fmt: skip

    def _zeroed(self, y: Tensor, mask: Tensor | None, backwards: bool, second: bool) -> Tensor:
        """Set an output to zero where its step is masked, if zero_output_for_mask."""
        if mask is None or not self.zero_output_for_mask:
            return y
        kept = mask.flip(1) if backwards else mask
        kept = kept if self.return_sequences else kept[:, 0 if second else -1]
        return torch.where(kept.reshape(*kept.shape, 1, 1, 1), y, y.new_zeros(()))

    def _merged(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        if len(parts) == 1 or self.merge_mode is None:
            return tuple(parts)
        forward, backward = parts
        if self.merge_mode == "concat":
            return (torch.cat(parts, -1),)
        if self.merge_mode == "mul":
            return (forward * backward,)
        return ((forward + backward) / (2 if self.merge_mode == "ave" else 1),)

    # Arrangement

    def _channels(self, tensor: Tensor, inward: bool = False) -> Tensor:
        """View a tensor with channels last as the user has it, or `inward` the other way."""
        if self.data_format == "channels_last":
            return tensor
        return tensor.movedim(-3, -1) if inward else tensor.movedim(-1, -3)

    def _written(self, y: Tensor, dtype: Any) -> Tensor:
        y = self._channels(y.to(dtype))
        return y.transpose(0, 1) if self.time_major and self.return_sequences else y

    def _states(self, value: Any, dtype: Any) -> list[Any]:
        """Return the states of each cell, channels-last."""
        names = self._state_names
        if value is None:
            return [(None,) * len(names)] * len(self.cells)
        if len(self.cells) == 1 and len(names) == 1 and isinstance(value, Tensor):
            value = (value,)
        cells = [value] if len(self.cells) == 1 and is_state(value, names) else list(value)
        cells = [(state,) if isinstance(state, Tensor) else state for state in cells] if len(names) == 1 else cells
        if len(cells) != len(self.cells) or any(state is not None and len(state) != len(names) for state in cells):
            kind = "pairs (h, c)" if len(names) == 2 else "states (h,)"
            raise ValueError(f"{self._op}: initial_state must be {len(self.cells)} {kind}, one a layer and direction")
        return [tuple(None if state is None else self._channels(state.to(dtype), inward=True)
                      for state in cell or (None,) * len(names)) for cell in cells]  # fmt: skip

    def _steps(self, sequence: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """Return the mask (B, T) that mask or lengths describe."""
        if mask is not None and lengths is not None:
            raise ValueError(f"{self._op}: give mask or lengths, not both")
        if lengths is not None:
            return torch.arange(sequence.shape[1], device=sequence.device) < lengths.to(sequence.device)[:, None]
        if mask is None:
            return None
        mask = (mask.transpose(0, 1) if self.time_major else mask) != 0
        expect_shape(self._op, "mask", tuple(mask.shape), tuple(sequence.shape[:2]), "(batch, time)")
        return mask


class ConvLSTM2D(_Recurrent):
    """ConvLSTM layers, one on the other, over whole sequences: `fastclstm.ConvLSTM2D` as a module of PyTorch.

    ``module(x)`` takes x (B, T, C, H, W) and returns the last layer's hidden sequence (B, T, F, HO, WO): a tensor, so
    that the module stands in an `nn.Sequential`. With return_all_layers and return_state it returns what the ConvLSTM
    of ndrplz and of TorchGeo does: the list of all layers' sequences and the list of their last (h, c).

    It computes in float32, or in float64 where x or the weights are; bfloat16 and float16 (also under autocast) are
    brought to float32, and the result is of the wider dtype of x and the weights. On the processor tensors share memory
    with NumPy's arrays; inside, frames are channels-last: an x whose channels are last in memory is not copied, and the
    result is a view of channels-last memory (``.contiguous()`` where it must not be). CUDA tensors are computed by the
    engine "cuda".

    Parameters
    ----------
    in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers
        As of `fastclstm.ConvLSTM2D`.
    return_state : bool
        Return ``(output, [(h, c), …])`` with the last states (B, F, HO, WO), one pair a layer, or two with
        bidirectional.
    return_all_layers : bool
        The output is the list of all layers' sequences, each before the LeakyReLU that the next layer sees.
    data_format : "channels_first" or "channels_last"
        The latter: x (B, T, H, W, C), output (B, T, HO, WO, F), states (B, HO, WO, F).
    device, dtype : optional
        Of the parameters, as of PyTorch's modules.
    seed : int, optional
        None: drawn by PyTorch, so that `torch.manual_seed` decides.
    **options
        Further options of `fastclstm.ConvLSTM2D`, such as peephole, activation (by name), bidirectional, merge_mode,
        dropout, go_backwards, return_sequences, time_major, recompute or engine. Not those that PyTorch has its own
        ways for: regularizers, constraints, stateful, time_dropout; nor normalization="batch".

    Attributes
    ----------
    cells : nn.ModuleList
        The parameters, layer by layer (with bidirectional each layer's forward, then its backward cell), by the names,
        shapes (kernels HWIO) and gates (i, f, g, o) of `fastclstm.ConvLSTM2D`: `from_layer` and `to_layer` copy them.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import torch
    >>> module = ConvLSTM2D(3, 8, 3, num_layers=2, return_state=True, seed=0)
    >>> y, states = module(torch.zeros(2, 4, 3, 6, 6))
    >>> y.shape, len(states), states[0][0].shape
    (torch.Size([2, 4, 8, 6, 6]), 2, torch.Size([2, 8, 6, 6]))
    """

    _layer = layers.ConvLSTM2D
    _operator = torch_ops.OPERATORS["convlstm2d"]


class ConvGRU2D(_Recurrent):
    """Convolutional GRUs, one on the other, over whole sequences: `fastclstm.ConvGRU2D` as a module of PyTorch.

    It is to that what `ConvLSTM2D` here is to `fastclstm.ConvLSTM2D`, and what is said there of layout, dtypes and
    memory holds. On the processor alone.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers
        As of `fastclstm.ConvGRU2D`.
    return_state : bool
        Return ``(output, [(h,), …])`` with the last states (B, F, HO, WO).
    return_all_layers, data_format, device, dtype, seed
        As of `ConvLSTM2D`.
    **options
        Further options of `fastclstm.ConvGRU2D`, such as reset_after, bidirectional, normalization="group" or dropout,
        but for those that PyTorch has its own ways for.

    Attributes
    ----------
    cells : nn.ModuleList
        As of `ConvLSTM2D`, gates z, r, n.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import torch
    >>> module = ConvGRU2D(3, 8, 3, return_state=True, seed=0)
    >>> y, [(h,)] = module(torch.zeros(2, 4, 3, 6, 6))
    >>> y.shape, bool((y[:, -1] == h).all())
    (torch.Size([2, 4, 8, 6, 6]), True)
    """

    _layer = layers.ConvGRU2D
    _operator = torch_ops.OPERATORS["convgru2d"]


class ConvRNN2D(_Recurrent):
    """Simple convolutional recurrent networks over whole sequences: `fastclstm.ConvRNN2D` as a module of PyTorch.

    Parameters, attributes, states ``(h,)`` and errors are those of `ConvGRU2D`, options those of `fastclstm.ConvRNN2D`.

    Examples
    --------
    >>> import torch
    >>> ConvRNN2D(3, 8, 3, activation="relu", seed=0)(torch.zeros(2, 4, 3, 6, 6)).shape
    torch.Size([2, 4, 8, 6, 6])
    """

    _layer = layers.ConvRNN2D
    _operator = torch_ops.OPERATORS["convrnn2d"]


def dtypes(op: str, x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """Return the dtype of a result, the wider of x's and the weights', and the one to compute in."""
    if x.dtype is weight.dtype and x.dtype in (torch.float32, torch.float64):
        return x.dtype, x.dtype
    result = torch.promote_types(x.dtype, weight.dtype)
    choice(op, "the dtype of x and the weights", result,
           (torch.float32, torch.float64, torch.bfloat16, torch.float16))  # fmt: skip
    return result, torch.float64 if result == torch.float64 else torch.float32
