"""convlstm2d over sequences, and one step of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.engines import remembered
from fastclstm.functional.arguments import (
    Gradients,
    check_structure,
    is_pair,
    read_cotangent,
    read_mapping,
)
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.nn.names import unknown_option
from fastclstm.spec import NORMALIZED_PARTS, ConvLSTMSpec, expect_shape, flag

Named = tuple[tuple[str, Any, np.dtype], ...]

_PLAIN = {type(None), bool, int, float, str}


def convlstm2d(
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
    peephole: Mapping[str, Any] | None = None,
    cell_clip: float | None = None,
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
    """Run a ConvLSTM over a batch of sequences (Shi et al. 2015, eq. 3; without peepholes unless given).

    With ``*`` the 2D convolution and ∘ the elementwise product, at each step

    ``i, f, o = σ(z_i), σ(z_f), σ(z_o)`` and ``g = tanh(z_g)`` of ``z = kernel * x_t + recurrent_kernel * h + bias``,
    then ``c = f∘c + i∘g`` and ``h = o∘tanh(c)``.

    Parameters
    ----------
    x : array (B, T, H, W, C)
        Sequences of frames, channels-last.
    kernel : array (KH, KW, C, 4F)
        Input kernels of the gates i, f, g, o, in that order on the last axis.
    recurrent_kernel : array (RKH, RKW, F, 4F)
        Kernels on the hidden state; their convolution has stride 1 and "same" padding.
    bias : array (4F,), optional
    initial_state : (h, c), optional
        Arrays (B, HO, WO, F); None, or None for either of them, means zeros. h comes first: Flax's carry is (c, h), of
        the same shapes, and must be turned round.
    strides, padding, padding_mode, dilation
        Of the input convolution, as in `conv2d`.
    recurrent_dilation : int or (int, int)
    activation, recurrent_activation, output_activation : str or (function, derivative)
        On g; on i, f and o; on the new cell state (None: the same as `activation`). In float32 the cpu engine's gates
        with the usual ones are never below 2^-40, 9e-13, where the sigmoid goes on towards 0.
    peephole : mapping, optional
        Weights under "i", "f" (applied to the old cell state) and "o" (applied to the new one): each (HO, WO, F)
        [elementwise, Shi et al. 2015], (F,) [a channel], or (K, K, F, F) [convolution, with optional "bias_i",
        "bias_f", "bias_o" of shape (F,)].
    cell_clip : float, optional
        Limits every cell state to [-cell_clip, cell_clip].
    mask : array of bool (B, T), optional
        Where False, the step is skipped: states are carried on and the previous output is repeated (zeros before the
        first valid step).
    go_backwards : bool
        Process the last frame first; outputs stay in processing order.
    return_sequences, return_state : bool
    normalization : "layer", "group", "batch" or fastclstm.nn.normalization.Normalization, optional
        Of the pre-activations z, before peepholes are added; the object says over what, and whether the convolutions
        of x and of h are normalized each for itself.
    normalization_weights : mapping, needed with `normalization`
        "gamma" and "beta" (4F,), or (HO, WO, 4F) where elementwise; of "batch" also "mean" and "variance" (4F,), the
        statistics to use: without them those of each step's batch are taken. Where the convolutions are normalized
        separately each name has the endings "_x" and "_h".
    dropout_masks : mapping, optional
        Factors under "x" (4, B, H, W, C) and "h" (4, B, HO, WO, F): what each gate's convolution sees of the frames and
        of the hidden state, at every step.
    algorithm, engine
        As in `conv2d`. On the cpu each convolution has an algorithm of its own where that pays by an estimate: where
        x and h differ in dilation, so that Winograd's transforms fit only one or each alone, where their kernels are of
        very different sizes, and where frames are small and channels many. Then x is convolved ahead of the steps, some
        of them at once, into up to 4 MB (at least a step of one image, 4·HO·WO·F numbers). Else one sum goes over both.
        "winograd" takes the transforms wherever they fit, for h always; "auto" the cheapest. The length of the sequence
        changes neither choice, nor "winograd" the size of the batch.

    Returns
    -------
    array (B, T, HO, WO, F), or (B, HO, WO, F) without return_sequences
        With return_state a tuple of that, h and c, the last states (B, HO, WO, F).

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on another device.
    NotImplementedError
        Normalization, dropout masks, convolutional peepholes or activations of your own with an x on a GPU.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015.
    """
    call = ConvLSTMCall(
        x, kernel, recurrent_kernel, bias, initial_state=initial_state, strides=strides, padding=padding,
        padding_mode=padding_mode, dilation=dilation, recurrent_dilation=recurrent_dilation, activation=activation,
        recurrent_activation=recurrent_activation, output_activation=output_activation, peephole=peephole,
        cell_clip=cell_clip, mask=mask, go_backwards=go_backwards, return_sequences=return_sequences,
        normalization=normalization, normalization_weights=normalization_weights, dropout_masks=dropout_masks,
        algorithm=algorithm, engine=engine,
    )  # fmt: skip
    output, h, c, _ = call.forward(save=False)
    return tuple(map(call.restore, (output, h, c))) if return_state else call.restore(output)


def convlstm2d_vjp(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, return_state: bool = False,
    recompute: bool = False, **options: Any,
) -> tuple[Any, ConvLSTMPullback]:  # fmt: skip
    """Compute `convlstm2d` and the function that pulls gradients back through time.

    Arrays are kept, not copied: they must not change before pullback is called. Parameters are those of `convlstm2d`,
    and

    Parameters
    ----------
    recompute : bool
        False: the activated gates and the cell state of every step are kept for the way back, 5·B·HO·WO·F numbers a
        step. True: only states are, and the way back takes the steps forward again, for a third more time: the cpu
        engine keeps h and c every few steps, 2·B·HO·WO·F numbers a piece, and has the gates of one piece at a time.
        With normalization, dropout or activations whose derivative needs more than their value it keeps the
        pre-activations instead of the gates (9 numbers, where x and h are normalized separately), or with True h and c
        of every step. Where NumPy computes (engine="reference", and with convolutions as peepholes and activations that
        are called) it is 6·B·HO·WO·F numbers a step, 10 or 14 with normalization, or with True 2. The cuda engine keeps
        5·B·HO·WO·F numbers a step too (with algorithm="bfloat16" 14 bytes instead of 20 for each pixel and filter, and
        x in 16 bits), or with True what the cpu engine does.

    Returns
    -------
    outputs : as `convlstm2d` returns them
    pullback : callable
        Takes the gradient of a scalar with respect to the outputs, in their structure (with return_state a tuple of
        three, each may be None), and returns a dict of gradients with the keys "x", "kernel", "recurrent_kernel" and,
        where given, "bias", "initial_state" (a pair), "peephole" and "normalization_weights" (mappings; the latter of
        gammas and betas: given statistics are constants). With ``input_gradient=False`` there is none of x, which is 8
        to 25 % of the work on the way back. Its attribute `statistics` lists, step by step in processing
        order, the "mean" and "variance" of "batch" normalization that were taken, and the "count" of values.
    """
    _check_options("convlstm2d_vjp", options)
    flag("convlstm2d_vjp", "recompute", recompute)
    call = ConvLSTMCall(x, kernel, recurrent_kernel, bias, **options)
    output, h, c, saved = call.forward(save="states" if recompute else True)
    restore = call.restore
    with_state = not {"h", "c"}.isdisjoint(call.arrays)
    pullback = ConvLSTMPullback(call, saved, return_state, bias is not None, with_state)
    outputs = tuple(map(restore, (output, h, c))) if return_state else restore(output)
    return outputs, pullback


def convlstm2d_step(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, out: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Take one step of a ConvLSTM, for frames that come one at a time.

    Parameters
    ----------
    x : array (B, H, W, C)
        The frame.
    kernel, recurrent_kernel, bias, **options
        As in `convlstm2d`, which also says what ``initial_state=(h, c)``, the states so far, may be.
    out : (h, c), optional
        NumPy arrays (B, HO, WO, F) that receive the new states: writeable, C-contiguous, of the dtype computed in.
        Their memory is their own, but the new c may be the old c itself. Where x and the states are C-contiguous
        arrays of that dtype, the cpu engine then allocates nothing as large as a frame in calls after the first; but it
        does with normalization whose statistics are not given, with dropout masks, with activations of your own and
        convolutions as peepholes, for samples that are computed directly (see `conv2d`), and where x is convolved ahead
        into more than 64 MB.

    Returns
    -------
    h, c : array (B, HO, WO, F)
        `out` itself where it was given.

    Raises
    ------
    ValueError
        Shapes or options that do not fit together, an `out` that cannot be written as said.
    TypeError
        Complex, object or ragged arrays; arrays on another device; an `out` that is no pair of NumPy arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import convlstm2d_step
    >>> x, kernel, recurrent_kernel = np.ones((1, 4, 4, 1)), np.ones((3, 3, 1, 8)), np.ones((3, 3, 2, 8))
    >>> h, c = convlstm2d_step(x, kernel, recurrent_kernel)
    >>> out = np.empty_like(h), c  # the cell state is replaced where it is
    >>> convlstm2d_step(x, kernel, recurrent_kernel, initial_state=(h, c), out=out)[1] is c
    True
    """
    op = "convlstm2d_step"
    _check_options(op, options, "return_sequences", "return_state")
    _, read = dispatch.choose(op, options.get("engine"), x)
    frames = read("x", x)
    if frames.ndim != 4:
        raise ValueError(f"{op}: x must be (batch, height, width, channels), got {frames.ndim}D {frames.shape}")
    one_step = frames.reshape(frames.shape[0], 1, *frames.shape[1:])
    call = ConvLSTMCall(one_step, kernel, recurrent_kernel, bias, return_sequences=False, **options)
    if out is not None:
        call.check_out(op, out)
    _, h, c, _ = call.forward(save=False, out=out)
    restore = dispatch.restorer(x)
    return (restore(h), restore(c)) if out is None else (h, c)


