"""The payload of one call of save: to the files, each rank's own way.

Each rank writes its own pieces, or sends them to the ranks that gather. What lies in
runs too short for that is exchanged first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpisave.collective import exchange, on_all_ranks, together
from mpisave.plan import buffers
from mpisave.transport.base import Route
from mpisave.transport.direct import Direct
from mpisave.transport.exchange import Exchange
from mpisave.transport.gather import Gather
from mpisave.weave import budget, chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arguments import Arguments
    from mpisave.arrays import HeldArray
    from mpisave.comms import Comm
    from mpisave.parts import Part
    from mpisave.storage import Target
    from mpisave.transport.base import Moved


class Mover:
    """Moves the payload of one call. All its methods are collective over `own`.

    Parameters
    ----------
    own, comm : Comm
        All ranks of the call; those that write the same file.
    part : Part
        This rank's part of the plan.
    held : sequence of HeldArray
        The arrays of this rank.
    target : Target or None
        The file of this rank, if it writes.
    args : Arguments
        Those of the call.
    writers : tuple of int
        Ranks of `comm` that seal a file.
    moved : Moved
        Told what was done.
    threads : int
        With how many this rank writes.
    has_device : bool
        Whether any rank has arrays on a device.
    by_device : bool
        Whether MPI is given memory of devices.
    """

    def __init__(
        self,
        own: Comm,
        comm: Comm,
        part: Part,
        held: Sequence[HeldArray],
        target: Target | None,
        args: Arguments,
        writers: tuple[int, ...],
        moved: Moved,
        *,
        threads: int,
        has_device: bool,
        by_device: bool,
    ) -> None:
        self._own, self._comm = own, comm
        self._part, self._held = part, held
        self._target = target
        self._args, self._roots = args, args.roots
        self._writers = writers
        self._threads = threads
        self._has_device, self._by_device = has_device, by_device
        self._limits = budget(args.max_nbytes, has_device=has_device)
        self._gathering: Gather | None = None
        self._is_woven = bool(part.files[0].woven)
        self._moved = moved

    def allocate(self) -> None:
        """Find out whether there is memory, before a byte is written."""
        if self._roots is None and self._comm is not self._own:  # several files
            every = exchange(self._own, "exchange", lambda: self._is_woven)
            self._is_woven = any(every)
        if self._roots is not None or self._is_woven:
            on_all_ranks(self._own, "allocate buffers", self._allocate)

    def close(self) -> None:
        """End the threads of a call that came to nothing. Independent."""
        if self._gathering is not None:
            self._gathering.close()

    def move(self) -> None:
        """Bring all payload to the files."""
        is_woven = self._is_woven
        # A rank that is alone flushes when it seals.
        flushes = self._roots is None and self._args.durable and self._comm.size > 1
        if self._roots is None:

            def write() -> None:
                self._write_own()
                if flushes and not is_woven and self._target is not None:
                    self._target.sync()

            on_all_ranks(self._own, "write", write)
        else:
            together(self._own, "gather and write", self._gather)
        if is_woven:
            for number, sealer in self._files:
                self._exchange(number, sealer, flushes=flushes)

    @property
    def _files(self) -> list[tuple[int, int]]:
        """Files that this rank has a part in: which of the plan, and who seals it."""
        every = enumerate(self._roots or (0,))
        return [(number, rank) for number, rank in every if rank in self._writers]

    def _write_own(self) -> None:
        part = self._part.files[0]
        if self._target is None:
            return
        direct = Direct(
            self._target,
            part.stream,
            part.stream.arrays(self._held),
            part.between,
            max_nbytes=self._args.max_nbytes,
            threads=self._threads,
        )
        direct.move(self._moved, self._comm.rank)

    def _allocate(self) -> None:
        if self._is_woven:
            for number, sealer in self._files:
                self._new_exchange(number, sealer)  # anew when the others are free
        if self._roots is not None:
            self._allocate_gather()

    def _allocate_gather(self) -> None:
        routes = []
        for root, part in zip(self._roots or (), self._part.files, strict=True):
            if root not in self._writers:
                continue
            incoming = None
            if root == self._comm.rank and self._part.whole and self._target:
                incoming = self._part.whole.incoming(self._target, self._comm.size)
            routes.append(Route(root, part.totals, part.stream, incoming))
        sizes = buffers(
            self._args.max_nbytes,
            len(routes),
            has_device=self._has_device,
            by_device=self._by_device,
        )
        self._gathering = Gather(
            self._comm, routes, self._held, sizes, by_device=self._by_device
        )

    def _gather(self) -> BaseException | None:
        if self._gathering is None:
            return None
        failed = self._gathering.move(self._moved)
        self._gathering = None  # and its buffers
        return failed

    def _new_exchange(self, number: int, sealer: int) -> Exchange:
        part = self._part.files[number]
        root = sealer if self._roots is not None else None
        return Exchange(
            self._comm,
            part.woven,
            chunks(part.woven, self._limits.chunk_nbytes, writer=root),
            part.offsets,
            self._held,
            self._target if root in (None, self._comm.rank) else None,
            self._limits,
        )

    def _exchange(self, number: int, sealer: int, *, flushes: bool) -> None:
        """Put together what lies in short runs."""
        transport = on_all_ranks(
            self._own, "allocate buffers", lambda: self._new_exchange(number, sealer)
        )

        def flush() -> None:
            if flushes and self._target is not None:
                self._target.sync()

        together(
            self._own, "exchange and write", lambda: transport.move(self._moved), flush
        )
