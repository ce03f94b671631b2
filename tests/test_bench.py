import dataclasses
import itertools
import json
import math
import signal
import sys
import time

import numpy as np
import pytest

import fastclstm
from bench import (
    cells,
    configurations,
    crowd,
    families,
    first_contact,
    gpu,
    landscape,
    peers,
    ratios,
    render,
    scaling,
    training,
)
from bench.cases import CASES, ConvLSTMCase, PoolCase
from fastclstm import functional


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("readme", 0.7786), ("mmnist", 98.15), ("deep", 96.64), ("shi", 150.99), ("radar", 235.55)],
)
def test_convlstm_work_counts_the_direct_convolutions(name, gigaflops):
    case = CASES[name]
    by_hand = 2 * case.B * case.T * case.H * case.W * case.K**2 * (case.C + case.F) * 4 * case.F / 1e9
    assert case.work == pytest.approx(by_hand, rel=1e-12)
    assert case.work == pytest.approx(gigaflops, rel=1e-3)


def test_pool_work_counts_bytes_in_and_out():
    assert CASES["pool_readme"].work == pytest.approx(4 * 10 * 32 * 32 * 32 * (1 + 1 / 8) / 1e9)


def test_data_is_drawn_and_repeatable():
    case = ConvLSTMCase("small", B=2, T=3, H=4, W=5, C=2, F=3, K=3)
    arrays = case.arrays()
    assert {name: array.shape for name, array in arrays.items()} == {
        "x": (2, 3, 4, 5, 2),
        "kernel": (3, 3, 2, 12),
        "recurrent_kernel": (3, 3, 3, 12),
        "bias": (12,),
    }
    for name, array in arrays.items():
        assert array.dtype == np.float32
        assert np.count_nonzero(array) == array.size
        np.testing.assert_array_equal(array, case.arrays()[name])
    assert np.abs(arrays["kernel"]).max() <= 1 / math.sqrt(3 * 3 * 2)
    assert np.abs(arrays["recurrent_kernel"]).max() <= 1 / math.sqrt(3 * 3 * 3)


def test_oracles_are_float64_of_the_outputs_shape():
    assert ConvLSTMCase("small", B=1, T=2, H=4, W=5, C=2, F=3, K=3).oracle().shape == (1, 2, 4, 5, 3)
    pooled = PoolCase("small", B=1, T=2, H=4, W=5, C=2, pool_size=2, stride=2).oracle()
    assert (pooled.shape, pooled.dtype) == ((1, 1, 2, 2, 2), np.float64)


def _result(seconds: float, faster: float) -> dict:
    return {"median_seconds": seconds, "rate": 1 / seconds, "share_of_peak": 0.5, "max_error": 1e-7,
            "fastclstm_times_faster": faster}  # fmt: skip


@pytest.fixture
def report() -> dict:
    results = {
        "fastclstm": _result(0.002, 1.0),
        "fastclstm-direct": _result(0.004, 2.0),
        "fastclstm-avx2": _result(0.003, 1.5),
        "numpy": _result(0.08, 40.0),
        "torch": _result(0.007, 3.5),
        "torch-channels-last": _result(0.006, 3.0),
        "onnxruntime": _result(0.001, 0.5),
    }
    run = {"case": "readme", "op": "convlstm2d", "title": "1×10×32²", "unit": "GFLOP/s", "threads": 2, "peaks": [100.0],
           "results": results}  # fmt: skip
    return {"runs": [run], "rounds": 3, "processor": "a processor", "cpus": 2, "versions": {"numpy": "2.0"}}


def test_table_shows_the_fastest_of_each_family_and_its_losses(report):
    header, _, row = [line for line in render.markdown(report).splitlines() if line.startswith("|")]
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells == {
        "case": "readme (1×10×32²)",
        "threads": "2",
        "fastclstm": "**2**",
        "direct": "4",
        "of FMA peak": "50%",
        "AVX2": "3",
        "NumPy": "80",
        "PyTorch eager": "6",
        "ONNX Runtime": "1",
        "vs. NumPy": "40.0×",
        "vs. fastest framework": "0.50×",
        "max error": "1.0e-07",
    }


