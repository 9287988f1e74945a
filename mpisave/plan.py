"""Where bytes go: owners, streams and rounds. Pure arithmetic.

For each root that writes, every other rank sends one *stream*: the bytes of the arrays
that it owns, one after another, in the order of the entries. A round takes the next
bytes of every stream; how many follows from the lengths of the streams and the cap
alone, so all ranks know every round without being told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

# Before MPI-4, Gatherv takes its counts and displacements as C ints, so no block may
# begin past 2**31 - 1. Open MPI 4.1 then raises on the root alone, and the other ranks
# wait for ever.
MAX_COUNT = 2**31 - 1

# Larger rounds than this were not faster, and smaller ones start to cost: see
# docs/performance.md.
ROUND_NBYTES = 16 * 2**20

# What the root stages of its own arrays where they are not contiguous.
SCRATCH_NBYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Extent:
    """The run of file bytes that holds one array."""

    offset: int  # of the first byte, from the start of the file
    nbytes: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0:
            raise ValueError(f"extent is negative: {self}")

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Buffers:
    """How the cap of a root is spent. In bytes."""

    round_nbytes: int
    scratch_nbytes: int


def buffers(max_nbytes: int, roots: int = 1) -> Buffers:
    """Return the buffer sizes that together keep within `max_nbytes` of one root.

    Two rounds are in memory at a time: one travels while the other is written. A root
    beside others also sends, and packs up to one more. A cap below 4 bytes counts as 4.
    """
    cap = max(max_nbytes, 4)
    scratch = min(SCRATCH_NBYTES, cap // 4)
    share = (cap - scratch) // (2 if roots == 1 else 3)
    return Buffers(min(share, ROUND_NBYTES, MAX_COUNT), scratch)


def owner(holders: Collection[int], root: int) -> int:
    """Return whose value is saved: the root's own, else the lowest holder's."""
    return root if root in holders else min(holders)


def streams(owners: Sequence[int], size: int) -> list[list[int]]:
    """Return, for each rank, the entries that it supplies, in file order."""
    supplied: list[list[int]] = [[] for _ in range(size)]
    for entry, rank in enumerate(owners):
        supplied[rank].append(entry)
    return supplied


def rounds(
    totals: npt.NDArray[np.int64], round_nbytes: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield, for each round, how many bytes of each stream it brings.

    Parameters
    ----------
    totals : ndarray of int64, shape (size,)
        Bytes of each rank's stream; the root's own is zero.
    round_nbytes : int
        Bytes that one round brings at most, all streams together.

    Yields
    ------
    ndarray of int64, shape (size,)
        Bytes of this round. Streams share it evenly until they run dry.
    """
    left = totals.copy()
    while (active := int(np.count_nonzero(left))) > 0:
        counts = np.minimum(left, round_nbytes // active)
        spare = round_nbytes - int(counts.sum())
        # What short streams leave, and the rest of the division, goes to the first.
        more = left - counts
        given = np.minimum(np.cumsum(more), spare)
        counts += np.diff(given, prepend=0)
        left -= counts
        yield counts


def displacements(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where the bytes of each rank begin in a round buffer."""
    return np.cumsum(counts) - counts


class Cursor:
    """Cuts a stream of items, some bytes long each, into consecutive windows.

    O(1) for each item and window over the whole stream.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._item = 0
        self._done = 0  # bytes of the current item that were handed out

    def take(self, nbytes: int) -> list[tuple[int, int, int]]:
        """Return the next `nbytes` as (item, first byte within it, number of bytes)."""
        window = []
        while nbytes > 0:
            size = self._sizes[self._item]
            part = min(nbytes, size - self._done)
            if part:
                window.append((self._item, self._done, part))
                self._done += part
                nbytes -= part
            if self._done == size:
                self._item += 1
                self._done = 0
        return window
