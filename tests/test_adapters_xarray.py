"""DataArrays in and out; what Dask computes in blocks, pieces and tiles against the whole."""

import os
import pickle
import signal
import time

import numpy as np
import pytest

from fastclstm import (
    Add,
    BatchNormalization,
    Concatenate,
    Conv2D,
    Conv3D,
    ConvGRU2D,
    ConvLSTM2D,
    ConvRNN2D,
    Dense,
    EncoderForecaster,
    GlobalAveragePooling,
    Input,
    LeakyReLU,
    MaxPooling2D,
    Model,
    Sequential,
    TimeDistributed,
)

xarray = pytest.importorskip("xarray")
dask = pytest.importorskip("dask")
adapter = pytest.importorskip("fastclstm.adapters.xarray")
apply, forecast, Windows = adapter.apply, adapter.forecast, adapter.Windows


@pytest.fixture(autouse=True)
def extra():
    """Tests that ask for xarray, as .ci/run knows by this."""
    pytest.importorskip("xarray")


def frames(*sizes, dims=("time", "y", "x"), **options):
    values = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    times = np.datetime64("2026-07-01T12:00") + np.arange(sizes[dims.index("time")]) * np.timedelta64(5, "m")
    coords = {"time": times, "y": np.arange(sizes[dims.index("y")]) * 1000.0, "x": np.arange(sizes[dims.index("x")])}
    return xarray.DataArray(values, coords, dims, "rain", {"units": "mm/h"}, **options)


def local(F=3, **options):
    """A network that sees the pixels around."""
    lstms = [ConvLSTM2D(1, F, 3, seed=0, **options), ConvLSTM2D(F, 2, (1, 5), seed=1)]
    return Sequential([*lstms, LeakyReLU(), TimeDistributed(Conv2D(2, 2, (2, 3), seed=2)), Conv2D(2, 1, 1, seed=3)])


def agree(a, b):
    xarray.testing.assert_allclose(a.compute(), b, rtol=0, atol=2e-6)
    assert a.attrs == b.attrs


def test_dims_coordinates_and_attributes():
    x, network = frames(2, 6, 5, 7, dims=("member", "time", "y", "x")).assign_coords(run=3), local()
    x = x.assign_coords(lat=(("y", "x"), np.zeros((5, 7))), member=["a", "b"])
    y = apply(network, x)
    assert y.dims == x.dims
    assert set(y.coords) == {"time", "y", "x", "run", "lat", "member"}
    assert (y.name, y.attrs) == ("rain", {"units": "mm/h"})
    np.testing.assert_array_equal(y.values, network(x.values[..., None])[..., 0])
    turned = apply(network, x.transpose("x", "member", "y", "time"))
    np.testing.assert_array_equal(turned.transpose(*y.dims).values, y.values)


