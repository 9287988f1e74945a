"""Work that several threads share: each takes the next job when it is done with one."""

from __future__ import annotations

import threading
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
    failures: list[BaseException] = []
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
        except BaseException as exc:  # noqa: BLE001 - raised by the caller's thread
            failures.append(exc)
            ended.set()

    # Executors share a lock, and so do threads that are no daemons: a signal handler
    # that saves would wait for it in the thread that has it.
    started: list[threading.Thread] = []
    try:
        for number in range(threads):
            name = f"mpisave worker {number}"
            worker = threading.Thread(target=work, name=name, daemon=True)
            worker.start()
            started.append(worker)
        for worker in started:
            worker.join()
    finally:
        ended.set()  # also where the caller is interrupted
        for worker in started:
            worker.join()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(results))]