def test_table_replaces_what_stood_between_the_markers():
    text = "before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n"
    assert render.insert(text, "new") == "before\n<!-- bench:start -->\nnew\n<!-- bench:end -->\nafter\n"
    with pytest.raises(ValueError, match="needs the lines"):
        render.insert("no markers", "new")


def test_reports_are_joined_in_table_order(report, tmp_path):
    run = report["runs"][0]
    later = report | {"runs": [run | {"title": "newer"}, run | {"case": "mmnist"}]}
    mixed = report | {"cpus": 64}
    paths = [tmp_path / f"{n}.json" for n in range(3)]
    for path, content in zip(paths, (report | {"runs": [run | {"case": "deep"}, run]}, later, mixed), strict=True):
        path.write_text(json.dumps(content))
    joined = render.load(paths[:2])["runs"]
    assert [(run["case"], run["title"]) for run in joined] == [
        ("readme", "newer"), ("mmnist", run["title"]), ("deep", run["title"]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="different machines"):
        render.load(paths)


def test_plot_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    render.save(render.bars, report, tmp_path / "bars.png")
    for name in ("bars.png", "bars-dark.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_training():
    def result(seconds, memory, faster):
        return {"median_seconds": seconds, "memory_mb": memory, "share_of_peak": 0.5,
                "times_faster": {"torch": faster, "torch-channels-last": 0.0},
                "errors": {"x": 1e-6, "bias": 2e-6}}  # fmt: skip

    results = {"fastclstm": result(0.002, 30.0, 3.0), "fastclstm-recompute": result(0.003, 15.0, 2.0),
               "torch": result(0.006, 80.0, 1.0), "torch-channels-last": result(0.007, 60.0, 0.9)}  # fmt: skip
    versions = dict.fromkeys(("python", "numpy", "numba", "torch"), "1")
    report = {"rounds": 5, "processor": "a processor", "cpus": 2, "versions": versions,
              "runs": [{"case": "readme", "title": "small", "threads": 2, "results": results}]}  # fmt: skip
    head, _, row, *_ = training.markdown(report).split("\n")
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)), strict=True))
    assert cells == {
        "case": "readme (small)", "threads": "2", "fastclstm": "**2**", "recompute": "3", "PyTorch": "6",
        "vs. PyTorch": "3.00×", "recompute vs. PyTorch": "2.00×", "of FMA peak": "50%", "MB": "30 (50%)",
        "recompute, MB": "15 (25%)", "PyTorch, MB": "60", "max error": "2.0e-06",
    }  # fmt: skip


# --- In a crowd ---


def test_the_tables_of_a_crowd(tmp_path):
    def run(situation, case, ratio):
        return {"situation": situation, "case": case, "default_wall": 0.002, "wall_ratio": ratio, "cpu_ratio": 1.25}

    report = {
        "processor": "a processor", "cpus": 2, "threads": 2, "rounds": 7, "cold_rounds": 3, "processes": 4,
        "cold": [{"what": "a call", "cold": {"wall": 4.04, "cpu": 5.0}, "warm": {"wall": 0.5, "cpu": 0.75}}],
        "busy": [run("alone", "readme", 0.55), run("alone", "fit", 0.6), run("1 busy", "readme", 1.0)],
        "prefork": [run("4 processes", "readme", 1.1)],
    }  # fmt: skip
    out, page = tmp_path / "crowd.json", tmp_path / "page.md"
    out.write_text(json.dumps(report))
    page.write_text("before\n<!-- crowd:start -->\nlast year's\n<!-- crowd:end -->\nafter\n")
    crowd.main(["--out", str(out), "--page", str(page)])
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| the first | cold, wall | cold, CPU | from disk, wall | from disk, CPU |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a call | 4 | 5 | 0.5 | 0.75 |",
        "|  | alone | 1 busy | 4 processes |",
        "| --- | ---: | ---: | ---: |",
        "| readme | 2 ms, 0.55×, 1.25× | 2 ms, 1.00×, 1.25× | 2 ms, 1.10×, 1.25× |",
        "| fit | 2 ms, 0.60×, 1.25× | – | – |",
    ]
    assert "a processor, 2 CPUs" in text
    assert "last year's" not in text


