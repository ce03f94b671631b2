"""ConvLSTM3D: stacked ConvLSTM layers over sequences of volumes, and the cell of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastclstm.layers.cell_options import LSTMOptions
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.recurrent_cell import LSTMCell


@dataclass(eq=False, repr=False)
class ConvLSTM3DCell(LSTMCell):
    """One ConvLSTM over volumes, one time step at a time: ``h, c = cell(x_t, h, c)``.

    All numbers are those of `fastclstm.functional.convlstm3d`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int, int)
        Of the input's convolution.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvLSTM3D`, without effect.
    padding, stride, use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, bias_initializer, \
kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, \
activation, recurrent_activation, output_activation, dilation, padding_mode, recurrent_kernel_size, \
recurrent_dilation, normalization, dropout, recurrent_dropout, data_format, dtype, seed, engine, algorithm
        As in `ConvLSTM3D`. Dropout masks are drawn anew by each training call.

    Attributes
    ----------
    kernel : array (KD, KH, KW, C, 4F)
        The parameters, gates in the order i, f, g, o: read-only; assign a new array to change one.
    recurrent_kernel : array (RKD, RKH, RKW, F, 4F)
    bias : array (4F,) or None
    gamma, beta : array (4F,) or None
        Of the normalization.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> cell = ConvLSTM3DCell(1, 4, 3, seed=0, engine="reference")
    >>> h, c = cell(np.ones((2, 3, 8, 8, 1)))
    >>> h.shape
    (2, 3, 8, 8, 4)
    """

    _operation = "convlstm3d"
    _rank: ClassVar[int] = 3


@dataclass(eq=False, repr=False)
class ConvLSTM3D(ConvRecurrent, LSTMOptions):
    """ConvLSTM layers, one on the other, over sequences of volumes, as Keras's ConvLSTM3D.

    ``layer(x)`` takes x (B, T, D, H, W, C) and returns the last layer's hidden sequence (B, T, DO, HO, WO, F). All
    numbers are those of `fastclstm.functional.convlstm3d`. On the processor alone: arrays on a GPU are refused.

    Parameters
    ----------
    kernel_size, recurrent_kernel_size : int, tuple (KD, KH, KW), or list
        As in `ConvLSTM2D`, with a depth.
    padding : "same", "valid", int, three ints or three pairs (before, after)
    stride, dilation, recurrent_dilation : int or (int, int, int)
    normalization : None, "group" or fastclstm.nn.normalization.Normalization
        Of the pre-activations: see `functional.convlstm3d`. In NumPy.
    data_format : "channels_last" or "channels_first"
        The latter: x (B, T, C, D, H, W), output (B, T, F, DO, HO, WO), states (B, F, DO, HO, WO).
    in_channels, out_channels, leaky_relu_slope, num_layers, use_bias, unit_forget_bias, kernel_initializer, \
recurrent_initializer, bias_initializer, kernel_regularizer, recurrent_regularizer, bias_regularizer, \
kernel_constraint, recurrent_constraint, bias_constraint, activation, recurrent_activation, output_activation, \
padding_mode, dropout, recurrent_dropout, dtype, seed, engine, algorithm, return_sequences, return_state, \
go_backwards, stateful, bidirectional, merge_mode, zero_output_for_mask, time_major, time_dropout, activity_regularizer
        As in `ConvLSTM2D`.

    Attributes
    ----------
    cells : tuple of ConvLSTM3DCell
    state_gradients, states
        As in `ConvLSTM2D`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> ConvLSTM3D(1, 4, 3, seed=0, engine="reference")(np.zeros((1, 5, 3, 8, 8, 1))).shape
    (1, 5, 3, 8, 8, 4)
    """

    _rank: ClassVar[int] = 3
    _cell_class = ConvLSTM3DCell
