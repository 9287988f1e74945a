"""The steps of save, in order."""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arguments import Arguments, check_alike, parse
from mpisave.collective import (
    Comm,
    SoloComm,
    check_launch,
    exchange,
    is_under_mpi,
    on_all_ranks,
    private_comm,
    through_coordinator,
)
from mpisave.errors import ArgumentError, show_key
from mpisave.formats import index
from mpisave.formats.hdf5 import HDF5Format
from mpisave.formats.pkl import PickleFormat, is_only_for_pickle
from mpisave.metadata import Described, Merged, describe, merge
from mpisave.plan import buffers, owner, streams
from mpisave.report import Clock, SaveReport
from mpisave.state_types import handler_of
from mpisave.storage import FileObject, StagedFile, sees_staging_file
from mpisave.transport.base import Incoming, Moved, Route
from mpisave.transport.gather import Gather
from mpisave.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from mpi4py import MPI

    from mpisave.arrays import HeldArray
    from mpisave.formats.base import Format, Layout
    from mpisave.plan import Extent
    from mpisave.storage import Target

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank is to do, by root in ascending order."""

    outgoing: list[list[int]]  # arrays of this rank, in the order of its state
    merged: Merged | None  # on roots only


def save(
    state_dict: object,
    path: str | os.PathLike[str] | BinaryIO | None,
    *,
    protocol: int = 4,
    use_binary_format: bool = False,
    gather_to: int | list[int] | tuple[int, ...] | None = None,
    state_type: str | None = None,
    max_grouped_size: int | str = "3G",
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
        the lowest of them, or of the rank that writes if that has it.
    path : str, os.PathLike or seekable binary file object
        Where to save; ``{rank}`` is filled in. A file object is needed on the ranks
        that write only. A file of that name is replaced when the new one is whole.
    protocol : {4, 2, 3, 5}
        Protocol of the pickle.
    use_binary_format : bool
        True writes HDF5, False a pickle.
    gather_to : int, list or tuple of int, or None
        Ranks of `comm` that write. Those that see the same directory write one file
        together, once. None: nobody gathers, each rank saves its own state to a path
        of its own.
    state_type : str or None
        ``"params"``, ``"opt"``, or what was registered. Required when gathering from
        more than one rank.
    max_grouped_size : int or str
        Bytes, or a number with K, M or G (1024-based): what gathering brings to a
        rank that writes at a time, staging included.
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
        **unknown,
    }
    with private_comm(_communicator(comm)) as own:
        call = _Call(own, path, given, clock)
        with clock.step("describe"):
            described, held = on_all_ranks(
                own, "describe the state dict", lambda: call.describe(state_dict)
            )
        with clock.step("plan"):
            part = call.plan(described)
        try:
            with clock.step("stage"):
                call.stage(part)
            with clock.step("move"):
                moved = call.move(part, held)
            with clock.step("seal"):
                on_all_ranks(own, "seal", lambda: call.seal(moved))
            with clock.step("publish"):
                return call.publish(moved)
        except BaseException:
            call.discard()
            raise


def _communicator(comm: Any) -> Any:
    """Return the communicator to save over, or refuse ranks that are none."""
    if comm is None and not is_under_mpi(os.environ):
        return SoloComm()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI library for it
        check_launch(1, os.environ)
        return SoloComm()
    if MPI.Is_finalized():
        raise ArgumentError("MPI is finalized: the ranks can no longer save together")
    world = MPI.COMM_WORLD  # noqa: TID251 - the default communicator
    if comm is None:
        comm = world
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ArgumentError(f"comm is {comm!r}: it is an intracommunicator of mpi4py")
    if comm != MPI.COMM_SELF:  # given on purpose, it means: this process alone
        check_launch(world.size, os.environ)
    return comm


class _Call:
    """One call of save on one rank: its arguments, and the file that it writes."""

    def __init__(
        self, own: Comm, path: object, given: dict[str, Any], clock: Clock
    ) -> None:
        self.own = own
        self.clock = clock
        self.path = path
        every = exchange(own, "check arguments", lambda: self._parse(given))
        self.args: Arguments = every[own.rank][0]
        self.is_alone = self.args.roots is None
        # Alone, a rank is the only one of a communicator of its own.
        self.comm: Comm = SoloComm() if self.is_alone else own
        self.roots = (0,) if self.args.roots is None else self.args.roots
        on_all_ranks(own, "check arguments", lambda: self._check(every))
        # Where each rank that writes does so, links resolved; None for a file object.
        self.paths = [path for _, path in every]
        self.name = self.args.filled_path(own.rank)
        self.format: Format = (
            HDF5Format()
            if self.args.use_binary_format
            else PickleFormat(self.args.protocol)
        )
        self.facts = self._facts()
        self.target: Target | None = None
        self.layout: Layout | None = None
        self.merged: Merged | None = None
        self.writers: tuple[int, ...] = ()
        # Bytes of the stream of each rank to each root.
        self.totals = np.zeros((0, 0), np.int64)
        self.transport: Gather | None = None

    def _facts(self) -> dict[str, str]:
        import mpisave

        facts = {"version": mpisave.__version__, "format": str(index.VERSION)}
        if self.args.state_type is not None:
            facts["state_type"] = self.args.state_type
        return facts

    def _parse(self, given: dict[str, Any]) -> tuple[Arguments, str | None]:
        arguments = parse(self.path, self.own.size, given)
        path = arguments.filled_path(self.own.rank)
        writes = arguments.roots is None or self.own.rank in arguments.roots
        # Only ranks that write touch the file system.
        return arguments, os.path.realpath(path) if path and writes else None

    def _check(self, every: Sequence[tuple[Arguments, str | None]]) -> None:
        check_alike([arguments for arguments, _ in every])
        if self.is_alone:
            _check_apart([path for _, path in every])
        args = self.args
        is_first = self.own.rank == (self.roots[0] if not self.is_alone else 0)
        suffix, path = args.state_type, args.path
        if is_first and suffix and path and not path.endswith(suffix):
            warnings.warn(
                f"the path {path!r} does not end in the state type {suffix!r}",
                stacklevel=7,  # the caller of save
            )

    def describe(self, state: object) -> tuple[list[Described], list[HeldArray]]:
        """Return what this rank holds, checked by state type and format."""
        described, held = describe(flatten(state))
        if self.args.state_type is not None:
            handler = handler_of(self.args.state_type)
            for node in described:
                handler.check(node.key, node.kind, node.type_name)
        self.format.check(described)
        return described, held

    def plan(self, described: list[Described]) -> _Part:
        """Return this rank's part of what all ranks hold together."""
        if self.is_alone:
            return on_all_ranks(self.own, "plan", lambda: self._plan([described])[0])
        part = through_coordinator(
            self.own, "plan", lambda: described, self._plan, root=self.roots[0]
        )
        self.totals = self.own.bcast(self.totals, root=self.roots[0])
        return part

    def _plan(self, descriptions: list[list[Described]]) -> list[_Part]:
        """Return the part of each rank. On the coordinator."""
        merged = merge(descriptions)
        self._warn_of_opaque(merged)
        size = len(descriptions)
        parts: list[_Part] = [
            _Part([], merged if rank in self.roots else None) for rank in range(size)
        ]
        nbytes = [entry.nbytes for entry in merged.entries]
        ordinals = [dict(entry.holders) for entry in merged.entries]
        self.totals = np.zeros((len(self.roots), size), np.int64)
        for totals, root in zip(self.totals, self.roots, strict=True):
            supplied = streams([owner(o, root) for o in ordinals], size)
            for rank, (part, entries) in enumerate(zip(parts, supplied, strict=True)):
                sends = entries if rank != root else []
                totals[rank] = sum(nbytes[e] for e in sends)
                part.outgoing.append([ordinals[e][rank] for e in sends])
        return parts

    def _warn_of_opaque(self, merged: Merged) -> None:
        if self.args.use_binary_format:
            return
        for node in merged.nodes:
            if is_only_for_pickle(Described(*node)):
                warnings.warn(
                    f"{show_key(node.key)} is an object of type {node.type_name}: "
                    f"mpisave.load will refuse the file, pickle.load alone reads it",
                    stacklevel=8,  # the caller of save
                )

    def stage(self, part: _Part) -> None:
        """Have the ranks that write lay the file out and reserve its bytes."""
        self._elect()
        on_all_ranks(self.own, "lay out the file", lambda: self._lay_out(part))

    def _elect(self) -> None:
        """Create the staging files: one for all roots that see the same directory."""
        if self.is_alone or any(self.paths[root] is None for root in self.roots):
            self.writers = self.roots
            on_all_ranks(self.own, "create the staging file", self._create)
            return
        writers: list[int] = []
        waiting = list(self.roots)
        while waiting:
            # One of each path goes ahead; the others look whether they see its file.
            first = {self.paths[root]: root for root in reversed(waiting)}
            names = exchange(
                self.own,
                "create the staging file",
                self._create if self.own.rank in first.values() else lambda: None,
            )
            writers += first.values()
            waiting = [root for root in waiting if root not in first.values()]
            if waiting:
                ahead = {root: names[first[self.paths[root]]] for root in waiting}
                seen = exchange(
                    self.own,
                    "look for the staging file",
                    functools.partial(self._sees, ahead.get(self.own.rank)),
                )
                waiting = [root for root in waiting if not seen[root]]
        self.writers = tuple(sorted(writers))

    def _create(self) -> str | None:
        if self.comm.rank not in self.roots:
            return None
        if self.name is None:
            self.target = FileObject(self.path)  # type: ignore[arg-type]
            self.target.check(must_begin=self.args.use_binary_format)
            return None
        staged = StagedFile(self.name)
        self.target = staged
        return staged.staging_name

    def _sees(self, staging_name: str | None) -> bool:
        if self.name is None or staging_name is None:
            return False
        return sees_staging_file(self.name, staging_name)

    def _lay_out(self, part: _Part) -> None:
        if self.target is None or part.merged is None:
            return
        self.merged = part.merged
        self.layout = self.format.layout(part.merged, self.facts)
        self.target.allocate(self.layout.nbytes)
        for offset, data in self.layout.runs():
            self.target.write(offset, memoryview(data))

    def move(self, part: _Part, held: list[HeldArray]) -> Moved:
        """Bring all payload to the files."""
        routes = [
            Route(
                root,
                self.totals[number],
                [held[ordinal] for ordinal in part.outgoing[number]],
                self._incoming(held) if self.comm.rank == root else None,
            )
            for number, root in enumerate(self.roots)
            if root in self.writers
        ]
        sizes = buffers(self.args.max_nbytes, len(routes))

        def allocate() -> Gather:
            self.transport = Gather(self.comm, routes, sizes)
            return self.transport

        transport = on_all_ranks(self.own, "allocate buffers", allocate)
        return on_all_ranks(self.own, "gather and write", transport.move)

    def _incoming(self, held: list[HeldArray]) -> Incoming | None:
        if self.target is None or self.layout is None or self.merged is None:
            return None
        root = self.comm.rank
        extents: list[list[Extent]] = [[] for _ in range(self.comm.size)]
        names: list[list[str]] = [[] for _ in range(self.comm.size)]
        own = []
        for entry, extent in zip(self.merged.entries, self.layout.extents, strict=True):
            ordinals = dict(entry.holders)
            rank = owner(ordinals, root)
            if rank == root:
                own.append((held[ordinals[rank]], extent))
            else:
                extents[rank].append(extent)
                names[rank].append(show_key(entry.key))
        return Incoming(self.target, extents, names, own)

    def seal(self, moved: Moved) -> None:
        """Write the index, and make all of it durable."""
        if self.target is None or self.layout is None or self.merged is None:
            return
        streams_of = [iter(checksums) for checksums in moved.checksums]
        root = self.comm.rank
        checksums = [
            next(streams_of[owner([r for r, _ in entry.holders], root)])
            for entry in self.merged.entries
        ]
        data = index.encode(
            self.merged,
            self.layout,
            checksums,
            container=self.format.name,
            facts=self.facts,
        )
        self.target.write(self.layout.nbytes, memoryview(data))
        self.target.sync()

    def publish(self, moved: Moved) -> SaveReport:
        """Make the files visible, and report."""
        clock = self.clock
        began = time.perf_counter()
        reports = exchange(self.own, "publish", lambda: self._publish(moved))
        writers = [self.own.rank] if self.is_alone else list(self.writers)
        written = [reports[writer] for writer in writers]
        first = written[0]
        if first is None:
            raise RuntimeError("a rank that wrote gave no report")
        now = time.perf_counter()
        seconds = {**first.seconds, "publish": now - began, "total": now - clock.began}
        paths = tuple(report.path for report in written if report is not None)
        report = SaveReport(
            paths,
            first.nbytes,
            first.payload_nbytes,
            seconds,
            first.step_nbytes,
            first.rounds,
            first.transport,
        )
        if self.own.rank == writers[0]:
            _log.info("saved %s", report)
        return report

    def _publish(self, moved: Moved) -> SaveReport | None:
        if self.target is None or self.layout is None or self.merged is None:
            return None
        self.target.publish()
        overlapped = {"gather": moved.waited_s, "write": moved.written_s}
        seconds = {**self.clock.seconds, **overlapped}
        payload = self.merged.nbytes
        return SaveReport(
            (self.target.name,),
            self.target.nbytes,
            payload,
            seconds,
            {"gather": moved.nbytes, "write": payload},
            moved.rounds,
            "gather (host)" if moved.rounds else "none",
        )

    def discard(self) -> None:
        """Leave nothing behind of a save that failed."""
        if self.transport is not None:
            self.transport.close()
        if self.target is not None:
            self.target.discard()


def _check_apart(paths: Sequence[str | None]) -> None:
    """Refuse ranks that would each write the same file."""
    seen: dict[str, int] = {}
    for rank, path in enumerate(paths):
        if path is None:
            continue
        if path in seen:
            raise ArgumentError(
                f"ranks {seen[path]} and {rank} would each save alone to the same "
                f"path, {path}: put '{{rank}}' into the path for a file a rank, or "
                f"gather to one rank with gather_to=0"
            )
        seen[path] = rank
