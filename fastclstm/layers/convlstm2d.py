"""ConvLSTM2D: stacked ConvLSTM layers over whole sequences, in one direction or both."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell
from fastclstm.layers.convlstm_options import ConvLSTMLayer
from fastclstm.layers.gate_weights import GateWeights


@dataclass(eq=False, repr=False)
class ConvLSTM2D(ConvRecurrent, ConvLSTMLayer):
    """ConvLSTM layers, one on the other, over whole sequences.

    ``layer(x)`` takes x (B, T, H, W, C) and returns the last layer's hidden sequence (B, T, HO, WO, F) in the layer's
    dtype, as x's kind of array. Layer 0 takes `in_channels`, every other one the filters of the layer before. All
    numbers are those of `fastclstm.functional.convlstm2d`.

    Parameters
    ----------
    in_channels : int
        C. 0: there is no input convolution, and of x (B, T, H, W, 0) only the shape counts; on the processor alone.
    out_channels : int or sequence of int
        F: of every layer, or one number a layer.
    kernel_size : int, tuple (KH, KW), or list
        Of every layer's input convolution; a list (or any sequence of pairs) has one item, int or pair, a layer. So
        with two layers ``(3, 5)`` is 3 high and 5 wide twice, ``[3, 5]`` is 3×3, then 5×5.
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        Of every input convolution; "same" keeps ``ceil(H / stride)``. The hidden state's is always "same".
    stride, dilation : int or (int, int)
        Of every input convolution; at most one of them above 1. Each stacked layer strides anew.
    leaky_relu_slope : float, optional
        Slope below zero of the LeakyReLU on what one layer hands to the next, never on the last layer's output nor on
        states. None: none.
    num_layers : int
    use_bias : bool
    unit_forget_bias : bool
        The forget gate's part of the bias starts at 1.
    kernel_initializer, recurrent_initializer, bias_initializer : str, number, object or function
        Of `fastclstm.nn.initializers`; a number is that constant; functions are ``(shape, rng, dtype) -> array``.
    kernel_regularizer, recurrent_regularizer, bias_regularizer : str, object or pair of functions, optional
        Of `fastclstm.nn.regularizers`: `penalty` sums them up, `get_gradients` includes their gradients.
    kernel_constraint, recurrent_constraint, bias_constraint : str, object or function, optional
        Of `fastclstm.nn.constraints`: `apply_constraints` applies them.
    activation, recurrent_activation, output_activation : str or pair of functions (forward, derivative)
        On g; on i, f and o; on the new cell state (None: as `activation`).
    padding_mode : "zeros" or "circular"
        What the padding of all convolutions holds.
    recurrent_kernel_size : int, tuple or list, optional
        Of the hidden state's convolution, in the forms of kernel_size. None: the same as the input's.
    recurrent_dilation : int or (int, int)
        Of the hidden state's convolution.
    peephole : None, "elementwise", "channel" or "conv"
        What the gates see of the cell state: i and f of the old one, o of the new one. "elementwise" (Shi et al. 2015)
        has weights (HO, WO, F) and needs frame_size, "channel" (F,), "conv" convolves with kernels (K, K, F, F) and,
        with use_bias, adds biases (F,).
    peephole_size : int or (int, int), optional
        K of "conv". None: that of the hidden state's convolution.
    peephole_initializer : str, number, object or function
    normalization : None, "layer", "group", "batch" or fastclstm.nn.normalization.Normalization
        Of the pre-activations. "batch" takes the statistics of each step's batch while training, and moves its moving
        mean and variance towards them; otherwise, or where frozen, it uses those.
    frame_size : int or (int, int), optional
        (H, W) of x, for what has a weight for every pixel. Other frames are then refused.
    cell_clip : float, optional
        Limits every cell state to [-cell_clip, cell_clip].
    dropout, recurrent_dropout : float
        Share in [0, 1) of the input's and of the hidden state's values that each gate's convolution does not see while
        training: four masks (B, H, W, C) and four (B, HO, WO, F), drawn once a call, the same for all steps; what is
        kept is scaled by 1 / (1 - rate).
    data_format : "channels_last" or "channels_first"
        The latter: x (B, T, C, H, W), output (B, T, F, HO, WO), states (B, F, HO, WO).
    dtype : "float32" or "float64"
        Of parameters, states and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters and the same dropout.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference"; may be changed later. None: where x is.
    algorithm : str
        "auto", "direct" or "winograd": how the cpu engine convolves x and h, each by itself where that pays: see
        `fastclstm.functional.convlstm2d`; with engine="cuda" those of `conv2d` there. May be changed later.
    return_sequences : bool
        False: only the last step's output (B, HO, WO, F), and only that is kept in memory.
    return_state : bool
        Return ``(output, [(h, c), …])`` with the last states, one pair a layer, or two with bidirectional.
    go_backwards : bool
        Process the last frame first, through all layers; outputs stay in processing order.
    stateful : bool
        Start each call from the states that the call before ended with, sample by sample; see `reset_state`.
    bidirectional : bool
        Two cells a layer: one processes the frames forward, the other backward, whose outputs are flipped back.
    merge_mode : "concat", "sum", "mul", "ave" or None
        How the two directions' outputs become one, on which the next layer works: "concat" has 2F channels, the others
        F; None, for a single layer, returns the pair (forward, backward).
    zero_output_for_mask : bool
        Where a step is masked its output is zero, instead of the output before. The last output too, where the last
        step is masked.
    time_major : bool
        Sequences, masks and outputs have the time axis first: x (T, B, H, W, C), mask (T, B).
    time_dropout : float
        Probability in [0, 1] that a whole frame of x is set to zero while training, for all samples alike and without
        scaling: see `TimeDistributionCalculator`.
    recompute : bool
        A training call keeps only states, and `backward` computes the rest again: a fraction of the memory for about a
        third more time, and the same gradients. See `functional.convlstm2d_vjp`.
    activity_regularizer : str, object or pair of functions, optional
        Penalty on the output of a training call, divided by the size of the batch; a part of `penalty`, whose gradient
        `backward` adds.

    Attributes
    ----------
    cells : tuple of ConvLSTM2DCell
        The layers' parameters: ``cells[l].kernel``, ``.recurrent_kernel``, ``.bias``, ``.weights``; with bidirectional
        those of each layer's forward direction, then of its backward direction.
    state_gradients : list of (dh, dc), optional
        Gradients of initial_state that the last `backward` left; None before, or where no initial state was given. A
        cell for which none was given has none either.
    states : list of (h, c), optional
        Where stateful: what the next call starts from.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network", NeurIPS 2015 (eq. 3); the dropout of Gal & Ghahramani, "A Theoretically
    Grounded Application of Dropout in Recurrent Neural Networks", NeurIPS 2016, with a mask for each gate.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ConvLSTM2D(1, 32, 3, 1, 1, 0.2, 1, seed=0, engine="reference")
    >>> layer.forward(np.zeros((1, 10, 32, 32, 1))).shape
    (1, 10, 32, 32, 32)
    >>> layer.weights["W_xi"].shape
    (32, 1, 3, 3)
    >>> layer
    ConvLSTM2D(in_channels=1, out_channels=32, kernel_size=(3, 3), padding=1, leaky_relu_slope=0.2, seed=0, \
engine='reference')
    """

    FLAGS: ClassVar[tuple[str, ...]] = (*ConvRecurrent.FLAGS, "recompute")
    CHANGEABLE: ClassVar[frozenset[str]] = ConvRecurrent.CHANGEABLE | {"recompute"}
    _cell_class = ConvLSTM2DCell

    _: KW_ONLY
    recompute: bool = False

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`.

        Stacked layers have their number before each name, 0.W_xi; directions their name, forward.W_xi, 0.forward.W_xi.
        """
        prefixes = (name.removeprefix("layers.0").removeprefix("layers.").removeprefix(".") if self.num_layers == 1
                    else name.removeprefix("layers.") for name in self._sublayers)  # fmt: skip
        return GateWeights({f"{p}." if p else "": cell for p, cell in zip(prefixes, self.cells, strict=True)})

    def _run_options(self) -> dict[str, Any]:
        return {"recompute": self.recompute}

    def _knows_gpu(self, training: bool) -> bool:
        return super()._knows_gpu(training) and not (training and self._activity_regularizer is not None)
