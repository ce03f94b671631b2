"""Engines: one module or package each, with the six functions named in `fastclstm.dispatch.OPERATIONS`."""
