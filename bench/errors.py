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
from fastclstm.engines.cpu.kernels import winograd

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


def tile_row(m: int, k: int) -> list[str]:
    """Return what Winograd's tile of m×m outputs and k×k taps errs: see `fastclstm.engines.cpu.tiles`."""
    rng, (A_T, G, B_T), alpha = np.random.default_rng(0), winograd.transforms(m, k), m + k - 1
    x = rng.standard_normal((400, alpha, alpha, 64)).astype(np.float32)
    w = (rng.uniform(-1, 1, (k, k, 64)) / k / 8).astype(np.float32)
    weights = np.einsum("ai,bj,ijc->abc", G, G, w.astype(float)).astype(np.float32)
    A, B = A_T.astype(np.float32), B_T.astype(np.float32)
    inputs = np.einsum("bj,najc->nabc", B, np.einsum("ai,nijc->najc", B, x))
    products, direct = np.zeros((400, alpha, alpha), np.float32), np.zeros((400, m, m), np.float32)
    exact = np.zeros((400, m, m))
    for c in range(64):
        products += inputs[..., c] * weights[..., c]
        for i, j in np.ndindex(k, k):
            direct += x[:, i : i + m, j : j + m, c] * w[i, j, c]
            exact += x[:, i : i + m, j : j + m, c].astype(float) * w[i, j, c]
    result = np.einsum("bj,naj->nab", A, np.einsum("ai,nij->naj", A, products))
    error, scale = np.abs(result - exact) / exact.std(), exact.std()
    numbers = error.max(), np.sqrt((error**2).mean()), np.sqrt(((direct - exact) ** 2).mean()) / scale
    return [f"F({m},{k})", f"{alpha**2 / m**2:.1f} of {k * k}", *(f"{number:.1e}" for number in numbers)]


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it between a file's markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.errors", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASE_NAMES, default=CASE_NAMES)
    parser.add_argument("--page", type=Path, help="the file with the markers; without it the table is printed")
    parser.add_argument("--tiles", action="store_true", help="of one convolution by each of Winograd's tiles instead")
    options = parser.parse_args(arguments)
    if options.tiles:
        head = ["tile", "multiplications an output", "largest", "r.m.s.", "direct, r.m.s."]
        body = [tile_row(alpha + 1 - k, k) for alpha in winograd.POINTS for k in range(2, alpha) if k < 8]
    else:
        head = ["case", *(f"{name}, {steps} steps" for name in COLUMNS for steps in STEPS)]
        body = [*map(row, options.cases)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    if options.page:
        options.page.write_text(insert(options.page.read_text(), table, "errors"))
    else:
        print(table)


if __name__ == "__main__":
    main()
