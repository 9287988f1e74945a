"""The end of a route that is not the root: it packs the bytes of a round, and sends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mpisave.checksum import BlockSums
from mpisave.devices import fence
from mpisave.errors import naming
from mpisave.plan import Cursor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpisave.arrays import HeldArray
    from mpisave.plan import Buffers, Column
    from mpisave.transport.base import Moved, Route
    from mpisave.transport.memory import Memory

T = TypeVar("T")


class Sender:
    """The end of a route that is not the root."""

    def __init__(
        self,
        comm: Any,
        route: Route,
        held: Sequence[HeldArray],
        sizes: Buffers,
        memory: Memory,
    ) -> None:
        self._comm = comm
        self._root = route.root
        self._stream = route.stream
        self._arrays = route.stream.arrays(held)
        self._cursor = Cursor(route.stream.nbytes)
        self._memory = memory
        self._library, self._is_device = memory.library, memory.is_device
        self._has_sums = not memory.by_device  # else the root computes them
        largest = min(int(route.totals[comm.rank]), sizes.round_nbytes)
        self._packed = memory.packed(largest)
        self._ahead: _Packed | None = None
        self.sums = BlockSums()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Nothing runs beside the rounds."""

    def finish(self) -> None:
        """Wait for copies of a round that was not to be."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            try:
                ahead.wait()
            except BaseException as exc:  # noqa: BLE001 - told as all others
                self.error = self.error or exc

    def round(
        self,
        counts: Column,
        upcoming: Column | None,
        _moved: Moved,
    ) -> None:
        """Send this rank's bytes of a round, and have those of the next one copied."""
        nbytes = int(counts[self._comm.rank])
        data = self._keep(lambda: self._finish(self._ahead or self._begin(nbytes)))
        if data is None:
            data = self._packed[0][:nbytes]
        request = self._igatherv(data)
        self._ahead = None
        if upcoming is not None and self._library is not None:
            then = int(upcoming[self._comm.rank])
            self._ahead = self._keep(lambda: self._begin(then))
        self._comm.wait(request)

    def _igatherv(self, data: Any) -> Any:
        from mpi4py import MPI

        sent = [data, data.size, MPI.BYTE]
        return self._comm.raw.Igatherv(sent, None, root=self._root)

    def _keep(self, action: Callable[[], T]) -> T | None:
        """Run an action. What it raises is told once all have caught up."""
        try:
            return action() if self.error is None else None
        except BaseException as exc:  # noqa: BLE001
            self.error = exc
            return None

    def _begin(self, nbytes: int) -> _Packed:
        """Put together what is sent next, or queue the copies that do."""
        window = self._cursor.take(nbytes)
        self._packed.reverse()
        data = self._packed[0][:nbytes]
        if len(window) == 1:
            item, first, part = window[0]
            array, start = self._arrays[item], self._stream.starts[item] + first
            there = None
            if not self._is_device:
                there = array.view(start, start + part)
            elif self._memory.is_near(array):
                there = array.buffer(start, start + part)
            if there is not None:
                return _Packed(window, there, fence(None))
        done = 0
        for item, first, part in window:
            array = self._arrays[item]
            with naming(array.name):
                array.stage(self._stream.starts[item] + first, data[done : done + part])
            if self._library is None:  # while it is in the cache
                self._add([(item, first, part)], data[done : done + part])
            done += part
        if self._library is None:
            window = []
        return _Packed(window, data, fence(self._library))

    def _finish(self, packed: _Packed) -> Any:
        """Return the bytes to send, once they are there."""
        packed.wait()
        self._add(packed.window, packed.data)
        return packed.data

    def _add(self, window: list[tuple[int, int, int]], data: Any) -> None:
        """Add the checksums of bytes to be sent, but for those the root computes."""
        done = 0
        for item, first, part in window if self._has_sums else ():
            within = self._stream.within[item] + first
            self.sums.add(item, within, data[done : done + part].data)
            done += part


class _Packed(NamedTuple):
    """What a sender sends in a round."""

    window: list[tuple[int, int, int]]  # as Cursor gives them: without a checksum yet
    data: Any
    wait: Callable[[], None]  # until it is there
