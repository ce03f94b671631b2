"""Several kernels one after the other in one parallel region, all of a team done with one before the next."""

from __future__ import annotations

from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.team import call


@kernel
def program(job, worker, entries):
    """Run kernels: entries (count, 2), the address of each, 0: none, and that of its job."""
    for n in range(len(entries)):
        if entries[n, 0] != 0:
            call(entries[n, 0], entries[n, 1], worker)
