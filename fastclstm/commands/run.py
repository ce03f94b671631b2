"""Sequences and samples from file to file: a ConvLSTM takes a few time steps at a time, through its state."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import typer

from fastclstm.commands.inputs import check_array_target, check_distinct, open_array, open_sequences, takes_sequences
from fastclstm.commands.options import SETTINGS, Engine, Quiet, Threads, Weights, set_threads, use_engine
from fastclstm.io import numpy_files
from fastclstm.io.files import replacing
from fastclstm.io.progress import progress_bar
from fastclstm.layers import Layer
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.models import load
from fastclstm.models.forecasting import Forecasting
from fastclstm.nn.names import with_article

States = list[tuple[Any, ...]]
"""(h, c), or what else a cell has, of each stacked layer."""

app = typer.Typer(**SETTINGS)


@app.command("run")
def command(
    source: Annotated[Path, typer.Argument(metavar="INPUT.npy", help="(T, H, W[, C]) or (B, T, H, W, C).")],
    weights: Weights,
    out: Annotated[Path, typer.Option(metavar="OUT.npy", help="Where the output goes.")],
    chunk: Annotated[int, typer.Option(min=1, help="Steps of a ConvLSTM, else samples, in memory at once.")] = 16,
    state_in: Annotated[
        Path | None, typer.Option(metavar="S.npz", help="States to start from (h0, c0, h1, …).", show_default=False)
    ] = None,
    state_out: Annotated[
        Path | None, typer.Option(metavar="S.npz", help="Where the last states go.", show_default=False)
    ] = None,
    engine: Engine = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Run a saved layer or network over a file of sequences or samples.

    However long sequences are, only --chunk steps are in memory where a ConvLSTM2D, or its like, is run, and of other
    networks --chunk samples. Those without a ConvLSTM2D or its like in them take what their first layer takes, samples
    on the first axis. The output file appears complete or not at all.
    """
    set_threads(threads)
    shape = run_file(
        source, weights, out, chunk=chunk, state_source=state_in, state_target=state_out, engine=engine, quiet=quiet
    )
    if not quiet:
        print(f"{out}: {shape}")


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
    """Run a saved layer or network over a ``.npy`` file and write its output to another.

    The input is memory-mapped and passes through a ConvLSTM2D, or its like, in chunks of time steps, the state being
    handed on, so that only one chunk is in memory; bidirectional layers, which begin with the last frame too, take all
    at once. The result has the bits that one call on the whole would give, as long as it holds no NaN (after one the
    cpu engine may compute in another way). Other layers and networks get chunks of samples, each sequence as a whole.
    Files appear complete or not at all; what was there before stays until then.

    Parameters
    ----------
    source : path of an array (T, H, W), (T, H, W, C) or (B, T, H, W, C)
        With a channels-first layer C stands before H; for a ConvLSTM1D without H, for a ConvLSTM3D with a depth before
        H. Any real dtype. For a network without any of these: samples on the first axis, as its first layer takes them.
    weights : path
        What the layer's or the network's `save` wrote. With return_sequences a layer's whole hidden sequence is
        written, else the last output.
    target : path
        Written as (T, HO, WO, F) or (HO, WO, F), after a batch axis where the input has one.
    chunk : int
        Time steps, or samples, computed at once; at least 1.
    state_source, state_target : path of a ``.npz``, optional
        Of a ConvLSTM2D or its like, the states before the first and after the last step: arrays h0, c0, h1, c1 …
        (B, HO, WO, F), a pair a layer; of a ConvGRU2D h0, h1 ….
    engine : str, optional
        Instead of the one the layers were saved with.
    quiet : bool
        Show no progress.

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
    check_distinct("run", (source, weights, state_source), (target, state_target))
    check_array_target("run", target)
    network = _load(weights, engine)
    if not isinstance(network, ConvRecurrent) and (state_source or state_target):
        raise ValueError(f"run: {weights} holds {with_article(type(network))}; --state-in and --state-out are for "
                         f"a ConvLSTM2D, or its like, by itself")  # fmt: skip
    if takes_sequences(network):
        x, batched = open_sequences("run", source, network)
    else:
        x, batched = open_array("run", source), True
    states = None if state_source is None else _load_states(state_source, network)
    with ExitStack() as files:
        new_state = files.enter_context(replacing(state_target)) if state_target else None
        new = files.enter_context(replacing(target))
        try:
            if not isinstance(network, ConvRecurrent):
                return _in_batches(network, x, new, chunk, batched, quiet)
            shape, states = _stream(network, x, states, new, chunk, batched, quiet)
            if new_state is not None:
                with new_state.open("wb") as file:
                    np.savez(file, **{f"{name}{n}": a for n, state in enumerate(states)
                                      for name, a in zip(network._state_names, state, strict=True)})  # fmt: skip
        except OSError as error:  # a full disk, say: writing to an open file does not name it
            raise OSError(error.errno, error.strerror, str(target)) from error
    return shape


def _load(weights: Path, engine: str | None) -> Layer:
    """Return what was saved, to compute with `engine`; raise ValueError where that cannot be run."""
    network = load(weights)
    if isinstance(network, ConvRecurrent):
        options: dict[str, Any] = {"return_state": True, "time_major": False, "stateful": False}
        layer = type(network).load(weights, **options, **({} if engine is None else {"engine": engine}))
        if layer.bidirectional and layer.merge_mode is None:
            raise ValueError(f"run: {weights} has merge_mode=None: two outputs; save the layer with another merge_mode")
        return layer
    name = type(network).__name__
    if why := network._unfit():
        why = "makes frames that follow; use forecast" if isinstance(network, Forecasting) else why
        raise ValueError(f"run: {weights} holds {with_article(name)}, which {why}")
    if remedy := network._several_outputs():
        raise ValueError(f"run: {weights} holds {with_article(name)} that returns more than one array; {remedy}")
    use_engine(network, engine)
    return network


def _load_states(path: Path, layer: Any) -> States:
    letters = layer._state_names
    try:
        count = -(-len(numpy_files.names(path)) // len(letters))
        names = [tuple(f"{letter}{n}" for letter in letters) for n in range(count)]
        states = numpy_files.read_npz(path, chain.from_iterable(names))
    except ValueError as error:
        told = ", ".join(f"{letter}{n}" for n in range(2) for letter in letters)
        raise ValueError(f"run: {path} is not a .npz file of states {told}, …: {error}") from error
    return [tuple(states[name] for name in each) for each in names]


def _stream(
    layer: ConvRecurrent, x: np.ndarray, states: States | None, target: Path, chunk: int, batched: bool, quiet: bool
) -> tuple[tuple[int, ...], States]:
    """Write the layer's output for x to `target`; return its shape and the last states."""
    steps = x.shape[1]
    if layer.bidirectional:
        chunk = max(steps, 1)
    writer: _SequenceWriter | None = None
    last_states: Any = states
    with target.open("wb") as file, progress_bar(total=steps, unit=" step", quiet=quiet) as progress:
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


def _in_batches(network: Layer, x: np.ndarray, target: Path, chunk: int, batched: bool, quiet: bool) -> tuple[int, ...]:
    """Write the network's output for the samples of x to `target`; return its shape."""
    run = getattr(network, "predict", network)  # which refuses what mixes samples
    with target.open("wb") as file, progress_bar(total=len(x), unit=" sample", quiet=quiet) as progress:
        writer: _SequenceWriter | None = None
        for start in range(0, len(x), chunk):
            output = run(x[start : start + chunk])[np.newaxis]  # samples in the place of steps
            if not batched:
                np.save(file, output[0, 0])
                return output.shape[2:]
            writer = writer or _SequenceWriter(file, output, len(x), batched=False)
            writer.write(start, output)
            progress.update(output.shape[1])
        if writer is not None:
            return writer.shape
        np.save(file, output := run(x))
    return output.shape


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
