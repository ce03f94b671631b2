"""ConvLSTM2DCell: one ConvLSTM layer, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.convlstm_gates import ConvLSTMGates
from fastclstm.layers.place import Place


@dataclass(eq=False, repr=False)
class ConvLSTM2DCell(ConvLSTMGates):
    """One ConvLSTM layer, one time step at a time: ``h, c = cell(x_t, h, c)``.

    With ``z = kernel * x + recurrent_kernel * h + bias`` split into z_i, z_f, z_g, z_o on its last axis:
    ``i, f, o = σ(z_i), σ(z_f), σ(z_o)``, ``g = tanh(z_g)``, ``c' = f∘c + i∘g``, ``h' = o∘tanh(c')``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int)
        Of the input's convolution.
    padding, stride
        Of the input's convolution, as in `ConvLSTM2D`; the hidden state's is always "same" with stride 1.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvLSTM2D`, without effect: the LeakyReLU stands between stacked layers only.
    use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, \
recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, activation, \
recurrent_activation, output_activation, dilation, padding_mode, recurrent_kernel_size, recurrent_dilation, peephole, \
peephole_size, peephole_initializer, normalization, frame_size, cell_clip, dropout, recurrent_dropout, data_format, \
dtype, seed, engine, algorithm
        As in `ConvLSTM2D`. Dropout masks are drawn anew by each training call.

    Attributes
    ----------
    kernel : array (KH, KW, C, 4F)
    recurrent_kernel : array (RKH, RKW, F, 4F)
    bias : array (4F,) or None
        The parameters, gates in the order i, f, g, o: read-only; assign a new array to change one.
    peephole_i, peephole_f, peephole_o : array (HO, WO, F), (F,) or (K, K, F, F), or None
    peephole_bias_i, peephole_bias_f, peephole_bias_o : array (F,) or None
        Of peephole="conv" with use_bias.
    gamma, beta : array (4F,) or (HO, WO, 4F), or None
        Of the normalization; where the convolutions are normalized separately gamma_x, beta_x and gamma_h, beta_h.
    moving_mean, moving_variance : array (4F,) or None
        Of normalization="batch"; separately with the endings _x and _h too. They have no gradients.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
    eq. 3, whose peepholes are peephole="elementwise".

    Examples
    --------
    >>> import numpy as np
    >>> cell = ConvLSTM2DCell(1, 4, 3, "same", 1, None, seed=0, engine="reference")
    >>> h, c = cell(np.ones((2, 8, 8, 1)), None, None)
    >>> h.shape, cell.weights["W_hi"].shape
    ((2, 8, 8, 4), (4, 4, 3, 3))
    """

    def step(self, x_t: Any, h: Any = None, c: Any = None, *, out: Any = None) -> tuple[Any, Any]:
        """Return the next (h, c), as `forward` does, or write them to `out` and return that.

        Parameters
        ----------
        x_t, h, c
            As in `forward`.
        out : (h, c), optional
            NumPy arrays (B, HO, WO, F) of the layer's dtype, writeable and C-contiguous, that receive the new states.
            Their memory is their own, but the new c may be the old c itself. See `functional.convlstm2d_step`.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer; an `out` that cannot be written as said, or with "channels_first".
        TypeError
            Anything but real arrays; an `out` for an x on a GPU.

        Examples
        --------
        >>> import numpy as np
        >>> cell = ConvLSTM2DCell(1, 4, 3, seed=0, engine="reference")
        >>> state = cell.step(np.ones((2, 8, 8, 1)))
        >>> spare = np.empty_like(state[0]), np.empty_like(state[1])
        >>> for frame in np.ones((5, 2, 8, 8, 1), np.float32):
        ...     state, spare = cell.step(frame, *state, out=spare), state
        """
        if out is None:
            return self.forward(x_t, h, c)
        if dispatch.on_gpu(x_t):
            raise TypeError("ConvLSTM2DCell: out is in the processor's memory, but x is on a GPU; leave it out")
        layout = self._layout(np.shape(x_t))
        if self.data_format == "channels_first" or not layout.batched:
            raise ValueError(
                "ConvLSTM2DCell: out needs data_format='channels_last' and x (B, H, W, C) with its batch axis; "
                "leave it out, or give that"
            )
        _, x, state = self._read(Place("ConvLSTM2DCell", x_t), x_t, (h, c))
        self._pullback = None
        return functional.convlstm2d_step(
            x, self.kernel, self.recurrent_kernel, self.bias, initial_state=state, out=out, **self._options()
        )
