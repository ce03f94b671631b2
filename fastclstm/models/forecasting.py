"""Networks that read frames and make those that follow: what `EncoderForecaster` and `MultiscaleForecaster` share.

An encoder's chain of layers reads the frames; the last states of its recurrent layers are those that the recurrent
layers of the forecaster's chain start from. What was decided:

- Both are graphs (`fastclstm.models.stages`), run forward and backward by `Network`. A layer that is not recurrent is
  applied frame by frame.
- A forecaster that reads no frames makes all steps in one run of whole sequences. One that reads its own frames makes
  them one by one; so it does in training, unless every input is a true frame (teacher forcing).
- Where some are, as in scheduled sampling, each sample draws anew at each step, from the training's seed, epoch and
  step alone: a resumed training draws the same.
- The gradient flows through every frame that was fed back, as Bengio et al. do not, who cut it there; PyTorch does,
  where nobody writes ``detach``.
- Patches are cut and put together at the network's ends, so that frames fed back stay in patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.engines import remembered
from fastclstm.layers.base import Layer, penalized, without_input_gradient
from fastclstm.layers.container import parts, without_penalties
from fastclstm.layers.layout import Layout
from fastclstm.layers.place import HOST, Place, place_of
from fastclstm.layers.rearranging import DepthToSpace, SpaceToDepth
from fastclstm.layers.symbolic import leaves
from fastclstm.layers.time_distributed import TimeDistributed
from fastclstm.models.graph import Slot, paired
from fastclstm.models.model import Model
from fastclstm.models.network import Calls
from fastclstm.models.stages import Stages
from fastclstm.models.summary import table
from fastclstm.nn import is_number
from fastclstm.nn.described import Described, describe
from fastclstm.spec import Shape, expect_shape, integers
from fastclstm.training.batches import Batch
from fastclstm.training.history import History
from fastclstm.training.trainable import Trainable

ENCODED_STEPS = 16
"""Time steps read at once where nothing is kept for backward."""

_LARGEST_MULTIPLE = 64
"""Of pixels that frames are tried to be padded to, where a message tells which sizes would do."""

States = list[tuple[Any, ...]]
"""One tuple of arrays a cell, (h, c) of a ConvLSTM."""

Share = bool | float | Callable[[int], float]
"""Of a forecaster's inputs that are true frames, by the number of the epoch where it is a function."""


