"""One file opened by all ranks, with its index: the same file, whoever replaces it."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

from mpisave.errors import FileFormatError, StorageError
from mpisave.finding import find_index, trailer_of
from mpisave.formats import foreign_hdf5, index
from mpisave.reading import naming_file
from mpisave.source import Source

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from mpisave.collective import Steps
    from mpisave.comms import Comm

# As often as this, ranks open a file that is replaced while they do so.
_MOST_TRIES = 20

# Of a file of another program: so many parts, of so many bytes, tell it from another.
_PARTS, _PART_NBYTES = 64, 4096


def open_same(
    steps: Steps,
    own: Comm,
    path: Any,
    opened: contextlib.ExitStack,
    find: Callable[[Source], tuple[bytes, str] | None],
) -> tuple[Source, tuple[bytes, str] | None]:
    """Open the file, the same on all ranks; return it and its index. Collective.

    A save may put another file at the path at any moment: the index of one file tells
    nothing of the payload of another.

    Parameters
    ----------
    steps : Steps
        Of the call.
    own : Comm
        All ranks of it.
    path : path, or seekable binary file object
        The same on all ranks, if it is a path.
    opened : contextlib.ExitStack
        Closes the file.
    find : callable
        Returns bytes of the index and kind of the file; None: it has none.

    Raises
    ------
    FileFormatError, StorageError, OSError
        On every rank, if the file cannot be opened, is none that can be read, or is
        replaced again and again.
    """
    for _ in range(_MOST_TRIES):
        first: list[Source] = []

        def find_here(first: list[Source] = first) -> tuple[bytes, str] | None:
            if own.rank != 0:
                return None
            first.append(opened.enter_context(Source(path)))
            with naming_file(first[0].name):
                return find(first[0])

        head: tuple[bytes, str] | None
        head = own.bcast(steps.step("read the index", find_here))

        def open_own(
            first: list[Source] = first, head: tuple[bytes, str] | None = head
        ) -> tuple[Any, ...]:
            if not first:
                first.append(opened.enter_context(_open(own, path)))
            is_name = isinstance(path, (str, bytes, os.PathLike))
            return is_name, _mark(first[0], head)

        every = steps.exchange("open the file", open_own)
        if len(set(every)) == 1 or not all(is_name for is_name, _ in every):
            return first[0], head
        opened.close()
    # Alike on all ranks: each has compared the same marks.
    raise FileFormatError(
        f"{path}: {_MOST_TRIES} times, {own.size} ranks did not open one and the same "
        f"file. It is replaced too often, or is not on a file system that all nodes "
        f"share."
    )


def _open(own: Comm, path: Any) -> Source:
    try:
        return Source(path)
    except OSError as exc:
        if own.size == 1:
            raise
        error = StorageError(
            f"cannot open {path}: {exc}. All ranks that load read it: it has to lie on "
            f"a file system that all nodes share."
        )
        error.errno = exc.errno
        raise error from exc


def _mark(source: Source, head: tuple[bytes, str] | None) -> tuple[Any, ...]:
    """Return what tells a file from another that was at its path before."""
    if head is not None and head[1] != index.FOREIGN:
        # The trailer has the checksum of the index, the index those of the payload.
        return source.nbytes, trailer_of(source)
    # Not by its time: each node may have a copy of its own.
    value, last = 0, max(0, source.nbytes - _PART_NBYTES)
    for number in range(_PARTS + 1):
        part = source.read(last * number // _PARTS, _PART_NBYTES)
        value = zlib.crc32(part, value)
    return source.nbytes, value


def index_of(source: Source) -> tuple[bytes, str] | None:
    """Return bytes of the index and kind of a file, or None: a foreign pickle.

    Raises
    ------
    FileFormatError
        If it is none that can be read.
    """
    head = find_index(source)
    if head is not None and head[1] == index.FOREIGN:
        return foreign_hdf5.inspect(source), index.FOREIGN
    return head
