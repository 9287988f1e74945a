"""Rounds of Alltoallv that put the chunks of woven arrays together at their writers."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import library_of
from mpisave.checksum import BlockSums
from mpisave.devices import fenced, host_memory
from mpisave.errors import naming
from mpisave.plan import displacements
from mpisave.shards import slices
from mpisave.weave import moves, rounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import Bytes, HeldArray
    from mpisave.plan import Column, Woven
    from mpisave.storage import Target
    from mpisave.transport.base import Moved
    from mpisave.weave import Budget, Chunk, Move


def alltoallv(
    comm: Any, packed: Bytes, sent: Column, received: Bytes, got: Column
) -> None:
    """Send bytes to every rank, and receive from every rank. Collective.

    Parameters
    ----------
    comm : Comm
        Of several ranks.
    packed, received : ndarray of uint8
        The bytes to each rank, and from each, one rank after another.
    sent, got : ndarray of int64, shape (size,)
        How many they are. Below 2**31 in all: a round is of few chunks.
    """
    from mpi4py import MPI

    request = comm.raw.Ialltoallv(
        [packed, sent.tolist(), displacements(sent).tolist(), MPI.BYTE],
        [received, got.tolist(), displacements(got).tolist(), MPI.BYTE],
    )
    comm.wait(request)


class Exchange:
    """The exchange of one file's woven arrays.

    Parameters
    ----------
    comm : Comm
        A communicator of mpi4py, or of a single process.
    woven : sequence of Woven
        The arrays.
    chunks : sequence of Chunk
        All of them, on every rank.
    offsets : sequence of int
        Where each array begins in the file.
    held : sequence of HeldArray
        The arrays of this rank, by ordinal.
    target : Target or None
        The file, on a rank that writes.
    limits : Budget
        Lengths of the buffers.
    """

    def __init__(
        self,
        comm: Any,
        woven: Sequence[Woven],
        chunks: Sequence[Chunk],
        offsets: Sequence[int],
        held: Sequence[HeldArray],
        target: Target | None,
        limits: Budget,
    ) -> None:
        self._comm = comm
        self._woven = woven
        self._chunks = chunks
        self._offsets = offsets
        self._held = held
        self._target = target
        sizes = [self._nbytes(chunk) for chunk in chunks]
        self._rounds = list(
            rounds(chunks, sizes, of_one=limits.chunk_nbytes, of_all=limits.sent_nbytes)
        )
        mine = [
            [self._nbytes(chunk) for chunk in together if chunk.writer == comm.rank]
            for together in self._rounds
        ]
        self._received = np.empty(max(map(sum, mine), default=0), np.uint8)
        self._whole = np.empty(max(itertools.chain(*mine), default=0), np.uint8)
        own = sum(
            int(array.counts[array.ranks == comm.rank].prod(axis=1).sum())
            * array.itemsize
            for array in woven
        )
        longest = max((sum(map(self._nbytes, t)) for t in self._rounds), default=0)
        self._library = library_of(held)
        self._packed = host_memory(min(own, longest), self._library)
        self._sums = BlockSums()
        self._error: BaseException | None = None

    def _nbytes(self, chunk: Chunk) -> int:
        return (chunk.stop - chunk.first) * self._woven[chunk.array].itemsize

    def move(self, moved: Moved) -> BaseException | None:
        """Exchange and write all chunks. Collective.

        Returns
        -------
        BaseException or None
            What failed on this rank, which has kept pace with the others: the caller
            has all ranks agree on it.
        """
        for together in self._rounds:
            self._round(together, moved)
        if self._sums.values:  # where this rank writes the file
            moved.of_chunks[self._comm.rank] = np.array(self._sums.values, np.uint32)
        return self._error

    def _round(self, together: Sequence[Chunk], moved: Moved) -> None:
        rank, size = self._comm.rank, self._comm.size
        sent = np.zeros(size, np.int64)
        got = np.zeros(size, np.int64)
        outgoing: list[tuple[int, Chunk, Move]] = []
        incoming: list[tuple[Chunk, list[Move]]] = []
        for chunk in together:
            itemsize = self._woven[chunk.array].itemsize
            found = list(moves(self._woven[chunk.array], chunk, rank))
            for move in found:
                nbytes = math.prod(move.count) * itemsize
                if move.rank == rank:
                    outgoing.append((chunk.writer, chunk, move))
                    sent[chunk.writer] += nbytes
                if chunk.writer == rank:
                    got[move.rank] += nbytes
            if chunk.writer == rank:
                incoming.append((chunk, found))
        packed = self._packed[: int(sent.sum())]
        try:
            if self._error is None:
                self._pack(outgoing, packed)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self._error = exc
        began = time.perf_counter()
        received = packed
        if size > 1:
            received = self._received[: int(got.sum())]
            alltoallv(self._comm, packed, sent, received, got)
        moved.waited_s += time.perf_counter() - began
        moved.rounds += 1
        moved.nbytes += int(got.sum() - got[rank])
        try:
            at = displacements(got).tolist()
            for chunk, found in incoming if self._error is None else ():
                self._put_together(chunk, found, received, at)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self._error = exc
        moved.written_s += time.perf_counter() - began

    def _pack(self, outgoing: list[tuple[int, Chunk, Move]], packed: Any) -> None:
        outgoing.sort(key=lambda item: item[0])
        at = 0
        with fenced(self._library):
            for _, chunk, move in outgoing:
                nbytes = math.prod(move.count) * self._woven[chunk.array].itemsize
                array = self._held[move.ordinal]
                with naming(array.name):
                    where = slices(move.start, move.count, move.origin)
                    array.stage_box(where, packed[at : at + nbytes])
                at += nbytes

    def _put_together(
        self, chunk: Chunk, incoming: list[Move], received: Any, at: list[int]
    ) -> None:
        """Write a chunk, of what begins at `at` of each rank's bytes; go on there."""
        array = self._woven[chunk.array]
        kind = np.dtype(f"V{array.itemsize}")
        nbytes = self._nbytes(chunk)
        elements = self._whole[:nbytes].view(kind)
        for move in incoming:
            n = math.prod(move.count) * array.itemsize
            part = received[at[move.rank] : at[move.rank] + n].view(kind)
            at[move.rank] += n
            stop = move.at + math.prod(move.around_count)
            box = elements[move.at : stop].reshape(move.around_count)
            where = slices(move.start, move.count, move.around)
            box[where] = part.reshape(move.count)
        if self._target is None:
            raise RuntimeError(f"rank {self._comm.rank} has no file to write to")
        within = chunk.first * array.itemsize
        data = self._whole[:nbytes].data
        self._sums.add(chunk, within, data)
        self._target.write(self._offsets[chunk.array] + within, data)
