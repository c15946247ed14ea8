"""Writes shards in several processes, which end when their parent ends."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from steppe.data.errors import DataError
from steppe.data.prepare import shards
from steppe.data.prepare.shards import Job, Recipe


def run(
    directory: str, recipe: Recipe, jobs: list[Job], dtype: str, workers: int, tell: Callable[[list[int]], None]
) -> Iterator[tuple[Job, dict | None]]:
    """Yields (job, entry) for finished shards; the entry is None if another process is writing the shard.

    Calls `tell` twice a second with the total [documents, tokens, bytes]. Workers end within a second after an error,
    an interrupt or the death of this process.
    """
    context = multiprocessing.get_context("spawn")  # tensorflow does not survive a fork
    # Raw memory without locks, because a worker that is killed while it holds a lock would block the others.
    counts, stopped = context.RawArray(ctypes.c_int64, 3 * len(jobs)), context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (counts, stopped, os.getpid()))
    done = threading.Event()

    def totals() -> list[int]:
        return [sum(counts[kind::3]) for kind in range(3)]

    def watch() -> None:
        while not done.wait(0.5):
            tell(totals())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with _interrupts_held():  # workers inherit the blocked signal, so only this process stops them
            futures = {pool.submit(_work, directory, recipe, job, dtype, i): job for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
        tell(totals())
    except BrokenProcessPool as error:
        stopped.value = True
        remedy = "finished shards remain; run again, perhaps with fewer --workers"
        raise DataError(f"a worker preparing {directory} was killed (out of memory?); {remedy}") from error
    except BaseException:
        stopped.value = True
        raise
    finally:
        done.set()
        watcher.join()
        pool.shutdown(wait=True, cancel_futures=True)


def run_here(
    directory: str, recipe: Recipe, jobs: list[Job], dtype: str, workers: int, tell: Callable[[list[int]], None]
) -> Iterator[tuple[Job, dict | None]]:
    """Like run, but in this process, one shard after the other."""
    counts, told = [0, 0, 0], time.monotonic()

    def count(*more: int) -> None:
        nonlocal told
        counts[:] = [a + b for a, b in zip(counts, more, strict=True)]
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            tell(counts)

    for job in jobs:
        yield job, shards.take(directory, recipe, job, dtype, count)
        tell(counts)


@contextmanager
def _interrupts_held():
    """Delays an interrupt until the block ends. Processes started in the block never receive interrupts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counts: Any = None  # set in worker processes


def _start(counts, stopped, parent: int) -> None:
    global _counts
    _counts = counts
    follow(parent, lambda: stopped.value)


def follow(parent: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Ends this process soon after its parent ends, or after `stopped()` is true."""

    def watch() -> None:
        while os.getppid() == parent and not stopped():
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(directory: str, recipe: Recipe, job: Job, dtype: str, index: int) -> dict | None:
    def count(*more: int) -> None:
        for kind, value in enumerate(more):
            _counts[3 * index + kind] += value

    return shards.take(directory, recipe, job, dtype, count)
