"""The steps of save, in order."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from dataclasses import dataclass, field
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
from mpisave.state_types import handler_of
from mpisave.storage import FileObject, StagedFile, sees_staging_file
from mpisave.transport.base import Incoming, Moved, Route
from mpisave.transport.gather import Gather
from mpisave.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from mpi4py import MPI

    from mpisave.arrays import HeldArray
    from mpisave.formats.base import Format, Layout
    from mpisave.storage import Target

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did. Alike on every rank, but for the last two of `seconds`.

    Where each rank saved alone, each reports on its own file.

    Attributes
    ----------
    paths : tuple of str
        The files that were written, in the order of the ranks that wrote them.
    nbytes : int
        Bytes of one file.
    payload_nbytes : int
        Bytes of the arrays in it.
    seconds : dict of str to float
        Wall time of each step on the first rank that wrote. ``"gather"`` (in Gatherv)
        and ``"write"`` overlap within ``"move"``. ``"publish"`` and ``"total"`` are of
        this rank.
    step_nbytes : dict of str to int
        Bytes that came by ``"gather"``, and that were put by ``"write"``.
    rounds : int
        Calls of Gatherv for one file.
    transport : str
        ``"gather (host)"``, or ``"none"`` where nothing had to move.
    """

    paths: tuple[str, ...]
    nbytes: int
    payload_nbytes: int
    seconds: dict[str, float]
    step_nbytes: dict[str, int]
    rounds: int
    transport: str

    @property
    def path(self) -> str:
        """The first file that was written."""
        return self.paths[0]

    def __str__(self) -> str:
        total = self.seconds["total"]
        steps = ", ".join(
            f"{name} {seconds:.3f} s"
            for name, seconds in self.seconds.items()
            if name != "total"
        )
        return (
            f"{', '.join(self.paths)}: {self.nbytes} bytes in {total:.3f} s "
            f"({self.nbytes / 1e9 / max(total, 1e-9):.2f} GB/s), transport "
            f"{self.transport}, {self.rounds} rounds ({steps})"
        )


@dataclass(slots=True)
class _Clock:
    """Wall time of the steps on this rank."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank is to do, by root in ascending order."""

    totals: list[np.ndarray[Any, np.dtype[np.int64]]]
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
    clock = _Clock()
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
        self, own: Comm, path: object, given: dict[str, Any], clock: _Clock
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
        self.paths = [
            arguments.filled_path(r) for r, (arguments, _) in enumerate(every)
        ]
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

    def _facts(self) -> dict[str, str]:
        import mpisave

        facts = {"version": mpisave.__version__, "format": str(index.VERSION)}
        if self.args.state_type is not None:
            facts["state_type"] = self.args.state_type
        return facts

    def _parse(self, given: dict[str, Any]) -> tuple[Arguments, str | None]:
        arguments = parse(self.path, self.own.size, given)
        path = arguments.filled_path(self.own.rank)
        return arguments, None if path is None else os.path.realpath(path)

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
        return through_coordinator(
            self.own, "plan", lambda: described, self._plan, root=self.roots[0]
        )

    def _plan(self, descriptions: list[list[Described]]) -> list[_Part]:
        """Return the part of each rank. On the coordinator."""
        merged = merge(descriptions)
        self._warn_of_opaque(merged)
        size = len(descriptions)
        parts: list[_Part] = [
            _Part([], [], merged if rank in self.roots else None)
            for rank in range(size)
        ]
        nbytes = [entry.nbytes for entry in merged.entries]
        ordinals = [dict(entry.holders) for entry in merged.entries]
        for root in self.roots:
            supplied = streams([owner(o, root) for o in ordinals], size)
            totals = np.array(
                [sum(nbytes[e] for e in entries) for entries in supplied], np.int64
            )
            totals[root] = 0
            for rank, (part, entries) in enumerate(zip(parts, supplied, strict=True)):
                part.totals.append(totals)
                sends = entries if rank != root else []
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
                lambda: self._create() if self.own.rank in first.values() else None,  # noqa: B023
            )
            writers += first.values()
            waiting = [root for root in waiting if root not in first.values()]
            if waiting:
                seen = exchange(
                    self.own,
                    "look for the staging file",
                    lambda: self._sees(names[first[self.paths[self.own.rank]]]),  # noqa: B023
                )
                waiting = [root for root in waiting if not seen[root]]
        self.writers = tuple(sorted(writers))

    def _create(self) -> str | None:
        if self.comm.rank not in self.roots:
            return None
        path = self.paths[self.own.rank]
        if path is None:
            self.target = FileObject(self.path)  # type: ignore[arg-type]
            self.target.check(must_begin=self.args.use_binary_format)
            return None
        staged = StagedFile(path)
        self.target = staged
        return staged.staging_name

    def _sees(self, name: str | None) -> bool:
        path = self.paths[self.own.rank]
        return bool(name and path) and sees_staging_file(str(path), str(name))

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
                part.totals[number],
                [held[ordinal] for ordinal in part.outgoing[number]],
                self._incoming(held) if self.comm.rank == root else None,
            )
            for number, root in enumerate(self.roots)
            if root in self.writers
        ]
        sizes = buffers(self.args.max_nbytes)
        transport = on_all_ranks(
            self.own, "allocate buffers", lambda: Gather(self.comm, routes, sizes)
        )
        return on_all_ranks(self.own, "gather and write", transport.move)

    def _incoming(self, held: list[HeldArray]) -> Incoming | None:
        if self.target is None or self.layout is None or self.merged is None:
            return None
        root = self.comm.rank
        extents: list[list[Any]] = [[] for _ in range(self.comm.size)]
        own = []
        for entry, extent in zip(self.merged.entries, self.layout.extents, strict=True):
            ordinals = dict(entry.holders)
            rank = owner(ordinals, root)
            if rank == root:
                own.append((held[ordinals[rank]], extent))
            else:
                extents[rank].append(extent)
        return Incoming(self.target, extents, own)

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
