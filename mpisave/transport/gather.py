"""Rounds of Gatherv to the roots, each written while the next one travels.

A sender packs its next bytes into a buffer, or sends them from where they lie when they
are one run. A root has two round buffers. A thread writes one of them, and the root's
own arrays in between, while Gatherv fills the other: the thread makes no MPI calls.

Checksums are computed by the rank that holds the bytes, before they travel: the work is
shared, and damage on the way shows when the file is read.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.checksum import crc32c
from mpisave.plan import Cursor, displacements, rounds
from mpisave.transport.base import Moved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from mpisave.arrays import Bytes
    from mpisave.plan import Buffers
    from mpisave.transport.base import Incoming, Route

# Own arrays are written in blocks, so that a round that has arrived need not wait, and
# that a block is in the cache still when it is written after its checksum.
_OWN_BLOCK_NBYTES = 2**20

# A root whose disk is full goes on receiving for this many rounds at most.
_ROUNDS_BETWEEN_NEWS = 16


class Gather:
    """The transport of one call.

    Parameters
    ----------
    comm : Comm
        A communicator of mpi4py, or of a single process.
    routes : sequence of Route
        One a root, in the same order on every rank.
    sizes : Buffers
        How a root spends its cap, in bytes.

    Raises
    ------
    MemoryError
        If there is no memory for the buffers of a root. Nothing was sent by then.
    """

    name = "gather"

    def __init__(self, comm: Any, routes: Sequence[Route], sizes: Buffers) -> None:
        self._comm = comm
        self._routes = routes
        self._ends = [
            _Sender(comm, route)
            if route.incoming is None
            else _Root(comm, route, route.incoming, sizes)
            for route in routes
        ]
        self._rounds = [rounds(route.totals, sizes.round_nbytes) for route in routes]

    def move(self) -> Moved:
        """Move all streams to their roots and write them. Collective.

        Returns
        -------
        Moved
            What arrived and was written here.

        Raises
        ------
        Exception
            What failed on this rank, after it has kept pace with the others: the
            caller has all ranks agree on it.
        """
        moved = Moved()
        for end in self._ends:
            end.start()
        try:
            self._all_rounds(moved)
        finally:
            for end in self._ends:
                end.finish()
        for route, end in zip(self._routes, self._ends, strict=True):
            checksums = self._comm.gather(end.checksums, root=route.root)
            if isinstance(end, _Root):
                moved.checksums = checksums
                moved.written_s = end.written_s
        for end in self._ends:
            if end.error:
                raise end.error
        return moved

    def _all_rounds(self, moved: Moved) -> None:
        for number in itertools.count(1):
            counts = [next(steps, None) for steps in self._rounds]
            if all(count is None for count in counts):
                return
            for end, count in zip(self._ends, counts, strict=True):
                if count is not None:
                    end.round(count, moved)
            if number % _ROUNDS_BETWEEN_NEWS == 0:
                failed = any(end.error for end in self._ends)
                if any(self._comm.allgather(failed)):
                    return


class _Sender:
    """The end of a route that is not the root."""

    def __init__(self, comm: Any, route: Route) -> None:
        self._comm = comm
        self._root = route.root
        self._arrays = route.outgoing
        self._cursor = Cursor([array.nbytes for array in route.outgoing])
        self._buffer: Bytes = np.empty(0, np.uint8)
        self.checksums = [0] * len(route.outgoing)
        self.error: Exception | None = None

    def start(self) -> None:
        """Nothing runs beside the rounds."""

    def finish(self) -> None:
        """Nothing ran beside the rounds."""

    def round(self, counts: npt.NDArray[np.int64], _moved: Moved) -> None:
        """Send this rank's bytes of a round."""
        nbytes = int(counts[self._comm.rank])
        try:
            data = self._next(nbytes)
        except Exception as exc:  # noqa: BLE001 - told once the others have caught up
            self.error = self.error or exc
            data = np.zeros(nbytes, np.uint8)
        self._gatherv(data)

    def _next(self, nbytes: int) -> Bytes:
        window = self._cursor.take(nbytes)
        if len(window) == 1:
            item, start, part = window[0]
            view = self._arrays[item].view(start, start + part)
            if view is not None:
                self.checksums[item] = crc32c(view, self.checksums[item])
                return view
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        done = 0
        for item, start, part in window:
            out = self._buffer[done : done + part]
            self._arrays[item].stage(start, out)
            self.checksums[item] = crc32c(out, self.checksums[item])
            done += part
        return self._buffer[:nbytes]

    def _gatherv(self, data: Bytes) -> None:
        from mpi4py import MPI

        self._comm.Gatherv([data, data.size, MPI.BYTE], None, root=self._root)


