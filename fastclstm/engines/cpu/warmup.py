"""Compile kernels before they are needed, so that their machine code waits on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from numba import types

from fastclstm.engines.cpu import launch, memory, outliers, packing, plans, tiles
from fastclstm.engines.cpu.conv2d import conv2d_backward
from fastclstm.engines.cpu.convlstm2d import convlstm2d, convlstm2d_backward
from fastclstm.engines.cpu.kernels import gates
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.team import run_team
from fastclstm.engines.cpu.max_pool3d import max_pool3d, max_pool3d_backward
from fastclstm.engines.cpu.recurrent import recurrent, recurrent_backward
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.nn import activations, normalization
from fastclstm.spec import CellSpec, ConvLSTMSpec, ConvSpec, PoolSpec

DTYPES = ("float32", "float64")

_FORWARD = {"convolution": "store", "ConvLSTM": "update", "ConvLSTM with peepholes or clipping": "update_peeping",
             "ConvLSTM of any kind": "update_any"}  # fmt: skip
_TILES = (None, *tiles.choices((3, 3)), *tiles.choices((5, 5)))
"""Of Winograd for the usual kernels; None: direct, for any."""


def _is_usual(tile: Tile | None) -> bool:
    """Whether a ConvLSTM of few filters takes such a tile on frames of a usual size; None: direct convolution."""
    return tile is None or tile.m_y == 4


def steps(*dtypes: str, forward_only: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What there is to do: the name of one or several kernels, and a function that compiles them or finds them on disk.

    forward_only: what inference needs.
    """
    yield "threads", partial(run_team.compile, (types.int64, types.int64, types.int64))
    for dtype in dtypes:
        for name, run in (*_forward(dtype), *(() if forward_only else _backward(dtype))):
            yield f"{name}, {dtype}", run


def compile_all(*dtypes: str, forward_only: bool = False, processes: int = 1) -> Iterator[str]:
    """Do it, in so many processes side by side; yield the name of each step that is done."""
    if processes == 1:
        for name, run in steps(*dtypes, forward_only=forward_only):
            run()
            yield name
        return
    count = sum(1 for _ in steps(*dtypes, forward_only=forward_only))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(partial(_compile_one, dtypes, forward_only), range(count))


def _compile_one(dtypes: tuple[str, ...], forward_only: bool, index: int) -> str:
    name, run = list(steps(*dtypes, forward_only=forward_only))[index]
    run()
    return name


