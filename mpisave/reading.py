"""Boxes of a file to memory: large reads, checked block by block."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import alone, in_new_thread
from mpisave.blocks import check_blocks
from mpisave.checksum import BLOCK_NBYTES
from mpisave.errors import (
    ArgumentError,
    FileFormatError,
    StateDictError,
    show_key,
)
from mpisave.shards import boxes_of_range, common, run_elements, slices, spans
from mpisave.threads import in_threads
from mpisave.to_device import Checks, Staging
from mpisave.wanted import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from mpisave.formats.index import Stored
    from mpisave.shards import Point
    from mpisave.source import Source
    from mpisave.wanted import Want

# Blocks that one call reads; also what a thread stages.
_WINDOW_NBYTES = 4 * BLOCK_NBYTES

# What a thread reads to a device before it asks for more, at most.
_UPLOAD_WINDOWS = 8

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
        Boxes, each with its memory. Of those that share memory, the last in the file is
        what is there.
    verify : bool
        Whether to check the CRC-32C of every block that is touched: all of it is read.
    threads : int
        How many may read at a time; each stages 4 MiB, 8 MiB for a device.

    Raises
    ------
    FileFormatError
        If bytes are missing, or are not what was saved.
    """
    held = [want.held for want in wants]
    lonely = set(map(id, alone(held)))
    mine = [want for want in wants if id(want.held) in lonely]
    # One after the other: each is checked before the next is there.
    tied = [want for want in wants if id(want.held) not in lonely]
    longest = max((want.stored.extent.nbytes for want in wants), default=0)
    # Of one size or the other: pinned memory is used again by who wants as much.
    most = _TOGETHER_NBYTES if longest <= _TOGETHER_NBYTES else _WINDOW_NBYTES
    checks = Checks([want.held for want in mine] if verify else [])
    # So that there is something for each thread, and all end at the same time.
    share = sum(a.nbytes for a in held if a.library is not None) // (2 * threads)
    windows = min(max(1, share // _WINDOW_NBYTES), _UPLOAD_WINDOWS)
    run = _Run(source, Staging(most), checks, windows * _WINDOW_NBYTES, verify=verify)
    try:
        in_threads(_jobs(run, mine), threads, in_new_thread(held))
        for want in sorted(tied, key=lambda want: want.stored.extent.offset):
            in_threads(_jobs(run, [want]), 1)
    finally:
        run.staging.finish()
    checks.check()


@dataclass(frozen=True, slots=True)
class _Run:
    """What all reads of a call share."""

    source: Source
    staging: Staging
    checks: Checks
    upload_nbytes: int  # what a thread reads to a device before it asks for more
    verify: bool


def _jobs(run: _Run, wants: Sequence[Want]) -> Iterator[Callable[[], None]]:
    small: list[Want] = []
    ordered = sorted(wants, key=lambda want: want.stored.extent.offset)
    for want in ordered:
        if want.held.nbytes == 0:
            continue
        if want.stored.extent.nbytes < _SMALL_NBYTES and is_whole(want):
            if small and not _fits(small, want):
                yield _Together(run, small)
                small = []
            small.append(want)
            continue
        box = _Box(want, verify=run.verify)
        is_on_device = want.held.library is not None
        is_sent_whole = is_on_device and box.is_all and box.is_flat
        most = run.upload_nbytes if is_sent_whole else _WINDOW_NBYTES
        for first, stop in box.windows(most):
            at = box.inside(first, stop)
            if is_on_device and at is not None:
                yield _Upload(run, box, first, stop, at)
            else:
                yield _Window(run, box, first, stop, at)
    if small:
        yield _Together(run, small)


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

    def __init__(self, run: _Run, wants: Sequence[Want]) -> None:
        self._run, self._wants = run, wants

    def __call__(self) -> None:
        first = self._wants[0].stored.extent.offset
        stop = self._wants[-1].stored.extent.stop
        device = next((w.held for w in self._wants if w.held.library), None)
        run = self._run
        nbytes = stop - first
        lane = None if device is None else run.staging.lane(device)
        data = np.empty(nbytes, np.uint8) if lane is None else lane.take(nbytes)
        done = run.source.read_into(first, data.data)
        try:
            for want in self._wants:
                extent = want.stored.extent
                start = extent.offset - first
                part = data[start : start + extent.nbytes]
                if start + extent.nbytes > done:
                    _refuse_torn(want.stored, max(0, done - start))
                if run.verify:
                    check_blocks(want.stored, part.data)
                want.held.fill(0, part)
        finally:
            if lane is not None:
                lane.begun()


class _Box:
    """A box of an array, read in windows of the array's bytes."""

    def __init__(self, want: Want, *, verify: bool) -> None:
        self.stored, self.start, self.held = want.stored, want.start, want.held
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

    def windows(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield the bytes to read: first and stop, from the start of the array."""
        total = self.stored.extent.nbytes
        if self.is_all:
            yield from _cut(0, total, most)
            return
        unit = self.unit
        first = self.runs // unit
        last = (self.runs + self.run_nbytes - 1) // unit
        most = most // unit * unit
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

    def __init__(
        self, run: _Run, box: _Box, first: int, stop: int, at: int | None
    ) -> None:
        self._run, self._box, self._at = run, box, at
        self._first, self._stop = first, stop

    def __call__(self) -> None:
        run, box, first, at = self._run, self._box, self._first, self._at
        held, nbytes = box.held, self._stop - first
        there = None if at is None else held.view(at, at + nbytes)
        lane = None if held.library is None else run.staging.lane(held)
        if there is not None:
            data = there
        elif lane is None:
            data = np.empty(nbytes, np.uint8)
        else:
            data = lane.take(nbytes)
        read_exactly(run.source, box.stored, first, data)
        if run.verify:
            check_blocks(box.stored, data.data, first // BLOCK_NBYTES)
        if there is not None:
            return
        try:
            self._copy(data)
        finally:
            if lane is not None:
                lane.begun()

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


class _Upload:
    """What goes to a device as it lies in the file: read while it is copied."""

    def __init__(self, run: _Run, box: _Box, first: int, stop: int, at: int) -> None:
        self._run, self._box = run, box
        self._first, self._stop, self._at = first, stop, at

    def __call__(self) -> None:
        run, stored, held = self._run, self._box.stored, self._box.held
        lane, shift = run.staging.lane(held), self._at - self._first
        is_checked_there = run.checks.takes(held)
        for first in range(self._first, self._stop, _WINDOW_NBYTES):
            nbytes = min(_WINDOW_NBYTES, self._stop - first)
            data = lane.take(nbytes)
            read_exactly(run.source, stored, first, data)
            if run.verify and not is_checked_there:
                check_blocks(stored, data.data, first // BLOCK_NBYTES)
            lane.send(held.source, first + shift, nbytes)
        if is_checked_there:
            nbytes = self._stop - self._first
            run.checks.add(stored, self._first // BLOCK_NBYTES, held, self._at, nbytes)


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


def _refuse_torn(stored: Stored, there: int) -> None:
    raise FileFormatError(
        f"{show_key(stored.key)} is torn: {there} of {stored.extent.nbytes} bytes are "
        f"there"
    )
