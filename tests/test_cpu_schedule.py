"""Claiming the work: every piece is done once, whatever the number of workers, after what it needs."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import launch, plans, threads
from fastclstm.engines.cpu.kernels import schedule
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.padding import SOURCE
from fastclstm.engines.cpu.kernels.schedule import first_piece, next_piece, piece_done, place, wait_for_neighbours
from fastclstm.engines.cpu.kernels.team import add, claim, done, grain, next_item, wait_for_all
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec


@kernel
def _count(job, worker, flows, sources, neighbours, counts, order, clock):
    """Count in counts[unit, t, block, part] how often a piece is done, and note when."""
    flow = flows[0]
    unit, piece, helped = first_piece()
    while True:
        unit, piece, helped = next_piece(flow, job, unit, piece, helped)
        if unit < 0:
            break
        t, block, part = place(flow, piece)
        wait_for_neighbours(flow, job, sources, neighbours, unit, block, t)
        counts[unit, t, block, part] += 1
        order[unit, t, block, part] = add(clock[0], 1)
        piece_done(flow, job, sources, unit, block)


def claimed(workers, units, steps, blocks, parts, reach=1):
    """Counts and order of the pieces of steps 2, 3, …, each of which reads the blocks up to `reach` away."""
    flow = np.zeros(1, schedule.FLOW)
    progress, clock = np.zeros(units * (1 + blocks) * 8, np.int64), np.zeros(1, np.int64)
    flow["units"], flow["first_step"], flow["steps"], flow["blocks"], flow["parts"] = units, 2, steps, blocks, parts
    flow["progress"] = progress.ctypes.data
    n = np.arange(blocks)
    neighbours = np.stack([np.maximum(n - reach, 0), np.minimum(n + reach + 1, blocks)], 1)
    counts, order = np.zeros((2, units, 2 + steps, blocks, parts), np.int64)
    sources = np.zeros(2, SOURCE)
    sources["hidden"] = 1, 0
    threads.run(_count, workers, (), flow, sources, neighbours, counts, order,
                np.array([clock.ctypes.data]))  # fmt: skip
    return counts[:, 2:], order[:, 2:]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_every_piece_is_done_once_and_after_its_neighbours(workers):
    for units, steps, blocks, parts in ((1, 4, 5, 2), (3, 2, 1, 1), (7, 3, 4, 3), (2, 50, 3, 1)):
        for _ in range(20):
            counts, order = claimed(workers, units, steps, blocks, parts)
            np.testing.assert_array_equal(counts, 1)
            for block in range(blocks):
                around = order[:, :-1, max(block - 1, 0) : block + 2].max((2, 3))
                assert (order[:, 1:, block].min(2) > around).all()


def test_one_worker_takes_unit_after_unit():
    _, order = claimed(1, 3, 4, 5, 2)
    np.testing.assert_array_equal(order.ravel(), np.arange(order.size))


@kernel
def _two_phases(job, worker, values, sums):
    """Fill values, then sums of all of them, twice."""
    piece, begun = claim(job), 0
    for turn in range(2):
        while piece < begun + len(values):
            wait_for_all(job, begun)
            values[piece - begun] = (turn + 1) * (piece - begun)
            done(job)
            piece = claim(job)
        begun += len(values)
        while piece < begun + len(sums):
            wait_for_all(job, begun)
            sums[piece - begun] += values.sum()
            done(job)
            piece = claim(job)
        begun += len(sums)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_phases_wait_for_each_other(workers):
    for _ in range(50):
        sums = np.zeros(7, np.int64)
        threads.run(_two_phases, workers, (), np.zeros(13, np.int64), sums)
        np.testing.assert_array_equal(sums, 3 * sum(range(13)))


@kernel
def _each(job, worker, counts):
    size = grain(job, len(counts))
    n = next_item(job, -1, size)
    while n < len(counts):
        counts[n] += 1
        n = next_item(job, n, size)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_comes_once(workers):
    for count in (1, 2, 15, 16, 17, 1000):
        counts = np.zeros(count, np.int64)
        threads.run(_each, workers, (), counts)
        np.testing.assert_array_equal(counts, 1)


def reads(spec, y, x):
    """The pixels that output (y, x) of a convolution reads."""
    rows = [y - spec.padding[0][0] + k * spec.dilation[0] for k in range(spec.KH)]
    columns = [x - spec.padding[1][0] + k * spec.dilation[1] for k in range(spec.KW)]
    if spec.padding_mode == "circular":
        rows, columns = [row % spec.H for row in rows], [column % spec.W for column in columns]
    return {(i, j) for i in rows for j in columns if 0 <= i < spec.H and 0 <= j < spec.W}


def owners(plan, spec, tile, planar):
    """The block of each output (image, y, x) of the first unit."""
    work, result = plan.work[0], {}
    if planar:
        m, d = int(work["m_y"]), int(work["dilation_y"])
        blocks = {y: (y // (m * d) * d + y % d) // int(work["band"]) for y in range(spec.HO)}
        return {(b, y, x): blocks[y] for b in range(int(work["images"])) for y, x in np.ndindex(spec.HO, spec.WO)}
    for b in range(work["unit_tiles"] // work["tiles"] if tile else 1):
        for y, x in np.ndindex(spec.HO, spec.WO):
            if tile:
                row, column = (  # bands of interleaved tiles
                    at // (m * d) * d + at % d
                    for at, m, d in zip((y, x), (tile.m_y, tile.m_x), spec.dilation, strict=True)
                )
                result[b, y, x] = (b * work["tiles"] + row * work["tiles_x"] + column) // work["block_tiles"]
            else:
                result[b, y, x] = y // work["block_height"] * work["blocks_x"] + x // work["block_width"]
    return result


@pytest.mark.parametrize("m", [0, 2, 4, (2, 4)])
@pytest.mark.parametrize("options", [{}, {"padding_mode": "circular"}, {"dilation": 3}], ids=str)
@pytest.mark.parametrize(("B", "H", "W", "k"), [(1, 70, 100, 3), (3, 13, 9, 5), (2, 50, 31, 3), (1, 200, 3, 5)])
@pytest.mark.parametrize("planar", [False, True])
def test_neighbours_are_all_that_a_block_reads(planar, m, options, B, H, W, k):
    spec = ConvSpec.infer((B, H, W, 4), (k, k, 4, 16), **options)
    m_y, m_x = m if isinstance(m, tuple) else (m, m)
    tile = Tile(m_y, m_x, k, k) if m else None
    plan = plans.plan((spec, spec), tile, "update", 1, 4, 2, planar)
    neighbours, owner = plan.tables.arrays[3 if planar else 2], owners(plan, spec, tile, planar)
    assert len(neighbours) == plan.blocks
    for (b, y, x), block in owner.items():
        first, last = neighbours[block]
        for pixel in reads(spec, y, x):
            other = owner[(b, *pixel)]
            assert first <= other < last
            assert neighbours[other][0] <= block < neighbours[other][1]  # who is read is not overwritten too soon


@pytest.mark.parametrize(
    ("B", "size", "C", "F", "m"), [(8, 8, 223, 80, 4), (2, 8, 32, 80, 4), (8, 8, 32, 32, 4), (1, 8, 32, 116, 2),
                                   (4, 8, 128, 256, 4), (3, 10, 256, 131, 4), (1, 16, 64, 64, 4), (6, 4, 16, 48, 2)]
)  # fmt: skip
def test_few_tiles_are_shared_evenly(B, size, C, F, m):
    """Of two workers none has much more than half of a step's columns times tiles."""
    specs = tuple(ConvSpec.infer((B, size, size, channels), (3, 3, channels, 4 * F)) for channels in (F, C))
    groups = -(-F // 16)
    plan = plans.plan(specs, Tile(m, m, 3, 3), "update", groups, 4, 2, False)
    work, total = plan.work[0], B * plan.work["tiles"][0]
    workers = [0.0, 0.0]
    for unit in range(plan.units):
        tiles_of_unit = min(work["unit_tiles"], total - unit * work["unit_tiles"])
        pieces = [
            min(work["block_tiles"], tiles_of_unit - block * work["block_tiles"])
            * (groups * (part + 1) // plan.parts - groups * part // plan.parts)
            for block in range(plan.blocks)
            for part in range(plan.parts)
        ]
        for piece in [sum(pieces)] if plan.units > 1 else pieces:
            workers[workers.index(min(workers))] += piece
    assert max(workers) <= 0.56 * total * groups


def test_slots_of_arrays_with_and_without_time():
    a = np.zeros((2, 5, 3, 4, 7), np.float32)
    assert schedule.slots(a) == (a.ctypes.data, a.strides[0], a.strides[1], 5)
    assert schedule.slots(a, backwards=True) == (a[:, 4:].ctypes.data, a.strides[0], -a.strides[1], 5)
    assert schedule.slots(a[0]) == (a.ctypes.data, a.strides[1], 0, 1)
    assert schedule.slots(None) == schedule.NOTHING


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("B", [1, 3])
def test_the_bits_of_long_sequences_do_not_depend_on_the_workers(algorithm, B, monkeypatch):
    """Two slots for the hidden states in turn: whoever is ahead must not write over what others read."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((B, 60, 33, 35, 2), np.float32), rng.standard_normal((3, 3, 2, 32), np.float32)
    recurrent_kernel = rng.standard_normal((3, 3, 8, 32), np.float32) / 8
    results = []
    for workers in (1, 2, 3, 5):
        monkeypatch.setattr(threads, "usable_threads", lambda workers=workers: workers)
        results.append(functional.convlstm2d(x, kernel, recurrent_kernel, algorithm=algorithm, return_sequences=False))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("seed", range(24))
def test_bits_of_drawn_calls_do_not_depend_on_the_workers(seed, monkeypatch):
    """Outputs and gradients: even kernels, recurrent ones larger than the input's, dilation, circles, masks, pieces."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(launch, "SERIAL_FLOPS", 1)
    monkeypatch.setattr(launch, "PIECE_FLOPS", int(rng.choice([1, 10**5, 10**10])))
    monkeypatch.setattr(launch, "PIECE_SECONDS", 1e-4)
    B, T, H, W, C, F = (int(rng.integers(1, most)) for most in (6, 9, 40, 40, 18, 20))
    k, recurrent_k = (3, 3) if seed % 2 else rng.integers(1, 7, 2)
    x, kernel = rng.standard_normal((B, T, H, W, C), np.float32), rng.standard_normal((k, k, C, 4 * F), np.float32)
    recurrent = rng.standard_normal((recurrent_k, recurrent_k, F, 4 * F), np.float32) / recurrent_k
    options = {
        "algorithm": "winograd" if seed % 2 else "direct", "go_backwards": bool(rng.random() < 0.5),
        "padding_mode": "circular" if rng.random() < 0.4 else "zeros", "recompute": bool(rng.random() < 0.5),
        "return_sequences": bool(rng.random() < 0.5), "mask": rng.random((B, T)) < rng.choice([0.6, 1.0]),
        "recurrent_dilation": 1 if seed % 2 else int(rng.integers(1, 4)),
    }  # fmt: skip
    results = []
    for workers in (1, 3, 8):
        monkeypatch.setattr(threads, "usable_threads", lambda workers=workers: workers)
        y, pull = functional.convlstm2d_vjp(x, kernel, recurrent, **options)
        results.append({"y": y, **pull(np.cos(y))})
    for other in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(other[name], value, name)