def test_ratios_in_a_crowd_are_those_within_a_round():
    def seconds(wall, cpu):
        return {"wall": wall, "cpu": cpu, "partner": 0.0}

    rounds = [
        {"one_thread": seconds(scale, scale), "default": seconds(0.5 * scale, 1.2 * scale)} for scale in (1, 8, 2)
    ]
    assert crowd._summary(rounds) == pytest.approx(
        {"one_thread_wall": 2.0, "default_wall": 1.0, "wall_ratio": 0.5, "cpu_ratio": 1.2}
    )


def test_a_block_of_calls_tells_wall_and_cpu_seconds_of_one():
    def compute():
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass

    told = crowd.block(lambda: time.sleep(0.01), compute, 1, 0.05)
    fastclstm.set_num_threads(None)
    assert told["wall"] >= 0.01
    assert told["partner"] >= 0.005
    assert told["cpu"] >= 0.005


def test_neighbours_are_busy_until_they_are_ended_whatever_happens():
    processes = []

    def fail():
        with crowd.neighbours(2) as started:
            processes.extend(started)
            raise RuntimeError("in the crowd")

    with pytest.raises(RuntimeError, match="in the crowd"):
        fail()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


# --- The landscape ---

SMALL = {"B": 2, "T": 3, "H": 7, "W": 6, "C": 2, "F": 3}


def test_drawing_is_decided_by_seed_and_number():
    drawn = [families.draw(5, number, number % 2 == 1) for number in range(12)]
    assert drawn == [families.draw(5, number, number % 2 == 1) for number in range(12)]
    assert len(set(drawn)) == 12
    assert families.draw(6, 0, False) != drawn[0]
    arrays = drawn[0].arrays()
    np.testing.assert_array_equal(arrays["kernel"], drawn[0].arrays()["kernel"])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_drawn_lies_in_the_ranges(family):
    for trained in (False, True):
        if family == "dropout" and not trained:
            continue
        for number in range(20):
            one = families.draw(3, number, trained, [family])
            assert (one.family, one.training) == (family, trained)
            for name, (low, high) in families.RANGES.items():
                values = getattr(one, name)
                assert all(low <= value <= high for value in np.atleast_1d(values)), (name, values)
            assert one.work <= families.MOST_WORK
            assert one.work >= families.LEAST_WORK or one.updates >= families.LEAST_UPDATES
            assert one.updates <= families.MOST_UPDATES


def test_the_work_of_training_is_that_of_three_passes():
    one = configurations.Configuration("geometry", **SMALL, kernel=(5, 3), recurrent_kernel=(1, 2), strides=(2, 1))
    forward = 2 * 2 * 3 * 4 * 6 * 4 * 3 * (5 * 3 * 2 + 1 * 2 * 3) / 1e9
    assert one.work == pytest.approx(forward)
    assert dataclasses.replace(one, training=True).work == pytest.approx(3 * forward)
    assert one.updates == 2 * 3 * 4 * 6 * 3


def test_the_fixed_list_covers_each_family_and_tells_all_apart():
    assert len({(one.family, one.title) for one in families.FIXED}) == len(families.FIXED)
    forward = [one for one in families.FIXED if not one.training]
    assert len(forward) >= 40
    assert {one.family for one in forward} == set(families.FAMILIES) - {"dropout"}
    assert {one.family for one in families.FIXED if one.training} == set(families.FAMILIES)
    assert {1, 3, 4, 8, 10, 12, 20} <= {one.F for one in forward}
    assert {(1, 1), (1, 3), (2, 2), (4, 4), (3, 5), (7, 7), (9, 9), (11, 11)} <= {one.kernel for one in forward}
    assert any(one.strides == (2, 2) and one.kernel == (5, 5) for one in forward)
    assert any(one.recurrent_kernel == (1, 1) for one in forward)
    assert all(families.bounded(one) or one.work < 2 * families.MOST_WORK for one in families.FIXED)


