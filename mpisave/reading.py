"""Boxes of a file to memory: large reads, checked block by block."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import in_new_thread, library_of
from mpisave.checksum import BLOCK_NBYTES, crc32c
from mpisave.devices import host_memory
from mpisave.errors import (
    ArgumentError,
    FileFormatError,
    StateDictError,
    show_key,
)
from mpisave.shards import boxes_of_range, common, run_elements, slices, spans
from mpisave.threads import in_threads
from mpisave.wanted import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from mpisave.devices import DeviceLibrary
    from mpisave.formats.index import Stored
    from mpisave.shards import Point
    from mpisave.source import Source
    from mpisave.wanted import Want

# Blocks that one call reads; also what a thread stages.
_WINDOW_NBYTES = 4 * BLOCK_NBYTES

# Arrays shorter than this are read together with their neighbours.
_SMALL_NBYTES = 64 * 2**10
_TOGETHER_NBYTES = 2**20
_GAP_NBYTES = 4096

# Without checksums: runs shorter than this are read with what lies between them.
_SHORTEST_RUN_NBYTES = 64 * 2**10


@contextlib.contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with it."""
    try:
        yield
    except (FileFormatError, StateDictError) as exc:
        if exc.step or str(exc).startswith(name):  # agreed on, or named, already
            raise
        raise type(exc)(f"{name}: {exc}") from exc


def read(source: Source, wants: Sequence[Want], *, verify: bool, threads: int) -> None:
    """Read what is wanted.

    Parameters
    ----------
    source : Source
        The file.
    wants : sequence of Want
        Boxes, each with its memory.
    verify : bool
        Whether to check the CRC-32C of every block that is touched: all of it is read.
    threads : int
        How many may read at a time; each stages at most 4 MiB.

    Raises
    ------
    FileFormatError
        If bytes are missing, or are not what was saved.
    """
    copies = _Copies()
    jobs = _jobs(source, wants, copies, verify=verify)
    begin = in_new_thread(want.held for want in wants)
    try:
        in_threads(jobs, threads, begin)
    finally:
        copies.finish()


class _Copies:
    """Copies to a device: one for each thread, while it reads what comes next."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._every: list[list[Callable[[], None]]] = []

    def begun(self, library: DeviceLibrary | None) -> None:
        """Wait for all that this thread has queued but the last."""
        if library is None:
            return
        if not hasattr(self._mine, "waits"):
            self._mine.waits = []
            self._every.append(self._mine.waits)
        waits = self._mine.waits
        waits.append(library.fence())
        if len(waits) > 1:
            waits.pop(0)()

    def finish(self) -> None:
        """Wait for those of all threads."""
        with contextlib.ExitStack() as every:  # where one fails, for the others too
            for waits in self._every:
                for wait in waits:
                    every.callback(wait)


def _jobs(
    source: Source, wants: Sequence[Want], copies: _Copies, *, verify: bool
) -> Iterator[Callable[[], None]]:
    small: list[Want] = []
    ordered = sorted(wants, key=lambda want: want.stored.extent.offset)
    for want in ordered:
        if want.held.nbytes == 0:
            continue
        if want.stored.extent.nbytes < _SMALL_NBYTES and is_whole(want):
            if small and not _fits(small, want):
                yield _Together(source, small, copies, verify=verify)
                small = []
            small.append(want)
            continue
        box = _Box(source, want, verify=verify)
        for first, stop in box.windows():
            yield _Window(box, copies, first, stop)
    if small:
        yield _Together(source, small, copies, verify=verify)


def _fits(small: Sequence[Want], want: Want) -> bool:
    """Return whether an array is read together with those before it."""
    first, last = small[0].stored.extent, small[-1].stored.extent
    extent = want.stored.extent
    return (
        0 <= extent.offset - last.stop <= _GAP_NBYTES
        and extent.stop - first.offset <= _TOGETHER_NBYTES
    )


class _Together:
    """Small arrays that lie close together: one read."""

    def __init__(
        self,
        source: Source,
        wants: Sequence[Want],
        copies: _Copies,
        *,
        verify: bool,
    ) -> None:
        self._source, self._wants, self._copies = source, wants, copies
        self._verify = verify

    def __call__(self) -> None:
        first = self._wants[0].stored.extent.offset
        stop = self._wants[-1].stored.extent.stop
        library = library_of(want.held for want in self._wants)
        data = host_memory(stop - first, library, _TOGETHER_NBYTES)
        done = self._source.read_into(first, data.data)
        try:
            for want in self._wants:
                extent = want.stored.extent
                start = extent.offset - first
                part = data[start : start + extent.nbytes]
                if start + extent.nbytes > done:
                    _refuse_torn(want.stored, max(0, done - start))
                if self._verify:
                    check_blocks(want.stored, part.data)
                want.held.fill(0, part)
        finally:
            self._copies.begun(library)


class _Box:
    """A box of an array, read in windows of the array's bytes."""

    def __init__(self, source: Source, want: Want, *, verify: bool) -> None:
        self.source, self.stored, self.verify = source, want.stored, verify
        self.start, self.held = want.start, want.held
        self.itemsize = want.stored.dtype.itemsize
        self.count = want.held.shape
        shape = want.stored.shape
        self.is_all = self.count == shape
        if self.is_all:  # there are many of these: no search for what is one run
            self.is_flat = self.held.is_contiguous
            return
        counts = np.array([self.count], np.int64).reshape(1, -1)
        run_nbytes = int(run_elements(shape, counts)[0]) * self.itemsize
        # What is read in units: whole blocks, or what lies between short runs as well.
        self.unit = BLOCK_NBYTES if verify else _SHORTEST_RUN_NBYTES
        if not verify and run_nbytes >= _SHORTEST_RUN_NBYTES:
            self.unit = 1
        # So that no unit lies in a gap.
        most_gap = (self.unit - 1) // self.itemsize
        firsts, length = spans(shape, self.start, self.count, most_gap)
        self.runs: npt.NDArray[np.int64] = firsts * self.itemsize
        self.run_nbytes = length * self.itemsize
        # Without gaps in them, runs may go where they lie: no copy.
        self.is_flat = self.held.is_contiguous and run_nbytes == self.run_nbytes

    def windows(self) -> Iterator[tuple[int, int]]:
        """Yield the bytes to read: first and stop, from the start of the array."""
        total = self.stored.extent.nbytes
        if self.is_all:
            yield from _cut(0, total, _WINDOW_NBYTES)
            return
        unit = self.unit
        first = self.runs // unit
        last = (self.runs + self.run_nbytes - 1) // unit
        most = _WINDOW_NBYTES // unit * unit
        # Units that some run touches, those that follow each other together.
        begin = end = int(first[0])
        for low, high in zip(first.tolist(), last.tolist(), strict=True):
            if low > end or unit == 1:
                yield from _cut(begin * unit, min(end * unit, total), most)
                begin = low
            end = max(end, high + 1)
        yield from _cut(begin * unit, min(end * unit, total), most)

    def inside(self, first: int, stop: int) -> int | None:
        """Return where bytes that all lie in one run begin in the box, or None."""
        if not self.is_flat:
            return None
        if self.is_all:
            return first
        number = int(np.searchsorted(self.runs, first, side="right")) - 1
        if number < 0:
            return None
        skip = first - int(self.runs[number])
        if stop - first + skip > self.run_nbytes:
            return None
        return number * self.run_nbytes + skip


