"""Word that kernels are being compiled: who is told, when, how often."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest

from fastclstm.engines import notices


@pytest.mark.parametrize(("terminal", "in_logs"), [(False, False), (True, False), (False, True)])
def test_compiling_is_told_once_after_some_silence(monkeypatch, capsys, terminal, in_logs):
    monkeypatch.setattr(notices, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    notice = notices.Notice()
    notice.in_logs = in_logs
    texts = []
    for seconds in (0.01, 0.2, 0.2):
        with notice.compiling():
            threading.Event().wait(seconds)
        texts.append(capsys.readouterr().err)
    assert [text.count("compiling kernels") for text in texts] == [0, terminal or in_logs, 0]
    assert all(len(line) < 80 for line in texts[1].splitlines())


def test_stderr_may_be_none_or_closed_or_anything_that_writes(monkeypatch):
    monkeypatch.setattr(notices, "SILENT_SECONDS", 0)
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, SimpleNamespace(write=print)):
        monkeypatch.setattr(sys, "stderr", stream)
        for in_logs in (False, True):
            notice = notices.Notice()
            notice.in_logs = in_logs
            with notice.compiling():
                threading.Event().wait(0.02)
