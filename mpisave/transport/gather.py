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

from mpisave.checksum import BlockSums
from mpisave.errors import naming
from mpisave.plan import Cursor, displacements, rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from mpisave.arrays import Bytes, HeldArray
    from mpisave.plan import Buffers
    from mpisave.transport.base import Incoming, Moved, Route

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
    held : sequence of HeldArray
        The arrays of this rank, by ordinal.
    sizes : Buffers
        How a root spends its cap, in bytes.

    Raises
    ------
    MemoryError
        If there is no memory for the buffers of a root. Nothing was sent by then.
    """

    def __init__(
        self,
        comm: Any,
        routes: Sequence[Route],
        held: Sequence[HeldArray],
        sizes: Buffers,
    ) -> None:
        self._comm = comm
        self._routes = routes
        self._ends: list[_Sender | _Root] = []
        # What this rank packs, for one root after the other.
        largest = max((int(r.totals[comm.rank]) for r in routes), default=0)
        packed: Bytes = np.empty(min(largest, sizes.round_nbytes), np.uint8)
        try:
            for route in routes:
                incoming = route.incoming
                self._ends.append(
                    _Sender(comm, route, held, packed)
                    if incoming is None
                    else _Root(comm, route, held, incoming, sizes)
                )
        except BaseException:
            self.close()
            raise
        self._rounds = [rounds(route.totals, sizes.round_nbytes) for route in routes]

    def close(self) -> None:
        """End the threads of a call that came to nothing."""
        for end in self._ends:
            end.finish()

    def move(self, moved: Moved) -> BaseException | None:
        """Move all streams to their roots and write them. Collective.

        Parameters
        ----------
        moved : Moved
            Told what arrived and was written here.

        Returns
        -------
        BaseException or None
            What failed on this rank, which has kept pace with the others: the caller
            has all ranks agree on it.
        """
        for end in self._ends:
            end.start()
        try:
            self._all_rounds(moved)
        finally:
            self.close()
        for route, end in zip(self._routes, self._ends, strict=True):
            every = self._comm.gather(np.array(end.sums.values, np.uint32), route.root)
            if isinstance(end, _Root):
                moved.of_streams.update(enumerate(every))
                moved.written_s += end.written_s
        return next((end.error for end in self._ends if end.error), None)

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

    def __init__(
        self, comm: Any, route: Route, held: Sequence[HeldArray], packed: Bytes
    ) -> None:
        self._comm = comm
        self._root = route.root
        self._stream = route.stream
        self._arrays = route.stream.arrays(held)
        self._cursor = Cursor(route.stream.nbytes)
        self._packed = packed
        self.sums = BlockSums()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Nothing runs beside the rounds."""

    def finish(self) -> None:
        """Nothing ran beside the rounds."""

    def round(self, counts: npt.NDArray[np.int64], _moved: Moved) -> None:
        """Send this rank's bytes of a round."""
        nbytes = int(counts[self._comm.rank])
        data = self._packed[:nbytes]
        try:
            if self.error is None:
                data = self._next(nbytes)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self.error = exc
        self._gatherv(data)

    def _next(self, nbytes: int) -> Bytes:
        window = self._cursor.take(nbytes)
        done = 0
        for item, first, part in window:
            array = self._arrays[item]
            start = self._stream.starts[item] + first
            with naming(array.name):
                view = array.view(start, start + part) if len(window) == 1 else None
                if view is None:
                    view = self._packed[done : done + part]
                    array.stage(start, view)
                self.sums.add(item, self._stream.within[item] + first, view.data)
            if len(window) == 1:
                return view
            done += part
        return self._packed[:nbytes]

    def _gatherv(self, data: Bytes) -> None:
        from mpi4py import MPI

        sent = [data, data.size, MPI.BYTE]
        self._comm.wait(self._comm.raw.Igatherv(sent, None, root=self._root))


