"""Where the command line was: see `fastclstm.commands`."""

from fastclstm.lazy import moved

__getattr__ = moved(__name__, dict.fromkeys(("app", "main"), "fastclstm.commands"))