class Forecasting(Trainable):
    """A network of an encoder and a forecaster; a subclass calls `_assemble` with their layers."""

    _op: ClassVar[str]
    _comes_back: ClassVar[bool]
    """Whether the frames made must be as large as those read."""

    in_channels: int
    data_format: str
    dtype: Any
    _noise: np.random.Generator | None = None
    """Where that of inputs is drawn from."""

    def _assemble(self, stages: Stages, named: Mapping[str, Layer], patch: Sequence[int]) -> None:
        """Take the graphs, and the layers by the names that their parameters are to have."""
        self._stages, self._tied, self._reading = stages, stages.tied, stages.reading
        self._sublayers = dict(named)
        self._patch = tuple(patch)
        self._cut, self._join = SpaceToDepth(self._patch), DepthToSpace(self._patch)
        self._taken: set[tuple[int, int]] = set()
        self._forced: Share = False
        self._moment = (0, 0, 0)

    def forecast(self, frames: Any, steps: int, states: States | None = None) -> Any:
        """Return the `steps` frames that follow, each computed once from the states before it.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        steps : int
        states : list of (h, c), optional
            What `encode` returned for the frames before these.

        Returns
        -------
        array (B, steps, H, W, C), or (B, steps, C, H, W)
            As the kind of array that `frames` is.

        Raises
        ------
        ValueError
            Shapes that do not fit the model.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        layout, x = self._read_frames(frames, training=False)
        (steps,) = integers(self._op, "steps", steps, 1, 1)
        place, last = layout.place, x[:, -1:]
        arrays = self._encode(place, x[:, :-1] if self._tied else x, self._flat(layout, states))
        arrays = self._stages.to_forecaster(arrays)
        if self._reading != "frames":
            made, *_ = self._make(place, self._start(x, arrays, steps), arrays, training=False)[0]
        else:
            made = None
            for step in range(steps):
                (last, *arrays), _ = self._make(place, last, arrays, training=False)
                if made is None:
                    made = np.empty_like(last, shape=(len(last), steps, *last.shape[2:]))
                made[:, step] = last[:, 0]
        return place.restore(layout.write(self._whole(made)))

    def encode(self, frames: Any, states: States | None = None) -> States:
        """Return the encoder's states (h, c) after `frames`, channels-last, one pair a cell.

        So a stream of frames is read as it comes: hand the states on with each next piece of it.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        states : list of (h, c), optional
            Those after the frames before.

        Raises
        ------
        ValueError
            Shapes that do not fit the model.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.

        Examples
        --------
        >>> import numpy as np
        >>> from fastclstm import EncoderForecaster
        >>> model = EncoderForecaster(1, (4, 2), 3, seed=0, engine="reference")
        >>> frames = np.random.default_rng(0).random((1, 5, 8, 8, 1))
        >>> states = model.encode(frames[:, :3])
        >>> np.array_equal(model.forecast(frames[:, 3:], 2, states), model.forecast(frames, 2))
        True
        """
        layout, x = self._read_frames(frames, training=False)
        place = layout.place
        arrays = self._encode(place, x, self._flat(layout, states))
        if not layout.batched:
            arrays = [array[0] for array in arrays]
        return self._stages.by_cell([place.restore(array) if place.on_gpu else array for array in arrays])

    def forward(
        self, frames: Any, steps: int | None = None, training: bool = False, targets: Any = None, forced: Any = None
    ) -> Any:
        """Return the frames that follow; while training, keep what `backward` needs.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        steps : int, optional
            None: as many as `targets` has.
        training : bool
        targets : array (B, steps, H, W, C), or (B, steps, C, H, W), optional
            The true frames. While training they are the forecaster's inputs (teacher forcing), else not used.
        forced : array of bool (B, steps - 1), optional
            While training with targets: where the input of the next step is the true frame; elsewhere it is the one
            made. None: everywhere.

        Returns
        -------
        array (B, steps, H, W, C), or (B, steps, C, H, W)

        Raises
        ------
        ValueError
            Shapes that do not fit the model; neither steps nor targets; targets for a forecaster that reads no frames.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        op, (layout, x) = self._op, self._read_frames(frames, training)
        truth = None if targets is None else self._read_targets(layout, targets)
        if steps is None:
            if truth is None:
                raise ValueError(f"{op}: give steps, the number of frames to make, or targets")
            steps = truth.shape[1]
        (steps,) = integers(op, "steps", steps, 1, 1)
        if truth is not None and self._reading == "frames":
            expect_shape(op, "targets", truth.shape, (len(x), steps, *x.shape[2:]), "channels-last, as the frames made")
        self._pullback = None
        if not training:
            return self.forecast(frames, steps)
        if truth is not None and self._reading != "frames":
            raise ValueError(f"{op}: targets are inputs of a forecaster that reads frames, but inputs is "
                             f"{self._reading!r}; leave targets out, and teacher_forcing")  # fmt: skip
        place = layout.place
        arrays, pull_encoder = self._encode_training(place, x[:, :-1] if self._tied else x)
        y, pull = self._forecast_training(place, x, self._stages.to_forecaster(arrays), steps, truth, forced)
        y = layout.write(self._whole(y))

        def pullback(dy: Any) -> Any:
            cotangent = place.read("dy", dy, self.dtype)
            expect_shape(op, "dy", cotangent.shape, y.shape, "the shape of the output")
            made = self._patches(layout.read("dy", cotangent, sequence=True))
            sums: dict[tuple[int, str], Any] = {}
            dlast, dstates = pull(made, sums)
            dx = pull_encoder(self._stages.to_encoder(dstates), sums)
            self._keep_sums(sums)
            if not self.input_gradient:
                return None
            whole = np.zeros_like(x)
            if dx is not None:
                whole[:, : dx.shape[1]] += dx
            if dlast is not None:
                whole[:, -1:] += dlast
            return place.restore(layout.write(self._whole(whole)))

        self._pullback = pullback
        return place.restore(y)

    def backward(self, dy: Any) -> Any:
        """Return the gradient of the last call's frames, given dy of the frames it made.

        It flows back through the whole roll-out, also from each input to the frame that it was. `targets` get none.
        `encode` and `forecast` in between do no harm.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(dy)

    def fit(self, x: Any, y: Any = None, *, teacher_forcing: Share = False, **options: Any) -> History:
        """Fit the parameters to frames x and the frames y that follow: see `Sequential.fit`, for all `options` too.

        Parameters
        ----------
        x, y : array (N, T, H, W, C) and (N, steps, H, W, C), or batches of these
        teacher_forcing : bool, number in [0, 1], or function
            Of a forecaster that reads frames: while training, its inputs are the true frames, which is faster and
            learns the next frame; else each is the frame that it made itself, as in `forecast`. A number is the
            probability of the former, drawn for each sample and step; a function, such as one of
            `fastclstm.nn.schedules`, returns it for the number of the epoch, from 0 on: scheduled sampling.

        References
        ----------
        Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks", NeurIPS 2015.

        Examples
        --------
        >>> import numpy as np
        >>> from fastclstm import EncoderForecaster
        >>> from fastclstm.nn.schedules import ExponentialDecay
        >>> frames = np.random.default_rng(0).random((4, 6, 8, 8, 1))
        >>> model = EncoderForecaster(1, 2, 3, seed=0, engine="reference")
        >>> history = model.fit(frames[:, :3], frames[:, 3:], epochs=2, seed=0, quiet=True,
        ...                     teacher_forcing=ExponentialDecay(1.0, decay_steps=1, decay_rate=0.5))
        >>> len(history["loss"])
        2
        """
        if teacher_forcing is not False and self._reading != "frames":
            raise ValueError(f"{self._op}: teacher_forcing is for a forecaster that reads frames, but inputs is "
                             f"{self._reading!r}; leave it out")  # fmt: skip
        _share(self._op, teacher_forcing, 0)
        self._forced = teacher_forcing
        return super().fit(x, y, **options)

    def _unfit(self) -> str | None:
        if type(self).forward is not Forecasting.forward:
            return None
        return ("must be told how many frames to make; call it by itself, or give a subclass of it a forward(frames, "
                "training=False) and an output_shape that know the number")  # fmt: skip

    def output_shape(self, input_shape: Sequence[int], steps: int = 1) -> Shape:
        """Return the shape of `steps` frames made from frames of `input_shape`."""
        shape = tuple(input_shape)
        layout = self._checked_layout(shape, "frames")
        made: Shape = self._shapes(layout, shape, steps)[1]
        return layout.shape(self._join.output_shape(made))

    def summary(self, input_shape: Sequence[int] | None = None, steps: int = 1) -> str:
        """Return a table of the layers: output shapes, if the frames' is given, and numbers of parameters.

        The batch of `input_shape` may be None. Where only the last hidden state is handed on, the shape is that.

        Examples
        --------
        >>> from fastclstm import EncoderForecaster
        >>> print(EncoderForecaster(1, (4, 2), 3).summary((None, 5, 8, 8, 1), steps=3))
        part          layer       output shape        parameters
        ------------  ----------  ------------------  ----------
        encoder       ConvLSTM2D  (None, 8, 8, 2)          1,176
        forecaster.0  ConvLSTM2D  (None, 3, 8, 8, 4)         736
        forecaster.1  ConvLSTM2D  (None, 3, 8, 8, 2)         440
        head          Conv2D      (None, 3, 8, 8, 1)           7
        ------------  ----------  ------------------  ----------
        2,359 parameters, 2,359 trainable, 0.0 MB
        """
        if input_shape is None:
            return table(self, self._sublayers, None, "part")
        shape = tuple(input_shape)
        known = (1, *shape[1:]) if shape and shape[0] is None else shape
        layout = self._checked_layout(known, "frames")
        made, _ = self._shapes(layout, known, steps)
        shapes = [layout.shape(made[id(layer)]) for layer in self._sublayers.values()]
        return table(self, self._sublayers, [(*shape[:1], *each[1:]) if layout.batched else each for each in shapes],
                     "part")  # fmt: skip

    def _shapes(self, layout: Layout, shape: Shape, steps: int) -> tuple[dict[int, Shape], Shape]:
        """Return the shape of what each layer returns, by its id, and of the frames made, channels-last, in patches."""
        made: dict[int, Shape] = {}
        return made, self._frames_made(layout.read_shape("frames", shape, sequence=True), steps, made)

    def _frames_made(self, frames: Shape, steps: int, made: dict[int, Shape]) -> Shape:
        """Return the shape of the frames made, in patches; write what each layer returns to `made`.

        Raises
        ------
        ValueError
            Frames (B, T, H, W, C) that a layer does not take, whose states are not of the size that the forecaster
            makes of them, or that do not come back to their size where they must.
        """
        stages, frames = self._stages, self._cut.output_shape(frames)
        states = _shapes_of(stages.encoder, [frames], made)
        if self._reading == "frames":
            start = (frames[0], steps, *frames[2:])
        else:
            size = stages.by_cell(states)[-1][0][1:3] if stages.mirrored else frames[2:4]
            start = (frames[0], steps, *size, stages.inputs[-1] or 0)
        first, *_ = _shapes_of(stages.forecaster, [start, *stages.to_forecaster(states)], made)
        if self._comes_back and first[2:4] != frames[2:4]:
            back = self._join.output_shape(first)
            raise ValueError(f"those made of them would have {back[2]} × {back[3]}")
        return first

    def _expect_size(self, name: str, H: int, W: int) -> None:
        """Raise ValueError unless all layers take frames of H × W; it says which they take."""
        if (H, W) in self._taken:
            return

        def problem(H: int, W: int) -> str | None:
            try:
                self._frames_made((1, 1, H, W, self.in_channels), 1, {})
            except ValueError as error:
                return str(error)
            return None

        if told := problem(H, W):
            raise ValueError(f"{self._op}: {name} of {H} × {W} pixels do not fit: {told}{_remedy(problem, H, W)}")
        self._taken.add((H, W))

    def _check_batch(self, op: str, batch: Batch) -> None:
        if extra := [name for name in ("mask", "lengths") if name in batch]:
            raise ValueError(f"{op}: {self._op} takes no {' and no '.join(extra)}; sample_weight weighs frames")
        shape = batch["x"].shape
        if not self._layout(shape).batched:
            raise ValueError(f"{op}: x {shape} is one sequence, but samples are on the first axis; give x[np.newaxis]")
        if "y" in batch and self._reading == "frames":
            self._checked_layout(batch["y"].shape, "y", batched=True)

    def _begin_step(self, seed: int, epoch: int, step: int) -> None:
        self._moment = seed, epoch, step

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        x, y = batch["x"], batch["y"]
        share = _share(self._op, self._forced, self._moment[1]) if training else 0.0
        if share == 0:
            return self.forward(x, steps=y.shape[1], training=training)
        forced = None
        if share < 1:
            forced = np.random.default_rng(self._moment).random((len(x), y.shape[1] - 1)) < share
        return self.forward(x, training=True, targets=y, forced=forced)

    def _fit_options(self) -> dict[str, Any]:
        given = self._forced
        told: Any = given
        if not (isinstance(given, bool) or is_number(given)):
            told = describe(given) if isinstance(given, Described) else type(given).__name__
        return {"teacher_forcing": told}

    def _encode(self, place: Place, x: np.ndarray, states: Sequence[Any] | None) -> list[Any]:
        """Return the arrays of the encoder's states after channels-last frames x, in patches."""
        for start in range(0, x.shape[1], ENCODED_STEPS):
            piece = dispatch.contiguous(x[:, start : start + ENCODED_STEPS])
            graph = self._stages.encoder if states is None else self._stages.going_on
            states, _ = _run(graph, place, [piece, *(states or ())], training=False)
        return self._zero_states(x) if states is None else list(states)

    def _zero_states(self, x: np.ndarray) -> list[Any]:
        """Return zeros for states, where the only frame given is the forecaster's."""
        shapes = _shapes_of(self._stages.encoder, [(len(x), 1, *x.shape[2:])], {})
        return [np.zeros_like(x, shape=shape) for shape in shapes]

    def _encode_training(self, place: Place, x: np.ndarray) -> tuple[list[Any], Callable[..., Any]]:
        """Return the arrays of the states, and what pulls their gradients back to x, adding to the parameters' sums."""
        if x.shape[1] == 0:
            return self._zero_states(x), lambda dstates, sums: None
        graph = self._stages.encoder
        arrays, calls = _run(graph, place, [dispatch.contiguous(x)], training=True)

        def pull(dstates: Sequence[Any], sums: dict[tuple[int, str], Any]) -> Any:
            with ExitStack() as stack:
                if not self.input_gradient:
                    stack.enter_context(without_input_gradient(graph))
                if self._tied:  # their penalties have been counted
                    stack.enter_context(without_penalties(list(parts(graph))))
                return _pull(graph, calls, dstates, sums)[0]

        return arrays, pull

    def _forecast_training(
        self, place: Place, x: np.ndarray, arrays: list[Any], steps: int, truth: Any, forced: Any
    ) -> tuple[Any, Callable[..., tuple[Any, list[Any]]]]:
        """Return the frames made, and what pulls dy back to the last frame given and to the states before."""
        graph, last = self._stages.forecaster, dispatch.contiguous(x[:, -1:])
        whole = None
        if self._reading != "frames":
            whole = self._start(x, arrays, steps)
        elif truth is not None and forced is None:
            whole = np.concatenate([last, truth[:, :-1]], 1)
        if whole is not None:
            (made, *_), calls = self._make(place, whole, arrays, training=True)

            def pull_whole(dy: Any, sums: dict[tuple[int, str], Any]) -> tuple[Any, list[Any]]:
                reads = self._reading == "frames" and self.input_gradient
                with ExitStack() as stack:
                    if not reads:
                        stack.enter_context(without_input_gradient(graph))
                    dx, *dstates = _pull(graph, calls, [dy, *[None] * len(arrays)], sums)
                return dx[:, :1] if reads else None, dstates

            return made, pull_whole
        chosen = None if truth is None else self._chosen(forced, (len(x), steps - 1))
        pieces, records = [], []
        with remembered.passage(steps):
            for step in range(steps):
                if step and chosen is not None and chosen[:, step - 1].any():
                    here = chosen[:, step - 1].reshape(-1, 1, 1, 1, 1)
                    mixed = np.where(here, dispatch.to_numpy(truth[:, step - 1 : step]), dispatch.to_numpy(last))
                    last = place.bring(mixed)
                (last, *arrays), calls = self._make(place, last, arrays, training=True)
                pieces.append(last)
                records.append(calls)

        def pull(dy: Any, sums: dict[tuple[int, str], Any]) -> tuple[Any, list[Any]]:
            dstates: list[Any] = [None] * len(arrays)
            dlast, layers = None, list(parts(graph))
            with remembered.passage(steps) as passage:
                for step in reversed(range(steps)):
                    passage.more = step > 0
                    part = dispatch.contiguous(dy[:, step : step + 1])
                    if dlast is not None:
                        if chosen is not None and chosen[:, step].any():
                            own = ~chosen[:, step].reshape(-1, 1, 1, 1, 1)
                            dlast = place.bring(np.where(own, dispatch.to_numpy(dlast), np.zeros((), dlast.dtype)))
                        part = part + dlast
                    with ExitStack() as stack:
                        if step:  # a penalty counts once
                            stack.enter_context(without_penalties(layers))
                        elif not self.input_gradient:
                            stack.enter_context(without_input_gradient(graph))
                        dlast, *dstates = _pull(graph, records[step], [part, *dstates], sums)
            return dlast, dstates

        return np.concatenate(pieces, 1), pull

    def _chosen(self, forced: Any, shape: Shape) -> np.ndarray:
        array = dispatch.as_numpy(self._op, "forced", forced)
        expect_shape(self._op, "forced", array.shape, shape, "(batch, steps - 1)")
        return array != 0

    def _make(self, place: Place, x: Any, arrays: Sequence[Any], training: bool) -> tuple[list[Any], Calls]:
        """Run the forecaster over inputs x from states on: [the frames made, the states after them]."""
        return _run(self._stages.forecaster, place, [x, *arrays], training)

    def _start(self, x: np.ndarray, arrays: Sequence[Any], steps: int) -> Any:
        """Return what a forecaster reads that is given no frames, in `steps` steps."""
        size = arrays[0].shape[1:3] if self._stages.mirrored else x.shape[2:4]
        shape = (len(x), steps, *size, self._stages.inputs[-1])
        if self._noise is not None:
            return np.zeros_like(x, shape=shape) + self._noise.standard_normal(shape).astype(x.dtype)
        return np.zeros_like(x, shape=shape)

    def _keep_sums(self, sums: Mapping[tuple[int, str], Any]) -> None:
        """Keep the gradients of the parameters for `get_gradients`, under this network's names."""
        owners, kept = self._owners(), self.trainable_parameters if self.store_gradients else ()
        self._gradients = {}
        for name in kept:
            owner, key = owners[name]
            gradient = sums.get((id(owner), key))
            if gradient is None and owner.store_gradients:
                gradient = penalized(owner, key, np.zeros_like(owner._parameters[key]))
            if gradient is not None:
                self._gradients[name] = gradient

    def _flat(self, layout: Layout, states: States | None) -> list[Any] | None:
        """Return a caller's states as arrays of the network's dtype with a batch axis."""
        if states is None:
            return None
        cells = self._stages.cells
        sizes = [len(cell) if isinstance(cell, tuple | list) else -1 for cell in states]
        if sizes != list(cells):
            raise ValueError(f"{self._op}: states must be what encode returned: a list of {len(cells)} tuples of "
                             f"arrays, one a cell")  # fmt: skip
        arrays = [layout.place.read("states", array, self.dtype) for array in leaves(states)]
        return [array if layout.batched else array[None] for array in arrays]

    def _read_frames(self, frames: Any, training: bool) -> tuple[Layout, np.ndarray]:
        """Return how a call's arrays lie, and its frames as a channels-last array of the model's dtype, in patches.

        It computes where the frames are; of those on a GPU the layers within say what they do not know.
        """
        place = place_of(self, frames, training, refuses=False)
        array = place.read("frames", frames, self.dtype)
        layout = self._layout(array.shape, place)
        self._checked_layout(array.shape, "frames", layout.batched)
        return layout, self._patches(layout.read("frames", array, sequence=True))

    def _read_targets(self, layout: Layout, targets: Any) -> np.ndarray:
        array = layout.place.read("targets", targets, self.dtype)
        if self._reading == "frames":
            self._checked_layout(array.shape, "targets", layout.batched)
        return self._patches(layout.read("targets", array, sequence=True))

    def _patches(self, x: np.ndarray) -> np.ndarray:
        return x if self._patch == (1, 1) else self._cut(x)

    def _whole(self, x: np.ndarray) -> np.ndarray:
        return x if self._patch == (1, 1) else self._join(x)

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where the frames have `shape`."""
        channel_axis = 1 if self.data_format == "channels_first" else -1
        batched = len(shape) != 4 or shape[channel_axis] != self.in_channels
        return Layout(self._op, self.dtype, self.data_format, batched=batched, place=place)

    def _checked_layout(self, shape: Shape, name: str, batched: bool | None = None) -> Layout:
        """Return how frames of `shape` lie; raise ValueError unless the model takes them."""
        op, layout = self._op, self._layout(shape)
        if batched is not None:
            layout = replace(layout, batched=batched)
        rank = 4 + layout.batched
        if len(shape) != rank:
            raise ValueError(f"{op}: {name} must be ({layout.axes(True)}), got {len(shape)}D {shape}"
                             + layout.hint(rank - len(shape)))  # fmt: skip
        channels, steps = shape[-1 if self.data_format == "channels_last" else -3], shape[int(layout.batched)]
        if channels != self.in_channels or steps < 1:
            raise ValueError(
                f"{op}: {name} must have {self.in_channels} channels, as in_channels says, and at least one time step, "
                f"got shape {shape}"
            )
        self._expect_size(name, *layout.read_shape(name, shape, sequence=True)[2:4])
        return layout


def _run(graph: Model, place: Place, arrays: Sequence[Any], training: bool) -> tuple[list[Any], Calls]:
    """Run a graph, whose shapes need no check, over arrays in the order of its inputs."""
    values = dict(zip(graph._graph.inputs, arrays, strict=True))
    made, calls = graph._run(place, values, None, training)
    return [place.bring(array) for array in made], calls


def _pull(graph: Model, calls: Calls, dy: Sequence[Any], sums: dict[tuple[int, str], Any]) -> list[Any]:
    """Pull the gradients of a graph's outputs back to its inputs; add those of the parameters to `sums`, by owner."""
    gradients: dict[Slot, Any] = {}

    def add(slot: Slot, part: Any) -> None:
        if part is not None:
            gradients[slot] = part

    paired(graph._graph.outputs, list(dy), add)
    pulled = graph._pull(calls, gradients)
    owners = graph._owners()
    for name, gradient in graph._kept_gradients().items():
        owner, key = owners[name]
        place = id(owner), key
        sums[place] = sums[place] + gradient if place in sums else gradient
    return [pulled.get(slot) for slot in graph._graph.inputs]


