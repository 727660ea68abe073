"""Compiled CPU loops on the threads that torch itself uses.

Between two operators torch's OpenMP threads go on spinning for milliseconds. A pool of our own would have to share the
cores with them: on two cores the second thread then brings next to nothing. So the tasks of a loop run as one parallel
region of the very OpenMP library that torch is linked with, through `GOMP_parallel`, the entry point that those of
GNU, LLVM and Intel have. Where torch has none of these (Windows, macOS) Python's threads do.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

SERIAL_WORK = 1 << 18  # below so many state updates (about 0.1 ms) a second thread costs more than it brings
REGION_WORK = 1 << 14  # the same where compiled code begins the region
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMP(NamedTuple):
    parallel: Callable[..., None]  # (body, data, threads, flags): runs body(data) on every thread of a team
    thread: Callable[[], int]  # this thread's place in its team
    threads: Callable[[], int]  # the team's size, which may be less than was asked for


@functools.cache
def _openmp() -> _OpenMP | None:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:  # loaded already: names are looked up in it and in what it is linked with
        library, quick = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))  # the second keeps the GIL
        return _OpenMP(library.GOMP_parallel, quick.omp_get_thread_num, quick.omp_get_num_threads)
    except (OSError, AttributeError):
        return None


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # keyed by process: threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="memzoo")


def run_tasks(kernel: Callable[..., None], arguments: tuple[Any, ...], tasks: int, work: int) -> None:
    """Call kernel(*arguments, first, last) so that every task is in one [first, last), on torch's number of threads.

    The kernel must release the GIL. `work` is in state updates; little of it stays on this thread.
    """
    threads = min(torch.get_num_threads(), tasks) if work > SERIAL_WORK else 1

    def share(i: int, n: int) -> None:
        kernel(*arguments, tasks * i // n, tasks * (i + 1) // n)

    openmp = _openmp()
    if threads == 1:
        share(0, 1)
    elif openmp is None:
        others = [_pool(os.getpid(), threads - 1).submit(share, i, threads) for i in range(1, threads)]
        share(0, threads)
        for other in others:
            other.result()
    else:
        _region(openmp, share, torch.get_num_threads())


def run_parts(kernel: Callable[..., None], region: Callable[..., None], arguments: tuple[Any, ...], work: int) -> None:
    """Call kernel(part, parts, *arguments) for every part, on torch's number of threads, begun by compiled code.

    `region` is a compiled function of (threads, arguments) that calls `regions.run(kernel, threads, arguments)`.
    """
    threads = torch.get_num_threads() if work > REGION_WORK else 1
    if threads == 1:
        kernel(0, 1, *arguments)
    elif _openmp() is not None:
        region(threads, arguments)
    else:
        run_tasks(lambda part, _: kernel(part, threads, *arguments), (), threads, SERIAL_WORK + work)


def _region(openmp: _OpenMP, share: Callable[[int, int], None], threads: int) -> None:
    """One parallel region; torch's own number of threads, since libgomp rebuilds a team whose size changes."""
    errors: list[BaseException] = []

    def body(_: int | None) -> None:
        try:
            share(openmp.thread(), openmp.threads())
        except BaseException as error:  # an exception cannot leave a thread of OpenMP's
            errors.append(error)

    openmp.parallel(_BODY(body), None, threads, 0)
    if errors:
        raise errors[0]
