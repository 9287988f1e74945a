"""Work that several threads share: each takes the next job when it is done with one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


def in_threads(
    jobs: Iterable[Callable[[], T]],
    threads: int,
    begin: Callable[[], None] = lambda: None,
) -> list[T]:
    """Do all jobs, and return what they return, in their order.

    Jobs are made as they are taken. After a failure no more are.

    Parameters
    ----------
    jobs : iterable of callable
        What is to be done.
    threads : int
        How many work at a time. One: the caller's.
    begin : callable
        What each new thread does first.

    Raises
    ------
    BaseException
        What a job has raised.
    """
    if threads == 1:
        return [job() for job in jobs]
    numbered = enumerate(jobs)
    results: dict[int, T] = {}
    lock, ended = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            begin()
            while not ended.is_set():
                with lock:
                    taken = next(numbered, None)
                if taken is None:
                    return
                number, job = taken
                results[number] = job()
        except BaseException:
            ended.set()
            raise

    with ThreadPoolExecutor(threads, "mpisave worker") as pool:
        try:
            workers = [pool.submit(work) for _ in range(threads)]
            for worker in workers:
                worker.result()
        finally:
            ended.set()  # also where the caller is interrupted
    return [results[number] for number in range(len(results))]