@pytest.mark.parametrize(
    ("layers", "dims"),
    [
        ([ConvLSTM2D(1, 3, 3, seed=0)], ("time", "y", "x", "channel")),
        ([ConvLSTM2D(1, 3, 3, seed=0, return_sequences=False)], ("y", "x", "channel")),
        ([ConvLSTM2D(1, 1, 3, seed=0, return_sequences=False)], ("y", "x")),
        ([ConvLSTM2D(1, 3, 3, seed=0), TimeDistributed(GlobalAveragePooling())], ("time", "feature")),
        ([ConvLSTM2D(1, 3, 3, seed=0, return_sequences=False), GlobalAveragePooling(), Dense(3, 2)], ("feature",)),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_networks_make(layers, dims, lazy):
    x, network = frames(3, 4, 6, 6, dims=("member", "time", "y", "x")), Sequential(layers)
    y = apply(network, x.chunk(member=2) if lazy else x)
    assert y.dims == ("member", *dims)
    assert ("time" in y.coords) == ("time" in dims)
    whole = network(x.values[..., None])
    expected = whole if "channel" in dims or "feature" in dims else whole[..., 0]
    np.testing.assert_allclose(y.values, expected, rtol=0, atol=1e-6)
    if lazy:
        assert y.shape == whole.shape or y.shape == whole.shape[:-1]
        assert y.dtype == whole.dtype


def test_sizes_that_change_have_no_coordinates():
    y = apply(Sequential([ConvLSTM2D(1, 2, 3), MaxPooling2D(2)]), frames(3, 8, 8))
    assert y.shape == (3, 4, 4, 2)
    assert set(y.coords) == {"time"}


def test_channels_first_networks_and_channels():
    x = frames(3, 5, 5, 2, dims=("time", "y", "x", "band"))
    first = ConvLSTM2D(2, 2, 3, seed=0, data_format="channels_first")
    last = ConvLSTM2D(2, 2, 3, seed=0)
    agree(apply(first, x), apply(last, x))
    agree(apply(first, x.chunk(time=3)), apply(last, x))
    x[0, 1], x[2] = np.nan, np.nan
    agree(apply(first, x.chunk(time=2), missing=0.0), apply(last, x, missing=0.0))  # the first piece hands states on


def test_steps_in_their_own_order():
    x = frames(4, 5, 5)
    y = apply(ConvLSTM2D(1, 1, 3, seed=0, go_backwards=True), x)
    backwards = apply(ConvLSTM2D(1, 1, 3, seed=0), x[::-1])
    xarray.testing.assert_allclose(y, backwards[::-1])


@pytest.mark.parametrize("options", [{}, {"peephole": "channel"}, {"recurrent_dilation": 2, "num_layers": 2}])
@pytest.mark.parametrize("chunks", [{"time": 3}, {"y": 17, "x": 20}, {"time": 2, "y": 40, "member": 1}])
def test_pieces_and_tiles_are_the_whole(options, chunks):
    x, network = frames(2, 5, 70, 60, dims=("member", "time", "y", "x")), local(**options)
    network.layers[0].cells[0].bias = np.linspace(-1, 1, 12)
    lazy = apply(network, x.chunk(chunks))
    assert lazy.chunks is not None
    assert lazy.shape == x.shape
    agree(lazy, apply(network, x))


@pytest.mark.parametrize(
    "cell",
    [
        ConvLSTM2D(1, 2, 3, seed=0, peephole="conv"),
        ConvLSTM2D(1, 2, 3, seed=0, dilation=2, normalization="batch"),
        ConvRNN2D(1, 2, 3, seed=0),
        ConvGRU2D(1, 2, 3, seed=0, reset_after=True),
        ConvGRU2D(1, 2, 3, seed=0, reset_after=False),
    ],
)
def test_pieces_and_tiles_of_other_cells(cell):
    x = frames(3, 60, 50)
    agree(apply(cell, x.chunk(time=2, y=30, x=25)), apply(cell, x))


def graph(**options):
    """Two ways side by side, one of which is a network of its own, and a layer that is called twice."""
    x = Input((None, None, None, 1))
    twice = Conv2D(1, 1, 3, seed=5)
    inner = Sequential([ConvRNN2D(1, 2, 3, seed=1), LeakyReLU()])(twice(x))
    both = Concatenate()([ConvLSTM2D(1, 2, (1, 3), seed=0, **options)(twice(x)), inner])
    return Model(x, Add()([ConvGRU2D(4, 1, 3, seed=2)(both), twice(x)]))


@pytest.mark.parametrize("chunks", [{"time": 2}, {"y": 30, "x": 25}, {"time": 2, "y": 30}])
def test_pieces_and_tiles_of_graphs(chunks):
    x, network = frames(5, 60, 50), graph()
    agree(apply(network, x.chunk(chunks)), apply(network, x))
    x[1], x[3, 4] = np.nan, np.nan
    agree(apply(network, x.chunk(chunks), missing=0.0), apply(network, x, missing=0.0))


def test_the_reach_of_a_graph_is_that_of_its_longest_way():
    blocks = pytest.importorskip("fastclstm.adapters.xarray_blocks")
    assert blocks.reach("apply", graph(), 5) == (1 + 1 + 4 + 1 + 4, 1 + 1 + 4 + 1 + 4)
    assert blocks.reach("apply", graph(recurrent_kernel_size=(9, 1)), 5)[0] == 1 + 4 * 4 + 1 + 4


def states_handed_on():
    x = Input((None, None, None, 1))
    _, states = ConvLSTM2D(1, 2, 3, return_state=True)(x)
    return Model(x, ConvLSTM2D(1, 2, 3)(x, initial_state=states))


FORECASTERS = [{}, {"inputs": "nothing", "cell": "ConvGRU2D"}, {"inputs": "learnt", "patch_size": 2},
               {"patch_size": (2, 1), "peephole": "channel"}]  # fmt: skip


@pytest.mark.parametrize("options", FORECASTERS, ids=str)
def test_tiles_of_forecasts_are_the_whole(options):
    x, network = frames(3, 80, 48), EncoderForecaster(1, (3, 2), 3, seed=0, **options)
    lazy = forecast(network, x.chunk(time=1, y=40), 2)
    assert lazy.chunks[1] == (40, 40)
    agree(lazy, forecast(network, x, 2))


def test_the_reach_of_forecasts_is_needed(monkeypatch):
    blocks = pytest.importorskip("fastclstm.adapters.xarray_blocks")
    x, network = frames(3, 80, 24), EncoderForecaster(1, (3, 2), 3, seed=0)
    right, found = forecast(network, x, 2), blocks.reach_of_forecast("forecast", network, 3, 2)
    assert found == (7, 7)  # two layers, three steps on, and two layers that read a frame made
    monkeypatch.setattr(blocks, "reach_of_forecast", lambda *_: (found[0] - 4, found[1]))
    assert np.abs(forecast(network, x.chunk(y=40), 2).compute() - right).max() > 1e-6


@pytest.mark.parametrize("network", [EncoderForecaster(1, (2, 2), 3, strides=(1, 2), seed=0),
                                     EncoderForecaster(1, 2, 3, patch_size=4, seed=0)])  # fmt: skip
def test_forecasts_that_no_tiles_make_are_of_whole_frames(network):
    x = frames(2, 16, 16)
    lazy = forecast(network, x.chunk(y=6), 1)
    assert lazy.chunks[1] == (16,)
    agree(lazy, forecast(network, x, 1))


def test_the_reach_is_needed(monkeypatch):
    blocks = pytest.importorskip("fastclstm.adapters.xarray_blocks")
    x, network = frames(5, 60, 60), local()
    right, found = apply(network, x), blocks.reach("apply", network, 5)
    assert found == (1 + 4 + 0 + 1, 1 + 4 + 2 + 8 + 1)
    monkeypatch.setattr(blocks, "reach", lambda *_: (found[0] - 4, found[1] - 8))
    assert np.abs(apply(network, x.chunk(y=30, x=30)).compute() - right).max() > 1e-6


def test_the_last_step_of_pieces():
    x = frames(2, 7, 40, 8, dims=("member", "time", "y", "x"))
    network = Sequential([ConvLSTM2D(1, 2, 3, seed=0, return_sequences=False), BatchNormalization(2), Conv2D(2, 2, 3)])
    agree(apply(network, x.chunk(time=3, y=20)), apply(network, x))


def test_missing_pixels_and_steps():
    x, network = frames(2, 7, 40, 8, dims=("member", "time", "y", "x")), local()
    x[0, 3] = np.nan  # a step, of the first alone
    x[1, :2] = np.nan  # before any is there
    x[:, 4, 10] = np.nan  # a row, once
    x[:, :, :, 0] = np.nan  # outside of what is seen
    y = apply(network, x, missing=0.0)
    np.testing.assert_array_equal(np.isnan(y).values, np.broadcast_to(np.arange(8) == 0, y.shape))
    mask = np.ones((2, 7), bool)
    mask[0, 3] = mask[1, :2] = False
    expected = network(np.nan_to_num(x.values)[..., None], mask=mask)[..., 0]
    np.testing.assert_array_equal(y.values[..., 1:], expected[..., 1:])
    for chunks in ({"member": 1}, {"time": 2}, {"time": 1, "y": 20}):
        agree(apply(network, x.chunk(chunks), missing=0.0), y)


def test_nan_is_told_of_unless_it_is_missing():
    x = frames(3, 5, 5)
    x[1, 2, 2] = np.nan
    with pytest.raises(ValueError, match="apply: 1 of 75 values are NaN; missing=VALUE"):
        apply(ConvLSTM2D(1, 1, 3), x)
    lazy = apply(ConvLSTM2D(1, 1, 3), x.chunk(time=1))
    with pytest.raises(ValueError, match="values are NaN"):
        lazy.compute()


@pytest.mark.parametrize(
    ("network", "chunks", "words"),
    [
        (ConvLSTM2D(1, 2, 3, bidirectional=True), {"time": 2}, r"ConvLSTM2D needs all steps at once.*chunk\(time=-1\)"),
        (Sequential([Conv3D(1, 1, 3)]), {"time": 2}, "Conv3D may need all steps"),
        (ConvLSTM2D(1, 2, 3, normalization="layer"), {"y": 4}, r"normalizes over whole frames.*chunk\(x=-1, y=-1\)"),
        (ConvLSTM2D(1, 2, 3, padding_mode="circular"), {"y": 4}, "periodic domain"),
        (Sequential([ConvLSTM2D(1, 2, 3), MaxPooling2D(2)]), {"y": 4}, "MaxPooling2D sees more than"),
        (ConvLSTM2D(1, 2, 3, peephole="elementwise", frame_size=8), {"y": 4}, "has weights for every pixel"),
        (states_handed_on(), {"time": 2}, "hands its last states|is given initial_state"),
    ],
)
def test_networks_that_see_all_at_once(network, chunks, words):
    with pytest.raises(ValueError, match=words):
        apply(network, frames(4, 8, 8).chunk(chunks))


def test_nothing_is_computed_and_weights_are_in_the_graph_once():
    computed = []
    chunks, meta = ((2,) * 500, (512,), (512,)), np.empty((0, 0, 0), "f4")
    source = dask.array.map_blocks(_zeros, computed, chunks=chunks, dtype="f4", meta=meta)
    x = xarray.DataArray(source, dims=("time", "y", "x"))
    network = ConvLSTM2D(1, 64, 3, seed=0)
    graph = dict(apply(network, x).__dask_graph__())
    assert not computed
    weights = sum(array.nbytes for array in network.parameters.values())
    assert len(pickle.dumps(list(graph.values()))) < 2 * weights + 10**6


def test_layers_refuse_what_they_would_compute_whole():
    x = frames(2, 4, 4, 1, dims=("time", "y", "x", "channel")).chunk(time=1)
    for lazy in (x, x.data):
        with pytest.raises(TypeError, match=r"x is held by Dask .* pass x.compute\(\)"):
            ConvLSTM2D(1, 1, 3)(lazy)
    assert ConvLSTM2D(1, 1, 3)(x.compute()).shape == (2, 4, 4, 1)


# Forecasts


def next_frame():
    return Sequential([ConvLSTM2D(1, 2, 3, seed=0), Conv2D(2, 1, 1, seed=1)])


@pytest.mark.parametrize("make", [lambda: EncoderForecaster(1, 2, 3, seed=0), next_frame])
def test_forecasts(make):
    x, network = frames(3, 4, 6, 6, dims=("member", "time", "y", "x")), make()
    y = forecast(network, x, 2)
    assert list(y.time.values) == [x.time.values[-1] + np.timedelta64(5 * n, "m") for n in (1, 2)]
    assert (y.dims, y.name, y.attrs) == (x.dims, x.name, x.attrs)
    np.testing.assert_array_equal(y.y, x.y)
    agree(forecast(network, x.chunk(member=2, time=2, y=3), 2), y)
    x[0, :, 2, 3] = np.nan
    with pytest.raises(ValueError, match="missing=VALUE"):
        forecast(network, x, 2)
    gone = np.isnan(forecast(network, x, 2, missing=0.0))
    assert gone.sum() == 2
    assert gone[0, :, 2, 3].all()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (np.arange(3), [3, 4]),
        (np.arange(3) * 0.1, [0.3, 0.4]),
        (np.array(["2026-01-01", "2026-02-01", "2026-03-01"], "M8[ns]"), ["2026-04-01", "2026-05-01"]),
        (np.array([0, 5, 10], "m8[m]").astype("m8[ns]"), np.array([15, 20], "m8[m]")),
        (np.array(["2026-01-02", "2026-01-01"], "M8[ns]"), ["2025-12-31", "2025-12-30"]),
    ],
)
def test_the_times_that_follow(times, expected):
    x = xarray.DataArray(np.zeros((len(times), 4, 4), "f4"), {"time": times}, ("time", "y", "x"))
    x.time.attrs["long_name"], x.time.encoding["units"] = "time of the scan", "minutes since 2000-01-01"
    made = forecast(EncoderForecaster(1, 1, 3), x, 2).time
    assert made.dtype == x.time.dtype
    expected = np.array(expected, x.time.dtype)
    np.testing.assert_allclose(made.values.astype(float), expected.astype(float))
    assert made.attrs == x.time.attrs
    assert made.encoding["units"] == x.time.encoding["units"]


