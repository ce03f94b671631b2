"""The recurrences beside the ConvLSTM of frames: convgru2d, convrnn2d and convlstm3d, rows of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import Gradients, check_structure, read_cotangent, read_mapping, shapes_of
from fastclstm.functional.volumes import Volumes
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.nn.names import unknown_option
from fastclstm.spec import CELL_STATES, CellSpec


@dataclass(frozen=True)
class Operation:
    """A row: the cell, and of what."""

    name: str
    cell: str
    rank: int = 2

    @property
    def states(self) -> tuple[str, ...]:
        """What the cell carries."""
        return CELL_STATES[self.cell]


CONVGRU2D, CONVRNN2D = Operation("convgru2d", "gru"), Operation("convrnn2d", "rnn")
CONVLSTM3D = Operation("convlstm3d", "lstm", 3)


def convgru2d(
    x: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    *,
    initial_state: Any = None,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    recurrent_dilation: Any = 1,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
    reset_after: bool = True,
    mask: Any = None,
    go_backwards: bool = False,
    return_sequences: bool = True,
    return_state: bool = False,
    normalization: Any = None,
    normalization_weights: Mapping[str, Any] | None = None,
    dropout_masks: Mapping[str, Any] | None = None,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Run a convolutional GRU over a batch of sequences.

    With ``*`` the 2D convolution, ∘ the elementwise product, W the kernel, R the recurrent one, at each step

    ``z, r = σ(W * x + R * h + b)``, then ``n = tanh(W_n * x + b_n + r∘(R_n * h + c_n))`` with reset_after, without
    ``n = tanh(W_n * x + R_n * (r∘h) + b_n)``, and ``h = z∘h + (1 − z)∘n``. As Keras's GRU, z being what is kept: where
    a module computes ``(1 − z)∘h + z∘n``, its weights of z are those here times −1.

    Parameters
    ----------
    x : array (B, T, H, W, C)
        Sequences of frames, channels-last.
    kernel : array (KH, KW, C, 3F)
        Input kernels of z, r and n, in that order on the last axis.
    recurrent_kernel : array (RKH, RKW, F, 3F)
        Kernels on the hidden state; their convolution has stride 1 and "same" padding.
    bias : array (2, 3F), optional
        Of the input and of the hidden state; with reset_after=False (3F,).
    initial_state : array (B, HO, WO, F) or (h,), optional
        None means zeros.
    strides, padding, padding_mode, dilation
        Of the input convolution, as in `conv2d`.
    recurrent_dilation : int or (int, int)
    activation, recurrent_activation : str or (function, derivative)
        On n; on z and r.
    reset_after : bool
        Whether r multiplies what the recurrent kernel makes of h: then a step is one convolution of h, and faster.
    mask : array of bool (B, T), optional
        Where False, the step is skipped: the state is carried on and the previous output is repeated (zeros before the
        first valid step).
    go_backwards : bool
        Process the last frame first; outputs stay in processing order.
    return_sequences, return_state : bool
    normalization : "group" or fastclstm.nn.normalization.Normalization, optional
        With reset_after=False: of the sums W * x + R * h + b, over pixels and groups of the 3F channels. None is of
        both n and another gate, as n is convolved apart; 3 groups unless told. In NumPy.
    normalization_weights : mapping, needed with `normalization`
        "gamma" and "beta" (3F,).
    dropout_masks : mapping, optional
        Factors under "x" (3, B, H, W, C) and "h" (3, B, HO, WO, F): what each gate's convolution sees, at every step.
    algorithm, engine
        As in `conv2d`. The engine "cuda" computes the convolutions of NumPy arrays alone; arrays on a GPU are refused.

    Returns
    -------
    array (B, T, HO, WO, F), or (B, HO, WO, F) without return_sequences
        With return_state a pair of that and the last h.

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on a GPU.

    References
    ----------
    Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder", EMNLP 2014; Ballas et al., "Delving Deeper
    into Convolutional Networks for Learning Video Representations", ICLR 2016, whose form is reset_after=False.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import convgru2d
    >>> x, kernel, recurrent_kernel = np.ones((1, 5, 4, 4, 1)), np.ones((3, 3, 1, 6)), np.ones((3, 3, 2, 6))
    >>> convgru2d(x, kernel, recurrent_kernel, engine="reference").shape
    (1, 5, 4, 4, 2)
    """
    return CellCall(
        CONVGRU2D, x, kernel, recurrent_kernel, bias, initial_state=initial_state, strides=strides, padding=padding,
        padding_mode=padding_mode, dilation=dilation, recurrent_dilation=recurrent_dilation, activation=activation,
        recurrent_activation=recurrent_activation, reset_after=reset_after, mask=mask, go_backwards=go_backwards,
        return_sequences=return_sequences, return_state=return_state, normalization=normalization,
        normalization_weights=normalization_weights, dropout_masks=dropout_masks, algorithm=algorithm, engine=engine,
    ).outputs()  # fmt: skip


