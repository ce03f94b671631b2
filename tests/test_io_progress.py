"""The progress bar: its text, and where there is none."""

import io
import sys

import pytest

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
        (io.StringIO(), None, False),
        (io.StringIO(), False, True),
        (Terminal(), False, True),
    ],
)
def test_where_it_is_shown(monkeypatch, stream, quiet, is_shown):
    assert bool(shown(monkeypatch, stream, quiet)) == is_shown


@pytest.mark.parametrize("quiet", [None, False])
def test_without_stderr_there_is_none(monkeypatch, quiet, capsys):
    closed = Terminal()
    closed.close()
    for stream in (None, closed, Small()):
        shown(monkeypatch, stream, quiet)
        assert capsys.readouterr().out == "a line\n"