class _Root:
    """The end of a route that receives and writes."""

    def __init__(
        self,
        comm: Any,
        route: Route,
        held: Sequence[HeldArray],
        incoming: Incoming,
        sizes: Buffers,
    ) -> None:
        self._comm = comm
        self._root = route.root
        self._incoming = incoming
        self._cursors = [Cursor(nbytes) for nbytes in incoming.nbytes]
        self._own = route.stream
        self._arrays = route.stream.arrays(held)
        self.sums = BlockSums()
        self._scratch: Bytes = np.empty(0, np.uint8)
        self._scratch_nbytes = sizes.scratch_nbytes
        total = int(route.totals.sum())
        largest = min(sizes.round_nbytes, total)
        self._free: deque[Bytes] = deque()
        for _ in range(2 if largest < total else 1):
            self._free.append(np.empty(largest, np.uint8))
        self._buffers_free = threading.Semaphore(len(self._free))
        self._writer = _Writer(self._own_blocks())  # last: it has a thread to end

    @property
    def error(self) -> BaseException | None:
        """What was met first."""
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
        self._writer.put(
            lambda: self._write(buffer, counts, displs), lambda: self._done(buffer)
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
        request = self._comm.raw.Igatherv(MPI.IN_PLACE, received, root=self._root)
        self._comm.wait(request)

    def _write(
        self,
        buffer: Bytes,
        counts: npt.NDArray[np.int64],
        displs: npt.NDArray[np.int64],
    ) -> None:
        data = buffer.data
        for rank in np.flatnonzero(counts).tolist():
            at = int(displs[rank])
            for item, start, part in self._cursors[rank].take(int(counts[rank])):
                offset = self._incoming.offsets[rank][item]
                with naming(self._incoming.names[rank][item]):
                    self._incoming.target.write(offset + start, data[at : at + part])
                at += part

    def _done(self, buffer: Bytes) -> None:
        self._free.append(buffer)
        self._buffers_free.release()

    def _own_blocks(self) -> Iterator[Callable[[], None]]:
        """Yield the writes of this rank's own arrays, in blocks of bounded length."""
        block: list[tuple[int, int, int]] = []
        waiting = 0
        for item, nbytes in enumerate(self._own.nbytes):
            for start in range(0, nbytes, _OWN_BLOCK_NBYTES):
                stop = min(start + _OWN_BLOCK_NBYTES, nbytes)
                block.append((item, start, stop))
                waiting += stop - start
                if waiting >= _OWN_BLOCK_NBYTES:
                    yield functools.partial(self._write_own, block)
                    block, waiting = [], 0
        yield functools.partial(self._write_own, block)

    def _write_own(self, block: list[tuple[int, int, int]]) -> None:
        for item, first, stop in block:
            with naming(self._arrays[item].name):
                self._write_run(item, self._arrays[item], first, stop)

    def _write_run(self, item: int, array: HeldArray, start: int, stop: int) -> None:
        before, within = self._own.starts[item], self._own.within[item]
        offset = self._own.offsets[item]
        while start < stop:
            view = array.view(before + start, before + stop)
            if view is None:
                if not self._scratch.size:
                    self._scratch = np.empty(self._scratch_nbytes, np.uint8)
                view = self._scratch[: stop - start]
                array.stage(before + start, view)
            self.sums.add(item, within + start, view.data)
            self._incoming.target.write(offset + start, view.data)
            start += view.size


class _Writer:
    """A thread that writes rounds as they come, and own arrays in between."""

    def __init__(self, own: Iterator[Callable[[], None]]) -> None:
        self._own: Iterator[Callable[[], None]] | None = own
        self._rounds: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._began = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="mpisave writer")
        self.busy_s = 0.0
        self.error: BaseException | None = None
        # Started here, where a failure is told to all, and idle until `start`.
        self._thread.start()

    def start(self) -> None:
        """Begin to write own arrays."""
        with self._changed:
            self._began = True
            self._changed.notify()

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

    def _next(self) -> tuple[Callable[[], None], Callable[[], None] | None] | None:
        """Wait for something to write; return None when there is no more."""
        with self._changed:
            while not self._rounds and not (self._began and self._own):
                if self._ended:
                    return None
                self._changed.wait()
            return self._rounds.popleft() if self._rounds else (self._write_own, None)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            write, done = job
            began = time.perf_counter()
            try:
                if self.error is None:
                    write()
            except BaseException as exc:  # noqa: BLE001 - told once all have caught up
                self.error = exc
            if self.error is not None:
                self._own = None
            self.busy_s += time.perf_counter() - began
            if done:
                done()

    def _write_own(self) -> None:
        block = next(self._own, None) if self._own else None
        if block is None:
            self._own = None
        else:
            block()
