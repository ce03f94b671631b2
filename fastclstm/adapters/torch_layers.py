"""ConvLSTM2D as a module of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastclstm import layers
from fastclstm.adapters import torch_ops  # first: without PyTorch it says what to install
from fastclstm.nn import activations
from fastclstm.spec import ConvSpec, choice, expect_shape, flag

import torch  # isort: skip
from torch import Tensor  # isort: skip

_OP = "adapters.torch.ConvLSTM2D"
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

    def __init__(self, cell: layers.ConvLSTM2DCell, device: Any, dtype: Any):
        super().__init__()
        self.names = tuple(cell.parameters)
        for name, array in cell.parameters.items():
            tensor = torch.from_numpy(np.array(array)).to(device, dtype)
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def weights(self, dtype: Any) -> dict[str, Tensor]:
        """Return the weights in a dtype, the further ones last."""
        return {name: getattr(self, name).to(dtype) for name in self.names}  # a replica's are no Parameters


def further_name(name: str) -> str:
    """Return what the operator calls a weight of a cell beside kernels and bias."""
    if name.startswith("peephole_"):
        return f"peephole.{name.removeprefix('peephole_')}"
    return f"normalization_weights.{name}"


class ConvLSTM2D(torch.nn.Module):
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
    recompute : bool
        Keep states alone for the way back, as of `fastclstm.ConvLSTM2D`.
    device, dtype : optional
        Of the parameters, as of PyTorch's modules.
    seed : int, optional
        None: drawn by PyTorch, so that `torch.manual_seed` decides.
    **options
        Further options of `fastclstm.ConvLSTM2D`, such as peephole, activation (by name), bidirectional, merge_mode,
        dropout, go_backwards, return_sequences, time_major or engine. Not those that PyTorch has its own ways for:
        regularizers, constraints, stateful, time_dropout; nor normalization="batch".

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

    def __init__(
        self, in_channels: int, out_channels: Any, kernel_size: Any, padding: Any = "same", stride: Any = 1,
        leaky_relu_slope: float | None = None, num_layers: int = 1, *, return_state: bool = False,
        return_all_layers: bool = False, data_format: str = "channels_first", recompute: bool = False,
        device: Any = None, dtype: Any = None, seed: int | None = None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        for name in options:
            if name in _NOT_HERE:
                raise TypeError(f"{_OP}: {name} is not for PyTorch; {_NOT_HERE[name]}")
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        dtype = torch.get_default_dtype() if dtype is None else dtype
        layer = layers.ConvLSTM2D(
            in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers, seed=seed,
            return_state=return_state, data_format=data_format, recompute=recompute,
            dtype="float64" if dtype == torch.float64 else "float32", **options,
        )  # fmt: skip
        flag(_OP, "return_all_layers", return_all_layers)
        if return_all_layers and not layer.return_sequences:
            raise ValueError(f"{_OP}: return_all_layers=True returns sequences; leave return_sequences=False out")
        self._adopt(layer, device, dtype)
        self.return_all_layers = return_all_layers

    def _adopt(self, layer: layers.ConvLSTM2D, device: Any, dtype: Any) -> None:
        """Take a layer's options and copies of its parameters."""
        if layer.normalization is not None and layer.normalization.kind == "batch":
            raise ValueError(f"{_OP}: normalization='batch' is not for PyTorch yet; choose 'layer' or 'group'")
        named = {name: getattr(layer, name) for name in ("activation", "recurrent_activation", "output_activation")}
        for name, value in named.items():
            if value is not None and not (isinstance(value, str) and activations.is_named(value)):
                raise TypeError(f"{_OP}: {name} must be the name of an activation, got {value!r}")
        self.options = {name: value for name, value in layer.options.items() if name != "seed"}
        for name in ("num_layers", "bidirectional", "merge_mode", "return_sequences", "return_state", "go_backwards",
                     "zero_output_for_mask", "time_major", "data_format", "leaky_relu_slope", "in_channels", "dropout",
                     "recurrent_dropout", "frame_size"):  # fmt: skip
            setattr(self, name, getattr(layer, name))
        self.cells = torch.nn.ModuleList(_Cell(cell, device, dtype) for cell in layer.cells)
        further = [name for name in self.cells[0].names if name not in ("kernel", "recurrent_kernel", "bias")]
        self._geometry = {"strides": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode,
                          "dilation": layer.dilation}  # fmt: skip
        self._encoded = torch_ops.encode(
            [further_name(name) for name in further], layer.normalization, recurrent_dilation=layer.recurrent_dilation,
            cell_clip=layer.cell_clip, algorithm=layer.algorithm, engine=layer.engine, recompute=layer.recompute,
            **self._geometry, **named,
        )  # fmt: skip

    @classmethod
    def from_layer(cls, layer: layers.ConvLSTM2D, device: Any = None) -> ConvLSTM2D:
        """Return the module with the options of a `fastclstm.ConvLSTM2D` and copies of its parameters."""
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        given = [name for name in _NOT_HERE if getattr(layer, name)]
        if given:
            raise TypeError(f"{_OP}: {given[0]} is not for PyTorch; {_NOT_HERE[given[0]]}")
        module._adopt(layer, device, getattr(torch, layer.dtype))
        module.return_all_layers = False
        return module

    def to_layer(self) -> layers.ConvLSTM2D:
        """Return the `fastclstm.ConvLSTM2D` with these options and copies of these parameters."""
        wide = self.cells[0].kernel.dtype == torch.float64
        layer = layers.ConvLSTM2D(**self.options | {"dtype": "float64" if wide else "float32"})
        for cell, ours in zip(self.cells, layer.cells, strict=True):
            weights = cell.weights(torch.float64 if wide else torch.float32)
            ours.set_parameters({name: tensor.detach().cpu().numpy().copy() for name, tensor in weights.items()})
        return layer

    def extra_repr(self) -> str:
        """Return the options that are not the usual ones."""
        shown = {"in_channels", "out_channels", "kernel_size"}
        usual = {name: field.default for name, field in layers.ConvLSTM2D.__dataclass_fields__.items()}
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
        initial_state : list of (h, c), optional
            One pair of tensors (B, F, HO, WO) a cell; for a single cell the pair itself will do.
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
            raise ValueError(f"{_OP}: x must have 5 axes, got {tuple(x.shape)}; a single sequence is x[None]")
        kernel = self.cells[0].kernel
        result, inside = dtypes(x, kernel)
        sequence = self._channels(x.to(inside), inward=True)
        if self.time_major:
            sequence = sequence.transpose(0, 1)
        if sequence.shape[-1] != self.in_channels:
            raise ValueError(f"{_OP}: x {tuple(x.shape)} has {sequence.shape[-1]} channels with data_format="
                             f"{self.data_format!r}, but in_channels is {self.in_channels}")  # fmt: skip
        if self.frame_size is not None:
            expect_shape(_OP, "a frame of x", tuple(sequence.shape[2:4]), self.frame_size, "frame_size")
        steps = self._steps(sequence, mask, lengths)
        outputs, states = self._layers(sequence, self._states(initial_state, inside), steps, inside)
        written = [tuple(self._written(part, result) for part in output) for output in outputs]
        several = [output if len(output) > 1 else output[0] for output in written]
        output = several if self.return_all_layers else several[-1]
        if not self.return_state:
            return output
        return output, [(self._channels(h.to(result)), self._channels(c.to(result))) for h, c in states]

    def _layers(
        self, sequence: Tensor, states: Sequence[Any], mask: Tensor | None, dtype: Any
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, Tensor]]]:
        """Return each layer's outputs, two where they are not merged, and each cell's last states."""
        outputs: list[tuple[Tensor, ...]] = []
        last_states: list[tuple[Tensor, Tensor]] = []
        ways = 1 + self.bidirectional
        for index in range(self.num_layers):
            last = index == self.num_layers - 1
            backwards = self.go_backwards and index == 0  # what layer 0 hands on is in processing order
            if index == 1 and self.go_backwards and mask is not None:
                mask = mask.flip(1)
            parts = []
            for way in range(ways):
                cell = index * ways + way
                y, h, c = self._cell(cell, sequence, states[cell], mask, dtype, bool(way) != backwards, not last)
                parts.append(self._zeroed(y, mask, backwards, bool(way)) if last else y)
                last_states.append((h, c))
            outputs.append(self._merged(parts))
            sequence = outputs[-1][0]
            if self.leaky_relu_slope is not None and not last:
                sequence = torch.nn.functional.leaky_relu(sequence, self.leaky_relu_slope)
        return outputs, last_states

    def _cell(
        self, index: int, sequence: Tensor, state: Any, mask: Tensor | None, dtype: Any, backwards: bool,
        whole: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Run a cell; a second direction's output is turned round into the order of the first."""
        weights = self.cells[index].weights(dtype)
        dropout = (None, None)
        if self.training and (self.dropout or self.recurrent_dropout):
            dropout = self._dropout(sequence, weights)
        sequences = whole or self.return_sequences
        y, h, c = torch_ops.run(sequence, weights, state, self._encoded, mask=mask, dropout=dropout,
                                go_backwards=backwards, return_sequences=sequences)  # fmt: skip
        return (y.flip(1) if sequences and self.bidirectional and index % 2 else y), h, c

    def _dropout(self, sequence: Tensor, weights: dict[str, Tensor]) -> Any:
        """Draw the inverted masks of x and of h, four each."""
        B, _, *frame = sequence.shape
        spec = ConvSpec.infer((B, *frame), weights["kernel"].shape, **self._geometry)
        F = weights["recurrent_kernel"].shape[2]
        shapes = ((self.dropout, (4, B, *frame)), (self.recurrent_dropout, (4, B, spec.HO, spec.WO, F)))
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
        """Return (h, c) of each cell, channels-last."""
        if value is None:
            return [(None, None)] * len(self.cells)
        single = len(self.cells) == 1 and len(value) == 2 and not isinstance(value[0], list | tuple)
        pairs = [value] if single else list(value)
        if len(pairs) != len(self.cells) or any(pair is not None and len(pair) != 2 for pair in pairs):
            raise ValueError(f"{_OP}: initial_state must be {len(self.cells)} pairs (h, c), one a layer and direction")
        return [tuple(None if state is None else self._channels(state.to(dtype), inward=True)
                      for state in pair or (None, None)) for pair in pairs]  # fmt: skip

    def _steps(self, sequence: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """Return the mask (B, T) that mask or lengths describe."""
        if mask is not None and lengths is not None:
            raise ValueError(f"{_OP}: give mask or lengths, not both")
        if lengths is not None:
            return torch.arange(sequence.shape[1], device=sequence.device) < lengths.to(sequence.device)[:, None]
        if mask is None:
            return None
        mask = (mask.transpose(0, 1) if self.time_major else mask) != 0
        expect_shape(_OP, "mask", tuple(mask.shape), tuple(sequence.shape[:2]), "(batch, time)")
        return mask


def dtypes(x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """Return the dtype of a result, the wider of x's and the weights', and the one to compute in."""
    result = torch.promote_types(x.dtype, weight.dtype)
    choice(_OP, "the dtype of x and the weights", result,
           (torch.float32, torch.float64, torch.bfloat16, torch.float16))  # fmt: skip
    return result, torch.float64 if result == torch.float64 else torch.float32
