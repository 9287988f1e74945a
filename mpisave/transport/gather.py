"""Rounds of Gatherv to the roots, each written while the next one travels.

A sender packs its next bytes into a buffer, or sends them from where they lie when they
are one run. A root has two round buffers. A thread writes one of them, and the root's
own arrays in between, while Gatherv fills the other: the thread makes no MPI calls.

Arrays on a device are packed on the device and gathered there, where MPI may be given
such memory; a root then copies round n to the host while round n + 1 travels and n - 1
is written. Otherwise a sender copies them to the host, the next round meanwhile.

Checksums are computed by the rank that holds the bytes, before they travel: the work is
shared, and damage on the way shows when the file is read. What travels from device to
device is first in the host's memory on the root, which computes them there.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.plan import rounds
from mpisave.transport.memory import Memory
from mpisave.transport.root import Root
from mpisave.transport.sender import Sender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import HeldArray
    from mpisave.plan import Buffers, Column
    from mpisave.transport.base import Moved, Route

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
    by_device : bool
        Whether MPI is given memory of the devices, by all ranks that hold such.

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
        *,
        by_device: bool,
    ) -> None:
        self._comm = comm
        self._routes = routes
        self._ends: list[Sender | Root] = []
        sent = [int(r.totals[comm.rank]) for r in routes if r.incoming is None]
        largest = min(max(sent, default=0), sizes.round_nbytes)
        memory = self._memory = Memory(held, largest, by_device=by_device)
        try:
            for route in routes:
                incoming = route.incoming
                self._ends.append(
                    Sender(comm, route, held, sizes, memory)
                    if incoming is None
                    else Root(comm, route, held, incoming, sizes, memory)
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
            with self._memory.current():
                self._all_rounds(moved)
        finally:
            self.close()
        for route, end in zip(self._routes, self._ends, strict=True):
            every = self._comm.gather(np.array(end.sums.values, np.uint32), route.root)
            if isinstance(end, Root):
                moved.of_streams.update(enumerate(every))
                moved.of_streams.update(end.sums_of_arrived())
                moved.written_s += end.written_s
        return next((end.error for end in self._ends if end.error), None)

    def _all_rounds(self, moved: Moved) -> None:
        counts = self._next_counts()
        for number in itertools.count(1):
            if all(count is None for count in counts):
                return
            upcoming = self._next_counts()
            for end, count, then in zip(self._ends, counts, upcoming, strict=True):
                if count is not None:
                    end.round(count, then, moved)
            counts = upcoming
            if number % _ROUNDS_BETWEEN_NEWS == 0:
                failed = any(end.error for end in self._ends)
                if any(self._comm.allgather(failed)):
                    return

    def _next_counts(self) -> list[Column | None]:
        return [next(steps, None) for steps in self._rounds]
