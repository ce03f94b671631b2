import json
import math
import signal
import time

import numpy as np
import pytest

import fastclstm
from bench import crowd, gpu, render, scaling, training
from bench.cases import CASES, ConvLSTMCase, PoolCase


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
    render.plot(report, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


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
    out, readme = tmp_path / "crowd.json", tmp_path / "README.md"
    out.write_text(json.dumps(report))
    readme.write_text("before\n<!-- crowd:start -->\nlast year's\n<!-- crowd:end -->\nafter\n")
    crowd.main(["--out", str(out), "--readme", str(readme)])
    text = readme.read_text()
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
