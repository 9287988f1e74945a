"""Large tables are built without Python's search for garbage."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def kept() -> Iterator[None]:
    """Give a context, or decorate a function, in which nothing made is garbage.

    Each time that enough objects were made, Python looks at all there are for cycles
    that nobody refers to. A table of 20,000 arrays has none, and looking was a third of
    the time that it took to make.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
