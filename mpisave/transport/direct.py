"""Each rank writes its own pieces: large ones from where they lie, small ones together.

Where a rank has a core to spare, a thread computes the checksum of one block while
another is written.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

from mpisave.arrays import in_new_thread, library_of
from mpisave.checksum import BLOCK_NBYTES, BlockSums
from mpisave.devices import fenced, host_memory, pinnable
from mpisave.errors import naming
from mpisave.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpisave.arrays import HeldArray
    from mpisave.storage import Target
    from mpisave.transport.base import Moved, Stream

# Blocks of checksums that one job of a thread writes.
_BLOCKS = 4

# Pieces shorter than this are copied together, and written with what is between them.
SMALL_NBYTES = 64 * 2**10

_PACKED_NBYTES = 2**20

# What is written at a time: it has just been read for the checksum, and is in the
# second-level cache. Shorter calls keep threads waiting for one another.
_STEP_NBYTES = 512 * 2**10


class Direct:
    """The transport of one rank that writes what it holds.

    Parameters
    ----------
    target : Target
        The file.
    stream : Stream
        The pieces, in file order.
    arrays : sequence of HeldArray
        Those in which the pieces are.
    between : list of bytes or None
        What lies in the file before each piece, if that is to be written with it and
        the piece before it.
    max_nbytes : int
        Of copies, all threads together.
    threads : int
        How many may write at a time.
    """

    def __init__(
        self,
        target: Target,
        stream: Stream,
        arrays: Sequence[HeldArray],
        between: Sequence[bytes | None],
        *,
        max_nbytes: int,
        threads: int,
    ) -> None:
        self._target = target
        self._stream = stream
        self._arrays = arrays
        self._between = between
        self._threads = max(1, threads)
        self._library = library_of(arrays)
        share = max_nbytes // self._threads
        self._scratch_nbytes = max(1, min(_PACKED_NBYTES, share))
        # The device packs a piece on the way, if it does not lie together.
        part = share if self._library is None else pinnable(share // 2)
        self._packed_nbytes = max(1, min(_PACKED_NBYTES, part))

    def move(self, moved: Moved, rank: int) -> None:
        """Write all pieces of `rank`, which is this one."""
        began = time.perf_counter()
        begin = in_new_thread(self._arrays)
        values = in_threads(self._jobs(), self._threads, begin)
        sums = list(itertools.chain.from_iterable(values))
        moved.of_streams[rank] = np.array(sums, np.uint32)
        moved.written_s += time.perf_counter() - began

    def _jobs(self) -> Iterator[Callable[[], Sequence[int]]]:
        """Yield the writes: runs of small pieces, and parts of large ones, in order."""
        first, waiting = 0, 0
        sizes = self._stream.nbytes
        for item, nbytes in enumerate(sizes):
            between = self._between[item]
            if waiting:
                more = nbytes + len(between or b"")
                if (
                    between is None
                    or nbytes >= SMALL_NBYTES
                    or waiting + more > self._packed_nbytes
                ):
                    yield self._packed(first, item)
                    waiting = 0
                    # What lies before this piece is written with it, or by itself.
                else:
                    waiting += more
                    continue
            head = len(between or b"")
            if nbytes < SMALL_NBYTES and nbytes + head <= self._packed_nbytes:
                first, waiting = item, nbytes + head
            else:
                if between:
                    yield self._literal(self._stream.offsets[item] - head, between)
                yield from self._parts(item)
        if waiting:
            yield self._packed(first, len(sizes))

    def _literal(self, offset: int, data: bytes) -> Callable[[], Sequence[int]]:
        def write() -> Sequence[int]:
            self._target.write(offset, memoryview(data))
            return ()

        return write

    def _packed(self, first: int, stop: int) -> Callable[[], Sequence[int]]:
        """Write pieces `first` to `stop`, and what lies before each, in one call."""

        def write() -> Sequence[int]:
            stream, sums = self._stream, BlockSums()
            head = len(self._between[first] or b"")
            offset = stream.offsets[first] - head
            end = stream.offsets[stop - 1] + stream.nbytes[stop - 1]
            packed = host_memory(end - offset, self._library, self._packed_nbytes)
            memory = packed.data
            at = 0
            places = []
            with fenced(self._library):
                for item in range(first, stop):
                    literal = self._between[item]
                    if literal:
                        memory[at : at + len(literal)] = literal
                        at += len(literal)
                    nbytes, start = stream.nbytes[item], stream.starts[item]
                    array = self._arrays[item]
                    with naming(array.name):
                        array.stage(start, packed[at : at + nbytes])
                    places.append(at)
                    at += nbytes
            for item, at in zip(range(first, stop), places, strict=True):
                data = memory[at : at + stream.nbytes[item]]
                sums.add(item, stream.within[item], data)
            with naming(self._arrays[first].name):
                self._target.write(offset, memory)
            return sums.values

        return write

    def _parts(self, item: int) -> Iterator[Callable[[], Sequence[int]]]:
        """Yield the writes of a large piece: whole blocks of checksums."""
        within, nbytes = self._stream.within[item], self._stream.nbytes[item]
        length = _BLOCKS * BLOCK_NBYTES
        done = 0
        while done < nbytes:
            stop = min(nbytes, done + length - (within + done) % length)
            yield self._part(item, done, stop)
            done = stop

    def _part(self, item: int, first: int, stop: int) -> Callable[[], Sequence[int]]:
        def write() -> Sequence[int]:
            stream, sums = self._stream, BlockSums()
            array = self._arrays[item]
            start, within = stream.starts[item], stream.within[item]
            done = first
            with naming(array.name):
                for block in array.blocks(
                    start + done, start + stop, _STEP_NBYTES, self._scratch_nbytes
                ):
                    sums.add(item, within + done, block.data)
                    self._target.write(stream.offsets[item] + done, block.data)
                    done += block.size
            return sums.values

        return write
