"""Large tables are built without Python's search for garbage."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# A handler of signals may save, in the thread that has the lock.
_lock = threading.RLock()
_within = 0  # how many threads, each as often as it is
_was_enabled = False


@contextmanager
def kept() -> Iterator[None]:
    """Give a context, or decorate a function, in which nothing made is garbage.

    Each time that enough objects were made, Python looks at all there are for cycles
    that nobody refers to. A table of 20,000 arrays has none, and looking was a third of
    the time that it took to make. It holds for all threads: nothing is waited for
    within.
    """
    global _within, _was_enabled  # noqa: PLW0603 - as there is one collector
    try:
        with _lock:
            if not _within:
                _was_enabled = gc.isenabled()
            _within += 1
            gc.disable()
        yield
    finally:
        with _lock:
            _within = max(0, _within - 1)  # 0: it was forked meanwhile
            if not _within and _was_enabled:
                gc.enable()


def _after_fork() -> None:
    # The child has none of the threads that were within, but may hold their lock.
    global _lock, _within  # noqa: PLW0603
    _lock = threading.RLock()
    if _within and _was_enabled:
        gc.enable()
    _within = 0


os.register_at_fork(after_in_child=_after_fork)