def test_calendars():
    cftime = pytest.importorskip("cftime")
    times = [cftime.DatetimeNoLeap(2028, 2, day) for day in (27, 28)]
    x = xarray.DataArray(np.zeros((2, 4, 4), "f4"), {"time": times}, ("time", "y", "x"))
    made = forecast(EncoderForecaster(1, 1, 3), x, 1).time
    assert made.values[0] == cftime.DatetimeNoLeap(2028, 3, 1)


def test_times_without_a_step():
    days = np.array(["2026-01-01", "2026-01-02", "2026-01-04"], "M8[ns]")
    x = xarray.DataArray(np.zeros((3, 4, 4), "f4"), {"time": days}, ("time", "y", "x"))
    with pytest.raises(ValueError, match=r"no steps of one size.*2026-01-04"):
        forecast(EncoderForecaster(1, 1, 3), x, 1)
    with pytest.raises(ValueError, match="one time alone"):
        forecast(EncoderForecaster(1, 1, 3), x[:1], 1)
    assert "time" not in forecast(EncoderForecaster(1, 1, 3), x.drop_vars("time"), 1).coords


def test_it_goes_through_a_file(tmp_path):
    pytest.importorskip("netCDF4")
    path, made = tmp_path / "rain.nc", tmp_path / "made.nc"
    frames(4, 6, 6).to_netcdf(path, encoding={"time": {"units": "seconds since 2026-01-01"}})
    with xarray.open_dataarray(path, chunks={}) as rain:
        forecast(EncoderForecaster(1, 2, 3, seed=0), rain, 2).to_netcdf(made)
    with xarray.open_dataarray(made, decode_times=False) as written:
        assert written.time.attrs["units"] == "seconds since 2026-01-01"
        assert list(np.diff(written.time)) == [300]
        assert written.attrs["units"] == "mm/h"