OPTIONS = {
    "usual": {},
    "even kernel": {"kernel": (4, 2), "bias": False},
    "geometry": {"kernel": (3, 5), "recurrent_kernel": (2, 3), "strides": (2, 1), "recurrent_dilation": (1, 2)},
    "valid": {"padding": "valid", "dilation": (2, 1), "mask": True, "go_backwards": True},
    "circular": {"padding_mode": "circular"},
    "channel peephole": {"peephole": "channel", "cell_clip": 0.5, "recurrent_activation": "hard_sigmoid"},
    "elementwise peephole": {"peephole": "elementwise", "activation": "leaky_relu"},
    "layer": {"normalization": "layer", "activation": "silu"},
    "group": {"normalization": "group", "recurrent_activation": "hard_sigmoid_keras2"},
    "batch": {"normalization": "batch", "activation": "gelu"},
    "dropout": {"dropout": 0.25},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [name for kind in landscape.PEERS.values() for name in kind])
def test_peers_compute_what_the_reference_engine_does(name, options):
    one = configurations.Configuration("options", **SMALL, **options)
    try:
        prepared = peers.IMPLEMENTATIONS["convlstm2d"][name].prepare(one, 1)
    except cells.Unavailable as reason:
        pytest.skip(str(reason))
    arrays = {key: value if isinstance(value, dict) else np.asarray(value) for key, value in one.arrays().items()}
    expected = functional.convlstm2d(**arrays, **one.options, engine="reference")
    got = prepared.channels_last(prepared.run())
    assert landscape.difference({"h": got}, {"h": expected}, one) < 1e-5


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"dtype": "float64"}], ids=[*OPTIONS, "float64"])
@pytest.mark.parametrize("name", landscape.PEERS["torch"])
def test_gradients_of_peers_are_those_of_the_reference_engine(name, options):
    pytest.importorskip("torch")
    one = configurations.Configuration("options", **SMALL, **options, training=True)
    if one.normalization == "batch":
        pytest.skip("statistics that are given are nobody's training")
    try:
        got = training.IMPLEMENTATIONS[name](one, 1)()
    except cells.Unavailable as reason:
        pytest.skip(str(reason))
    expected = training.IMPLEMENTATIONS["numpy"](one, 1)()
    assert got.keys() == expected.keys()
    assert landscape.difference(got, expected, one) < 1e-5


def test_what_is_not_ours_is_wrong():
    one = configurations.Configuration("usual", **SMALL)
    ours = {"h": np.ones((2, 3), np.float32)}
    assert landscape.difference({"h": ours["h"] + np.float32(1e-5)}, ours, one) == pytest.approx(1e-5, rel=0.1)
    for other in (ours["h"] + np.float32(1e-3), np.full((2, 3), np.nan, np.float32), ours["h"][:1], np.ones((2, 3))):
        with pytest.raises(landscape.Wrong, match="ours"):
            landscape.difference({"h": other}, ours, one)


def _measured(ratio: float, **told: object) -> dict:
    return {"title": f"of {ratio}", "family": "usual", "threads": 2, "training": False, "ratio": ratio,
            "fastest": "ncnn", "left_out": {}} | told  # fmt: skip


def test_a_configuration_is_judged_by_the_fastest_of_those_that_stayed():
    one = configurations.Configuration("usual", B=1, T=10, H=10, W=10, C=1, F=4)
    times = {"fastclstm": [2.0, 1.0, 4.0], "ncnn": [3.0, 2.0, 4.0], "torch": [2.5, 9.0, 9.0], "onnxruntime": [0.5]}
    told = landscape.judged(one, times, one.work / 4, 10.0)
    assert (told["fastest"], told["ratio"]) == ("ncnn", 1.5)
    assert told["share_of_peak"] == pytest.approx(2.0)
    assert told["share_of_gates"] == pytest.approx(4000 * landscape.GATE_OPERATIONS / 1e9 / (one.work / 4) / 2)
    assert told["share_of_bandwidth"] == pytest.approx(4 * (1000 + 4000 + 9 * 16 + 9 * 64) / 1e9 / 10 / 2)
    assert told["milliseconds"] == {"fastclstm": 2000, "ncnn": 3000, "torch": 9000, "onnxruntime": 500}
    assert "ratio" not in landscape.judged(one, {"fastclstm": [1.0]}, 1.0, 1.0)


