"""The scripts of examples/ that are not in the gallery, which the site's build runs."""

import re
import runpy
from pathlib import Path

import pytest

import fastclstm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.extra
def test_several_processes(capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("xarray")
    pytest.importorskip("distributed")
    threads = torch.get_num_threads(), fastclstm.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / "several_processes.py"))["main"](["--quick"])
    finally:
        torch.set_num_threads(threads[0])
        fastclstm.set_num_threads(threads[1])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[-2:]] == ["training", "inference"]
    assert all(re.search(r"\d s +\d", line) for line in lines[-2:])


def test_every_example_is_run():
    """Those with a title are in the gallery; of the others each has a test here."""
    untitled = [path.stem for path in EXAMPLES.glob("*.py") if not re.match(r'"""\n[^\n]+\n={3,}\n', path.read_text())]
    assert [name for name in untitled if f"test_{name}" not in globals()] == []
