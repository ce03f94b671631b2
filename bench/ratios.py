"""What a landscape shows: the ratios' summary, the table for its page, and the picture, a dot a configuration."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a reader asks first: how many, the geometric mean, the worst, the share from 1.3× on, the losses."""
    ratios = sorted(run["ratio"] for run in runs if "ratio" in run)
    if not ratios:
        return {"count": 0}
    return {
        "count": len(ratios),
        "geometric_mean": statistics.geometric_mean(ratios),
        "worst": ratios[0],
        "share_from_1.3": sum(ratio >= 1.3 for ratio in ratios) / len(ratios),
        "losses": sorted(
            ({"title": run["title"], "threads": run["threads"], "family": run["family"], "fastest": run["fastest"],
              "ratio": run["ratio"]} for run in runs if run.get("ratio", 1) < 1),
            key=lambda loss: loss["ratio"],
        ),
    }  # fmt: skip


def groups(runs: Sequence[dict[str, Any]]) -> dict[tuple[bool, int], list[dict[str, Any]]]:
    """Return the runs by whether they train and the number of threads."""
    keys = sorted({(run["training"], run["threads"]) for run in runs})
    return {key: [run for run in runs if (run["training"], run["threads"]) == key] for key in keys}


def wrong(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs in which ours failed, or a peer did, or its result was another than ours."""
    return [run for run in runs if "failure" in run or broken(run)]


def broken(run: dict[str, Any]) -> dict[str, str]:
    """Return the peers that stayed out for another reason than that they cannot do this."""
    return {name: why for name, why in run["left_out"].items() if not why.startswith("Unavailable")}


def key(run: dict[str, Any]) -> tuple[str, str, int]:
    """Return what tells a run from the others."""
    return run["title"], run["family"], run["threads"]


def joined(earlier: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report with `runs` in place of those of the same configuration and number of threads."""
    table = {key(run): run for run in (*earlier["runs"], *runs)}
    return earlier | {"runs": list(table.values())}


def load(paths: list[Path]) -> dict[str, Any]:
    """Read landscapes as one report; of a configuration and number of threads the last file counts."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for other in others:
        if other["processor"] != first["processor"]:
            raise ValueError(f"measured on different machines: {first['processor']} and {other['processor']}")
        first = joined(first, other["runs"])
    return first


def markdown(report: dict[str, Any], picture: str | None = None) -> str:
    """Return the table of the families, the losses by name, and what a reader must know about them."""
    runs = report["runs"]
    members = groups(runs)
    names = {
        key: f"{'training' if key[0] else 'inference'}, {key[1]} thread{'s' if key[1] > 1 else ''}" for key in members
    }
    rows = [["family", *names.values()], ["---", *["---:"] * len(names)]]
    for family in dict.fromkeys(run["family"] for run in runs):
        cells = [_cell([run for run in some if run["family"] == family]) for some in members.values()]
        if set(cells) != {"–"}:
            rows.append([family, *cells])
    rows.append(["**all**", *(_cell(some) for some in members.values())])
    rows.append(["at least 1.3×", *(f"{found['share_from_1.3']:.0%}" if (found := summary(some))["count"] else "–"
                                    for some in members.values())])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"![How many times as fast as the fastest peer]({picture})"] if picture else []
    losses = [loss for some in members.values() for loss in summary(some).get("losses", ())]
    lost = "; ".join(f"{loss['title']} ({loss['threads']} threads: {loss['ratio']:.2f}×, {loss['fastest']})"
                     for loss in sorted(losses, key=lambda loss: loss["ratio"]))  # fmt: skip
    failed = "; ".join(run["title"] for run in wrong(runs))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", "How many times as long as ours the fastest peer takes: the geometric mean of a family's "
              "configurations, in brackets the worst, then how many. "
              f"Below 1×: {lost or 'none'}."
              + (f" **Failed or disagreed: {failed}.**" if failed else "")
              + f" {report['processor']}, {report['cpus']} CPUs; {versions}."]  # fmt: skip
    return "\n".join(lines)


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    found = summary(runs)
    if not found["count"]:
        return "–"
    return f"{found['geometric_mean']:.2f}× ({found['worst']:.2f}×), {found['count']}"


def dots(report: dict[str, Any], path: Path) -> None:
    """Draw a landscape, a dot a configuration in the order of the ratios, and save it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    members = groups(report["runs"])
    kinds = sorted({trained for trained, _ in members})
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(10, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axes, trained in zip(panels[0], kinds, strict=True):
        counts = sorted((threads for kind, threads in members if kind == trained), reverse=True)
        for threads, colour in zip(counts, ("#c2410c", "#60a5fa", "#94a3b8"), strict=False):
            ratios = sorted(run["ratio"] for run in members[trained, threads] if "ratio" in run)
            places = [100 * (place + 0.5) / len(ratios) for place in range(len(ratios))]
            label = f"{threads} thread{'s' if threads > 1 else ''}"
            axes.plot(places, ratios, "o", markersize=4, color=colour, label=label)
        axes.axhline(1, color="black", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("configurations, in percent, by their ratio")
        axes.set_title("training" if trained else "inference", fontsize=10)
        axes.legend(loc="upper left", fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("times as fast as the fastest peer")
    figure.suptitle(f"ConvLSTM, {report['processor']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
