"""A rank that others wait for writes where it is stuck, if it is for too long."""

from __future__ import annotations

import faulthandler
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_END_S = 1.0
# A thread can wait for some centuries at most.
_LONGEST_S = 3600.0


@contextmanager
def watchdog(
    stuck: Callable[[], tuple[float, str]], after_s: float | None
) -> Iterator[None]:
    """Give a context in which this process writes its stacks if it is stuck. Once.

    A rank that a file system or a device holds cannot raise. The others give it up and
    name it; where it is, only itself can tell. Not by the timer of faulthandler: there
    is one for each process, and it may be the caller's.

    Parameters
    ----------
    stuck : callable
        Returns for how many seconds this rank has been at one thing, and at what.
    after_s : float or None
        When to write; None: never.
    """
    if after_s is None:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        left = after_s
        while not is_over.wait(min(max(left, 0.01), _LONGEST_S)):
            seconds, what = stuck()
            left = after_s - seconds
            if left <= 0:
                dump_stacks(f"{what} for {seconds:.1f} s: others may give it up.")
                return

    # As long as the GIL is free, which it is in calls of the system.
    thread = threading.Thread(target=watch, name="mpisave watchdog", daemon=True)
    try:
        # Where there are no more threads, the call does without.
        with suppress(RuntimeError, MemoryError):
            thread.start()
        yield
    finally:
        is_over.set()
        if thread.ident is not None:
            thread.join(_END_S)  # longer only if nobody reads what it writes


def dump_stacks(why: str) -> None:
    """Write the stacks of all threads of this process to standard error."""
    if sys.stderr is None:
        return
    try:
        print(f"mpisave: {why} Its stacks:", file=sys.stderr, flush=True)  # noqa: T201
        faulthandler.dump_traceback(sys.stderr)
    except (OSError, ValueError, AttributeError, RuntimeError):
        return  # standard error is no file