class _Root:
    """The end of a route that receives and writes."""

    def __init__(
        self, comm: Any, route: Route, incoming: Incoming, sizes: Buffers
    ) -> None:
        self._comm = comm
        self._root = route.root
        self._incoming = incoming
        self._cursors = [Cursor([e.nbytes for e in es]) for es in incoming.extents]
        self.checksums = [0] * len(incoming.own)
        self._scratch: Bytes = np.empty(0, np.uint8)
        self._scratch_nbytes = sizes.scratch_nbytes
        self._writer = _Writer(self._own_blocks())
        total = int(route.totals.sum())
        largest = min(sizes.round_nbytes, total)
        self._free: deque[Bytes] = deque()
        for _ in range(2 if largest < total else 1):
            self._free.append(np.empty(largest, np.uint8))
        self._buffers_free = threading.Semaphore(len(self._free))

    @property
    def error(self) -> Exception | None:
        """What the writer met first."""
        return self._writer.error

    @property
    def written_s(self) -> float:
        """Seconds spent on writing."""
        return self._writer.busy_s

    def start(self) -> None:
        """Begin to write this rank's own arrays."""
        self._writer.start()

    def finish(self) -> None:
        """Wait until all is written."""
        self._writer.finish()

    def round(self, counts: npt.NDArray[np.int64], moved: Moved) -> None:
        """Receive a round and hand it to the writer."""
        self._buffers_free.acquire()
        buffer = self._free.popleft()
        displs = displacements(counts)
        began = time.perf_counter()
        self._gatherv(buffer, counts, displs)
        moved.waited_s += time.perf_counter() - began
        moved.rounds += 1
        moved.nbytes += int(counts.sum())
        windows = [
            (rank, int(displs[rank]), self._cursors[rank].take(int(counts[rank])))
            for rank in np.flatnonzero(counts).tolist()
        ]
        self._writer.put(
            lambda: self._write(buffer, windows), lambda: self._done(buffer)
        )

    def _gatherv(
        self,
        buffer: Bytes,
        counts: npt.NDArray[np.int64],
        displs: npt.NDArray[np.int64],
    ) -> None:
        from mpi4py import MPI

        # The root's own part is in place, and empty: it is written from its arrays.
        # An MPI without CUDA would otherwise copy device memory with memcpy.
        received = [buffer, counts.tolist(), displs.tolist(), MPI.BYTE]
        self._comm.Gatherv(MPI.IN_PLACE, received, root=self._root)

    def _write(
        self, buffer: Bytes, windows: list[tuple[int, int, list[tuple[int, int, int]]]]
    ) -> None:
        data = buffer.data
        for rank, displ, window in windows:
            at = displ
            for item, start, part in window:
                offset = self._incoming.extents[rank][item].offset + start
                self._incoming.target.write(offset, data[at : at + part])
                at += part

    def _done(self, buffer: Bytes) -> None:
        self._free.append(buffer)
        self._buffers_free.release()

    def _own_blocks(self) -> Iterator[Callable[[], None]]:
        """Yield the writes of this rank's own arrays, in blocks of bounded length."""
        block: list[tuple[int, int, int]] = []
        waiting = 0
        for item, (array, _) in enumerate(self._incoming.own):
            for start in range(0, array.nbytes, _OWN_BLOCK_NBYTES):
                stop = min(start + _OWN_BLOCK_NBYTES, array.nbytes)
                block.append((item, start, stop))
                waiting += stop - start
                if waiting >= _OWN_BLOCK_NBYTES:
                    yield functools.partial(self._write_own, block)
                    block, waiting = [], 0
        yield functools.partial(self._write_own, block)

    def _write_own(self, block: list[tuple[int, int, int]]) -> None:
        for item, first, stop in block:
            array, extent = self._incoming.own[item]
            start = first
            while start < stop:
                view = array.view(start, stop)
                if view is None:
                    if not self._scratch.size:
                        self._scratch = np.empty(self._scratch_nbytes, np.uint8)
                    view = self._scratch[: stop - start]
                    array.stage(start, view)
                self.checksums[item] = crc32c(view, self.checksums[item])
                self._incoming.target.write(extent.offset + start, view.data)
                start += view.size


class _Writer:
    """A thread that writes rounds as they come, and own arrays in between."""

    def __init__(self, own: Iterator[Callable[[], None]]) -> None:
        self._own: Iterator[Callable[[], None]] | None = own
        self._rounds: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="mpisave writer")
        self.busy_s = 0.0
        self.error: Exception | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, write: Callable[[], None], done: Callable[[], None]) -> None:
        """Have `write` called soon, and `done` after it, whether it failed or not."""
        with self._changed:
            self._rounds.append((write, done))
            self._changed.notify()

    def finish(self) -> None:
        """Wait until all was written, or an error made it useless."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._rounds and self._own is None and not self._ended:
                    self._changed.wait()
                job = self._rounds.popleft() if self._rounds else None
                if job is None and self._own is None:
                    return
            write, done = job or (self._next_own, None)
            began = time.perf_counter()
            try:
                if self.error is None:
                    write()
                else:
                    self._own = None
            except Exception as exc:  # noqa: BLE001 - told once all have caught up
                self.error = exc
            finally:
                self.busy_s += time.perf_counter() - began
                if done:
                    done()

    def _next_own(self) -> None:
        if self._own is None:
            return
        block = next(self._own, None)
        if block is None:
            self._own = None
        else:
            block()
