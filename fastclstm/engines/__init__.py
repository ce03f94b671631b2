"""Engines: one module or package each, with the functions named in `fastclstm.dispatch.OPERATIONS`."""