# Which dim is which


def test_dims_are_known_by_marks_or_told():
    x = frames(3, 4, 5).rename(time="when", y="a", x="b")
    with pytest.raises(ValueError, match=r"which dim of frames \('when', 'a', 'b'\) is y and x\? Give"):
        apply(next_frame(), x)
    expected = apply(next_frame(), frames(3, 4, 5)).values
    np.testing.assert_array_equal(apply(next_frame(), x, space=("a", "b")), expected)
    x.a.attrs["standard_name"], x.b.attrs["axis"] = "latitude", "X"
    np.testing.assert_array_equal(apply(next_frame(), x.transpose("b", "a", "when")).transpose(*x.dims), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"frames": np.zeros((3, 4, 4))}, TypeError, "must be an xarray.DataArray, got ndarray"),
        ({"frames": frames(3, 4, 4).to_dataset()}, TypeError, r"is a Dataset; give one of its variables \('rain'\)"),
        ({"time": "t"}, ValueError, "time='t' is no dim of frames, which has 'time', 'y', 'x'"),
        ({"space": "y"}, ValueError, "space must be two dims"),
        ({"network": np.tanh}, TypeError, "network must be a layer or network"),
        ({"network": ConvLSTM2D(2, 1, 3)}, ValueError, "channels"),
        ({"network": ConvLSTM2D(1, 1, 3, return_state=True)}, ValueError, "return_state=False"),
        ({"network": EncoderForecaster(1, 1, 3)}, TypeError, "call forecast"),
    ],
)
def test_errors(arguments, error, words):
    given = {"network": ConvLSTM2D(1, 1, 3), "frames": frames(3, 4, 4)} | arguments
    with pytest.raises(error, match=words):
        apply(**given)


