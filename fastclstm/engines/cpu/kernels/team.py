"""How the threads of a call share its work: they claim it piece by piece, in order, and wait for what a piece needs.

A call's job begins with a few counters (`HEADER`), each on a cache line of its own. Workers claim pieces by an atomic
ticket. As tickets are claimed in order, whatever a piece waits for was claimed before it by a worker that runs, so that
no number of threads, not even one, can come to a standstill; and a worker that loses its processor to somebody else
holds up one piece, not its share. Who waits spins for some microseconds and then sleeps: a neighbour gets the
processor. Every element of a result has one piece that writes it, so no bit depends on the number of threads.

The last to leave a call is its first worker: threading layers end a parallel region with a barrier that spins, and a
worker that sleeps until the others are through meets them there. For those that have not begun it does not wait long:
a layer may run several workers on one thread, one after the other (OMP_THREAD_LIMIT, OMP_DYNAMIC, oneTBB).
"""

from __future__ import annotations

import os
import sys
import time

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline, kept
from fastclstm.engines.cpu.kernels.simd import INT32, INT64, IS_ARM

WORKERS, TICKET, DONE, BEGUN, LEFT, BUSY = range(0, 48, 8)
"""Where in a job's header of int64 is what: workers, pieces claimed and done, workers but the first begun and gone,
nanoseconds of processor time that a team has had."""

NESTED = 41
"""Where a job says, by 1, that it is one of a program's, at whose end all of the team wait for each other."""

HEADER = 48

IS_LINUX = sys.platform == "linux"

AFFINITY_WORDS = 16
"""Of 64 processors: as many as C libraries know sets of."""

SPINS = 4000
"""How often a worker looks before it sleeps: some 50 to 200 µs."""

SLEEP_MICROSECONDS = 50

STARTS = 100
"""How often the first worker looks whether the others have begun, before they may have its processor: some µs."""

PATIENCE = 400
"""How often the first worker sleeps for others that have not begun: some 20 to 60 ms."""


@intrinsic
def add(typingctx, address, count):
    """Add to the counter at an address, atomically; return what it was. What was written before is seen after."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], INT64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def look(typingctx, address):
    """Counter at an address; what others wrote before they raised it is seen from here on."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.inttoptr(args[0], INT64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, sig, args):
        if IS_ARM:
            kind = ir.FunctionType(ir.VoidType(), [INT32])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [INT32(1)])
        else:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _sleep(typingctx):
    """Let others have the processor for a moment."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(INT32, [INT32])
        if os.name == "posix":
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "usleep"), [INT32(SLEEP_MICROSECONDS)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield(typingctx):
    """Let another thread that waits for this processor have it, if there is one."""

    def codegen(context, builder, sig, args):
        if IS_LINUX:
            kind = ir.FunctionType(INT32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def processor(typingctx):
    """1 more than the number of the processor that this thread is on; 0 where the system does not tell."""

    def codegen(context, builder, sig, args):
        if not IS_LINUX:
            return INT64(0)
        kind = ir.FunctionType(INT32, [])
        number = builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_getcpu"), [])
        return builder.add(builder.sext(number, INT64), INT64(1))

    return types.int64(), codegen


@intrinsic
def go_elsewhere(typingctx, number):
    """Have this thread moved off a processor (from `processor`), if it may be on others; what it may stays as it is."""

    def codegen(context, builder, sig, args):
        if not IS_LINUX:
            return context.get_dummy_value()
        number = builder.sub(args[0], INT64(1))
        words = cgutils.alloca_once(builder, ir.ArrayType(INT64, AFFINITY_WORDS))
        kind = ir.FunctionType(INT32, [INT32, INT64, words.type])
        get, put = (cgutils.get_or_insert_function(builder.module, kind, f"sched_{verb}affinity")
                    for verb in ("get", "set"))  # fmt: skip
        arguments = INT32(0), INT64(8 * AFFINITY_WORDS), words
        fits = builder.icmp_unsigned("<", number, INT64(64 * AFFINITY_WORDS))
        with builder.if_then(fits):
            known = builder.icmp_signed(">=", builder.call(get, arguments), INT32(0))
            with builder.if_then(known):
                place = builder.gep(words, [INT64(0), builder.lshr(number, INT64(6))])
                before = builder.load(place)
                bit = builder.shl(INT64(1), builder.and_(number, INT64(63)))
                builder.store(builder.and_(before, builder.not_(bit)), place)
                moved = builder.call(put, arguments)  # of none left it says that it cannot be
                with builder.if_then(builder.icmp_signed(">=", moved, INT32(0))):
                    builder.store(before, place)
                    builder.call(put, arguments)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _processor_time(typingctx):
    """Nanoseconds of processor time that this thread has had; 0 where the system does not tell."""

    def codegen(context, builder, sig, args):
        if os.name != "posix" or not hasattr(time, "CLOCK_THREAD_CPUTIME_ID"):
            return INT64(0)
        pair = cgutils.alloca_once(builder, ir.ArrayType(INT64, 2))  # seconds, nanoseconds
        kind = ir.FunctionType(INT32, [INT32, pair.type])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [INT32(time.CLOCK_THREAD_CPUTIME_ID), pair])
        seconds, rest = (builder.extract_value(builder.load(pair), n) for n in range(2))
        return builder.add(builder.mul(seconds, INT64(10**9)), rest)

    return types.int64(), codegen


@intrinsic
def call(typingctx, function, job, worker):
    """Call the kernel at an address."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [INT64, INT64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@inline
