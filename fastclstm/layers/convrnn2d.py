"""ConvRNN2D: stacked simple convolutional recurrent networks over whole sequences, and the cell of one of them."""

from __future__ import annotations

from dataclasses import dataclass

from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.recurrent_cell import StepOfH


@dataclass(eq=False, repr=False)
class ConvRNN2DCell(StepOfH):
    """One simple convolutional recurrent network, one time step at a time: ``h = cell(x_t, h)``.

    ``h = tanh(kernel * x + recurrent_kernel * h + bias)``: see `fastclstm.functional.convrnn2d`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int)
        Of the input's convolution.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvRNN2D`, without effect.
    padding, stride, use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, \
recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, activation, \
dilation, padding_mode, recurrent_kernel_size, recurrent_dilation, normalization, dropout, recurrent_dropout, \
data_format, dtype, seed, engine, algorithm
        As in `ConvRNN2D`. Dropout masks are drawn anew by each training call.

    Attributes
    ----------
    kernel : array (KH, KW, C, F)
    recurrent_kernel : array (RKH, RKW, F, F)
    bias : array (F,) or None
        The parameters: read-only; assign a new array to change one.
    gamma, beta : array (F,) or None
        Of the normalization.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> cell = ConvRNN2DCell(1, 4, 3, seed=0, engine="reference")
    >>> cell(np.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 4)
    """

    _operation = "convrnn2d"
    _cell = "rnn"


@dataclass(eq=False, repr=False)
class ConvRNN2D(ConvRecurrent):
    """Simple convolutional recurrent networks, one on the other, over whole sequences.

    ``layer(x)`` takes x (B, T, H, W, C) and returns the last layer's hidden sequence (B, T, HO, WO, F). All numbers are
    those of `fastclstm.functional.convrnn2d`. On the processor alone: arrays on a GPU are refused.

    Parameters
    ----------
    activation : str or pair of functions (forward, derivative)
        On the new hidden state.
    normalization : None, "group" or fastclstm.nn.normalization.Normalization
        Of the pre-activations: see `functional.convrnn2d`. In NumPy.
    in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers, use_bias, \
kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, recurrent_regularizer, \
bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dilation, padding_mode, \
recurrent_kernel_size, recurrent_dilation, dropout, recurrent_dropout, data_format, dtype, seed, engine, algorithm, \
return_sequences, go_backwards, stateful, bidirectional, merge_mode, zero_output_for_mask, time_major, time_dropout, \
activity_regularizer
        As in `ConvLSTM2D`.
    return_state : bool
        Return ``(output, [(h,), …])`` with the last states, one a layer, or two with bidirectional.

    Attributes
    ----------
    cells : tuple of ConvRNN2DCell
    state_gradients, states
        As in `ConvGRU2D`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> ConvRNN2D(1, 8, 3, seed=0, engine="reference")(np.zeros((1, 10, 16, 16, 1))).shape
    (1, 10, 16, 16, 8)
    """

    _cell_class = ConvRNN2DCell