# Training


def test_windows():
    x = frames(2, 12, 4, 4, dims=("member", "time", "y", "x"))
    windows = Windows(x.chunk(time=5), 3, 2, every=3, batch_size=4, seed=0)
    assert len(windows) == 2
    batches = list(windows)
    assert [b[0].shape for b in batches] == [(4, 3, 4, 4, 1), (2, 3, 4, 4, 1)]
    np.testing.assert_array_equal(batches[0][0][1], x.values[0, 3:6, ..., None])
    np.testing.assert_array_equal(batches[1][1][1], x.values[1, 9:11, ..., None])
    epochs = [np.concatenate([b[0] for b in windows(epoch)]) for epoch in (0, 1, 0)]
    np.testing.assert_array_equal(epochs[0], epochs[2])
    assert not np.array_equal(epochs[0], epochs[1])
    with pytest.raises(ValueError, match=r"a window has 10 [+] 4 frames, but frames has 12"):
        Windows(x, 10, 4)


def test_windows_of_other_sizes_weights_and_times():
    """Frames get to multiples by missing pixels; weights are made of what is to be foretold; gaps are not bridged."""
    x = frames(9, 5, 6).clip(0)
    x[4, 1] = np.nan
    x = x.isel(time=[0, 1, 2, 3, 4, 6, 7, 8])
    windows = Windows(x, 2, 1, batch_size=9, missing=-1.0, multiple=(4, 2), weigh=lambda y: 1 + y[..., 0] ** 2)
    ((given, wanted, weights),) = windows
    assert (given.shape, wanted.shape, weights.shape) == ((4, 2, 8, 6, 1), (4, 1, 8, 6, 1), (4, 1, 8, 6))
    assert (given[:, :, 5:] == -1).all()
    truth = x.values[[2, 3, 4, 7], None]
    there = np.pad(np.isfinite(truth), ((0, 0), (0, 0), (0, 3), (0, 0)))
    np.testing.assert_array_equal(weights == 0, ~there)
    np.testing.assert_allclose(weights[there], 1 + truth[np.isfinite(truth)] ** 2, rtol=1e-6)
    ((*_, weights),) = Windows(
        x.fillna(0).astype(int), 2, 1, batch_size=9, missing=0, weigh=lambda y: 0.5 + 0 * y[..., 0]
    )
    assert (weights == 0.5).all()  # of integers too
    with pytest.raises(ValueError, match="no so many of the 8 times follow on"):
        Windows(x, 5, 1)
    with pytest.raises(ValueError, match="weigh and multiple ask for weights"):
        Windows(x, 2, 1, multiple=4)


