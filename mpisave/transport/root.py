"""The end of a route that receives and writes, and the thread that does the latter."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import in_new_thread
from mpisave.checksum import BlockSums
from mpisave.devices import device_library, fence
from mpisave.errors import naming
from mpisave.plan import Cursor, displacements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpisave.arrays import Bytes, HeldArray
    from mpisave.plan import Buffers, Column
    from mpisave.transport.base import Incoming, Moved, Route, Sums
    from mpisave.transport.memory import Memory

# What is written of own arrays before a round that has arrived: several blocks, each of
# which is copied from a device while the one before it is written.
_OWN_TURN_NBYTES = 8 * 2**20

# A block is in the cache still when it is written after its checksum.
_OWN_BLOCK_NBYTES = 2**20


class Root:
    """The end of a route that receives and writes."""

    def __init__(
        self,
        comm: Any,
        route: Route,
        held: Sequence[HeldArray],
        incoming: Incoming,
        sizes: Buffers,
        memory: Memory,
    ) -> None:
        self._comm = comm
        self._root = route.root
        self._incoming = incoming
        self._cursors = [Cursor(stream.nbytes) for stream in incoming.streams]
        self._own = route.stream
        self._arrays = route.stream.arrays(held)
        self.sums = BlockSums()
        self._arrived = [BlockSums() for _ in incoming.streams]
        self._library, self._by_device = memory.library, memory.by_device
        self._scratch_nbytes = sizes.scratch_nbytes
        total = int(route.totals.sum())
        largest = min(sizes.round_nbytes, total)
        many = 2 if largest < total else 1
        self._free: deque[Bytes] = deque(memory.host(largest) for _ in range(many))
        # On the device, and what waits until each may be filled again.
        self._on_device: deque[tuple[Any, Callable[[], None]]] = deque()
        if memory.is_device and total:
            self._on_device.extend(
                (memory.for_mpi(largest), fence(None)) for _ in range(many)
            )
        self._buffers_free = threading.Semaphore(len(self._free))
        begin = in_new_thread(held)
        self._writer = _Writer(begin, self._own_turns())  # last: a thread to end

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
        """Wait until all is written, and copied, if an error made that useless."""
        self._writer.finish()
        for _, ready in self._on_device:
            with contextlib.suppress(Exception):  # told by the writer
                ready()

    def sums_of_arrived(self) -> dict[int, Sums]:
        """Return the checksums of the streams that were not summed by who sent them."""
        if not self._by_device:
            return {}
        return {
            rank: np.array(sums.values, np.uint32)
            for rank, sums in enumerate(self._arrived)
            if rank != self._comm.rank
        }

    def round(
        self,
        counts: Column,
        _upcoming: Column | None,
        moved: Moved,
    ) -> None:
        """Receive a round and hand it to the writer."""
        displs = displacements(counts)
        # On the device, a round arrives while both buffers of the host are in use.
        moved.by_device += self._by_device
        if self._on_device:
            arrival = self._arrive(counts, displs, moved)
            buffer = self._take()
            ready = self._copy(arrival, buffer, int(counts.sum()))
        else:
            buffer, ready = self._take(), fence(None)
            self._gatherv(buffer, counts, displs, moved)
        moved.rounds += 1
        moved.nbytes += int(counts.sum())

        def write() -> None:
            ready()
            self._write(buffer, counts, displs)

        self._writer.put(write, lambda: self._done(buffer))

    def _take(self) -> Bytes:
        """Return a buffer of the host, once one is free."""
        self._buffers_free.acquire()
        return self._free.popleft()

    def _arrive(self, counts: Column, displs: Column, moved: Moved) -> Any:
        """Receive a round on the device; return where it is."""
        arrival, is_free = self._on_device.popleft()
        with contextlib.suppress(Exception):  # told by the writer
            is_free()
        self._gatherv(arrival, counts, displs, moved)
        return arrival

    def _copy(self, arrival: Any, buffer: Bytes, nbytes: int) -> Callable[[], None]:
        """Begin to copy a round to the host; return what waits for it."""
        try:
            device_library().copy(arrival[:nbytes], buffer[:nbytes])
            ready = fence(self._library)
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            error = exc

            def fail() -> None:
                raise error

            self._on_device.append((arrival, fence(None)))
            return fail
        self._on_device.append((arrival, ready))
        return ready

    def _gatherv(
        self,
        buffer: Any,
        counts: Column,
        displs: Column,
        moved: Moved,
    ) -> None:
        from mpi4py import MPI

        began = time.perf_counter()

        # The root's own part is in place, and empty: it is written from its arrays.
        # An MPI without CUDA would otherwise copy device memory with memcpy.
        received = [buffer, counts.tolist(), displs.tolist(), MPI.BYTE]
        request = self._comm.raw.Igatherv(MPI.IN_PLACE, received, root=self._root)
        self._comm.wait(request)
        moved.waited_s += time.perf_counter() - began

    def _write(
        self,
        buffer: Bytes,
        counts: Column,
        displs: Column,
    ) -> None:
        for rank in np.flatnonzero(counts).tolist():
            at = int(displs[rank])
            stream, names = self._incoming.streams[rank], self._incoming.names[rank]
            for item, start, part in self._cursors[rank].take(int(counts[rank])):
                data = buffer[at : at + part].data
                with naming(names[item]):
                    if self._by_device:
                        within = stream.within[item] + start
                        self._arrived[rank].add(item, within, data)
                    self._incoming.target.write(stream.offsets[item] + start, data)
                at += part

    def _done(self, buffer: Bytes) -> None:
        self._free.append(buffer)
        self._buffers_free.release()

    def _own_turns(self) -> Iterator[Callable[[], None]]:
        """Yield the writes of this rank's own arrays, each of bounded length."""
        turn: list[tuple[int, int, int]] = []
        waiting = 0
        for item, nbytes in enumerate(self._own.nbytes):
            for start in range(0, nbytes, _OWN_TURN_NBYTES):
                stop = min(start + _OWN_TURN_NBYTES, nbytes)
                turn.append((item, start, stop))
                waiting += stop - start
                if waiting >= _OWN_TURN_NBYTES:
                    yield functools.partial(self._write_own, turn)
                    turn, waiting = [], 0
        yield functools.partial(self._write_own, turn)

    def _write_own(self, turn: list[tuple[int, int, int]]) -> None:
        for item, first, stop in turn:
            with naming(self._arrays[item].name):
                self._write_run(item, self._arrays[item], first, stop)

    def _write_run(self, item: int, array: HeldArray, start: int, stop: int) -> None:
        before, within = self._own.starts[item], self._own.within[item]
        offset = self._own.offsets[item]
        for block in array.blocks(
            before + start, before + stop, _OWN_BLOCK_NBYTES, self._scratch_nbytes
        ):
            self.sums.add(item, within + start, block.data)
            self._incoming.target.write(offset + start, block.data)
            start += block.size


class _Writer:
    """A thread that writes rounds as they come, and own arrays in between."""

    def __init__(
        self, begin: Callable[[], None], own: Iterator[Callable[[], None]]
    ) -> None:
        self._begin = begin
        self._own: Iterator[Callable[[], None]] | None = own
        self._rounds: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._began = False
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, name="mpisave writer", daemon=True
        )
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
        try:
            self._begin()
        except BaseException as exc:  # noqa: BLE001 - told once all have caught up
            self.error = exc
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
        turn = next(self._own, None) if self._own else None
        if turn is None:
            self._own = None
        else:
            turn()
