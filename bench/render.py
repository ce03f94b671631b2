"""Render saved comparisons: a page's table between its markers, and a bar plot; or a landscape, and its dots."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from bench import ratios
from bench.cases import CASES

OURS, DIRECT, AVX2 = "fastclstm", "fastclstm-direct", "fastclstm-avx2"

FAMILIES = {
    "NumPy": ("numpy",),
    "PyTorch eager": ("torch", "torch-channels-last", "torch-split", "torch-split-channels-last"),
    "torch.compile": ("torch-compile", "torch-compile-channels-last"),
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino",),
    "ncnn": ("ncnn", "ncnn-split"),
    "Keras": ("keras-jax", "keras-torch"),
}
"""The peers as the table shows them: of each family its fastest member."""

_COLOURS = ("#c2410c", "#fb923c", "#94a3b8", "#1e3a8a", "#60a5fa", "#166534", "#4ade80", "#7e22ce", "#0f172a")

_EXPLANATION = (
    "Medians of {rounds} interleaved rounds on {processor}, {cpus} CPUs; of each family the fastest variant. “direct” "
    'is `algorithm="direct"`; “of FMA peak” is its share of the multiply-add peak; “AVX2” is fastclstm compiled for a '
    "processor with nothing newer; “of bandwidth” is the share of the memory bandwidth, measured in the same rounds, "
    "which arrays in the caches may exceed; “vs.” is how many times faster fastclstm is, frameworks being "
    "all but NumPy, below 1 where it loses; “max error” is against the float64 oracle. {all_versions}."
)

Run = dict[str, Any]


def load(paths: list[Path]) -> dict[str, Any]:
    """Read saved comparisons as one report, in table order; of a case and thread count the last file counts."""
    reports = [json.loads(path.read_text()) for path in paths]
    machines = {(report["processor"], report["cpus"], report["rounds"]) for report in reports}
    if len(machines) > 1:
        raise ValueError(f"these were measured on different machines or with different rounds: {sorted(machines)}")
    runs = {(run["case"], run["threads"]): run for report in reports for run in report["runs"]}
    order = list(CASES)
    return reports[0] | {"runs": sorted(runs.values(), key=lambda run: (order.index(run["case"]), run["threads"]))}


def families(run: Run) -> dict[str, tuple[str, Run]]:
    """Return, for each family that ran, its fastest member's name and result."""
    results = run["results"]
    fastest = {}
    for family, members in FAMILIES.items():
        there = [name for name in members if name in results]
        if there:
            name = min(there, key=lambda name: results[name]["median_seconds"])
            fastest[family] = (name, results[name])
    return fastest


def _milliseconds(result: Run | None) -> str:
    return "–" if result is None else f"{result['median_seconds'] * 1e3:.3g}"


def _row(run: Run, columns: list[str], direct: bool) -> list[str]:
    results, peers = run["results"], families(run)
    ours = results[OURS]
    rivals = [result["fastclstm_times_faster"] for family, (_, result) in peers.items() if family != "NumPy"]
    cells = [f"{run['case']} ({run['title']})", str(run["threads"]), f"**{_milliseconds(ours)}**"]
    if direct:
        cells += [
            _milliseconds(results.get(DIRECT)),
            f"{results[DIRECT]['share_of_peak']:.0%}" if DIRECT in results else "–",
            _milliseconds(results.get(AVX2)),
        ]
    else:
        cells += [f"{ours['share_of_peak']:.0%}"]
    cells += [_milliseconds(peers[family][1]) if family in peers else "–" for family in columns]
    cells += [f"{peers['NumPy'][1]['fastclstm_times_faster']:.1f}×" if "NumPy" in peers else "–"]
    return [*cells, f"{min(rivals):.2f}×" if rivals else "–", f"{ours['max_error']:.1e}"]


def _table(runs: list[Run], direct: bool) -> list[str]:
    columns = [family for family in FAMILIES if any(family in families(run) for run in runs)]
    head = ["case", "threads", "fastclstm", *(["direct", "of FMA peak", "AVX2"] if direct else ["of bandwidth"])]
    head += [*columns, "vs. NumPy", "vs. fastest framework", "max error"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *(_row(run, columns, direct) for run in runs)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def markdown(report: dict[str, Any], plot: str | None = None) -> str:
    """Return the tables and what a reader must know about them."""
    lines: list[str] = []
    lstm = [run for run in report["runs"] if run["op"] == "convlstm2d"]
    pool = [run for run in report["runs"] if run["op"] == "max_pool3d"]
    if lstm:
        lines += ["ConvLSTM forward pass, float32, milliseconds:", "", *_table(lstm, direct=True), ""]
    if pool:
        lines += ["MaxPooling3D, float32, milliseconds:", "", *_table(pool, direct=False), ""]
    if plot:
        lines += [f"![Speed beside other implementations]({plot})", ""]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [_EXPLANATION.format(**report, all_versions=versions)]
    return "\n".join(lines)


def insert(text: str, block: str, name: str = "bench") -> str:
    """Return `text` with what stands between the markers of `name` replaced by `block`, or raise ValueError."""
    opening, closing = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not start or not end:
        raise ValueError(f"the file needs the lines {opening} and {closing}, in this order")
    return f"{before}{opening}\n{block}\n{closing}{after}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw each case's speed, fastclstm beside the families, on the largest thread count, and save it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(run["threads"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["op"] == "convlstm2d" and run["threads"] == threads]
    names = [OURS, "direct", *FAMILIES]
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.84 / len(names)
    for position, name in enumerate(names):
        rates = []
        for run in runs:
            result = run["results"].get({"direct": DIRECT}.get(name, name)) or families(run).get(name, (None, None))[1]
            rates.append(result["rate"] if result else 0.0)
        at = [case + (position - (len(names) - 1) / 2) * width for case in range(len(runs))]
        axes.bar(at, rates, width, label=f"{OURS}, direct" if name == "direct" else name, color=_COLOURS[position])
    peak = statistics.median(value for run in runs for value in run["peaks"])
    axes.axhline(peak, color="black", linestyle=":", linewidth=1, label="FMA peak")
    axes.set_xticks(range(len(runs)), [run["case"] for run in runs])
    axes.set_ylabel("GFLOP/s of the direct convolution")
    axes.set_title(f"ConvLSTM forward, float32, {threads} threads, {report['processor']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Render saved comparisons into a Markdown file and a picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.render", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by bench.compare")
    parser.add_argument("--page", type=Path, help="the file with the markers; without it the table is printed")
    parser.add_argument("--plot", type=Path, help="the PNG to draw")
    parser.add_argument("--landscape", action="store_true", help="the results are those of bench.landscape")
    options = parser.parse_args(arguments)
    report = (ratios.load if options.landscape else load)(options.results)
    picture = None
    if options.plot:
        (ratios.dots if options.landscape else plot)(report, options.plot)
        if options.page:
            picture = Path(os.path.relpath(options.plot, options.page.parent)).as_posix()
    block = ratios.markdown(report, picture) if options.landscape else markdown(report, picture)
    if options.page:
        name = "landscape" if options.landscape else "bench"
        options.page.write_text(insert(options.page.read_text(), block, name))
    else:
        print(block)


if __name__ == "__main__":
    main()
