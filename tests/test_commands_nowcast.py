"""radar, train, forecast and verify: from a folder of NetCDF files to forecasts with units, and to their scores."""

import csv
import importlib.util
import os
import re

import numpy as np
import pytest
from test_commands import ROOT, assert_user_error, fastclstm_cli, process

xarray = pytest.importorskip("xarray")
pytest.importorskip("dask")
pytest.importorskip("netCDF4")

from fastclstm.adapters import xarray_files, xarray_nowcast  # noqa: E402
from fastclstm.io import weights  # noqa: E402

SMALL = ("--steps-in", 3, "--steps-out", 4, "--filters", 2, "--epochs", 1, "--every", 6, "--engine", "reference", "-q")


@pytest.fixture(autouse=True)
def extra():
    """Tests that ask for xarray, as .ci/run knows by this."""
    pytest.importorskip("xarray")


@pytest.fixture
def undrawn(monkeypatch):
    """The page of plots, which `archive` has, costs more than all else."""
    if has_pictures():
        drawing = importlib.import_module("fastclstm.commands.nowcast_drawing")
        monkeypatch.setattr(drawing, "draw_verification", lambda path, *rest: path.write_bytes(b"drawn"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Four files of frames of 13×15 pixels, and a network trained on them."""
    folder = tmp_path_factory.mktemp("archive")
    made = fastclstm_cli("radar", folder / "rain", "--days", 0.4, "--minutes", 8, "--size", 13, 15, "--seed", 1,
                         "--start", "2026-07-01T21:00")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert made.stdout == f"{folder / 'rain'}: 2 files, 72 frames of 13×15 pixels\n"
    trained = fastclstm_cli("train", "--data", folder / "rain", "--variable", "rain", "--out", folder / "net", *SMALL)
    assert trained.exit_code == 0, trained.output
    (folder / "train.txt").write_text(trained.stdout)
    return folder


def frames(archive):
    return xarray.concat([xarray.open_dataset(path).load() for path in sorted((archive / "rain").iterdir())], "time")


def test_from_a_folder_to_a_verified_forecast(archive, tmp_path):
    text = (archive / "train.txt").read_text()
    assert "rain (mm h-1): 72 frames of 13×15 pixels, one each 8 min, 2026-07-01T21:00 to 2026-07-02T06:28" in text
    assert "58 to train on, 7 after them for validation, the last 7 to verify; transform: ln(1 + v / 0.1)" in text
    for score in ("CSI", "POD", "FAR", "FSS"):
        assert re.search(rf"^{score} +>= 0.1 mm h-1 +>= 1 mm h-1 +>= 5 mm h-1$", text, re.MULTILINE)
    written = {path.name for path in (archive / "net").iterdir()}
    assert written >= {"weights.safetensors", "history.csv", "scores.csv", "checkpoint.safetensors"}
    with (archive / "net" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"ConvLSTM", "flow", "last"}
    assert [row["lead_time"] for row in rows[:12:3]] == ["+8 min", "+16 min", "+24 min", "+32 min"]

    plots = [tmp_path / "f.gif", tmp_path / "f.png"] if has_pictures() else [None, None]
    for out, plot in zip((tmp_path / "f.nc", tmp_path / "g.nc"), plots, strict=True):
        options = () if plot is None else ("--plot", plot)
        made = fastclstm_cli("forecast", archive / "rain", "--steps", 12, "--weights",
                             archive / "net" / "weights.safetensors", "--out", out, *options)  # fmt: skip
        assert made.exit_code == 0, made.output
        assert plot is None or plot.stat().st_size > 1000
    result, given = xarray.open_dataset(tmp_path / "f.nc"), frames(archive)
    assert dict(result.rain.sizes) == {"time": 12, "y": 13, "x": 15}
    assert result.rain.attrs == given.rain.attrs
    assert result.attrs["history"].startswith("fastclstm ")
    for name in ("y", "x"):
        xarray.testing.assert_identical(result[name], given[name])
    steps = np.diff(np.concatenate([given.time.values[-2:], result.time.values]))
    assert (steps == np.timedelta64(8, "m")).all()
    assert (result.rain.fillna(0) >= 0).all()
    missing = given.rain[-3:].isnull().all("time")
    assert missing.any()
    assert (result.rain.isnull().all("time") == missing).all()

    net = xarray_nowcast.Nowcast.load(archive / "net" / "weights.safetensors")
    xarray.testing.assert_allclose(net.forecast(given.rain, 12), result.rain, rtol=1e-5, atol=1e-5)


def has_pictures():
    return all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL"))


def test_the_log_is_undone_and_what_is_made_is_added_to_the_last_frame(archive):
    """A network of zeros is persistence, in the units of the data."""
    net = xarray_nowcast.Nowcast.load(archive / "net" / "weights.safetensors")
    assert net.info.transform.kind == "log"
    net.network.set_parameters({name: np.zeros_like(a) for name, a in net.network.parameters.items()})
    rain = frames(archive).rain
    made = net.forecast(rain, 2)
    for step in range(2):
        there = np.isfinite(rain.values[-1])
        np.testing.assert_allclose(made.values[step][there], rain.values[-1][there], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("y", "rises"), [([1, 2, 9], True), ([9, np.nan, 1, 0], False), ([3, 3, 3], None),
                                           ([np.nan] * 3, None)])  # fmt: skip
def test_which_way_rows_go(y, rises):
    frames = xarray.DataArray(np.zeros((len(y), 2)), {"y": y}, ("y", "x"))
    assert xarray_nowcast._rises(frames, "y") is rises


def test_frames_may_lie_the_other_way_round(archive):
    """Rain moves where it moves, whether the first row is the north's or the south's."""
    net = xarray_nowcast.Nowcast.load(archive / "net" / "weights.safetensors")
    assert net.info.rising == (True, True)
    rain = frames(archive).rain
    made, (scores, shown) = net.forecast(rain, 2), net.verify(rain, steps=2, flow="own")
    for turned in ({"y": slice(None, None, -1)}, {"x": slice(None, None, -1), "y": slice(None, None, -1)}):
        xarray.testing.assert_identical(net.forecast(rain.isel(turned), 2), made.isel(turned))
        again, drawn = net.verify(rain.isel(turned), steps=2, flow="own")
        np.testing.assert_array_equal(again.scores("ConvLSTM", "MSE"), scores.scores("ConvLSTM", "MSE"))
        there = tuple({"y": -3, "x": -2}[dim] for dim in turned)
        np.testing.assert_array_equal(drawn["observed"], np.flip(shown["observed"], there))
    without = rain.drop_vars(["y", "x"])
    np.testing.assert_array_equal(net.forecast(without, 2).values, made.values)


@pytest.mark.usefixtures("undrawn")
def test_an_encoding_without_our_signs_ends_no_work(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    told = process("radar", tmp_path / "rain", "--days", 0.1, "--size", 8, 9, env=environment)
    out, err = told.communicate()
    assert (told.returncode, out[-40:]) == (0, f"{tmp_path / 'rain'}: 1 file, 29 frames of 8?9 pixels\n"[-40:]), err


def test_names_of_files(archive, tmp_path, monkeypatch):
    """A folder, files in any order, a pattern in quotes; a time that comes twice counts once."""
    paths = sorted(map(str, (archive / "rain").iterdir()))
    whole, _ = xarray_files.open_frames("train", archive / "rain")
    for names in (paths, paths[::-1], str(archive / "rain" / "*.nc"), [*paths, paths[0]]):
        xarray.testing.assert_identical(xarray_files.open_frames("train", names, "rain")[0], whole)
    part = frames(archive).isel(time=slice(10, 20))
    part.to_netcdf(tmp_path / "again.nc")
    xarray.testing.assert_identical(xarray_files.open_frames("train", [*paths, tmp_path / "again.nc"])[0], whole)
    monkeypatch.chdir(archive / "rain")
    made = fastclstm_cli("train", "--data", *(os.path.basename(p) for p in paths), "--out", tmp_path / "net", *SMALL)
    assert made.exit_code == 0, made.output
    assert "72 frames" in made.stdout


def test_one_frame_a_file_and_a_zarr_store(archive, tmp_path):
    given = frames(archive).isel(time=slice(0, 5))
    for n in range(5):
        given.isel(time=n).to_netcdf(tmp_path / f"{4 - n}.nc")
    made, _ = xarray_files.open_frames("train", tmp_path)
    xarray.testing.assert_equal(made, given.rain)
    pytest.importorskip("zarr")
    for steps in (5, 2):  # the second takes the place of the first
        xarray_files.write_frames(tmp_path / "store.zarr", given.rain[:steps], "test")
        xarray.testing.assert_equal(xarray_files.open_frames("train", tmp_path / "store.zarr")[0], given.rain[:steps])


@pytest.mark.usefixtures("undrawn")
def test_larger_than_memory_gives_the_same(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(xarray_files, "IN_MEMORY", 0)
    monkeypatch.setattr(xarray_files, "CHUNK", 4 * 13 * 15 * 4)
    lazy, _ = xarray_files.open_frames("train", archive / "rain")
    assert max(lazy.chunks[0]) == 4
    made = fastclstm_cli("train", "--data", archive / "rain", "--out", tmp_path / "net", *SMALL)
    assert made.exit_code == 0, made.output
    assert "read from the files batch by batch" in made.stdout
    one, other = (weights.load(path / "net" / "weights.safetensors") for path in (archive, tmp_path))
    assert one[1] == other[1]
    for name, array in one[0].items():
        np.testing.assert_array_equal(other[0][name], array)


@pytest.mark.usefixtures("undrawn")
def test_verify_scores_any_files(archive, tmp_path):
    made = fastclstm_cli("verify", archive / "rain", "--weights", archive / "net" / "weights.safetensors", "--out",
                         tmp_path / "v", "--threshold", 0.5, "--steps", 2, "--window", 3, "--flow", "own")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "FSS of windows of 3 pixels" in made.stdout
    assert ">= 0.5 mm h-1" in made.stdout
    assert (tmp_path / "v" / "scores.csv").exists()


@pytest.mark.filterwarnings("error:All-NaN")
def test_verify_of_nothing_is_a_table_without_figures(archive, tmp_path):
    rain = frames(archive).rain
    (rain * np.nan).assign_attrs(rain.attrs).to_netcdf(tmp_path / "nothing.nc")
    made = fastclstm_cli("verify", tmp_path / "nothing.nc", "--weights", archive / "net" / "weights.safetensors",
                         "--out", tmp_path / "v", "--flow", "own")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "–" in made.stdout


KELVIN = {"units": "K", "long_name": "sea surface temperature"}


def field(times=40, name="sst", attrs=KELVIN, low=280.0, dims=("time", "lat", "lon"), **options):
    rng = np.random.default_rng(0)
    t, y, x = np.meshgrid(np.arange(times), np.arange(12), np.arange(14), indexing="ij")
    values = low + 3 + 3 * np.sin((x - 0.5 * t) / 3) * np.cos(y / 4) + 0.1 * rng.standard_normal(t.shape)
    coords = {dims[0]: np.datetime64("2026-01-01", "ns") + np.arange(times) * np.timedelta64(1, "D")}
    coords |= {dims[1]: np.linspace(50, 60, 12), dims[2]: np.linspace(0, 20, 14)}
    return xarray.DataArray(values, coords, dims, name, attrs, **options)


@pytest.mark.usefixtures("undrawn")
def test_other_variables_and_packed_values(tmp_path):
    """Temperatures, packed as 16-bit integers, with missing ones: linear, and nothing is cut at zero."""
    sst = field()
    sst[:, :3, :3] = np.nan
    sst[5, 8] = np.nan
    packed = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 283.0, "_FillValue": -32768}
    dataset = sst.to_dataset().assign(crs=((), 0, {"grid_mapping_name": "latitude_longitude"}))
    dataset.sst.attrs["grid_mapping"] = "crs"
    dataset.assign_attrs(title="sea").to_netcdf(tmp_path / "sst.nc", encoding={"sst": packed})
    made = fastclstm_cli("train", "--data", tmp_path / "sst.nc", "--out", tmp_path / "net", *SMALL)
    assert made.exit_code == 0, made.output
    assert "sst (K): 40 frames of 12×14 pixels, one each 1 d" in made.stdout
    assert "transform: linear" in made.stdout
    net = tmp_path / "net" / "weights.safetensors"
    made = fastclstm_cli("forecast", tmp_path / "sst.nc", "--weights", net, "--out", tmp_path / "out.nc")
    assert made.exit_code == 0, made.output
    out = xarray.open_dataset(tmp_path / "out.nc", decode_coords="all")
    assert (out.sst.units, out.title, out.sst.dtype) == ("K", "sea", np.float32)
    assert out.sst.encoding["grid_mapping"] == "crs"
    assert out.crs.grid_mapping_name == "latitude_longitude"
    assert out.sst[:, :3, :3].isnull().all()
    assert not out.sst[:, 3:, 3:].isnull().any()
    assert (out.sst[:, 3:, 3:] > 100).all()


def packed_file(path, values, attrs, dtype="i2"):
    """Write values, as they stand in the file, of a variable "rain" with attributes."""
    netCDF4 = importlib.import_module("netCDF4")
    with netCDF4.Dataset(path, "w") as file:
        for name, size in zip(("time", "y", "x"), (len(values), 1, 2), strict=True):
            file.createDimension(name, size)
        rain = file.createVariable("rain", dtype, ("time", "y", "x"))
        rain.set_auto_maskandscale(False)
        rain[:] = np.array(values).astype(dtype)[:, None, None]
        rain.setncatts(attrs)
    return path


INVALID = {
    "packed bounds": ([-1, 0, 1000, 1001], {"scale_factor": 0.01, "valid_range": np.array([0, 1000], "i2")}, None,
                      [np.nan, 0, 10, np.nan]),
    "bounds of what is unpacked": ([-1, 0, 1000, 1001], {"scale_factor": 0.01, "valid_min": np.float32(0),
                                                         "valid_max": np.float64(10)}, None, [np.nan, 0, 10, np.nan]),
    "unsigned": ([0, 40000, 65531], {"scale_factor": 0.5, "_Unsigned": "true", "valid_range": np.array([0, -6], "i2")},
                 None, [0, 20000, np.nan]),
    "a value that is none of the dtype": ([0, 7], {}, -9999.0, [0, 7]),
    "a value between": ([0, 7], {}, 7.5, [0, 7]),
    "a packed value, rounded": ([0, 3, 4], {"scale_factor": 0.1}, 0.3, [0, np.nan, 0.4]),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_values_that_are_none(tmp_path, monkeypatch, case):
    values, attrs, missing, expected = INVALID[case]
    path = packed_file(tmp_path / "a.nc", values, attrs)
    for limit in (1 << 30, 0):
        monkeypatch.setattr(xarray_files, "IN_MEMORY", limit)
        made, _ = xarray_files.open_frames("train", path, missing=missing)
        assert hasattr(made.data, "dask") == (limit == 0)  # what is larger than memory stays in its file
        np.testing.assert_allclose(made[:, 0, 0], expected, rtol=1e-6)


def test_bounds_and_times_that_are_none(tmp_path, archive):
    for name, bound in (("valid_range", "0, 5"), ("valid_max", "five")):
        path = packed_file(tmp_path / "a.nc", [1, 2], {name: bound})
        with pytest.raises(ValueError, match=rf"a\.nc, {name} of rain is '{bound}' but must be .* mend or remove"):
            xarray_files.open_frames("train", path)
    given = frames(archive).isel(time=slice(0, 3))
    times = given.time.values.copy()
    times[1] = np.datetime64("NaT")
    given.assign_coords(time=times).to_netcdf(tmp_path / "b.nc")
    with pytest.raises(ValueError, match="1 of 3 times of rain are missing; give the files without"):
        xarray_files.open_frames("train", tmp_path / "b.nc")


@pytest.mark.usefixtures("undrawn")
def test_windows_leave_out_gaps(archive, tmp_path):
    given = frames(archive)
    given.isel(time=[*range(30), *range(33, 72)]).to_netcdf(tmp_path / "gap.nc")
    made = fastclstm_cli("train", "--data", tmp_path / "gap.nc", "--out", tmp_path / "net", *SMALL)
    assert made.exit_code == 0, made.output
    x = given.rain.isel(time=[*range(8), *range(10, 19)])
    from fastclstm.adapters.xarray import Windows

    windows = Windows(x, 3, 4, batch_size=1, missing=0.0)
    assert len(windows) == 2 + 3


BAD = {
    "variable": (lambda d: d, "--variable wind", ["has no variable 'wind'", "rain ('time', 'y', 'x')"]),
    "two variables": (lambda d: d.assign(snow=d.rain), "", ["which variable", "snow", "--variable NAME"]),
    "short": (lambda d: d.isel(time=slice(0, 15)), "", ["has 15 frames", "need 21 at least"]),
    "all missing": (lambda d: d * np.nan, "", ["all is missing"]),
    "constant": (lambda d: d.rain.where(d.rain.isnull(), 0).to_dataset(), "", ["the value 0 only"]),
    "negative": (
        lambda d: d.rain.fillna(-999).assign_attrs(d.rain.attrs).to_dataset(), "--transform log",
        ["goes down to -999", "--missing -999"],
    ),
    "no time": (lambda d: d.isel(time=0, drop=True), "", ["no dim of time"]),
    "dims": (lambda d: d.rename(y="a", x="b").drop_vars(["a", "b"]), "", ["which dim", "--space ROWS COLUMNS"]),
    "text": (lambda d: d.assign(rain=d.rain.astype(str)), "--variable rain", ["must hold real numbers"]),
    "transform": (lambda d: d, "--transform dB", ["transform must be one of 'auto', 'log', 'linear', 'none'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_of_train_come_before_anything_is_written(archive, tmp_path, case):
    spoil, options, words = BAD[case]
    spoil(frames(archive)).to_netcdf(tmp_path / "bad.nc")
    result = fastclstm_cli("train", "--data", tmp_path / "bad.nc", "--out", tmp_path / "net", *SMALL, *options.split())
    assert_user_error(result, *words)
    assert not (tmp_path / "net").exists()


def test_files_that_do_not_fit_together(archive, tmp_path):
    given = frames(archive).isel(time=slice(0, 4))
    given.to_netcdf(tmp_path / "a.nc")
    for other, words in (
        (given.isel(y=slice(1, None)), "give files of one grid"),
        (given.assign_coords(x=given.x + 500), "the coordinate x differs"),
        (given.assign(rain=given.rain.assign_attrs(units="m s-1")), "but in 'm s-1' in"),
    ):
        other.assign_coords(time=given.time + np.timedelta64(1, "D")).to_netcdf(tmp_path / "b.nc")
        with pytest.raises(ValueError, match=words):
            xarray_files.open_frames("train", [tmp_path / "a.nc", tmp_path / "b.nc"])
    with pytest.raises(FileNotFoundError):
        xarray_files.open_frames("train", tmp_path / "none.nc")
    with pytest.raises(ValueError, match="no file matches"):
        xarray_files.open_frames("train", tmp_path / "no*.nc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no file that ends in \.nc"):
        xarray_files.open_frames("train", tmp_path / "empty")
    (tmp_path / "text.nc").write_text("text")
    with pytest.raises((ValueError, OSError), match=r"text\.nc"):
        xarray_files.open_frames("train", tmp_path / "text.nc")


def test_forecast_refuses_what_it_was_not_trained_on(archive, tmp_path):
    given = frames(archive)

    def run(dataset, *options, weights=archive / "net" / "weights.safetensors", out=tmp_path / "out.nc"):
        dataset.to_netcdf(tmp_path / "in.nc")
        return fastclstm_cli("forecast", tmp_path / "in.nc", "--weights", weights, "--out", out, *options)

    late = given.assign_coords(time=given.time[0] + (given.time - given.time[0]) * 2)
    gap = given.isel(time=[*range(69), 71])
    cases = (
        (given.rename(rain="hail"), ["has no variable 'rain'", "it has hail"]),
        (given.isel(time=slice(0, 2)), ["has 2 frames, but the network is given 3"]),
        (late, ["has a step of 16 min, but the network was trained on 8 min"]),
        (gap, ["have a gap between them"]),
        (given.assign(rain=given.rain.assign_attrs(units="kg m-2 s-1")), ["trained on 'mm h-1'", "times 3600"]),
        (given.assign(rain=given.rain.assign_attrs(units="K")), ["is in 'K'"]),
        (given.assign(rain=given.rain.drop_attrs()), ["is in 'no units'"]),
        ((given * np.nan).assign(rain=(given.rain * np.nan).assign_attrs(given.rain.attrs)), ["all is missing"]),
    )
    for dataset, words in cases:
        assert_user_error(run(dataset), *words)
        assert not (tmp_path / "out.nc").exists()
    assert_user_error(run(given, out=tmp_path / "out.npy"), "out.npy must end in .nc (NetCDF) or .zarr")
    assert_user_error(run(given, "--plot", tmp_path / "a.jpg"), "suffix of --plot must be one of '.png', '.gif'")
    assert_user_error(run(given, "--scale", 0, 1), "--scale is for .npy")
    assert_user_error(run(given, out=tmp_path / "in.nc"), "would overwrite")
    from fastclstm import EncoderForecaster

    EncoderForecaster(1, 2, 3, seed=0).save(tmp_path / "plain.safetensors")
    assert_user_error(run(given, weights=tmp_path / "plain.safetensors"), "but not what it was trained on")
    same = given.assign(rain=given.rain.assign_attrs(units="mm/h"))
    assert run(same).exit_code == 0
    smaller = given.isel(y=slice(0, 9), x=slice(2, 9))
    assert run(smaller).exit_code == 0
    assert dict(xarray.open_dataset(tmp_path / "out.nc").rain.sizes) == {"time": 4, "y": 9, "x": 7}


def test_thresholds_and_offset_are_in_the_units_of_the_data():
    def info(frames, kind="auto", **options):
        axes = xarray_nowcast.Axes.of("train", frames)
        return xarray_nowcast.describe_frames("train", frames, axes, steps_in=3, steps_out=2, kind=kind, offset=None,
                                              multiple=(1, 1), thresholds=None, **options)  # fmt: skip

    rate = field(name="pr", attrs={"units": "kg m-2 s-1", "standard_name": "precipitation_flux"}, low=0.0) / 3600
    rate.attrs = {"units": "kg m-2 s-1", "standard_name": "precipitation_flux"}
    known = info(rate.clip(0))
    assert known.transform.kind == "log"
    assert known.transform.offset == pytest.approx(0.1 / 3600)
    assert known.thresholds == pytest.approx([0.1 / 3600, 1 / 3600, 5 / 3600])
    depth = field(name="rain", attrs={"units": "mm"}, low=0.0).clip(0).assign_attrs(units="mm")
    assert info(depth).thresholds == pytest.approx([2.4, 24, 120])  # of a day
    wind = field(name="wind", attrs={"units": "m s-1"}, low=0.0)
    assert info(wind).transform.kind == "linear"
    values = wind.values[wind.values > wind.values.min()]
    assert info(wind).thresholds == pytest.approx(np.quantile(values, [0.5, 0.75, 0.9]), rel=0.02)
    assert info(wind).missing == pytest.approx(float(info(wind).transform(wind.mean())))
