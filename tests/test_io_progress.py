"""The progress bar: its text, and where there is none."""

import io
import sys

import pytest

from fastclstm.io import progress
from fastclstm.io.progress import progress_bar, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Small:
    """Somebody's own, with little more than `write`."""

    closed = True

    def write(self, text):
        return len(text)


def shown(monkeypatch, stream, quiet):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=None, unit=" step", quiet=quiet) as bar:
        bar.set_description_str("epoch 2")
        bar.update(8)
        say("a line")
    return "" if stream is None or stream.closed else stream.getvalue()


def test_the_text(monkeypatch, capsys):
    text = shown(monkeypatch, Terminal(), None)
    assert "epoch 2: 8 step [" in text
    assert ": :" not in text
    assert "8step" not in text
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize(
    ("stream", "quiet", "is_shown"),
    [
        (Terminal(), True, False),
        (io.StringIO(), True, False),
        (io.StringIO(), None, False),
        (io.StringIO(), False, True),
        (Terminal(), False, True),
    ],
)
def test_where_it_is_shown(monkeypatch, stream, quiet, is_shown):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    assert bool(shown(monkeypatch, stream, quiet)) == is_shown


@pytest.mark.parametrize("total", [None, 4])
def test_a_log_gets_lines(monkeypatch, total):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=total, unit=" step", quiet=False) as bar:
        for epoch in (1, 2):
            bar.set_description_str(f"epoch {epoch}")
            bar.update(2)
    text = sys.stderr.getvalue()
    assert "\r" not in text
    _, first, *_, last = lines = text.splitlines()
    assert all(lines)
    assert first.startswith(
        "epoch 1: 50%, 2 of 4 steps, 00:00 gone, 00:00 to go" if total else "epoch 1: 2 steps, 00:00 gone"
    )
    assert last.startswith("epoch 2: 100%, 4 of 4 steps" if total else "epoch 2: 4 steps")


def test_what_is_short_leaves_nothing_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(range(3), quiet=False) as bar:
        assert list(bar) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("quiet", [None, False])
def test_without_stderr_there_is_none(monkeypatch, quiet, capsys):
    closed = Terminal()
    closed.close()
    for stream in (None, closed, Small()):
        shown(monkeypatch, stream, quiet)
        assert capsys.readouterr().out == "a line\n"