@dataclass(frozen=True)
class ConvLSTMPullback:
    """The function that pulls gradients of the outputs of `convlstm2d` back to its arguments."""

    call: ConvLSTMCall
    saved: Any
    return_state: bool
    with_bias: bool
    with_state: bool

    def __call__(self, cotangents: Any, *, input_gradient: bool = True) -> Gradients:
        """Return the gradients by the arguments' names; of x unless `input_gradient` is false."""
        call, spec, restore = self.call, self.call.spec, self.call.restore
        if self.return_state:
            check_structure("convlstm2d", cotangents, "(dy, dh, dc)", 3)
        doutput, dh, dc = cotangents if self.return_state else (cotangents, None, None)
        gradients = call.engine.convlstm2d_backward(
            spec,
            self.saved,
            read_cotangent("convlstm2d", "dy", doutput, spec.output_shape, call.dtype, call.read),
            read_cotangent("convlstm2d", "dh", dh, spec.state_shape, call.dtype, call.read),
            read_cotangent("convlstm2d", "dc", dc, spec.state_shape, call.dtype, call.read),
            input_gradient=input_gradient,
        )
        names = ("x", "kernel", "recurrent_kernel")[not input_gradient :]
        result = {name: restore(gradients[name]) for name in names}
        if self.with_bias:
            result["bias"] = restore(gradients["bias"])
        if self.with_state:
            result["initial_state"] = (restore(gradients["h"]), restore(gradients["c"]))
        if call.peephole is not None:
            result["peephole"] = {name: restore(value) for name, value in gradients["peephole"].items()}
        if call.normalization is not None:
            pulled = gradients["normalization"].items()
            learnt = {name: restore(value) for name, value in pulled if name.startswith(("gamma", "beta"))}
            result["normalization_weights"] = learnt
        return result

    @property
    def statistics(self) -> list[dict[str, Any]]:
        """Of each step the mean, the variance and the count of values of "batch" normalization, by name and part."""
        normalization = self.call.spec.normalization
        if normalization is None or normalization.kind != "batch":
            return []
        parts = NORMALIZED_PARTS[normalization.separate]
        return [
            {key: value for part, n in zip(parts, normalized, strict=True) for key, value in (
                (f"mean{part}", n.mean.ravel()), (f"variance{part}", n.variance.ravel()), (f"count{part}", n.count)
            )}
            for *_, normalized in self.saved.steps
        ]  # fmt: skip


