"""The curves of a training in files, and what counts as improvement."""

import csv
import json
import math

import pytest

from fastclstm.training import EarlyStopping, History


def test_history_files(tmp_path):
    history = History(loss=[2.0, 1.0], val_csi=[math.nan, 0.5])
    history.save(tmp_path / "h.json")
    assert json.loads((tmp_path / "h.json").read_text()) == {"loss": [2.0, 1.0], "val_csi": [None, 0.5]}
    history.save(tmp_path / "h.csv")
    with (tmp_path / "h.csv").open() as file:
        assert list(csv.reader(file)) == [["epoch", "loss", "val_csi"], ["1", "2.0", "nan"], ["2", "1.0", "0.5"]]
    with pytest.raises(ValueError, match=r"suffix of path must be one of '\.csv', '\.json', got '\.txt'"):
        history.save(tmp_path / "h.txt")


def test_what_counts_as_improvement():
    less, more = EarlyStopping(min_delta=0.5), EarlyStopping(mode="max", min_delta=0.5)
    for stopping, values in ((less, (0.4, 0.5, math.nan)), (more, (1.6, 1.5, math.nan))):
        assert [stopping.improves(value, 1.0) for value in values] == [True, False, False]
        assert [stopping.improves(value, None) for value in values] == [True, True, False]