def convrnn2d(
    x: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    *,
    initial_state: Any = None,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    recurrent_dilation: Any = 1,
    activation: Any = "tanh",
    mask: Any = None,
    go_backwards: bool = False,
    return_sequences: bool = True,
    return_state: bool = False,
    normalization: Any = None,
    normalization_weights: Mapping[str, Any] | None = None,
    dropout_masks: Mapping[str, Any] | None = None,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Run a simple convolutional recurrent network: ``h = tanh(kernel * x + recurrent_kernel * h + bias)``.

    Parameters
    ----------
    x : array (B, T, H, W, C)
    kernel : array (KH, KW, C, F)
    recurrent_kernel : array (RKH, RKW, F, F)
    bias : array (F,), optional
    normalization : "group" or fastclstm.nn.normalization.Normalization, optional
        Of the sum, over pixels and groups of the F channels; 1 group unless told. In NumPy.
    initial_state, strides, padding, padding_mode, dilation, recurrent_dilation, activation, mask, go_backwards, \
return_sequences, return_state, normalization_weights, dropout_masks, algorithm, engine
        As in `convgru2d`, with one gate.

    Returns
    -------
    array (B, T, HO, WO, F), or (B, HO, WO, F) without return_sequences
        With return_state a pair of that and the last h.

    Raises
    ------
    ValueError, TypeError
        As `convgru2d` does.

    References
    ----------
    Elman, "Finding Structure in Time", Cognitive Science 14 (1990).
    """
    return CellCall(
        CONVRNN2D, x, kernel, recurrent_kernel, bias, initial_state=initial_state, strides=strides, padding=padding,
        padding_mode=padding_mode, dilation=dilation, recurrent_dilation=recurrent_dilation, activation=activation,
        mask=mask, go_backwards=go_backwards, return_sequences=return_sequences, return_state=return_state,
        normalization=normalization, normalization_weights=normalization_weights, dropout_masks=dropout_masks,
        algorithm=algorithm, engine=engine,
    ).outputs()  # fmt: skip


def convlstm3d(
    x: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    *,
    initial_state: Any = None,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    recurrent_dilation: Any = 1,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
    output_activation: Any = None,
    mask: Any = None,
    go_backwards: bool = False,
    return_sequences: bool = True,
    return_state: bool = False,
    normalization: Any = None,
    normalization_weights: Mapping[str, Any] | None = None,
    dropout_masks: Mapping[str, Any] | None = None,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Run a ConvLSTM over sequences of volumes: the cell of `convlstm2d` with the convolutions of `conv3d`.

    Parameters
    ----------
    x : array (B, T, D, H, W, C)
        Sequences of volumes, channels-last.
    kernel : array (KD, KH, KW, C, 4F)
        Input kernels of the gates i, f, g, o, in that order on the last axis.
    recurrent_kernel : array (RKD, RKH, RKW, F, 4F)
    bias : array (4F,), optional
    initial_state : (h, c), optional
        Arrays (B, DO, HO, WO, F); None, or None for either of them, means zeros.
    strides, padding, padding_mode, dilation, algorithm, engine
        Of the input convolution, as in `conv3d`.
    recurrent_dilation : int or (int, int, int)
    activation, recurrent_activation, output_activation : str or (function, derivative)
        On g; on i, f and o; on the new cell state (None: the same as `activation`).
    mask, go_backwards, return_sequences, return_state
        As in `convlstm2d`.
    normalization : "group" or fastclstm.nn.normalization.Normalization, optional
        Of the sum of the convolutions, over voxels and groups of the 4F channels; 4 groups unless told. In NumPy.
    normalization_weights : mapping, needed with `normalization`
        "gamma" and "beta" (4F,).
    dropout_masks : mapping, optional
        Factors under "x" (4, B, D, H, W, C) and "h" (4, B, DO, HO, WO, F).

    Returns
    -------
    array (B, T, DO, HO, WO, F), or (B, DO, HO, WO, F) without return_sequences
        With return_state a tuple of that, h and c.

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on a GPU.
    """
    return CellCall(
        CONVLSTM3D, x, kernel, recurrent_kernel, bias, initial_state=initial_state, strides=strides, padding=padding,
        padding_mode=padding_mode, dilation=dilation, recurrent_dilation=recurrent_dilation, activation=activation,
        recurrent_activation=recurrent_activation, output_activation=output_activation, mask=mask,
        go_backwards=go_backwards, return_sequences=return_sequences, return_state=return_state,
        normalization=normalization, normalization_weights=normalization_weights, dropout_masks=dropout_masks,
        algorithm=algorithm, engine=engine,
    ).outputs()  # fmt: skip


def _with_vjp(operation: Operation, function: Callable[..., Any]) -> Callable[..., Any]:
    def vjp(x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, **options: Any) -> tuple[Any, CellPullback]:
        known = function.__kwdefaults__ or {}
        if unknown := sorted(options.keys() - known.keys()):
            raise TypeError(unknown_option(f"{operation.name}_vjp", unknown[0], sorted(known)))
        return CellCall(operation, x, kernel, recurrent_kernel, bias, **options).vjp()

    states = ", ".join(f"d{name}" for name in operation.states)
    vjp.__name__ = vjp.__qualname__ = f"{operation.name}_vjp"
    vjp.__doc__ = f"""Compute `{operation.name}` and the function that pulls gradients back through it.

    Parameters are those of `{operation.name}`. They are kept, not copied: arrays must not change before pullback is
    called.

    Returns
    -------
    outputs : as `{operation.name}` returns them
    pullback : callable
        Takes the gradient of a scalar with respect to the outputs, in their structure (with return_state
        (dy, {states}), each may be None), and returns a dict of gradients with the keys "x", "kernel",
        "recurrent_kernel" and, where given, "bias", "initial_state" (a tuple of as many as there are states) and
        "normalization_weights". With ``input_gradient=False`` there is none of x.
    """
    return vjp


convgru2d_vjp = _with_vjp(CONVGRU2D, convgru2d)
convrnn2d_vjp = _with_vjp(CONVRNN2D, convrnn2d)
convlstm3d_vjp = _with_vjp(CONVLSTM3D, convlstm3d)


@dataclass(frozen=True)
class CellPullback:
    """The function that pulls gradients of the outputs of a recurrence back to its arguments."""

    call: CellCall
    saved: Any
    statistics: tuple[()] = ()
    """None are taken of batches."""

    def __call__(self, cotangents: Any, *, input_gradient: bool = True) -> Gradients:
        """Return the gradients by the arguments' names; of x unless `input_gradient` is false."""
        call, spec, restore, op = self.call, self.call.spec, self.call.restore, self.call.operation.name
        names = call.operation.states
        if call.return_state:
            check_structure(op, cotangents, f"(dy, {', '.join('d' + name for name in names)})", 1 + len(names))
        doutput, *dlast = cotangents if call.return_state else (cotangents, *(None for _ in names))
        gradients = call.engine.recurrent_backward(
            spec,
            self.saved,
            read_cotangent(op, "dy", doutput, spec.output_shape, call.dtype, call.read),
            [read_cotangent(op, f"d{name}", d, spec.state_shape, call.dtype, call.read)
             for name, d in zip(names, dlast, strict=True)],
            input_gradient=input_gradient,
        )  # fmt: skip
        result = {name: restore(gradients[name]) for name in ("x", "kernel", "recurrent_kernel")[not input_gradient :]}
        if "bias" in call.arrays:
            result["bias"] = restore(gradients["bias"])
        if any(name in call.arrays for name in names):
            result["initial_state"] = tuple(restore(gradients[name]) for name in names)
        if call.normalization is not None:
            result["normalization_weights"] = {n: restore(a) for n, a in gradients["normalization"].items()}
        return result


class CellCall:
    """One validated call of a recurrence: its engine, geometry and native arrays."""

    def __init__(
        self, operation: Operation, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, *, initial_state: Any = None,
        activation: Any = "tanh", recurrent_activation: Any = "sigmoid", output_activation: Any = None,
        mask: Any = None, normalization: Any = None, normalization_weights: Mapping[str, Any] | None = None,
        dropout_masks: Mapping[str, Any] | None = None, algorithm: str = "auto", engine: str | None = None,
        return_state: bool = False, **geometry: Any,
    ):  # fmt: skip
        op = operation.name
        expect_on_cpu(op, x)
        self.operation, self.return_state, self.algorithm = operation, return_state, algorithm
        self.engine, self.read = dispatch.choose(op, engine, x)
        dispatch.check_algorithm(op, self.engine, algorithm)
        self.restore = dispatch.restorer(x)
        given = {"x": x, "kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
        given |= dict(zip(operation.states, _states(op, operation.states, initial_state), strict=True))
        arrays = {name: self.read(name, value) for name, value in given.items() if value is not None}
        normalizers = read_mapping(op, "normalization_weights", normalization_weights, self.read)
        dropouts = read_mapping(op, "dropout_masks", dropout_masks, self.read)
        mask = None if mask is None else self.read("mask", mask)
        shapes = {name: array.shape for name, array in arrays.items()}
        self.spec = CellSpec.infer(
            operation.cell,
            shapes["x"],
            shapes["kernel"],
            shapes["recurrent_kernel"],
            shapes.get("bias"),
            state_shapes={name: shapes[name] for name in operation.states if name in shapes},
            mask_shape=None if mask is None else mask.shape,
            normalization_shapes=shapes_of(normalizers),
            dropout_shapes=shapes_of(dropouts),
            rank=operation.rank,
            activation=activations.get(activation),
            recurrent_activation=activations.get(recurrent_activation),
            output_activation=activations.get(activation if output_activation is None else output_activation),
            normalization=None if normalization is None else normalizations.get(normalization),
            op=op,
            **geometry,
        )
        mappings = normalizers, dropouts
        self.dtype = dispatch.working_dtype(
            *arrays.values(), *(a for named in mappings for a in (named or {}).values())
        )
        self.arrays = {name: dispatch.native(array, self.dtype) for name, array in arrays.items()}
        self.normalization, self.dropout = (
            None if named is None else {key: dispatch.native(array, self.dtype) for key, array in named.items()}
            for named in mappings
        )
        self.mask = None if mask is None else np.ascontiguousarray(mask != 0)

    def outputs(self) -> Any:
        """Return what the operation does."""
        return self._given(*self._forward(save=False)[:2])

    def vjp(self) -> tuple[Any, CellPullback]:
        """Return that, and the pullback."""
        output, states, saved = self._forward(save=True)
        return self._given(output, states), CellPullback(self, saved)

    def _given(self, output: np.ndarray, states: tuple[np.ndarray, ...]) -> Any:
        return tuple(map(self.restore, (output, *states))) if self.return_state else self.restore(output)

    def _forward(self, save: bool) -> tuple[np.ndarray, tuple[np.ndarray, ...], Any]:
        get, volumes = self.arrays.get, None
        if self.operation.rank == 3:
            volumes = VolumeConvolution.of(self.engine, self.operation.name)
        result: tuple[np.ndarray, tuple[np.ndarray, ...], Any] = self.engine.recurrent(
            self.spec, get("x"), get("kernel"), get("recurrent_kernel"), get("bias"),
            tuple(get(name) for name in self.operation.states), self.mask, normalization=self.normalization,
            dropout=self.dropout, algorithm=self.algorithm, save=save, convolution=volumes,
        )  # fmt: skip
        return result


class VolumeConvolution:
    """The convolution of n volumes a sample, by way of an engine's conv2d: see `engines.cells.Convolves`."""

    def __init__(self, engine: Any, op: str, spec: Any, kernel: np.ndarray, bias: np.ndarray | None, algorithm: str):
        self._arguments = engine, kernel, algorithm, op
        self._spec, self._bias = spec, bias
        self._of_batch: dict[int, Volumes] = {}
        self.gradient = np.zeros_like(kernel)

    @classmethod
    def of(cls, engine: Any, op: str) -> Callable[..., VolumeConvolution]:
        """Return what makes one of (spec, kernel, bias, algorithm)."""
        return lambda *arguments: cls(engine, op, *arguments)

    def look(self, *arrays: np.ndarray | None) -> None:
        """Leave it to conv2d, which looks itself."""

    def forward(self, x: np.ndarray, z: np.ndarray) -> None:
        """Write the convolution of x to z."""
        volumes = _volumes(x)
        z[...] = self._of(len(volumes)).convolve(volumes, self._bias).reshape(z.shape)

    def pull_back(self, dz: np.ndarray, dx: np.ndarray) -> None:
        """Write the gradient of x to dx."""
        d = _volumes(dz)
        result, _, _ = self._of(len(d)).pull_back(d, d, ("x",))
        dx[...] = result.reshape(dx.shape)

    def add(self, x: np.ndarray, dz: np.ndarray) -> None:
        """Add the kernel's gradient."""
        volumes = _volumes(x)
        _, dkernel, _ = self._of(len(volumes)).pull_back(volumes, _volumes(dz), ("kernel",))
        self.gradient += dkernel

    def _of(self, count: int) -> Volumes:
        if count not in self._of_batch:
            engine, kernel, algorithm, op = self._arguments
            self._of_batch[count] = Volumes(engine, replace(self._spec, B=count), kernel, algorithm, op)
        return self._of_batch[count]


def _volumes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def expect_on_cpu(op: str, x: Any) -> None:
    """Raise TypeError where x is on a GPU."""
    if dispatch.on_gpu(x):
        raise TypeError(f"{op}: x is on a GPU, where there are no kernels for this operation yet; move x to the "
                        f"processor, as x.cpu() or cupy.asnumpy(x) do, and take engine='cpu'")  # fmt: skip


def _states(op: str, names: tuple[str, ...], value: Any) -> tuple[Any, ...]:
    """Return the initial states, of which a single one need not be in a tuple."""
    if value is None:
        return (None,) * len(names)
    if not isinstance(value, tuple | list):
        value = (value,)
    if len(value) != len(names) and len(names) == 1:  # an array as nested lists
        value = (value,)
    if len(value) != len(names):
        raise ValueError(f"{op}: initial_state must be ({', '.join(names)}), got {len(value)} items")
    return tuple(value)