def _check_options(op: str, options: Mapping[str, Any], *fixed: str) -> None:
    """Raise TypeError where `options` are not keywords of `convlstm2d`, or among those that `op` fixes."""
    known = set(convlstm2d.__kwdefaults__ or ()).difference(fixed)
    if unknown := sorted(options.keys() - known):
        raise TypeError(unknown_option(op, unknown[0], sorted(known)))


def _form_of(
    arrays: dict[str, Any], mappings: tuple[dict[str, Any] | None, ...], functions: tuple[Any, ...],
    normalization: Any, geometry: dict[str, Any],
) -> tuple[ConvLSTMSpec, np.dtype]:  # fmt: skip
    """Check a call's shapes and options; where these are plain, once for all calls of one form.

    Return the geometry, and the dtype to compute in.
    """
    how = None if normalization is None else normalizations.get(normalization)
    shapes = tuple([(name, array.shape, array.dtype) for name, array in arrays.items()])
    by_name = tuple([
        None if of is None else tuple([(name, array.shape, array.dtype) for name, array in of.items()])
        for of in mappings
    ])  # fmt: skip
    names = tuple(map(_name, functions))
    if None in names or not all(map(_is_plain, geometry.values())):
        return _found_form(shapes, by_name, functions, how, tuple(geometry), *geometry.values())
    return _known_form(shapes, by_name, names, how, tuple(geometry), *geometry.values())