def _rest(looks):
    """Pass the time between two of many looks."""
    if looks < SPINS:
        _pause()
    else:
        _sleep()


@inline
def wait(address, count):
    """Wait until the counter at an address has come to `count`."""
    looks = 0
    while look(address) < count:
        looks += 1
        _rest(looks)


@inline
def workers_of(job):
    """Count of the workers of a job."""
    return look(job + 8 * WORKERS)


@inline
def claim(job):
    """Take the next piece that nobody has: 0, 1, 2 and so on."""
    return add(job + 8 * TICKET, 1)


@inline
def grain(job, count):
    """How many of `count` equal small things make a piece: few enough that no worker waits long for the last."""
    workers = workers_of(job)
    return count if workers == 1 else max(1, count // (8 * workers))


@inline
def next_item(job, item, size):
    """The thing after `item` of a piece of `size`, or the first of a newly claimed one; -1: of the worker's first."""
    item += 1
    return size * claim(job) if item % size == 0 else item


@inline
def wait_for_all(job, count):
    """Wait until `count` pieces are done; then this one's turn has come."""
    wait(job + 8 * DONE, count)


@inline
def done(job):
    """Say that a piece is done."""
    add(job + 8 * DONE, 1)


@inline
def finished(job, count, all_of_them):
    """Say that a worker has done `count` things in all; whether these were the last of `all_of_them`."""
    return count > 0 and add(job + 8 * DONE, count) + count == all_of_them


@inline
def begin(job, worker):
    """Say that a worker is there."""
    if worker != 0 or look(job + 8 * NESTED) != 0:
        add(job + 8 * BEGUN, 1)


@inline
def leave(job, worker):
    """Say that a worker is through; the first one waits for the others.

    After a program's job all wait for those that are at it. Who comes later finds no pieces left.
    """
    looks = 0
    if look(job + 8 * NESTED) != 0:
        add(job + 8 * LEFT, 1)
        while look(job + 8 * LEFT) != look(job + 8 * BEGUN):  # in this order: who begins in between counts as there
            looks += 1
            _rest(looks)
        return
    if worker != 0:
        add(job + 8 * LEFT, 1)
        return
    others = workers_of(job) - 1
    while True:
        gone = look(job + 8 * LEFT)
        if gone >= others or (looks >= SPINS + PATIENCE and gone >= look(job + 8 * BEGUN)):
            break
        looks += 1
        _rest(looks)


# Numba's own functions for these two hold an address, which keeps code that calls them from the disk.


@intrinsic
def _get_num_threads(typingctx):
    """Threads that Numba's parallel regions in this thread use."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(INT64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "get_num_threads"), [])

    return types.int64(), codegen


@intrinsic
def _set_num_threads(typingctx, count):
    """Set it; at most as many as Numba has started."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [INT64])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "set_num_threads"), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inline
def _part(job, worker, workers, callers):
    """Have each worker on a processor of its own.

    On a virtual machine with two processors Linux woke the second worker, after a pause of 30 ms, on the processor of
    the caller, though the other one was idle: there it waits for 4 ms, or the two take turns, and a call of 1 ms takes
    3. So the caller lets it begin, and it goes elsewhere. Nobody is kept anywhere.
    """
    if worker == 0:
        looks = 0
        while looks < STARTS and look(job + 8 * BEGUN) < workers - 1:
            looks += 1
            _pause()
        if looks == STARTS:
            _yield()
    elif callers != 0 and processor() == callers:
        go_elsewhere(callers)


def _run_team(function, job, workers):
    """Run the kernel at an address on a job: the one parallel region of a call. Numba's own setting is put back.

    All of that without returning to Python, so that no Ctrl-C comes between.
    """
    before = _get_num_threads()
    at = processor()
    _set_num_threads(workers)
    for worker in numba.prange(workers):
        _part(job, worker, workers, at)
        begun = _processor_time()
        call(function, job, worker)
        add(job + 8 * BUSY, _processor_time() - begun)
    _set_num_threads(before)


run_team = kept(_run_team, "team.run_team", parallel=True)
"""Run the kernel at an address on a job by so many workers, in one parallel region."""