def _cut(first: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(first, stop, most):
        yield start, min(start + most, stop)


class _Window:
    """One read of a box."""

    def __init__(self, box: _Box, copies: _Copies, first: int, stop: int) -> None:
        self._box, self._copies = box, copies
        self._first, self._stop = first, stop

    def __call__(self) -> None:
        box, first, stop = self._box, self._first, self._stop
        held, at = box.held, box.inside(first, stop)
        there = None if at is None else held.view(at, at + stop - first)
        data = there
        if data is None:
            data = host_memory(stop - first, held.library, _WINDOW_NBYTES)
        read_exactly(box.source, box.stored, first, data)
        if box.verify:
            check_blocks(box.stored, data.data, first // BLOCK_NBYTES)
        if there is not None:
            return
        try:
            if at is not None:
                held.fill(at, data)
            else:
                self._copy(data)
        finally:
            self._copies.begun(held.library)

    def _copy(self, data: npt.NDArray[np.uint8]) -> None:
        """Copy what of the box is in a window to its place."""
        box = self._box
        first = -(-self._first // box.itemsize)
        stop = self._stop // box.itemsize
        skip = first * box.itemsize - self._first
        nbytes = (stop - first) * box.itemsize
        elements = data[skip : skip + nbytes].view(box.stored.dtype)
        at = 0
        for start, count in boxes_of_range(box.stored.shape, first, stop):
            n = math.prod(count)
            shared = common(start, count, box.start, box.count)
            if shared is not None:
                part = elements[at : at + n].reshape(count)
                where = slices(*shared, box.start)
                box.held.fill_box(where, part[slices(*shared, start)])
            at += n


def read_exactly(
    source: Source, stored: Stored, at: int, out: npt.NDArray[np.uint8]
) -> None:
    """Fill `out` from byte `at` of an array, or say that the file is torn."""
    done = source.read_into(stored.extent.offset + at, out.data)
    if done < out.size:
        _refuse_torn(stored, at + done)


def mapped(source: Source) -> Callable[[Stored, Point, Point], npt.NDArray[Any]]:
    """Return what maps boxes of a file, read-only.

    Raises
    ------
    ArgumentError
        If it is a file object.
    """
    descriptor = source.descriptor
    if descriptor is None:
        raise ArgumentError("mmap=True needs a path: a file object cannot be mapped")
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def array(stored: Stored, start: Point, shape: Point) -> npt.NDArray[Any]:
        if stored.extent.stop > len(memory):
            _refuse_torn(stored, max(0, len(memory) - stored.extent.offset))
        n = math.prod(stored.shape)
        flat = np.frombuffer(memory, stored.dtype, n, stored.extent.offset)
        where: Any = slices(start, shape, (0,) * len(shape))
        return flat.reshape(stored.shape)[(..., *where)]  # 0-d too is an array

    return array


def check_blocks(stored: Stored, data: memoryview, first: int = 0) -> None:
    """Refuse blocks that are not what was saved.

    Parameters
    ----------
    stored : Stored
        The array.
    data : memoryview
        Its bytes from the start of block `first` on, up to the end of a block.
    first : int
        Which block comes first.

    Raises
    ------
    FileFormatError
        With the key, the block, and both checksums.
    """
    for number, start in enumerate(range(0, data.nbytes, BLOCK_NBYTES), start=first):
        found = crc32c(data[start : start + BLOCK_NBYTES])
        if found != stored.sums[number]:
            raise FileFormatError(
                f"{show_key(stored.key)} is altered: the CRC-32C of block {number} at "
                f"offset {stored.extent.offset + number * BLOCK_NBYTES} is "
                f"{found:#010x}, not {stored.sums[number]:#010x}"
            )


def _refuse_torn(stored: Stored, there: int) -> None:
    raise FileFormatError(
        f"{show_key(stored.key)} is torn: {there} of {stored.extent.nbytes} bytes are "
        f"there"
    )