def _found_form(
    arrays: Named, mappings: tuple[Named | None, ...], functions: tuple[Any, ...], normalization: Any,
    options: tuple[str, ...], *values: Any,
) -> tuple[ConvLSTMSpec, np.dtype]:  # fmt: skip
    """Do it: arrays are told as (name, shape, dtype), options by their names and values."""
    shapes = {f"{name}_shape": shape for name, shape, _ in arrays}
    peephole, normalizers, dropout = (None if of is None else {name: shape for name, shape, _ in of} for of in mappings)
    activation, recurrent_activation, output_activation = map(activations.get, functions)
    how = dict(zip(options, values, strict=True))
    spec = ConvLSTMSpec.infer(
        **shapes, peephole_shapes=peephole, normalization_shapes=normalizers, dropout_shapes=dropout,
        activation=activation, recurrent_activation=recurrent_activation, output_activation=output_activation,
        normalization=normalization, **how,
    )  # fmt: skip
    every = (*arrays, *(one for of in mappings for one in of or ()))
    return spec, dispatch.working_dtype_of(dtype for name, _, dtype in every if name != "mask")


_known_form = lru_cache(maxsize=256, typed=True)(_found_form)  # True is not 1


def _name(function: Any) -> str | None:
    """Return the name by which an activation is given, or would be; None: it is somebody's own."""
    if type(function) is str:
        return function
    return activations.get(function).name if activations.is_named(function) else None


def _is_plain(value: Any) -> bool:
    """Return whether an option is told by what it is equal to and, if it is not a tuple, its type."""
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_integral, value)))


def _is_integral(value: Any) -> bool:
    return type(value) is int or (type(value) is tuple and all(map(_is_integral, value)))


