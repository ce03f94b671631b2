"""Beyond one process: training by PyTorch's DistributedDataParallel, inference on a cluster of Dask's workers.

Each part runs on one process of one thread, then on two, prints the seconds, and compares the results: losses and
parameters of training, every value of inference. Run it with ``python examples/several_processes.py``; it needs
PyTorch, xarray and dask.distributed, and about a minute (with ``--quick``, in one process and by NumPy, some
seconds, of which no figure means anything). Other machines are a matter of addresses: ``torchrun`` starts
the same training there, and ``distributed.Client("scheduler:8786")`` takes the place of the LocalCluster.
"""

import argparse
import os
import queue
import tempfile
import time

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import xarray
from distributed import Client, LocalCluster
from torch.nn.parallel import DistributedDataParallel

import fastclstm
from fastclstm.adapters.torch import ConvLSTM2D
from fastclstm.adapters.xarray import apply

STEPS, BATCH = 6, 8


def train(rank, processes, store, results, size, filters, engine):
    """Train on this process's share of each batch; the first one tells losses, parameters and seconds."""
    torch.set_num_threads(1)
    fastclstm.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(ConvLSTM2D(*sizes, 3, engine=engine) for sizes in ((1, filters), (filters, 1))))
    x, y = torch.rand(2, BATCH, 10, 1, size, size)
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    parallel, losses, seconds = DistributedDataParallel(model), [], []
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (parallel(x[share]) - y[share]).square().mean()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        total = loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / processes)
    if rank == 0:
        results.put((losses, [p.detach().numpy() for p in model.parameters()], sorted(seconds[1:])[len(seconds) // 2]))
    torch.distributed.barrier()  # whoever ends early would take its connections from under the other
    torch.distributed.destroy_process_group()


def trained(processes, quick, *sizes):
    """Return what a training by so many processes gives; if `quick`, by this one alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        if quick:
            results = queue.SimpleQueue()
            train(0, 1, store, results, *sizes)
            return results.get()
        results = torch.multiprocessing.get_context("spawn").Queue()
        arguments = processes, store, results, *sizes
        context = torch.multiprocessing.spawn(train, arguments, nprocs=processes, join=False)
        told = results.get()
        while not context.join():
            pass
    return told


def inferred(processes, quick, network, frames):
    """Return what a cluster of so many workers makes of frames, and its seconds; if `quick`, workers are threads."""
    options = {"n_workers": processes, "threads_per_worker": 1, "dashboard_address": None, "processes": not quick}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.run(fastclstm.set_num_threads, 1)
        made = apply(network, frames)
        made.isel(member=slice(0, 2)).compute()  # what is compiled and imported once
        start = time.perf_counter()
        made = made.compute()
        return made, time.perf_counter() - start


def main(arguments=None):
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="little frames, in this process alone: to see that it runs"
    )
    quick = parser.parse_args(arguments).quick
    size, filters, engine = (8, 4, "reference") if quick else (48, 32, None)
    one, two = (trained(processes, quick, size, filters, engine) for processes in (1, 2))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    rows = [("training, a step (DDP, gloo)", one[2], two[2])]

    network = fastclstm.Sequential(
        [
            fastclstm.ConvLSTM2D(1, filters, 3, seed=0, engine=engine),
            fastclstm.Conv2D(filters, 1, 1, seed=1, engine=engine),
        ]
    )
    rain = np.random.default_rng(0).random((16, 12, 2 * size, 2 * size), np.float32)
    frames = xarray.DataArray(rain, dims=("member", "time", "y", "x")).chunk(member=1)
    (whole, one), (shared, two) = (inferred(processes, quick, network, frames) for processes in (1, 2))
    np.testing.assert_allclose(whole, shared, atol=1e-6)
    rows.append(("inference, 16 members (Dask)", one, two))

    print(f"{'':32} one process   two   times as fast")
    for name, single, double in rows:
        print(f"{name:32} {single:9.3f} s {double:7.3f} s {single / double:10.2f}")


if __name__ == "__main__":
    main()
