"""Long sequences from file to file, a few time steps at a time, through a layer's state."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastclstm.io import numpy_files
from fastclstm.io.files import replacing
from fastclstm.layers import ConvLSTM2D

States = list[tuple[Any, Any]]
"""One pair (h, c) a stacked layer."""


def run_file(
    source: Path,
    weights: Path,
    target: Path,
    *,
    chunk: int = 16,
    state_source: Path | None = None,
    state_target: Path | None = None,
    engine: str | None = None,
    quiet: bool = True,
) -> tuple[int, ...]:
    """Run a saved layer over the sequences of a ``.npy`` file and write its output to another.

    The input is memory-mapped and passes through the layer in chunks of time steps, the state being handed on, so that
    only one chunk is in memory; bidirectional layers, which begin with the last frame too, take all at once. The result
    has the bits that one call on the whole would give, as long as it holds no NaN (after one the cpu engine may compute
    in another way). Files appear complete or not at all; what was there before stays until then.

    Parameters
    ----------
    source : path of an array (T, H, W), (T, H, W, C) or (B, T, H, W, C)
        With a channels-first layer C stands before H. Any real dtype.
    weights : path
        What `ConvLSTM2D.save` wrote. With return_sequences the whole hidden sequence is written, else the last output.
    target : path
        Written as (T, HO, WO, F) or (HO, WO, F), after a batch axis where the input has one.
    chunk : int
        Time steps computed at once; at least 1.
    state_source, state_target : path of a ``.npz``, optional
        The states before the first and after the last step: arrays h0, c0, h1, c1 … (B, HO, WO, F), a pair a layer.
    engine : str, optional
        Instead of the one the layer was saved with.
    quiet : bool
        Show no progress bar; there is none either where stderr is not a terminal.

    Returns
    -------
    tuple of int
        Shape of the array written.

    Raises
    ------
    ValueError, TypeError
        A file that is not what it should be, an array that does not fit the layer, an output that is an input too.
    OSError
        A file that cannot be read or written.
    """
    if chunk < 1:
        raise ValueError(f"run: chunk must be at least 1 time step, got {chunk}")
    _check_distinct((source, weights, state_source), (target, state_target))
    options = {"return_state": True, "time_major": False, "stateful": False}
    layer = ConvLSTM2D.load(weights, **options, **({} if engine is None else {"engine": engine}))
    if layer.bidirectional and layer.merge_mode is None:
        raise ValueError(f"run: {weights} has merge_mode=None: two outputs; save the layer with another merge_mode")
    x, batched = _open_sequences(source, channel_axis=-1 if layer.data_format == "channels_last" else -3)
    states = None if state_source is None else _load_states(state_source)
    with ExitStack() as files:
        new_state = files.enter_context(replacing(state_target)) if state_target else None
        new = files.enter_context(replacing(target))
        try:
            shape, states = _stream(layer, x, states, new, chunk, batched, quiet)
            if new_state is not None:
                with new_state.open("wb") as file:
                    np.savez(file, **{f"{name}{n}": a for n, pair in enumerate(states)
                                      for name, a in zip("hc", pair, strict=True)})  # fmt: skip
        except OSError as error:  # a full disk, say: writing to an open file does not name it
            raise OSError(error.errno, error.strerror, str(target)) from error
    return shape


def _check_distinct(inputs: tuple[Path | None, ...], outputs: tuple[Path | None, ...]) -> None:
    """Raise ValueError where an output would overwrite an input or another output."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is not None:
            if path.resolve() in taken:
                raise ValueError(f"run: writing {path} would overwrite an input or another output; choose another name")
            taken.add(path.resolve())


def _open_sequences(path: Path, channel_axis: int) -> tuple[np.ndarray, bool]:
    """Memory-map the sequences as (B, T, H, W, C); also tell whether the file has a batch axis."""
    x = numpy_files.read_npy(path)
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"run: {path} has shape {x.shape} but must be (T, H, W), (T, H, W, C) or (B, T, H, W, C): "
            f"time, height, width and channels, after a batch axis"
        )
    if x.ndim == 3:
        return np.expand_dims(x, channel_axis)[np.newaxis], False
    return (x, True) if x.ndim == 5 else (x[np.newaxis], False)


def _load_states(path: Path) -> States:
    try:
        pairs = [(f"h{n}", f"c{n}") for n in range((len(numpy_files.names(path)) + 1) // 2)]
        states = numpy_files.read_npz(path, chain.from_iterable(pairs))
    except ValueError as error:
        raise ValueError(f"run: {path} is not a .npz file of states h0, c0, h1, c1, …: {error}") from error
    return [(states[h], states[c]) for h, c in pairs]


def _stream(
    layer: ConvLSTM2D, x: np.ndarray, states: States | None, target: Path, chunk: int, batched: bool, quiet: bool
) -> tuple[tuple[int, ...], States]:
    """Write the layer's output for x to `target`; return its shape and the last states."""
    from tqdm import tqdm

    steps = x.shape[1]
    if layer.bidirectional:
        chunk = max(steps, 1)
    writer: _SequenceWriter | None = None
    last_states: Any = states
    with target.open("wb") as file, tqdm(total=steps, unit="step", disable=True if quiet else None) as progress:
        for start in range(0, max(steps, 1), chunk):
            stop = min(start + chunk, steps)
            frames = x[:, steps - stop : steps - start] if layer.go_backwards else x[:, start:stop]
            output, last_states = layer(frames, initial_state=last_states)
            if layer.return_sequences:
                writer = writer or _SequenceWriter(file, output, steps, batched)
                writer.write(start, output)
            progress.update(stop - start)
        if writer is not None:
            return writer.shape, last_states
        output = output if batched else output[0]
        np.save(file, output)
    return output.shape, last_states


class _SequenceWriter:
    """A ``.npy`` file written a few steps at a time; unlike in a memory map, a full disk is an OSError, not a crash."""

    def __init__(self, file: IO[bytes], first: np.ndarray, steps: int, batched: bool):
        B, _, *frame = first.shape
        self.file, self.steps = file, steps
        self.shape = (B, steps, *frame) if batched else (steps, *frame)
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        self.data_start = file.tell()

    def write(self, step: int, output: np.ndarray) -> None:
        """Write the output (B, steps, …) that begins at `step`."""
        for b, sequence in enumerate(np.ascontiguousarray(output)):
            frame_bytes = sequence[0].nbytes
            self.file.seek(self.data_start + (b * self.steps + step) * frame_bytes)
            self.file.write(sequence.data)
