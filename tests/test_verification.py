"""Scores by lead time, against values computed by hand."""

import csv

import numpy as np
import pytest

from fastclstm.nn import metrics
from fastclstm.nn.transforms import Transform
from fastclstm.verification import SCORES, Verification

NAN = np.nan


def frames(*rows):
    """One forecast of one step from rows of pixels: (1, 1, H, W, 1)."""
    return np.array(rows, float)[None, None, ..., None]


def test_counts_by_hand():
    """At 1: two hits, one miss, two false alarms; the pixels without a value count for nobody."""
    truth = frames([2, 3, 1, 0, 0, NAN], [0, 0, 5, 0, 0, 0])
    made = frames([1, 4, 0, 1, 2, 9], [0, 0, NAN, 0, 0, 0])
    table = Verification([1, 10], scale=1)
    table.add(truth, {"net": made})
    for score, at_one in (("CSI", 2 / 5), ("POD", 2 / 3), ("FAR", 2 / 4)):
        value = table.scores("net", score)
        assert value.shape == (1, 2)
        assert value[0, 0] == pytest.approx(at_one)
        assert np.isnan(value[0, 1])
    errors = [1, -1, 1, -1, -2, 0, 0, 0, 0, 0]
    assert table.scores("net", "MSE") == pytest.approx([np.square(errors).mean()])
    assert table.scores("net", "MAE") == pytest.approx([np.abs(errors).mean()])
    assert np.isnan(table.scores("net", "SSIM")).all()  # too small


def test_fss_by_hand():
    """Of one event each, a pixel apart, windows of three share six of their nine pixels."""
    truth, made = np.zeros((2, 1, 1, 7, 7, 1))
    truth[..., 3, 3, 0], made[..., 3, 4, 0] = 1, 1
    fss = {}
    for scale in (1, 3, 5):
        table = Verification([0.5], scale=scale)
        table.add(truth, {"net": made})
        fss[scale] = table.scores("net", "FSS")[0, 0]
    assert fss == {1: 0, 3: pytest.approx(1 - 6 / 18), 5: pytest.approx(1 - 10 / 50)}


def test_fss_against_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    a, b = np.random.default_rng(0).random((2, 3, 17, 13, 2))
    for scale in (1, 2, 3, 4, 9, 40):
        means = [[ndimage.uniform_filter((f >= 0.8).astype(float), scale, mode="constant")
                  for film in x for f in np.moveaxis(film, -1, 0)] for x in (a, b)]  # fmt: skip
        p, t = map(np.array, means)
        expected = 1 - np.square(p - t).sum() / (np.square(p).sum() + np.square(t).sum())
        assert metrics.fss(a, b, 0.8, scale) == pytest.approx(expected, rel=1e-12)


def test_parts_make_the_whole():
    rng = np.random.default_rng(0)
    truth, net, last = rng.random((3, 5, 4, 18, 15, 1)) * 10
    truth[:, :, 15:17] = NAN
    truth[0, :, :9] = NAN  # so parts have other numbers of windows of SSIM
    whole, parts = (Verification([1, 5], 3, Transform("linear", 0, 10)) for _ in range(2))
    whole.add(truth, {"net": net, "last": last})
    for part in (slice(0, 2), slice(2, 5)):
        parts.add(truth[part], {"net": net[part], "last": last[part]})
    assert (whole.forecasts, parts.forecasts, parts.methods) == (5, 5, ("net", "last"))
    for method in whole.methods:
        for score in SCORES:
            np.testing.assert_allclose(parts.scores(method, score), whole.scores(method, score), rtol=1e-12)
    seen = np.isfinite(truth[:, 2])
    assert whole.scores("net", "CSI")[2, 1] == metrics.csi(net[:, 2], truth[:, 2], 5.0, valid=seen)
    assert whole.scores("net", "MSE")[2] == pytest.approx(np.square(net - truth)[:, 2][seen].mean())
    filled = np.where(np.isnan(truth), 0, truth)
    assert whole.scores("net", "SSIM")[2] == pytest.approx(
        metrics.ssim(net[:, 2] / 10, filled[:, 2] / 10, valid=seen), rel=1e-6
    )


def test_all_methods_are_compared_on_the_same_pixels():
    truth = frames([1, 1, 0, 0])
    table = Verification([1], 1)
    table.add(truth, {"good": truth, "blind": frames([NAN, 1, 0, 0])})
    assert table.scores("good", "MSE") == 0
    assert table.scores("blind", "POD")[0, 0] == 1


def test_the_table_and_the_file(tmp_path):
    truth = np.random.default_rng(0).random((2, 12, 12, 12, 1))
    table = Verification([0.25, 0.75], 3)
    table.add(truth, {"ConvLSTM": truth, "last": 1 - truth})
    leads = [f"+{5 * n} min" for n in range(1, 13)]
    lines = table.table(leads, "mm h-1", rows=3).splitlines()
    assert lines[0].split() == ["CSI", ">=", "0.25", "mm", "h-1", ">=", "0.75", "mm", "h-1"]
    assert [line[:8].strip() for line in lines[2:5]] == ["+5 min", "+35 min", "+60 min"]
    assert lines[2].split()[2:] == [f"{table.scores(m, 'CSI')[0, n]:.2f}" for n in (0, 1) for m in table.methods]
    assert max(map(len, lines)) <= 80
    table.save(tmp_path / "scores.csv", leads)
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 12 * 2
    row = rows[-1]
    assert (row["method"], row["lead_time"], row["threshold"]) == ("last", "+60 min", "0.75")
    assert float(row["FSS"]) == table.scores("last", "FSS")[-1, 1]


def test_errors():
    table = Verification([1])
    for arrays, words in (
        ((np.zeros((3, 4, 4, 1)), {"net": np.zeros((3, 4, 4, 1))}), r"truth must be \(B, steps, H, W, C\)"),
        ((np.zeros((1, 2, 4, 4, 1)), {"net": np.zeros((1, 3, 4, 4, 1))}), "'net' has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            table.add(*arrays)
    table.add(np.zeros((1, 2, 4, 4, 1)), {"net": np.zeros((1, 2, 4, 4, 1))})
    with pytest.raises(ValueError, match="methods must be those of before"):
        table.add(np.zeros((1, 2, 4, 4, 1)), {"other": np.zeros((1, 2, 4, 4, 1))})
    with pytest.raises(ValueError, match="had 2 steps before, and now 3"):
        table.add(np.zeros((1, 3, 4, 4, 1)), {"net": np.zeros((1, 3, 4, 4, 1))})
    for write in (table.table, lambda leads: table.save("no folder/scores.csv", leads)):
        with pytest.raises(ValueError, match="leads must be the names of 2 lead times, got 1"):
            write(["+5 min"])
    with pytest.raises(ValueError, match="no forecasts yet"):
        Verification([1]).table([])
    held = np.ma.masked_equal(np.zeros((1, 2, 4, 4, 1)), 0)
    for arrays in ((held, {"net": held.data}), (held.data, {"net": held})):
        with pytest.raises(TypeError, match=r"is a masked array, .*filled\(np.nan\)"):
            table.add(*arrays)
    for thresholds in ([], [np.nan]):
        with pytest.raises(ValueError, match="thresholds must be one or more finite numbers"):
            Verification(thresholds)
