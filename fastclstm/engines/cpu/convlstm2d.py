"""convlstm2d on the cpu engine: one kernel a time step convolves x and h, applies the gates and writes c and h.

What one kernel for all of a step cannot do (normalization, in-cell dropout, the training of some activations) goes by
`stepwise`; what no kernel knows (a caller's own activations, convolutions of the cell state) takes the recurrence in
NumPy over this engine's convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import backward, launch, outliers, plans, stepwise, stepwise_backward
from fastclstm.engines.cpu.conv2d import conv2d, conv2d_backward
from fastclstm.engines.cpu.fused_steps import Steps
from fastclstm.engines.cpu.kernels import gates
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.spec import ConvLSTMSpec

Arrays = dict[str, np.ndarray]


def convlstm2d(
    spec: ConvLSTMSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    h: np.ndarray | None,
    c: np.ndarray | None,
    peephole: Arrays | None,
    mask: np.ndarray | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool | str = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, recurrence.Saved | backward.Saved | stepwise.Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output, last h, last c and, with `save`, what backward needs.

    save="states" keeps only some states, from which backward takes the steps between them forward again.

    `out` are arrays for the last h, whose memory the output of a single step shares, and the last c, which may be `c`.
    """
    if dropout is not None or not _is_fused(spec) or (save and not backward.fits(spec)):
        if stepwise.knows(spec):
            inputs = stepwise.Inputs(
                x, (recurrent_kernel, kernel), bias, (h, c), peephole, mask, normalization, dropout, algorithm
            )
            return stepwise.forward(spec, inputs, save, out)
        arguments = x, kernel, recurrent_kernel, bias, h, c, peephole, mask
        return recurrence.forward(
            spec, conv2d, *arguments, normalization=normalization, dropout=dropout, save=save, out=out,
            algorithm="direct" if algorithm == "direct" else "auto",
        )  # fmt: skip
    ways = plans.choose_ways(spec.recurrent, spec.input, algorithm, x.itemsize, not save)
    length = backward.piece_length(spec, x.itemsize) if save == "states" else spec.T
    return _fused(spec, ways, x, (recurrent_kernel, kernel), bias, (h, c), peephole, mask, algorithm, save, length, out)


def convlstm2d_backward(
    spec: ConvLSTMSpec,
    saved: recurrence.Saved | backward.Saved | stepwise.Saved,
    dy: np.ndarray | None,
    dh: np.ndarray | None,
    dc: np.ndarray | None,
    *,
    input_gradient: bool = True,
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`."""
    if isinstance(saved, backward.Saved):
        return backward.backward(spec, saved, dy, dh, dc, input_gradient=input_gradient)
    if isinstance(saved, stepwise.Saved):
        return stepwise_backward.backward(spec, saved, dy, dh, dc, input_gradient=input_gradient)
    return recurrence.backward(spec, conv2d_backward, saved, dy, dh, dc, input_gradient=input_gradient)


def _is_fused(spec: ConvLSTMSpec) -> bool:
    """Whether the kernels of a whole step know everything that the cell does."""
    return spec.peephole != "conv" and spec.normalization is None and gates.activation_codes(spec) is not None


def _fused(
    spec: ConvLSTMSpec, ways: plans.Ways, x: np.ndarray, kernels: tuple[np.ndarray, np.ndarray],
    bias: np.ndarray | None, first: backward.Pair, peephole: Arrays | None, mask: np.ndarray | None, algorithm: str,
    save: bool | str, length: int, out: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, backward.Saved | None]:  # fmt: skip
    """Do it with the fused kernels, from the `first` h and c on; length: steps of a piece, where states are saved."""
    dtype, state = x.dtype, spec.state_shape
    spoilt = np.zeros(spec.B, np.bool_)
    for spoils, array, steps_of in ((ways.x, x, mask), (ways.h, first[0], None)):
        if array is not None and outliers.spoil(spoils):
            spoilt |= outliers.find(array, steps_of)
    ways = plans.DIRECT if spoilt.all() else ways
    h_last, c_last = (np.empty(state, dtype), np.empty(state, dtype)) if out is None else out
    borrowed = None
    if ways.transform and first[1] is not None and np.may_share_memory(first[1], c_last):
        # What is spoilt begins there again.
        borrowed = launch.borrow(c_last.nbytes)
        copy = borrowed[1][: c_last.nbytes].view(dtype).reshape(state)
        np.copyto(copy, first[1])
        first = first[0], copy
    # Where no step is skipped the outputs are the hidden states, and are kept only once.
    separate = np.empty(spec.output_shape, dtype) if mask is not None else None
    ordered = np.ascontiguousarray(mask[:, ::-1]) if mask is not None and spec.go_backwards else mask
    kept = spec.T if spec.return_sequences and mask is None else min(2, spec.T)
    h_states = h_last[:, np.newaxis] if kept == 1 else np.empty((spec.B, kept, *state[1:]), dtype)
    saved = None
    if save:
        saved = backward.start(spec, x, kernels, bias, first, peephole, ordered, algorithm, ways, length,
                               states_only=save == "states")  # fmt: skip
    if c_last.size:
        steps = Steps(spec, ways, kernels, bias, peephole, remember=not save)
        if saved is not None:
            backward.run_forward(spec, saved, steps, h_states, c_last, separate)
        else:
            h_first, c_first = (np.zeros(state, dtype) if given is None else given for given in first)
            steps.run(
                spec.B, spec.T, x=slots(x, spec.go_backwards), h_first=slots(h_first), c_first=slots(c_first),
                h=slots(h_states), c=slots(c_last), y=slots(separate), fresh=first[0] is None, mask=ordered,
            )  # fmt: skip
    if not np.may_share_memory(h_last, h_states):
        h_last[...] = h_states[:, (spec.T - 1) % kept]
    output = separate if separate is not None else h_states if spec.return_sequences else h_last
    if out is None and np.may_share_memory(output, h_last):
        output = output.copy()
    spoilt |= np.isnan(h_last.min((1, 2, 3))) if ways.transform else False  # where a NaN has been h is NaN to the end
    if ways.transform and spoilt.any():
        h, c, mask = (None if array is None else array[spoilt] for array in (*first, mask))
        *again, saved_again = _fused(spec.with_batch(int(spoilt.sum())), plans.DIRECT, x[spoilt], kernels, bias, (h, c),
                                     peephole, mask, algorithm, save, length, None)  # fmt: skip
        for whole, part in zip((output, h_last, c_last), again, strict=True):
            whole[spoilt] = part
        if saved is not None and saved_again is not None:
            saved.replace(spoilt, saved_again)
    if borrowed is not None:
        launch.give_back(*borrowed)
    return output, h_last, c_last, saved