def test_training_from_lazy_frames_with_missing_pixels():
    x = frames(14, 6, 6)
    x[5, 2:4] = np.nan
    curves = []
    for given in (x, x.chunk(time=4)):
        network = EncoderForecaster(1, 2, 3, seed=0)
        windows = Windows(given, 3, 2, batch_size=4, seed=1, missing=-1.0)
        history = network.fit(windows, epochs=2, quiet=True)
        curves.append(history["loss"])
    assert np.isfinite(curves[0]).all()
    assert curves[0] == curves[1]
    with pytest.raises(ValueError, match="Windows: 12 of"):
        network.fit(Windows(x, 3, 2, batch_size=1), quiet=True)


@pytest.fixture
def own_environment():
    """A cluster in this process writes to the environment: one thread for OpenMP and BLAS."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_cluster_that_loses_a_worker(own_environment):
    distributed = pytest.importorskip("distributed")
    x, network = frames(8, 4, 12, 12, dims=("member", "time", "y", "x")), local()
    expected = apply(network, x)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        address, process = next(iter(client.run(os.getpid).items()))
        future = client.compute(apply(network, x.chunk(member=1, time=2)))
        os.kill(process, signal.SIGKILL)
        late = time.monotonic() + 30
        while address in client.scheduler_info()["workers"] and time.monotonic() < late:
            time.sleep(0.01)
        assert address not in client.scheduler_info()["workers"]
        agree(future.result(), expected)


def _zeros(computed, block_info=None):
    computed.append(1)
    return np.zeros(block_info[None]["chunk-shape"], "f4")
