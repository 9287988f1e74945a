"""Reading for devices: through pinned memory in turns, with checksums on arrival."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from mpisave.arrays import library_of
from mpisave.blocks import check_sum
from mpisave.checksum import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import HeldArray
    from mpisave.devices import Lane
    from mpisave.formats.index import Stored

# With less, CUDA's compiler, at the first time, and the calls of the device take longer
# than the host takes to compute the checksums.
_LEAST_NBYTES = 256 * 2**20


class Staging:
    """Lanes to devices: of each thread, and each device that it meets, one.

    Parameters
    ----------
    most : int
        Bytes that are taken at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._mine = threading.local()
        self._every: list[Lane] = []

    def lane(self, held: HeldArray) -> Lane:
        """Return this thread's lane to the device of an array."""
        library: Any = held.library
        number = library.ordinal(held.source)
        if not hasattr(self._mine, "lanes"):
            self._mine.lanes = {}
        lanes: dict[int, Lane] = self._mine.lanes
        if number not in lanes:
            lanes[number] = library.lane(held.source, self._most)
            self._every.append(lanes[number])
        return lanes[number]

    def finish(self) -> None:
        """Wait for the copies of all threads."""
        with contextlib.ExitStack() as every:  # where one fails, for the others too
            for lane in self._every:
                every.callback(lane.wait)


class Checks:
    """Checks blocks on the devices to which they were copied, all at once.

    A device computes CRC-32C faster than its memory is filled, and what it sees is what
    has come.

    Parameters
    ----------
    held : sequence of HeldArray
        What is read: no two share memory, of which the last would be seen.
    """

    def __init__(self, held: Sequence[HeldArray]) -> None:
        there = [array for array in held if array.library is not None]
        library = library_of(there)
        self._sum: Any = None
        self._taken: set[int] = set()
        self._parts: list[tuple[Stored, int, HeldArray, int, int]] = []
        if library is None or sum(a.nbytes for a in there) < _LEAST_NBYTES:
            return
        whole = [a for a in there if a.is_contiguous]
        # All but the last block of an array are full.
        most = sum(a.nbytes // BLOCK_NBYTES + 1 for a in whole)
        if whole:
            self._sum = library.summing([a.source for a in whole], most)
        if self._sum is not None:
            self._taken = set(map(id, whole))

    def takes(self, held: HeldArray) -> bool:
        """Return whether blocks of an array are checked where they are."""
        return id(held) in self._taken

    def add(
        self, stored: Stored, first: int, held: HeldArray, at: int, nbytes: int
    ) -> None:
        """Have blocks checked, from `first` on, which come to byte `at` of an array."""
        self._parts.append((stored, first, held, at, nbytes))

    def check(self) -> None:
        """Refuse blocks that are not what was saved. Once all copies are done.

        Raises
        ------
        FileFormatError
            With the key, the block, and both checksums.
        """
        if not self._parts:
            return
        # Of several that are altered, the first in the file.
        self._parts.sort(key=lambda part: (part[0].extent.offset, part[1]))
        runs = [(held.source, at, nbytes) for _, _, held, at, nbytes in self._parts]
        found = self._sum(runs, BLOCK_NBYTES)
        done = 0
        for stored, first, _, _, nbytes in self._parts:
            count = -(-nbytes // BLOCK_NBYTES)
            sums = tuple(found[done : done + count])
            if sums != stored.sums[first : first + count]:
                for number, value in enumerate(sums, start=first):
                    check_sum(stored, number, value)
            done += count
