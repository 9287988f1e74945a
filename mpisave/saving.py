"""The steps of save, in order."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpisave import garbage
from mpisave.arguments import Arguments, check_alike, deadline, parse
from mpisave.arrays import library_of, settle
from mpisave.choosing import choose
from mpisave.collective import alike, exchange, on_all_ranks, through_coordinator
from mpisave.comms import private_comm
from mpisave.election import check_places, create_for_all, create_for_roots
from mpisave.errors import show_key
from mpisave.formats import index
from mpisave.formats.hdf5 import HDF5Format
from mpisave.formats.pkl import PickleFormat, is_only_for_pickle
from mpisave.metadata import Described, describe
from mpisave.moving import Mover
from mpisave.parts import Part, divide
from mpisave.placement import (
    MOST_WRITERS,
    communicator,
    threads_of,
    warn_caller,
    where_this_runs,
)
from mpisave.replicas import digests_of
from mpisave.report import Clock, SaveReport
from mpisave.state_types import handler_of
from mpisave.transport.base import Moved
from mpisave.transport.memory import memory_of
from mpisave.tree import flatten
from mpisave.weave import budget

if TYPE_CHECKING:
    from typing import BinaryIO

    from mpi4py import MPI

    from mpisave.arrays import HeldArray
    from mpisave.comms import Comm
    from mpisave.formats.base import Format
    from mpisave.merging import Merged
    from mpisave.plan import Woven
    from mpisave.storage import Target

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Plans that are kept with a communicator: parameters and moments, and a pair to spare.
_MOST_PLANS = 4


def save(
    state_dict: object,
    path: str | os.PathLike[str] | BinaryIO | None,
    *,
    protocol: int = 4,
    use_binary_format: bool = False,
    gather_to: int | list[int] | tuple[int, ...] | None = None,
    state_type: str | None = None,
    max_grouped_size: int | str = "3G",
    replicas: str = "first",
    transport: str = "auto",
    durable: bool = True,
    overwrite: bool = True,
    timeout: float | None = 600.0,
    comm: MPI.Intracomm | None = None,
    **unknown: object,
) -> SaveReport:
    """Save the state dicts of all ranks to one file. Collective over `comm`.

    The state that was at `path` stays loadable until the new file is whole.

    Parameters
    ----------
    state_dict : nested dict, list or tuple of arrays and small objects, or one array
        What this rank holds; never modified. Ranks may hold different keys: the file
        holds the union. A key that several ranks hold is saved once, with the value of
        the lowest of them, or of the rank that gathers if that has it. A `Shard` is
        part of an array, a `PerRank` one value for each rank.
    path : str, os.PathLike or seekable binary file object
        Where to save; ``{rank}`` is filled in. A file object is needed on the ranks
        that write only. A file of that name is replaced when the new one is whole.
    protocol : {4, 2, 3, 5}
        Protocol of the pickle.
    use_binary_format : bool
        True writes HDF5, False a pickle.
    gather_to : int, list or tuple of int, or None
        Ranks of `comm` that write. Those that see the same directory write one file
        together, once. None: nobody gathers. Ranks that give the same path write that
        one file together, each its own bytes; a rank with a path of its own saves its
        state alone.
    state_type : str or None
        ``"params"``, ``"opt"``, or what was registered. Required when gathering from
        more than one rank.
    max_grouped_size : int or str
        Bytes, or a number with K, M or G (1024-based): what gathering, or the exchange
        of shards, brings to a rank at a time, staging included.
    replicas : {"first", "check", "share"}
        What of an array that several ranks hold. ``"first"``: the lowest of them writes
        it. ``"share"``: each of them writes an even part; they must be equal.
        ``"check"``: the same, after their checksums were found to be equal. When
        gathering, ``"share"`` is as ``"first"``.
    transport : {"auto", "device", "host"}
        How arrays that lie on devices travel when gathering. ``"device"``: MPI is given
        memory of the devices. ``"host"``: they are copied to the host first.
        ``"auto"``: by device where MPI turns out to be CUDA-aware, see docs/gpu.md.
    durable : bool
        Whether to return only when the file outlives a crash of the machine (fsync).
        Without, a crash soon after may lose the new file and the one before it.
    overwrite : bool
        Whether a file that is at `path` is replaced. False refuses it, before a byte
        moves and again when the new file gets its name. Of no effect on file objects.
    timeout : float or None
        How many seconds a rank waits for the others in one step. None: for ever.
    comm : mpi4py.MPI.Intracomm, optional
        Default: COMM_WORLD in an MPI job, else this process alone.
    **unknown : object
        Refused, with the name of the argument that was meant.

    Returns
    -------
    SaveReport
        What was done, and how long it took.

    Raises
    ------
    ArgumentError, StateDictError, LaunchError, StorageError, CollectiveError
        Alike on every rank, whichever failed. No staging file is left, and what was
        at `path` is there; only where several ranks write files of their own, or a
        directory cannot be flushed, a file may be published all the same when the
        last step fails. UnknownArgumentError is a TypeError. A `comm` that is none is
        refused on the rank that gave it: there is nothing to tell the others by.
    """
    clock = Clock()
    given = {
        "protocol": protocol,
        "use_binary_format": use_binary_format,
        "gather_to": gather_to,
        "state_type": state_type,
        "max_grouped_size": max_grouped_size,
        "replicas": replicas,
        "transport": transport,
        "durable": durable,
        "overwrite": overwrite,
        "timeout": timeout,
        **unknown,
    }
    with private_comm(communicator(comm), "save", deadline(timeout)) as own:
        call = _Call(own, path, given, clock)
        with clock.step("describe"):
            call.describe(state_dict)
        if call.gathers_from_devices:
            with clock.step("choose"):
                call.choose()
        with clock.step("plan"):
            call.plan()
        try:
            with clock.step("stage"):
                call.stage()
            with clock.step("move"):
                call.move()
            with clock.step("seal"):
                call.seal()
            with clock.step("publish"):
                return call.publish()
        except BaseException:
            call.discard()
            raise


_NO_DIGESTS = np.zeros(0, np.uint32)


class _Call:
    """One call of save on one rank."""

    def __init__(
        self, own: Comm, path: object, given: dict[str, Any], clock: Clock
    ) -> None:
        self.own = own
        self.clock = clock
        self.path = path
        sent_before = own.sent_nbytes
        every = exchange(own, "check arguments", lambda: self._parse(given))
        self.args: Arguments = every[own.rank][0]
        alike(own, "check arguments", lambda: check_alike([a for a, *_ in every]))
        # Where each rank that writes does so, links resolved; None for a file object.
        self.paths = [path for _, path, _ in every]
        self.threads = threads_of([w for *_, w in every], own.rank, MOST_WRITERS)
        self.roots = self.args.roots
        self.hosts = [host for *_, (host, *_) in every]
        if self.roots is None:
            named = [args.filled_path(rank) for rank, (args, *_) in enumerate(every)]
            places = functools.partial(check_places, named, self.paths, self.hosts)
            alike(own, "check arguments", places)
        # Who seals the file of each rank: the lowest that gave the same path.
        firsts: dict[str | None, int] = {}
        self.sealers = [
            rank if path is None else firsts.setdefault(path, rank)
            for rank, path in enumerate(self.paths)
        ]
        self.comm: Comm = own
        if self.roots is None:
            self.comm = own.part(tuple(self.sealers))
        self.sent_before = self._sent_nbytes() - (own.sent_nbytes - sent_before)
        self.place: Any = self.args.filled_path(own.rank) or path
        self.format: Format = (
            HDF5Format()
            if self.args.use_binary_format
            else PickleFormat(self.args.protocol)
        )
        self.target: Target | None = None
        self.writers: tuple[int, ...] = (0,)  # ranks of `comm` that seal a file
        self.mover: Mover | None = None
        self.moved = Moved()
        self.by_device = False

    def _parse(self, given: dict[str, Any]) -> tuple[Arguments, str | None, Any]:
        arguments = parse(self.path, self.own.size, given)
        path = arguments.filled_path(self.own.rank)
        writes = arguments.roots is None or self.own.rank in arguments.roots
        # Only ranks that write touch the file system.
        where = os.path.realpath(path) if path and writes else None
        suffix, name = arguments.state_type, arguments.path
        is_first = self.own.rank == (arguments.roots[0] if arguments.roots else 0)
        if is_first and suffix and name and not name.endswith(suffix):
            warn_caller(f"the path {name!r} does not end in the state type {suffix!r}")
        return arguments, where, where_this_runs()

    def describe(self, state: object) -> None:
        """Find out what this rank holds, checked by state type and format."""
        every = exchange(
            self.own, "describe the state dict", lambda: self._describe(state)
        )
        self.has_device = any(has_device for _, has_device in every)
        self.digests = self._of_group([digests for digests, _ in every])

    def _of_group(self, column: list[T]) -> list[T]:
        """Return what is of the ranks that save together with this one."""
        if self.roots is not None:
            return column
        mine = self.sealers[self.own.rank]
        pairs = zip(column, self.sealers, strict=True)
        return [item for item, sealer in pairs if sealer == mine]

    def _describe(self, state: object) -> tuple[tuple[bytes, bytes], bool]:
        with garbage.kept():
            nodes = flatten(state, self.comm.rank, self.comm.size)
            described, held, description = describe(nodes)
        if self.args.state_type is not None:
            handler = handler_of(self.args.state_type)
            for node in described:
                handler.check(node.key, node.kind, node.type_name)
        self.format.check(described)
        settle(held)
        self.held: list[HeldArray] = held
        self.description = description
        digests = description.structure, description.digest
        return digests, library_of(held) is not None

    @property
    def gathers_from_devices(self) -> bool:
        """Whether arrays on devices travel to the ranks that write."""
        return self.roots is not None and self.has_device

    def choose(self) -> None:
        """Find out whether MPI is given memory of the devices."""
        choice = choose(
            self.own,
            self.args.transport,
            memory_of(self.held),
            roots=self.roots or (0,),
            timeout_s=self.args.timeout_s,
        )
        self.by_device = choice.transport == "device"

    def plan(self) -> None:
        """Get this rank's part of what all ranks hold together."""
        args = self.args
        what = (args.use_binary_format, args.protocol, args.roots, args.replicas)
        facts = self._facts()
        limits = (args.max_nbytes, self.has_device)
        key = hashlib.blake2b(repr((what, limits, facts)).encode())
        for _, digest in self.digests:
            key.update(digest)
        plans: dict[bytes, Part] = self.comm.kept.setdefault("plans", {})
        # On all ranks or on none: all of them plan the same, in the same order.
        part = plans.pop(key.digest(), None)

        def plan() -> Part:
            return part if part is not None else self._plan(facts)

        # Groups plan each for itself, and not all of them anew: then all agree.
        is_one = self.comm is self.own
        part = plan() if is_one else on_all_ranks(self.own, "plan", plan)
        plans[key.digest()] = part
        while len(plans) > _MOST_PLANS:
            del plans[next(iter(plans))]
        self.part: Part = part

    def _plan(self, facts: dict[str, str]) -> Part:
        structures = [structure for structure, _ in self.digests]
        is_first = structures.index(structures[self.comm.rank]) == self.comm.rank
        mine = self.description
        limits = budget(self.args.max_nbytes, has_device=self.has_device)
        root = self.roots[0] if self.roots else 0

        def combine(
            sent: list[tuple[Any, Any]],
        ) -> tuple[list[Part], list[list[Woven]]]:
            full = {first.structure: first for first, _ in sent if first is not None}
            descriptions = [
                full[structure].with_boxes(boxes)
                for structure, (_, boxes) in zip(structures, sent, strict=True)
            ]
            with garbage.kept():
                parts = divide(
                    descriptions,
                    self.format,
                    facts,
                    roots=self.roots,
                    replicas=self.args.replicas,
                    chunk_nbytes=limits.chunk_nbytes,
                )
            if (whole := parts[root].whole) is not None:
                self._warn_of_opaque(whole.merged)
            # Boxes of all ranks, which all need: sent once, not with the part of each.
            woven = [file.woven for file in parts[root].files]
            for part in parts:
                for file in part.files:
                    file.woven = []
            return parts, woven

        part, woven = through_coordinator(
            self.comm,
            "plan",
            # Ranks that hold the same keys need not all say which.
            lambda: (mine if is_first else None, mine.boxes),
            combine,
            root=root,
        )
        for file, boxes in zip(part.files, woven, strict=True):
            file.woven = boxes
        return part

    def _facts(self) -> dict[str, str]:
        import mpisave

        facts = {"version": mpisave.__version__, "format": str(index.VERSION)}
        if self.args.state_type is not None:
            facts["state_type"] = self.args.state_type
        return facts

    def _warn_of_opaque(self, merged: Merged) -> None:
        if self.args.use_binary_format:
            return
        for node in merged.nodes:
            if is_only_for_pickle(Described(*node)):
                warn_caller(
                    f"{show_key(node.key)} is an object of type {node.type_name}: "
                    f"pickle.load alone gives it back, mpisave.load with "
                    f"allow_pickle=True"
                )

    def stage(self) -> None:
        """Have one rank for each file lay it out and reserve its bytes."""
        how = {
            "must_begin": self.args.use_binary_format,
            "overwrite": self.args.overwrite,
        }
        if self.roots is None:
            self.target = create_for_all(self.own, self.sealers, self.place, **how)
        else:
            self.target, self.writers = create_for_roots(
                self.own, self.roots, self.paths, self.place, **how
            )
        self.mover = Mover(
            self.own,
            self.comm,
            self.part,
            self.held,
            self.target,
            self.args,
            self.writers,
            self.moved,
            # A file object has one position.
            threads=self.threads if isinstance(self.place, str) else 1,
            has_device=self.has_device,
            by_device=self.by_device,
        )
        self.mover.allocate()
        on_all_ranks(self.own, "lay out the file", self._lay_out)

    def _sent_nbytes(self) -> int:
        group = 0 if self.comm is self.own else self.comm.sent_nbytes
        return self.own.sent_nbytes + group

    @property
    def _seals(self) -> bool:
        return self.comm.rank in self.writers

    def _lay_out(self) -> None:
        whole = self.part.whole
        if not self._seals or self.target is None or whole is None:
            stream = self.part.files[0].stream
            if self.target is not None and len(stream.offsets):
                self.target.check_limit(stream.offsets[-1] + stream.nbytes[-1])
            return
        self.target.allocate(whole.layout.nbytes)
        fill = self.roots is not None or self.comm.size == 1
        for offset, data in whole.layout.runs(whole.handed_out, fill=fill):
            self.target.write(offset, memoryview(data))

    def move(self) -> None:
        """Bring all payload to the files."""
        if self.mover is not None:
            self.mover.move()

    def seal(self) -> None:
        """Write the index, and make all of it durable."""
        moved = self.moved
        digests = _NO_DIGESTS
        if self.args.replicas == "check":
            digests = on_all_ranks(
                self.own,
                "compare replicas",
                lambda: digests_of(self.held, self.part.replicas),
            )
        sealer = self.writers[0]
        mine = (
            digests,
            moved.of_streams.get(self.comm.rank),
            moved.of_chunks.get(self.comm.rank),
        )
        self.own.enter("seal")
        every = self.comm.gather(mine, root=sealer)
        if self.roots is None and every is not None:
            moved.of_streams = {
                r: s for r, (_, s, _) in enumerate(every) if s is not None
            }
            moved.of_chunks = {r: c for r, (*_, c) in enumerate(every) if c is not None}

        def write() -> None:
            whole = self.part.whole
            if not self._seals or self.target is None or whole is None:
                if self.target is not None:
                    self.target.close()  # it may fail, and flushes on some systems
                return
            if every is not None:
                found = [digests for digests, *_ in every]
                whole.check_replicas(found, self._of_group(self.hosts))
            data = index.encode(
                whole.merged,
                whole.layout,
                whole.checksums(moved, self.comm.size),
                container=self.format.name,
                facts=self._facts(),
            )
            self.target.write(whole.layout.nbytes, memoryview(data))
            nbytes = whole.layout.nbytes + len(data)
            self.target.complete(nbytes, durable=self.args.durable)

        on_all_ranks(self.own, "seal", write)

    def publish(self) -> SaveReport:
        """Make the files visible, and report."""
        clock, began = self.clock, time.perf_counter()
        reports = exchange(self.own, "publish", self._publish)
        writers = self.writers
        if self.roots is None:
            writers = (self.sealers[self.own.rank],)
        written = [report for w in writers if (report := reports[w]) is not None]
        first = written[0]
        now = time.perf_counter()
        seconds = {**first.seconds, "publish": now - began, "total": now - clock.began}
        report = SaveReport(
            tuple(report.path for report in written),
            first.nbytes,
            first.payload_nbytes,
            seconds,
            first.step_nbytes,
            first.rounds,
            first.transport,
            self._sent_nbytes() - self.sent_before,
        )
        if self.own.rank == writers[0]:
            _log.info("saved %s", report)
        return report

    def _publish(self) -> SaveReport | None:
        whole, moved = self.part.whole, self.moved
        if not self._seals or self.target is None or whole is None:
            return None
        # Those that waited in vain for this rank may have saved a newer file since.
        self.own.hear()
        self.target.publish(durable=self.args.durable)
        overlapped = {"gather": moved.waited_s, "write": moved.written_s}
        payload = int(whole.merged.nbytes_of_entries().sum())
        transport = "none"
        if self.comm.size > 1 and (moved.rounds or self.roots is None):
            where = "device" if moved.by_device else "host"
            transport = "direct (host)" if self.roots is None else f"gather ({where})"
        return SaveReport(
            (self.target.name,),
            self.target.nbytes,
            payload,
            {**self.clock.seconds, **overlapped},
            {"gather": moved.nbytes, "write": payload},
            moved.rounds if self.comm.size > 1 else 0,
            transport,
        )

    def discard(self) -> None:
        """Leave nothing behind of a save that failed."""
        if self.mover is not None:
            self.mover.close()
        if self.target is not None:
            self.target.discard()
