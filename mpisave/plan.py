"""Where bytes go: owners, pieces, streams and rounds. Pure arithmetic.

A *piece* is a run of bytes that lie together both in an array of one rank and in the
file. Each byte of the file's payload is in one piece, or in an array that is *woven*:
one whose shards lie in the file in runs too short to write one at a time (`weave`).

When gathering, every rank sends each root one *stream*: the bytes of its pieces, one
after another, in file order. A round takes the next bytes of every stream; how many
follows from the lengths of the streams and the cap alone, so all ranks know every round
without being told.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpisave.checksum import BLOCK_NBYTES
from mpisave.devices import pinnable
from mpisave.shards import run_elements, run_starts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpisave.merging import Boxes, Holding, Merged
    from mpisave.shards import Point, Points

Column = npt.NDArray[np.int64]  # shape (n,)

# Before MPI-4, Gatherv takes its counts and displacements as C ints, so no block may
# begin past 2**31 - 1. Open MPI 4.1 then raises on the root alone, and the other ranks
# wait for ever.
MAX_COUNT = 2**31 - 1

# Larger rounds than this were not faster, and smaller ones start to cost: see
# docs/performance.md.
ROUND_NBYTES = 16 * 2**20

# Of a box that several ranks hold, each supplies a part if that is as long.
_LARGE_NBYTES = 4 * 2**20

# Boxes that lie in the file in shorter runs than this are exchanged among the ranks
# first: a call of pwrite for each would cost more than the exchange.
SHORTEST_RUN_NBYTES = 256 * 2**10

# What the root stages of its own arrays where they are not contiguous.
SCRATCH_NBYTES = 4 * 2**20


@dataclass(slots=True)  # frozen, it would take twice as long to make
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


def buffers(
    max_nbytes: int,
    roots: int = 1,
    *,
    has_device: bool = False,
    by_device: bool = False,
) -> Buffers:
    """Return the buffer sizes that together keep within `max_nbytes` of one rank.

    Two rounds are in memory at a time: one travels while the other is written. A root
    beside others also sends, and packs up to one more. A cap below 4 bytes counts as 4.

    Parameters
    ----------
    max_nbytes : int
        The cap.
    roots : int
        How many ranks gather.
    has_device : bool
        Whether arrays lie on devices: a sender then packs a round for each root while
        the one before it travels, and what does not lie together on the device, too.
    by_device : bool
        Whether rounds arrive in memory of a device: two more, copied to the host.
    """
    cap = max(max_nbytes, 4)
    scratch = min(SCRATCH_NBYTES, cap // 4)
    as_root = 4 if by_device else 2
    as_sender = 2 * (roots - 1) if has_device else min(1, roots - 1)
    many = as_root + as_sender
    if has_device:
        many = max(many + min(1, roots - 1), 2 * roots + 1)  # that of a sender alone
    share = max(1, (cap - scratch) // many)
    largest = min(share, ROUND_NBYTES, MAX_COUNT)
    return Buffers(pinnable(largest) if has_device else largest, scratch)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Pieces in columns: arrays of int64 of one length."""

    entry: Column
    rank: Column  # that supplies it
    ordinal: Column  # the how-manieth array of that rank's state it is in
    start: Column  # bytes from the start of that array
    within: Column  # bytes from the start of the entry
    nbytes: Column

    def __len__(self) -> int:
        return len(self.entry)

    def take(self, which: Column | npt.NDArray[np.bool_]) -> Pieces:
        """Return some of the pieces."""
        return Pieces(*(getattr(self, name)[which] for name in self.__slots__))

    @staticmethod
    def join(parts: Sequence[Pieces]) -> Pieces:
        """Return all pieces of several tables."""
        names = Pieces.__slots__
        empty = [np.zeros(0, np.int64)]
        return Pieces(
            *(np.concatenate([getattr(p, n) for p in parts] or empty) for n in names)
        )

    def by_rank(self, size: int) -> list[Pieces]:
        """Return the pieces of each rank, in the order in which they are here."""
        order = np.argsort(self.rank, kind="stable")
        ordered = self.take(order)
        edges = np.searchsorted(ordered.rank, np.arange(size + 1)).tolist()
        return [
            ordered.take(np.s_[first:stop])  # type: ignore[arg-type]
            for first, stop in itertools.pairwise(edges)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Woven:
    """An array that is put together from boxes before it is written."""

    entry: int
    itemsize: int
    shape: Point
    ranks: Column  # that supplies each box
    ordinals: Column
    starts: Points
    counts: Points


def cut(
    merged: Merged, *, root: int | None = None, share: bool = False
) -> tuple[Pieces, list[Woven]]:
    """Cut all payload into pieces, each supplied by one rank.

    Parameters
    ----------
    merged : Merged
        What all ranks hold.
    root : int, optional
        A rank that supplies itself whatever it holds. What it does not hold, or
        without it everything, comes from the lowest rank that does.
    share : bool
        Whether holders of equal replicas supply equal shares of them.

    Returns
    -------
    pieces : Pieces
        In the order of the entries, and of the bytes in each.
    woven : list of Woven
        The arrays that are in no piece.

    Notes
    -----
    O(n log n) in the number of entries and boxes.
    """
    nbytes = merged.nbytes_of_entries()
    parts = _shared(merged.holdings, nbytes) if share else _whole(merged, nbytes, root)
    woven = []
    details = merged.entry_details() if merged.sharded else []
    for entry, boxes in merged.sharded.items():
        itemsize, shape = details[entry]
        chosen = _suppliers(boxes, root, share=share, turn=entry)
        supply = Woven(
            entry,
            itemsize,
            shape,
            boxes.ranks[chosen],
            boxes.ordinals[chosen],
            boxes.starts[chosen],
            boxes.counts[chosen],
        )
        runs = run_elements(shape, supply.counts)
        total = supply.counts.prod(axis=1)
        if ((runs < total) & (runs * itemsize < SHORTEST_RUN_NBYTES)).any():
            woven.append(supply)
        else:
            pieces = _runs(supply, runs, total)
            if share:
                pieces = _split_large(pieces, total // runs, boxes)
            parts.append(pieces)
    pieces = Pieces.join(parts)
    if merged.sharded or share:
        pieces = pieces.take(np.lexsort((pieces.within, pieces.entry)))
    return pieces, woven


def _whole(merged: Merged, nbytes: Column, root: int | None) -> list[Pieces]:
    """Return a piece for each array that some rank holds whole."""
    rank = np.full(len(nbytes), -1, np.int64)
    ordinal = np.zeros(len(nbytes), np.int64)
    ordered = list(reversed(merged.holdings))  # the lowest rank comes last, and stays
    for holding in ordered:
        rank[holding.entries] = holding.ranks[0]
        ordinal[holding.entries] = holding.ordinals
    for holding in ordered:
        if root is not None and root in holding.ranks:
            rank[holding.entries] = root
            ordinal[holding.entries] = holding.ordinals
    entry = np.flatnonzero((rank >= 0) & (nbytes > 0))
    zero = np.zeros(len(entry), np.int64)
    return [Pieces(entry, rank[entry], ordinal[entry], zero, zero, nbytes[entry])]


def _shared(holdings: Sequence[Holding], nbytes: Column) -> list[Pieces]:
    """Cut the arrays that the same ranks hold evenly among these ranks."""
    # Which holdings an array is in: refined by one after the other.
    label = np.zeros(len(nbytes), np.int64)
    members: list[tuple[int, ...]] = [()]
    for number, holding in enumerate(holdings):
        before, where = np.unique(label[holding.entries], return_inverse=True)
        label[holding.entries] = len(members) + where
        members += [(*members[old], number) for old in before.tolist()]
    order = np.argsort(label, kind="stable")
    edges = np.searchsorted(label[order], np.arange(len(members) + 1)).tolist()
    parts = []
    for inside, first, stop in zip(members, edges[:-1], edges[1:], strict=True):
        entries = order[first:stop]
        entries = entries[nbytes[entries] > 0]
        if inside and len(entries):
            held = [holdings[number] for number in inside]
            parts.append(_split(entries, nbytes[entries], held))
    return parts


def _split(entries: Column, nbytes: Column, held: Sequence[Holding]) -> Pieces:
    """Cut one run of arrays into as many parts of equal length as there are holders."""
    ranks = np.sort(np.concatenate([holding.ranks for holding in held]))
    item, part, within, many = _even_parts(np.zeros_like(nbytes), nbytes, len(ranks))
    rank = ranks[part]
    ordinal = np.zeros(len(item), np.int64)
    for holding in held:
        mine = np.isin(rank, holding.ranks)
        by_entry = np.argsort(holding.entries)
        place = np.searchsorted(holding.entries[by_entry], entries[item[mine]])
        ordinal[mine] = holding.ordinals[by_entry[place]]
    return Pieces(entries[item], rank, ordinal, within, within, many)


def _even_parts(
    within: Column, nbytes: Column, parts: int
) -> tuple[Column, Column, Column, Column]:
    """Cut a run of items into parts of equal length, on blocks of the checksums.

    Parameters
    ----------
    within, nbytes : ndarray of int64
        Where each item begins in its array, and its bytes.
    parts : int
        How many.

    Returns
    -------
    item, part, first, many : ndarray of int64
        Of each piece: which item it is cut from, which part it is in, its first byte in
        the item, and its bytes.
    """
    ends = np.cumsum(nbytes)
    begins = ends - nbytes
    cuts = ends[-1] * np.arange(1, parts) // parts
    item = np.searchsorted(ends, cuts, side="right")
    # So that no block is made of two, unless an item begins within one.
    at = (within[item] + cuts - begins[item]) // BLOCK_NBYTES * BLOCK_NBYTES
    cuts = begins[item] + np.maximum(at - within[item], 0)
    edges = np.unique(np.concatenate([[0], ends, cuts]))
    first = edges[:-1]
    item = np.searchsorted(ends, first, side="right")
    part = np.searchsorted(cuts, first, side="right")
    return item, part, first - begins[item], np.diff(edges)


def _split_large(pieces: Pieces, many: Column, boxes: Boxes) -> Pieces:
    """Have all holders of a large box supply an even part of it.

    Parameters
    ----------
    pieces : Pieces
        Of all distinct boxes of one array, each supplied by one of its holders.
    many : ndarray of int64
        How many of them each box has.
    boxes : Boxes
        With all holders.
    """
    which = np.repeat(np.arange(len(many)), many)
    nbytes = np.bincount(which, weights=pieces.nbytes, minlength=len(many))
    holders = np.bincount(boxes.box, minlength=len(many))
    is_large = (holders > 1) & (nbytes >= holders * _LARGE_NBYTES)
    parts = [pieces.take(~is_large[which])]
    for number in np.flatnonzero(is_large).tolist():
        mine = pieces.take(which == number)
        found = np.flatnonzero(boxes.box == number)
        item, part, first, length = _even_parts(mine.within, mine.nbytes, len(found))
        parts.append(
            Pieces(
                mine.entry[item],
                boxes.ranks[found[part]],
                boxes.ordinals[found[part]],
                mine.start[item] + first,
                mine.within[item] + first,
                length,
            )
        )
    return Pieces.join(parts)


def _suppliers(boxes: Boxes, root: int | None, *, share: bool, turn: int) -> Column:
    """Return which holder supplies each distinct box."""
    if share:
        order = np.argsort(boxes.box, kind="stable")
        _, firsts, holders = np.unique(
            boxes.box[order], return_index=True, return_counts=True
        )
        # Whole boxes in turn, if they are not large: there are many then.
        return order[firsts + (np.arange(len(firsts)) + turn) % holders]
    is_root = boxes.ranks == root
    order = np.argsort(~is_root, kind="stable")
    _, firsts = np.unique(boxes.box[order], return_index=True)
    return order[firsts]


def _runs(supply: Woven, runs: Column, total: Column) -> Pieces:
    """Return the pieces of boxes that are made of long runs."""
    itemsize = supply.itemsize
    many = total // runs
    if (many == 1).all():
        strides = [
            math.prod(supply.shape[axis + 1 :]) for axis in range(len(supply.shape))
        ]
        within = supply.starts @ np.array(strides, np.int64)
    else:
        within = np.concatenate(
            [
                run_starts(supply.shape, tuple(start), tuple(count))
                for start, count in zip(
                    supply.starts.tolist(), supply.counts.tolist(), strict=True
                )
            ]
        )
    which = np.repeat(np.arange(len(many)), many)
    number = np.arange(len(which)) - np.repeat(np.cumsum(many) - many, many)
    return Pieces(
        np.full(len(which), supply.entry),
        supply.ranks[which],
        supply.ordinals[which],
        number * runs[which] * itemsize,
        within * itemsize,
        runs[which] * itemsize,
    )


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
