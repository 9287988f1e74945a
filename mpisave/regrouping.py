"""Boxes in short runs that several ranks want of one array: each byte read once.

The array is read in chunks, each by one rank, which checks it and passes on to every
rank what lies in its box. The other way round, this is what saving does with shards.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import alone, library_of
from mpisave.blocks import check_blocks
from mpisave.checksum import BLOCK_NBYTES
from mpisave.collective import exchange, on_all_ranks, together
from mpisave.devices import fenced, host_memory
from mpisave.plan import SHORTEST_RUN_NBYTES, Woven, displacements
from mpisave.reading import naming_file, read_exactly
from mpisave.shards import run_elements, slices
from mpisave.transport.exchange import alltoallv
from mpisave.wanted import is_whole
from mpisave.weave import (
    CHUNK_NBYTES,
    Chunk,
    boxes_of_rank,
    chunks,
    moves,
    rounds,
    supplied,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from mpisave.comms import Comm
    from mpisave.errors import Key
    from mpisave.formats.index import Stored
    from mpisave.source import Source
    from mpisave.wanted import Want
    from mpisave.weave import Move

# What one rank receives in a round, and what it sends, at most.
_ROUND_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Demand:
    """An array of which several ranks want boxes in short runs."""

    stored: Stored
    woven: Woven  # the boxes; an ordinal is a place in that rank's wants


def read_regrouped(
    comm: Comm,
    source: Source,
    wants: Sequence[Want],
    arrays: Mapping[Key, Stored],
    *,
    verify: bool,
) -> list[Want]:
    """Read what several ranks want in short runs. Collective.

    Parameters
    ----------
    comm : Comm
        The ranks that load.
    source : Source
        The file, as each rank has it open.
    wants : sequence of Want
        What this rank wants.
    arrays : mapping of key to Stored
        All that the file holds: other ranks may want what this one does not.
    verify : bool
        Whether to check the CRC-32C of every block.

    Returns
    -------
    list of Want
        What is left to be read.

    Raises
    ------
    FileFormatError, StorageError
        On every rank, if bytes are missing or altered, or cannot be read.
    """
    # Arrays that share memory are read in the order of the file, by each rank.
    lonely = set(map(id, alone(want.held for want in wants)))
    short = {
        place: want
        for place, want in enumerate(wants)
        if id(want.held) in lonely and _is_short(want)
    }
    mine = [
        (want.stored.key, place, want.start, want.held.shape)
        for place, want in short.items()
    ]
    every = exchange(comm, "find what several ranks want", lambda: mine)
    demands = _demands(every, arrays)
    if not demands:
        return list(wants)
    regrouping = on_all_ranks(
        comm,
        "allocate buffers",
        lambda: _Regrouping(comm, source, wants, demands, verify=verify),
    )
    regrouping.run()
    taken = {demand.stored.key for demand in demands}
    return [
        want
        for place, want in enumerate(wants)
        if place not in short or want.stored.key not in taken
    ]


def _is_short(want: Want) -> bool:
    """Return whether a box lies in the file in runs too short to read each."""
    held = want.held
    if not held.nbytes or is_whole(want):
        return False
    count = np.array([held.shape], np.int64).reshape(1, -1)
    run = int(run_elements(want.stored.shape, count)[0])
    nbytes = run * held.dtype.itemsize
    return nbytes < min(held.nbytes, SHORTEST_RUN_NBYTES)


def _demands(
    every: Sequence[Sequence[tuple[Key, int, Any, Any]]], arrays: Mapping[Key, Stored]
) -> list[_Demand]:
    """Return the arrays that more than one rank wants, in file order."""
    by_array: dict[Key, list[tuple[int, int, Any, Any]]] = {}
    for rank, wanted in enumerate(every):
        for key, *box in wanted:
            by_array.setdefault(key, []).append((rank, *box))
    demands = []
    in_order = sorted(by_array, key=lambda key: arrays[key].extent.offset)
    for number, key in enumerate(in_order):
        stored, found = arrays[key], by_array[key]
        ranks = np.array([rank for rank, *_ in found], np.int64)
        if ranks[0] == ranks[-1]:  # ascending
            continue
        columns = zip(*(item[1:] for item in found), strict=True)
        places, starts, counts = (np.array(column, np.int64) for column in columns)
        itemsize, shape = stored.dtype.itemsize, stored.shape
        woven = Woven(number, itemsize, shape, ranks, places, starts, counts)
        demands.append(_Demand(stored, woven))
    return demands


class _Regrouping:
    """The exchange of one call of load."""

    def __init__(
        self,
        comm: Comm,
        source: Source,
        wants: Sequence[Want],
        demands: Sequence[_Demand],
        *,
        verify: bool,
    ) -> None:
        self._comm, self._source, self._wants = comm, source, wants
        self._demands, self._verify = demands, verify
        self._woven = [demand.woven for demand in demands]
        found = [
            part
            for chunk in chunks(self._woven, CHUNK_NBYTES)
            for part in self._wanted_parts(chunk)
        ]
        sizes = {chunk: self._nbytes(self._woven, chunk) for chunk in found}
        self._rounds = list(
            rounds(found, [*sizes.values()], of_one=CHUNK_NBYTES, of_all=_ROUND_NBYTES)
        )
        self._error: BaseException | None = None
        sends = [
            sum(sizes[chunk] for chunk in every if chunk.writer == comm.rank)
            for every in self._rounds
        ]
        mine = [boxes_of_rank(array, comm.rank) for array in self._woven]
        gets = [sum(self._nbytes(mine, c) for c in every) for every in self._rounds]
        self._library = library_of(want.held for want in wants)
        self._packed = np.empty(max(sends, default=0), np.uint8)
        self._received = host_memory(max(gets, default=0), self._library)

    def _nbytes(self, woven: Sequence[Woven], chunk: Chunk) -> int:
        """Return the bytes that boxes have in a chunk."""
        array = woven[chunk.array]
        return supplied(array, chunk.first, chunk.stop) * array.itemsize

    def _wanted_parts(self, chunk: Chunk) -> Iterator[Chunk]:
        """Yield the parts of a chunk that are wanted, none of them by too many."""
        array = self._woven[chunk.array]
        first, stop = chunk.first, chunk.stop
        n = supplied(array, first, stop)
        if n == 0:
            return
        middle = (first + stop) // 2
        halves = [
            dataclasses.replace(chunk, stop=middle),
            dataclasses.replace(chunk, first=middle),
        ]
        is_long = (stop - first) * array.itemsize > BLOCK_NBYTES
        is_half = is_long and supplied(array, first, middle) in (0, n)
        too_many = n * array.itemsize > _ROUND_NBYTES and stop - first > 1
        if is_half or too_many:
            for half in halves:
                yield from self._wanted_parts(half)
        else:
            yield chunk

    def run(self) -> None:
        """Read and pass on all chunks; then all ranks agree."""

        def move() -> BaseException | None:
            for found in self._rounds:
                self._round(found)
            return self._error

        together(self._comm, "read and exchange", move)

    def _round(self, found: Sequence[Chunk]) -> None:
        rank, size = self._comm.rank, self._comm.size
        sent = np.zeros(size, np.int64)
        got = np.zeros(size, np.int64)
        outgoing: list[tuple[Chunk, list[Move]]] = []
        incoming: list[tuple[int, Move]] = []
        for chunk in found:
            array = self._woven[chunk.array]
            relevant = list(moves(array, chunk, rank))
            if chunk.writer == rank:
                outgoing.append((chunk, relevant))
            for move in relevant:
                nbytes = math.prod(move.count) * array.itemsize
                if chunk.writer == rank:
                    sent[move.rank] += nbytes
                if move.rank == rank:
                    incoming.append((chunk.writer, move))
                    got[chunk.writer] += nbytes
        packed = self._packed[: int(sent.sum())]
        received = self._received[: int(got.sum())]
        try:
            at = displacements(sent).tolist()
            with naming_file(self._source.name):
                for chunk, relevant in outgoing if self._error is None else ():
                    self._pack(chunk, relevant, packed, at)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self._error = exc
        alltoallv(self._comm, packed, sent, received, got)
        try:
            if self._error is None:
                self._place(incoming, received, got)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self._error = exc

    def _pack(
        self, chunk: Chunk, outgoing: Sequence[Move], packed: Any, at: list[int]
    ) -> None:
        """Read a chunk, and put each rank's part where that begins; go on there."""
        demand = self._demands[chunk.array]
        itemsize = demand.woven.itemsize
        first, stop = chunk.first * itemsize, chunk.stop * itemsize
        elements = self._read(demand.stored, first, stop).view(demand.stored.dtype)
        for move in outgoing:
            n = math.prod(move.count) * itemsize
            part = packed[at[move.rank] : at[move.rank] + n].view(demand.stored.dtype)
            at[move.rank] += n
            end = move.at + math.prod(move.around_count)
            box = elements[move.at : end].reshape(move.around_count)
            where = slices(move.start, move.count, move.around)
            part.reshape(move.count)[...] = box[where]

    def _read(self, stored: Stored, first: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return bytes of an array, checked: whole blocks are read for that."""
        begin, end = first, stop
        if self._verify:
            begin = first // BLOCK_NBYTES * BLOCK_NBYTES
            end = min(-(-stop // BLOCK_NBYTES) * BLOCK_NBYTES, stored.extent.nbytes)
        data = np.empty(end - begin, np.uint8)
        read_exactly(self._source, stored, begin, data)
        if self._verify:
            check_blocks(stored, data.data, begin // BLOCK_NBYTES)
        return data[first - begin : stop - begin]

    def _place(
        self, incoming: Sequence[tuple[int, Move]], received: Any, got: Any
    ) -> None:
        at = displacements(got).tolist()
        with fenced(self._library):
            for sender, move in incoming:
                want = self._wants[move.ordinal]
                n = math.prod(move.count) * want.held.dtype.itemsize
                part = received[at[sender] : at[sender] + n].view(want.held.dtype)
                at[sender] += n
                where = slices(move.start, move.count, move.origin)
                want.held.fill_box(where, part.reshape(move.count))
