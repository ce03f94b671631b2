"""Measure rounding: every algorithm's largest error of h against float64, after 10 and after 100 steps."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import CASES, ConvLSTMCase
from bench.render import insert
from fastclstm import functional

STEPS = (10, 100)
COLUMNS: dict[str, dict[str, Any]] = {
    "NumPy float32": {"engine": "reference"},
    "direct": {"engine": "cpu", "algorithm": "direct"},
    "auto": {"engine": "cpu", "algorithm": "auto"},
}
CASE_NAMES = ("readme", "mmnist", "keras5", "deep", "shi", "openstl")
"""All but `radar`, which differs from `mmnist` in the size of its frames only."""


def row(name: str) -> list[str]:
    """Return a case's title and the errors, one image, of each column after each number of steps."""
    case = CASES[name]
    assert isinstance(case, ConvLSTMCase)
    case = replace(case, B=1, T=STEPS[-1])
    exact = case.oracle()
    cells = [f"{name} ({case.C}→{case.F}, k{case.K})"]
    for options in COLUMNS.values():
        error = np.abs(functional.convlstm2d(**case.arrays(), **options) - exact).max(axis=(0, 2, 3, 4))
        cells += [f"{error[:steps].max():.1e}" for steps in STEPS]
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it between a file's markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.errors", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASE_NAMES, default=CASE_NAMES)
    parser.add_argument("--readme", type=Path, help="the file with the markers; without it the table is printed")
    options = parser.parse_args(arguments)
    head = ["case", *(f"{name}, {steps} steps" for name in COLUMNS for steps in STEPS)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *map(row, options.cases)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    if options.readme:
        options.readme.write_text(insert(options.readme.read_text(), table, "errors"))
    else:
        print(table)


if __name__ == "__main__":
    main()