def test_the_summary_of_a_landscape():
    runs = [_measured(4.0), _measured(0.5), _measured(1.0), _measured(1.3), {**_measured(1.0), "failure": "broken"}]
    del runs[-1]["ratio"]
    found = ratios.summary(runs)
    assert found["geometric_mean"] == pytest.approx((4 * 0.5 * 1.3) ** 0.25)
    assert (found["count"], found["worst"], found["share_from_1.3"]) == (4, 0.5, 0.5)
    assert [loss["title"] for loss in found["losses"]] == ["of 0.5"]
    assert ratios.summary(runs[-1:]) == {"count": 0}
    assert ratios.wrong([*runs, _measured(2.0, left_out={"torch": "Wrong: by far", "ncnn": "Unavailable: no"})]) == [
        runs[-1], _measured(2.0, left_out={"torch": "Wrong: by far", "ncnn": "Unavailable: no"}),
    ]  # fmt: skip


def test_a_landscape_is_rendered(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [_measured(0.5), _measured(2.0), _measured(3.0, threads=1), _measured(1.5, training=True, family="dropout")]
    report = {"processor": "a processor", "cpus": 2, "versions": {"numpy": "2.0"}, "runs": runs[:1]}
    first, second, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "page.md"
    first.write_text(json.dumps(report))
    second.write_text(json.dumps(report | {"runs": [runs[0] | {"ratio": 0.8}, *runs[1:]]}))
    page.write_text("before\n<!-- landscape:start -->\nold\n<!-- landscape:end -->\nafter\n")
    picture = tmp_path / "dots.png"
    render.main(["--landscape", str(first), str(second), "--page", str(page), "--plot", str(picture)])
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| family | inference, 1 thread | inference, 2 threads | training, 2 threads |",
        "| --- | ---: | ---: | ---: |",
        "| usual | 3.00× (3.00×), 1 | 1.26× (0.80×), 2 | – |",
        "| dropout | – | – | 1.50× (1.50×), 1 |",
        "| **all** | 3.00× (3.00×), 1 | 1.26× (0.80×), 2 | 1.50× (1.50×), 1 |",
        "| at least 1.3× | 100% | 50% | 100% |",
    ]
    assert "Below 1×: of 0.5 (2 threads: 0.80×, ncnn)." in text
    assert 'dark)" srcset="dots-dark.png">' in text
    assert 'src="dots.png">' in text
    assert all(picture.with_stem(stem).read_bytes()[:4] == b"\x89PNG" for stem in ("dots", "dots-dark"))
    failing = report | {"runs": [*runs, {**_measured(1.0), "title": "the odd one", "failure": "broken"}]}
    assert "Failed or disagreed: the odd one." in ratios.markdown(failing)
    elsewhere = report | {"environment": {"NUMBA_CPU_NAME": "haswell"}}
    assert "Environment: NUMBA_CPU_NAME=haswell." in ratios.markdown(elsewhere)
    second.write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match="different environments"):
        ratios.load([first, second])