def _forward(dtype: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for tile in _TILES:
        how = f"Winograd {tile}" if tile else "direct"
        for name, finish in _FORWARD.items():
            yield f"{name}, {how}", partial(_compile_sequence, dtype, tile, finish, False)
            if finish == "store" or (finish == "update" and _is_usual(tile)):
                yield f"{name}, {how}, few filters", partial(_compile_sequence, dtype, tile, finish, True)
        shape = (tile.k_y, tile.k_x, 1, 1) if tile else (1, 1, 1, launch.SMALL_KERNEL)
        kernels = (np.ones(shape, dtype),)
        yield f"packing of kernels, {how}", partial(launch.pack, kernels, None, np.ones(1), tile, remember=False)
    yield "ConvGRU and the like", partial(_other_cells, dtype, False)
    square = np.ones((128, 128), dtype)
    yield "frames in another order", partial(memory.copy, square, np.empty_like(square).T)
    yield "weights beside what they were", partial(memory.are_words, square, memory.contents(square), 1)
    yield "search for fill values", partial(outliers.find, np.ones(outliers.SMALL + 1, dtype))
    volume = np.ones((1, 1, 1, 1, 1), dtype)
    pool = PoolSpec.infer(volume.shape, 1)
    yield "pooling", partial(max_pool3d, pool, volume, False)
    yield "pooling with indices", partial(max_pool3d, pool, volume, True)


def _backward(dtype: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for tile in _TILES:
        how = f"Winograd {tile}" if tile else "direct"
        yield f"ConvLSTM in training, {how}", partial(_compile_sequence, dtype, tile, "update_and_keep", False)
        if _is_usual(tile):
            keep = partial(_compile_sequence, dtype, tile, "update_and_keep", True)
            yield f"ConvLSTM in training, {how}, few filters", keep
        yield f"gradient of kernels, {how}", partial(_train, dtype, tile)
    yield "gradient of gates with peepholes or clipping", partial(_train, dtype, None, cell_clip=1.0)
    yield "gradient of gates of any kind", partial(_train, dtype, None, activation="relu")
    yield "normalization and dropout", partial(_step_by_step, dtype)
    yield "gradient of ConvGRU and the like", partial(_other_cells, dtype, True)
    image = np.ones((1, 3, 3, 1), dtype)
    strided = ConvSpec.infer(image.shape, (3, 3, 1, 1), strides=2)
    pulled = image, np.ones((3, 3, 1, 1), dtype), np.ones((1, 2, 2, 1), dtype)
    yield "gradient of strided convolution", partial(conv2d_backward, strided, *pulled)
    volume, indices = np.ones((1, 1, 1, 1, 1), dtype), np.zeros((1, 1, 1, 1, 1), np.int64)
    yield "gradient of pooling", partial(max_pool3d_backward, PoolSpec.infer(volume.shape, 1), indices, volume)
    overlapping = PoolSpec.infer(volume.shape, 2, 1, padding="same")
    yield "gradient of overlapping pooling", partial(max_pool3d_backward, overlapping, indices, volume)


def _compile_sequence(dtype: str, tile: Tile | None, finish: str, planar: bool) -> None:
    k_y, k_x = (tile.k_y, tile.k_x) if tile else (3, 3)
    spec = ConvSpec.infer((1, 8, 8, 1), (k_y, k_x, 1, 1))
    columns = packing.lay_out(1, 1, 1, 1, None, np.dtype(dtype))
    plan = plans.plan((spec,), tile, finish, 1, np.dtype(dtype).itemsize, 1, planar)
    tables = launch.NO_FLOWS, plan.tables, columns.tables, table(np.zeros(1, gates.CELL)), launch.NO_MASK
    plan.kernel.function(plan.variant, tables)


def _train(dtype: str, tile: Tile | None, activation: str = "tanh", cell_clip: float | None = None) -> None:
    """Take one small step forward and backward, on a frame for which such tiles are chosen."""
    size, k = ({2: 4, 4: 32}[tile.m_y], tile.k_y) if tile else (3, 3)
    x, kernel = np.ones((1, 1, size, size, 1), dtype), np.ones((k, k, 1, 4), dtype)
    spec = ConvLSTMSpec.infer(
        x.shape, kernel.shape, kernel.shape, activation=activations.get(activation),
        recurrent_activation=activations.get("sigmoid"), output_activation=activations.get("tanh"), cell_clip=cell_clip,
    )  # fmt: skip
    algorithm = "winograd" if tile else "direct"
    *_, saved = convlstm2d(spec, x, kernel, kernel, None, None, None, None, None, algorithm=algorithm, save=True)
    assert saved is not None
    convlstm2d_backward(spec, saved, x, None, None)


def _other_cells(dtype: str, backward: bool) -> None:
    """Take one small step of a ConvGRU forward, and backward."""
    x, kernel = np.ones((1, 1, 3, 3, 1), dtype), np.ones((3, 3, 1, 3), dtype)
    spec = CellSpec.infer(
        "gru", x.shape, kernel.shape, kernel.shape, activation=activations.get("tanh"),
        recurrent_activation=activations.get("sigmoid"), output_activation=activations.get("tanh"), op="warmup",
    )  # fmt: skip
    y, _, saved = recurrent(spec, x, kernel, kernel, None, (None,), None, algorithm="direct", save=backward)
    if saved is not None:
        recurrent_backward(spec, saved, y, (None,))


def _step_by_step(dtype: str) -> None:
    """Take one small step forward and backward with normalization and dropout."""
    x, kernel, masks = np.ones((1, 1, 3, 3, 1), dtype), np.ones((3, 3, 1, 4), dtype), np.ones((4, 1, 3, 3, 1), dtype)
    sigmoid, tanh = activations.get("sigmoid"), activations.get("tanh")
    spec = ConvLSTMSpec.infer(
        x.shape, kernel.shape, kernel.shape, activation=tanh, recurrent_activation=sigmoid, output_activation=tanh,
        normalization=normalization.get("layer"), normalization_shapes={"gamma": (4,), "beta": (4,)},
    )  # fmt: skip
    weights, state = {"gamma": np.ones(4, dtype), "beta": np.ones(4, dtype)}, np.ones((1, 3, 3, 1), dtype)
    *_, saved = convlstm2d(spec, x, kernel, kernel, None, state, state, None, None, normalization=weights,
                           dropout={"x": masks, "h": masks}, algorithm="direct", save=True)  # fmt: skip
    assert saved is not None
    convlstm2d_backward(spec, saved, x, None, None)
