"""ConvGRU2D: stacked convolutional GRUs over whole sequences, and the cell of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastclstm.layers.cell_options import GRUOptions
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.recurrent_cell import StepOfH
from fastclstm.spec import Shape


@dataclass(eq=False, repr=False)
class ConvGRU2DCell(StepOfH, GRUOptions):
    """One convolutional GRU, one time step at a time: ``h = cell(x_t, h)``.

    All numbers are those of `fastclstm.functional.convgru2d`, which has the equations.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int)
        Of the input's convolution.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvGRU2D`, without effect.
    padding, stride, reset_after, use_bias, kernel_initializer, recurrent_initializer, bias_initializer, \
kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, \
activation, recurrent_activation, dilation, padding_mode, recurrent_kernel_size, recurrent_dilation, normalization, \
dropout, recurrent_dropout, data_format, dtype, seed, engine, algorithm
        As in `ConvGRU2D`. Dropout masks are drawn anew by each training call.

    Attributes
    ----------
    kernel : array (KH, KW, C, 3F)
        The parameters, gates in the order z, r, n: read-only; assign a new array to change one.
    recurrent_kernel : array (RKH, RKW, F, 3F)
    bias : array (2, 3F), of the input and of the hidden state; without reset_after (3F,); or None
    gamma, beta : array (3F,) or None
        Of the normalization.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> cell = ConvGRU2DCell(1, 4, 3, seed=0, engine="reference")
    >>> cell(np.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 4)
    """

    _operation = "convgru2d"
    _cell = "gru"

    def _bias_shape(self) -> Shape:
        width = 3 * self.out_channels
        return (2, width) if self.reset_after else (width,)

    def _options(self, learning: bool = False) -> dict[str, Any]:
        return super()._options(learning) | {"reset_after": self.reset_after}


@dataclass(eq=False, repr=False)
class ConvGRU2D(ConvRecurrent, GRUOptions):
    """Convolutional GRUs, one on the other, over whole sequences.

    ``layer(x)`` takes x (B, T, H, W, C) and returns the last layer's hidden sequence (B, T, HO, WO, F) in the layer's
    dtype, as x's kind of array. All numbers are those of `fastclstm.functional.convgru2d`, which has the equations. On
    the processor alone: arrays on a GPU are refused.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, padding, stride, leaky_relu_slope, num_layers
        As in `ConvLSTM2D`.
    activation, recurrent_activation : str or pair of functions (forward, derivative)
        On n; on z and r.
    reset_after : bool
        Whether r multiplies what the recurrent kernel makes of h, as in Keras's GRU, cuDNN and aserdega's ConvGRU, with
        biases of the input and of the hidden state; or h before it is convolved, as Ballas et al. 2016, jhhuang96,
        U-TAE, mlcast and most others do. The former is faster: a step is one convolution of h instead of two.
    normalization : None, "group" or fastclstm.nn.normalization.Normalization
        Of the pre-activations, with reset_after=False: see `functional.convgru2d`. In NumPy.
    dropout, recurrent_dropout : float
        As in `ConvLSTM2D`, with three masks, one a gate.
    use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, recurrent_regularizer, \
bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dilation, padding_mode, \
recurrent_kernel_size, recurrent_dilation, data_format, dtype, seed, engine, algorithm, return_sequences, \
go_backwards, stateful, bidirectional, merge_mode, zero_output_for_mask, time_major, time_dropout, activity_regularizer
        As in `ConvLSTM2D`.
    return_state : bool
        Return ``(output, [(h,), …])`` with the last states, one a layer, or two with bidirectional.

    Attributes
    ----------
    cells : tuple of ConvGRU2DCell
        The layers' parameters; with bidirectional those of each layer's forward direction, then of its backward one.
    state_gradients : list of (dh,), optional
        Gradients of initial_state that the last `backward` left.
    states : list of (h,), optional
        Where stateful: what the next call starts from.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Ballas et al., "Delving Deeper into Convolutional Networks for Learning Video Representations", ICLR 2016; Shi et
    al., "Deep Learning for Precipitation Nowcasting: A Benchmark and A New Model", NeurIPS 2017.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ConvGRU2D(1, 32, 3, seed=0, engine="reference")
    >>> layer(np.zeros((1, 10, 32, 32, 1))).shape
    (1, 10, 32, 32, 32)
    """

    _cell_class = ConvGRU2DCell
