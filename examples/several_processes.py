"""Beyond one process: training by PyTorch's DistributedDataParallel, inference on a cluster of Dask's workers.

Each part runs on one process of one thread, then on two, prints the seconds, and compares the results: losses and
parameters of training, every value of inference. Run it with ``python examples/several_processes.py``; it needs
PyTorch, xarray and dask.distributed, and about a minute. Other machines are a matter of addresses: ``torchrun`` starts
the same training there, and ``distributed.Client("scheduler:8786")`` takes the place of the LocalCluster.
"""

import os
import sys
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


def train(rank, processes, store, results):
    """Train on this process's share of each batch; the first one tells losses, parameters and seconds."""
    torch.set_num_threads(1)
    fastclstm.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = torch.nn.Sequential(ConvLSTM2D(1, 32, 3), ConvLSTM2D(32, 1, 3))
    x, y = torch.rand(BATCH, 10, 1, 48, 48), torch.rand(BATCH, 10, 1, 48, 48)
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


def trained(processes):
    """Return what a training by so many processes gives."""
    results = torch.multiprocessing.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = processes, os.path.join(folder, "store"), results
        context = torch.multiprocessing.spawn(train, arguments, nprocs=processes, join=False)
        told = results.get()
        while not context.join():
            pass
    return told


def inferred(processes, network, frames):
    """Return what a cluster of so many workers makes of frames, and its seconds."""
    options = {"n_workers": processes, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.run(fastclstm.set_num_threads, 1)
        made = apply(network, frames)
        made.isel(member=slice(0, 2)).compute()  # what is compiled and imported once
        start = time.perf_counter()
        made = made.compute()
        return made, time.perf_counter() - start


def main():
    """Print a table."""
    one, two = trained(1), trained(2)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    rows = [("training, a step (DDP, gloo)", one[2], two[2])]

    network = fastclstm.Sequential([fastclstm.ConvLSTM2D(1, 32, 3, seed=0), fastclstm.Conv2D(32, 1, 1, seed=1)])
    rain = np.random.default_rng(0).random((16, 12, 96, 96), np.float32)
    frames = xarray.DataArray(rain, dims=("member", "time", "y", "x")).chunk(member=1)
    (whole, one), (shared, two) = inferred(1, network, frames), inferred(2, network, frames)
    np.testing.assert_allclose(whole, shared, atol=1e-6)
    rows.append(("inference, 16 members (Dask)", one, two))

    print(f"{'':32} one process   two   times as fast")
    for name, single, double in rows:
        print(f"{name:32} {single:9.3f} s {double:7.3f} s {single / double:10.2f}")


if __name__ == "__main__":
    sys.exit(main())