class ConvLSTMCall:
    """One validated call of `convlstm2d`: its engine, geometry and native arrays."""

    def __init__(
        self, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, *, initial_state: Any = None,
        activation: Any = "tanh", recurrent_activation: Any = "sigmoid", output_activation: Any = None,
        peephole: Mapping[str, Any] | None = None, mask: Any = None, normalization: Any = None,
        normalization_weights: Mapping[str, Any] | None = None, dropout_masks: Mapping[str, Any] | None = None,
        algorithm: str = "auto", engine: str | None = None, **geometry: Any,
    ):  # fmt: skip
        op = "convlstm2d"
        self.engine, self.read = dispatch.choose(op, engine, x)
        dispatch.check_algorithm(op, self.engine, algorithm)
        self.algorithm = algorithm
        self.restore = dispatch.restorer(x)
        h, c = _state_pair(op, initial_state)
        optional = {"bias": bias, "h": h, "c": c}
        given = {"x": x, "kernel": kernel, "recurrent_kernel": recurrent_kernel}
        given |= {name: value for name, value in optional.items() if value is not None}
        arrays = {name: self.read(name, value) for name, value in given.items()}
        peepholes = read_mapping(op, "peephole", peephole, self.read)
        normalizers = read_mapping(op, "normalization_weights", normalization_weights, self.read)
        dropouts = read_mapping(op, "dropout_masks", dropout_masks, self.read)
        mask = None if mask is None else self.read("mask", mask)
        mappings = peepholes, normalizers, dropouts
        functions = activation, recurrent_activation, activation if output_activation is None else output_activation
        shaped = arrays if mask is None else arrays | {"mask": mask}
        self.spec, self.dtype = _form_of(shaped, mappings, functions, normalization, geometry)
        self.arrays = {name: dispatch.native(array, self.dtype) for name, array in arrays.items()}
        self.peephole, self.normalization, self.dropout = (
            None if named is None else {key: dispatch.native(array, self.dtype) for key, array in named.items()}
            for named in mappings
        )
        self.mask = mask if mask is None or dispatch.on_gpu(mask) else np.ascontiguousarray(mask != 0)

    def forward(self, save: bool | str, out: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
        """Run the engine: output, last h, last c (in `out`) and, with `save`, what its backward pass needs."""
        get, spec, normalization = self.arrays.get, self.spec, self.normalization
        weights = get("kernel"), get("recurrent_kernel"), get("bias")
        if normalization is not None and not save and any(name.startswith("mean") for name in normalization):
            sources = *weights, *normalization.values()
            if all(w is None or isinstance(w, np.ndarray) for w in sources):
                key = "normalized", spec.normalization, *normalization
                weights = remembered.remember(sources, key, self._with_normalization)
                spec, normalization = replace(spec, normalization=None), None
        return self.engine.convlstm2d(
            spec, get("x"), *weights, get("h"), get("c"), self.peephole, self.mask,
            normalization=normalization, dropout=self.dropout, algorithm=self.algorithm, save=save, out=out,
        )  # fmt: skip

    def _with_normalization(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return kernel, recurrent_kernel and bias that do what normalization with given statistics does to z."""
        weights, epsilon = self.normalization or {}, self.spec.normalization.epsilon
        parts = NORMALIZED_PARTS[self.spec.normalization.separate]
        scales = [weights[f"gamma{part}"] / np.sqrt(weights[f"variance{part}"] + epsilon) for part in parts]
        shifts = [weights[f"beta{part}"] - weights[f"mean{part}"] * s for part, s in zip(parts, scales, strict=True)]
        bias = self.arrays.get("bias", np.zeros(4 * self.spec.F, self.dtype))
        if len(parts) == 1:
            bias = bias * scales[0]
        folded = self.arrays["kernel"] * scales[0], self.arrays["recurrent_kernel"] * scales[-1], sum(shifts, bias)
        kernel, recurrent, bias = map(remembered.immutable, folded)
        return kernel, recurrent, bias

    def check_out(self, op: str, out: Any) -> None:
        """Raise TypeError or ValueError unless `out` is a pair of arrays that can receive the last h and c."""
        if dispatch.on_gpu(self.arrays["x"]):
            raise TypeError(f"{op}: out is for arrays in the processor's memory, but x is on a GPU; leave it away")
        if not is_pair(out) or not all(isinstance(array, np.ndarray) for array in out):
            came = f"({', '.join(type(a).__name__ for a in out)})" if is_pair(out) else type(out).__name__
            raise TypeError(f"{op}: out must be a pair (h, c) of NumPy arrays, got {came}")
        for name, array in zip("hc", out, strict=True):
            what, shape = f"out {name}", self.spec.state_shape
            expect_shape(op, what, array.shape, shape, "(batch, height, width, filters) of the states")
            if array.dtype != self.dtype:
                raise ValueError(f"{op}: {what} has dtype {array.dtype} but the states are {self.dtype}; "
                                 f"make it with np.empty({shape}, np.{self.dtype})")  # fmt: skip
            if not array.flags.carray:
                flaw = "read-only" if not array.flags.writeable else "not contiguous and aligned"
                raise ValueError(f"{op}: {what} is {flaw}; make it with np.empty({shape}, np.{self.dtype})")
        new_h, new_c = out
        read = self.arrays | {f"peephole {name!r}": array for name, array in (self.peephole or {}).items()}
        for name, old in (read | {"out c": new_c}).items():
            if np.may_share_memory(new_h, old):
                raise ValueError(f"{op}: out h overlaps {name}; give it memory of its own")
        for name, old in read.items():
            if np.may_share_memory(new_c, old) and not (name == "c" and new_c.ctypes.data == old.ctypes.data):
                raise ValueError(
                    f"{op}: out c overlaps {name}; give it memory of its own, or exactly that of the old c"
                )


def _state_pair(op: str, initial_state: Any) -> tuple[Any, Any]:
    if initial_state is None:
        return None, None
    if not is_pair(initial_state):
        raise ValueError(f"{op}: initial_state must be a pair (h, c), got {type(initial_state).__name__}")
    return initial_state[0], initial_state[1]