def _remedy(problem: Callable[[int, int], str | None], H: int, W: int) -> str:
    """Return what to do about frames of H × W for which there is a problem: the next multiples that have none."""

    def padded(rows: int, columns: int) -> tuple[int, int]:
        return -(-max(H, 1) // rows) * rows, -(-max(W, 1) // columns) * columns

    for n in range(2, _LARGEST_MULTIPLE + 1):
        if problem(*padded(n, n)) is None:
            rows = next(m for m in range(1, n + 1) if problem(*padded(m, n)) is None)
            columns = next(m for m in range(1, n + 1) if problem(*padded(rows, m)) is None)
            return "; pad them to {} × {}".format(*padded(rows, columns))
    return ""


def _shapes_of(graph: Model, given: Sequence[Shape], made: dict[int, Shape]) -> list[Shape]:
    """Return the shapes of a graph's outputs, and write those that its layers return to `made`, by their ids."""
    shapes = graph._all_shapes(dict(zip(graph._graph.inputs, given, strict=True)))
    for step in graph._graph.steps:
        layer = step.layer.layer if isinstance(step.layer, TimeDistributed) else step.layer
        made[id(layer)] = made[id(step.layer)] = shapes[next(iter(leaves(step.y)))]
    return [shapes[slot] for slot in graph._graph.outputs]


def _share(op: str, given: Share, epoch: int) -> float:
    """Return the share of inputs that are true frames in an epoch."""
    value = given(epoch) if callable(given) else float(given) if isinstance(given, bool) else given
    if not (is_number(value) and 0 <= value <= 1):
        where = f" of epoch {epoch}" if callable(given) else ""
        raise ValueError(f"{op}: teacher_forcing must be True, False, a number in [0, 1] or a function that returns "
                         f"one for an epoch, got {value!r}{where}")  # fmt: skip
    return float(value)