def test_a_landscape_is_measured_and_a_failure_of_ours_is_loud(tmp_path, monkeypatch, capsys):
    class Crew:
        threads, bandwidth = 1, 10.0

        def __init__(self, threads, forms, folder):
            self.kinds = dict.fromkeys(("fastclstm", "torch", "ncnn"), "")

        def ask(self, name, configuration, settle=0.0):
            if name == "fastclstm" and configuration.F == 4:
                return "ValueError: broken"
            return "Wrong: by far" if name == "ncnn" and configuration.F == 8 else {"difference": 0.0}

        def round(self, names, configuration):
            calm = next(noise) == 0
            seconds = {"fastclstm": 1.0, "torch": 2.0, "ncnn": 1.5} if calm else dict.fromkeys(names, 9.0)
            return {"seconds": {name: seconds[name] for name in names}, "peak": 100.0, "others": 0.0 if calm else 0.5}

        def close(self):
            pass

    noise = itertools.cycle((1, 1, 0))  # calm only each third time
    monkeypatch.setattr(landscape, "Crew", Crew)
    out = tmp_path / "landscape.json"
    command = ["--only", "few-filters", "--fixed-only", "--inference", "--threads", "1", "--out", str(out)]
    with pytest.raises(SystemExit, match="ours or a peer failed"):
        landscape.main(command)
    printed = capsys.readouterr().out
    assert "OURS FAILED: ValueError: broken" in printed
    assert "!!! 4×10×64², 1→8, k3: ncnn: Wrong: by far" in printed
    report = json.loads(out.read_text())
    told = {run["title"]: (run.get("fastest"), run.get("ratio")) for run in report["runs"]}
    assert told["4×10×64², 1→3, k3"] == ("ncnn", 1.5)
    assert told["4×10×64², 1→4, k3"] == (None, None)
    assert told["4×10×64², 1→8, k3"] == ("torch", 2.0)
    out.write_text(json.dumps(report | {"runs": report["runs"][1:]}))
    with pytest.raises(SystemExit):
        landscape.main([*command, "--missing"])
    printed = capsys.readouterr().out
    assert ["1→3, k3" in printed, "1→4, k3" in printed, "1→8, k3" in printed] == [
        True,
        True,
        False,
    ]  # failed ones again
    assert len(json.loads(out.read_text())["runs"]) == len(report["runs"])
    monkeypatch.setattr(landscape.os, "environ", dict(landscape.os.environ))
    with pytest.raises(SystemExit, match="otherwise; write another"):
        landscape.main([*command, "--avx2"])


# --- On more cores ---


def test_one_worker_takes_as_long_as_all_pieces(monkeypatch):
    monkeypatch.setattr(scaling, "ATOMIC_SECONDS", 0.0)
    around = np.array([[0, 2], [0, 3], [1, 3]])
    assert scaling.play(np.array([1.0, 2.0, 4.0]), around, 2, 3, 5, 1) == pytest.approx(2 * 3 * 5 * 7)


def test_workers_take_units_then_help_and_wait_for_neighbours(monkeypatch):
    monkeypatch.setattr(scaling, "ATOMIC_SECONDS", 0.0)
    alone, both = np.array([[0, 1], [1, 2]]), np.array([[0, 2], [0, 2]])
    pieces = np.ones(2)
    assert scaling.play(pieces, alone, 3, 1, 4, 3) == 8  # a unit each
    assert scaling.play(pieces, alone, 1, 1, 4, 2) == 4  # a block each
    assert scaling.play(pieces, both, 1, 1, 4, 50) == 4  # no more can be at a step
    assert scaling.play(np.array([1.0, 3.0]), both, 1, 1, 4, 2) == 12  # the larger one holds up both
    assert scaling.play(np.array([1.0, 3.0]), alone, 1, 1, 4, 2) == 12


def test_claims_cost_time(monkeypatch):
    monkeypatch.setattr(scaling, "ATOMIC_SECONDS", 0.25)
    # A unit, then for each of three pieces claim and report, then a claim in vain, and no other unit.
    assert scaling.play(np.ones(3), np.array([[0, 1]] * 3), 1, 1, 1, 1) == pytest.approx(0.25 + 3 * 1.5 + 0.25 * 3)


@pytest.mark.parametrize("name", ["readme", "shi", "radar"])
def test_predictions_lie_between_one_thread_and_all(name):
    alone = scaling.predict(CASES[name], 1, 1e-6)
    times = [scaling.predict(CASES[name], threads, 1e-6) for threads in (2, 8, 64)]
    assert all(alone / (1.1 * threads) < seconds < alone for threads, seconds in zip((2, 8, 64), times, strict=True))


# --- On a GPU ---


def test_inputs_are_more_than_the_cache():
    assert [gpu.copies(size, 60 << 20) for size in (1 << 30, 60 << 20, 32 << 20, 1000)] == [2, 2, 4, 32]


def test_the_floor_is_the_larger_of_two():
    case = gpu.CASES["step"]
    measured = {"float32": 50.0, "tf32": 400.0, "bfloat16": 800.0, "float16": 800.0, "copy": 4.0}
    operations = 2 * 8 * 20 * 64 * 64 * 9 * 128 * 256
    assert gpu.floor(case, "bfloat16", measured) == pytest.approx(operations / 800e12)
    moved = 8 * 20 * 64 * 64 * (64 + 4 * 64) * 4
    assert gpu.floor(case, "simt", measured | {"copy": 1e-3}) == pytest.approx(moved / 1e9)
    read_and_written = 8 * 16 * 112 * 112 * 64 * 4 * (1 + 1 / 8)
    assert gpu.floor(gpu.CASES["pool_video"], "exact", measured) == pytest.approx(read_and_written / 4e12)


