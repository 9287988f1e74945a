"""Arrays whose shards lie in the file in short runs: who puts them together. Pure.

The file bytes of such an array are cut into *chunks*. One rank writes a chunk whole,
and gets the parts of it that others hold. In a round each writer has one large chunk,
or several small ones. All of it follows from the boxes, so every rank works it out for
itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpisave.devices import pinnable
from mpisave.shards import boxes_of_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpisave.plan import Column, Woven
    from mpisave.shards import Point

# Chunks longer than this were not faster.
CHUNK_NBYTES = 4 * 2**20

# What a rank sends in one round is no more than this, however large the cap.
_MOST_SENT_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """How the cap is spent while chunks are exchanged, in bytes."""

    chunk_nbytes: int  # received, and once more put together
    sent_nbytes: int


def budget(max_nbytes: int, *, has_device: bool = False) -> Budget:
    """Return the lengths that together keep within `max_nbytes` of one rank.

    Boxes on a device are packed there on the way, each no longer than a chunk.
    """
    copies = 3 if has_device else 2
    chunk = max(1, min(CHUNK_NBYTES, max_nbytes // (copies + 2)))
    sent = min(_MOST_SENT_NBYTES, max_nbytes - copies * chunk)
    return Budget(chunk, max(chunk, pinnable(sent) if has_device else sent))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of file bytes of one woven array."""

    array: int  # which of the woven arrays
    writer: int
    first: int  # element, in C order
    stop: int


@dataclass(frozen=True, slots=True)
class Move:
    """The part of a chunk that lies in one box, in the order in which it travels."""

    rank: int  # that supplies it
    ordinal: int
    origin: Point  # where its box begins, as all that follows in the global array
    start: Point
    count: Point
    # The part of the chunk, itself a box, in which it lies, and where that begins.
    around: Point
    around_count: Point
    at: int  # elements from the start of the chunk


def chunks(
    woven: Sequence[Woven], chunk_nbytes: int, *, writer: int | None = None
) -> list[Chunk]:
    """Cut woven arrays into chunks, and have their holders write them in turn.

    Parameters
    ----------
    woven : sequence of Woven
        The arrays, in file order.
    chunk_nbytes : int
        Bytes of a chunk at most, but for one of a single element.
    writer : int, optional
        The rank that writes all of them.
    """
    found: list[Chunk] = []
    for number, array in enumerate(woven):
        total = math.prod(array.shape)
        most = max(1, chunk_nbytes // array.itemsize)
        row = math.prod(array.shape[1:])
        # Whole rows: cut ones would make a chunk of more boxes.
        most = most // row * row or most
        holders = sorted(set(array.ranks.tolist()))
        for turn, first in enumerate(range(0, total, most), start=len(found)):
            who = holders[turn % len(holders)] if writer is None else writer
            found.append(Chunk(number, who, first, min(total, first + most)))
    return found


def rounds(
    found: Sequence[Chunk], sizes: Sequence[int], *, of_one: int, of_all: int
) -> Iterator[list[Chunk]]:
    """Yield the chunks of each round, in order: as many as fit, and one at least.

    Parameters
    ----------
    found : sequence of Chunk
        All of them.
    sizes : sequence of int
        Their bytes.
    of_one, of_all : int
        Bytes in a round at most: of one writer, unless a single chunk has more, and of
        all.
    """
    together: list[Chunk] = []
    of_writers: dict[int, int] = {}
    total = 0
    for chunk, nbytes in zip(found, sizes, strict=True):
        before = of_writers.get(chunk.writer, 0)
        is_over = before + nbytes > of_one and before > 0
        if together and (is_over or total + nbytes > of_all):
            yield together
            together, of_writers, total, before = [], {}, 0, 0
        together.append(chunk)
        of_writers[chunk.writer] = before + nbytes
        total += nbytes
    if together:
        yield together


def supplied(array: Woven, first: int, stop: int) -> int:
    """Return how many elements the boxes have between two: more where they overlap."""
    total = 0
    stops = array.starts + array.counts
    for start, count in boxes_of_range(array.shape, first, stop):
        begin = np.array(start, np.int64)
        end = begin + np.array(count, np.int64)
        sides = np.minimum(stops, end) - np.maximum(array.starts, begin)
        total += int(np.maximum(sides, 0).prod(axis=1).sum())
    return total


def moves(array: Woven, chunk: Chunk, rank: int) -> Iterator[Move]:
    """Yield what a chunk is made of, the lowest box first within each of its parts.

    To its writer all of it, to any other rank what that supplies.
    """
    if chunk.writer != rank:
        array = boxes_of_rank(array, rank)
    at = 0
    stops = array.starts + array.counts
    for around, around_count in boxes_of_range(array.shape, chunk.first, chunk.stop):
        low = np.maximum(array.starts, np.array(around, np.int64))
        high = np.minimum(
            stops, np.array(around, np.int64) + np.array(around_count, np.int64)
        )
        for box in np.flatnonzero((high > low).all(axis=1)).tolist():
            yield Move(
                int(array.ranks[box]),
                int(array.ordinals[box]),
                tuple(array.starts[box].tolist()),
                tuple(low[box].tolist()),
                tuple((high[box] - low[box]).tolist()),
                around,
                around_count,
                at,
            )
        at += math.prod(around_count)


def boxes_of_rank(array: Woven, rank: int) -> Woven:
    """Return what of an array one rank has."""
    mine = array.ranks == rank
    return dataclasses.replace(
        array,
        ranks=array.ranks[mine],
        ordinals=array.ordinals[mine],
        starts=array.starts[mine],
        counts=array.counts[mine],
    )


def as_pieces(
    woven: Sequence[Woven], found: Sequence[Chunk]
) -> tuple[Column, Column, Column]:
    """Return the entry of each chunk, and its bytes within that: first and number."""
    arrays = [woven[chunk.array] for chunk in found]
    entry = [array.entry for array in arrays]
    sizes = [array.itemsize for array in arrays]
    within = [c.first * size for c, size in zip(found, sizes, strict=True)]
    nbytes = [(c.stop - c.first) * n for c, n in zip(found, sizes, strict=True)]
    return tuple(np.array(c, np.int64) for c in (entry, within, nbytes))  # type: ignore[return-value]