def test_accelerated_models_are_measured_beside_our_own_layer():
    pytest.importorskip("torch")
    from bench import accelerate

    case = ConvLSTMCase("small", B=1, T=2, H=5, W=5, C=2, F=3, K=3)
    for model in accelerate.MODELS:
        found = {side: accelerate.call(side, model, case, side != "own")[1] for side in accelerate.SIDES}
        np.testing.assert_allclose(found["own"][0], found["torch"][0], rtol=0, atol=1e-6)
        assert len(found["torch"]) == len(found["accelerated"]) > 1  # the gradients too
        for ours, theirs in zip(found["accelerated"], found["torch"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    sizes = accelerate.drawn(3, 2, True)
    assert sizes == accelerate.drawn(3, 2, True)
    assert all(one.K % 2 and one.H == one.W for one in sizes)


def test_the_page_on_accelerate_names_what_is_slower_and_what_is_above(tmp_path):
    pytest.importorskip("torch")
    from bench import accelerate

    def row(case, over, factor):
        return {"model": "ndrplz", "case": case, "title": case, "train": False, "threads": 2, "over": over,
                "medians": {"torch": 0.09, "accelerated": 0.01, "own": 1e-2}, "factor": factor,
                "within": over < 6e-4}  # fmt: skip

    out = tmp_path / "rows.json"
    out.write_text(json.dumps(accelerate.joined(out, [row("fast", 0.0, 9.0), row("slow", 1e-4, 0.9)], 5)))
    report = accelerate.joined(out, [row("fast", 1e-3, 4.0)], 5)  # measured again
    assert [one["case"] for one in report["rows"]] == ["slow", "fast"]
    table = accelerate.markdown(report)
    assert "| ndrplz | inference | 2 | 1.90× | 0.90× | +5.5% | 1 of 2 |" in table
    assert "Slower than plain PyTorch: ndrplz slow inference (0.90×). Medians of 5 rounds" in table
    assert "| fast | ndrplz | inference | 90.00 | 10.00 | 10.00 | 4.00× | **+10%** |" in table


def test_first_contact_goes_on_after_a_step_that_fails_or_hangs(tmp_path):
    python = [sys.executable, "-c"]
    steps = [
        first_contact.Step("there is none", ["no-such-command"], 5),
        first_contact.Step("hangs", [*python, "import time; print('here', flush=True); time.sleep(60)"], 1),
        first_contact.Step("fails", [*python, "raise SystemExit(3)"], 5),
        first_contact.Step("knows a variable", [*python, "import os; assert os.environ['A'] == 'b'"], 5, {"A": "b"}),
    ]
    assert first_contact.run_part("part", steps, tmp_path) == 3
    found = [one["status"] for one in json.loads((tmp_path / "part.json").read_text())]
    assert found[0].startswith("not started")
    assert found[1:] == ["not done after 1 s", "failed with 3", "passed"]
    assert "here" in (tmp_path / "part.log").read_text()
    assert first_contact.run_part("late", steps[-1:], tmp_path, seconds=0) == 1


def test_first_contact_has_commands_that_are_there(tmp_path, monkeypatch):
    """Files of tests exist, and every command of ours takes its options."""
    monkeypatch.setattr(first_contact, "check", lambda options: 0)
    monkeypatch.setattr(gpu.devices, "missing", lambda: "no GPU")
    for step in (step for steps in first_contact.parts(tmp_path).values() for step in steps):
        files = [word for word in step.command if word.startswith("tests/")]
        assert all((first_contact.ROOT / name).exists() for name in files)
        for module in (first_contact, gpu):
            if module.__name__ in step.command:
                options = step.command[step.command.index(module.__name__) + 1 :]
                with pytest.raises(SystemExit) as end:
                    module.main(options)
                assert end.value.code == (0 if module is first_contact else "bench.gpu: no GPU")
