"""The steps of load."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpisave import garbage
from mpisave.arguments import check_same, deadline, parse_timeout
from mpisave.arrays import alone, settle
from mpisave.collective import Steps
from mpisave.comms import SoloComm, private_comm
from mpisave.devices import device_library
from mpisave.errors import (
    ArgumentError,
    FileFormatError,
    StateDictError,
    show_key,
    show_ranks,
)
from mpisave.formats import index, pkl
from mpisave.formats.unpickle import unpickle
from mpisave.opening import index_of, open_same
from mpisave.placement import (
    MOST_READERS,
    communicator,
    threads_of,
    warn_caller,
    where_this_runs,
)
from mpisave.reading import mapped, naming_file, read
from mpisave.regrouping import read_regrouped
from mpisave.selection import Asked, select
from mpisave.sharing import read_shared
from mpisave.skeleton import is_altered, read_part
from mpisave.tree import flatten
from mpisave.wanted import HOST, All, Match, Place, is_whole, rank_of, saved_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import BinaryIO

    from mpi4py import MPI

    from mpisave.comms import Comm
    from mpisave.errors import Key
    from mpisave.source import Source
    from mpisave.tree import Node
    from mpisave.wanted import Want

T = TypeVar("T")


def load(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    comm: MPI.Intracomm | None = None,
    like: Any = None,
    into: str = "new",
    keys: str | tuple[str | int, ...] | Iterable[Any] | None = None,
    device: str | None = None,
    mmap: bool = False,
    missing: str = "error",
    unexpected: str = "error",
    per_rank: Callable[[int, int], int] | None = None,
    verify: bool = True,
    timeout: float | None = 600.0,
    allow_pickle: bool = False,
) -> Any:
    """Load a file, or what this rank wants of it. Collective over `comm`.

    What the file is shows in its content, not in its name. A file of mpisave is read
    through its index; any other pickle by an interpreter that knows arrays, plain
    containers and scalars; any other HDF5 file as dicts of contiguous arrays, after a
    process of its own has inspected it. Nothing that a file names is imported or
    called, unless `allow_pickle` says so, and no other file is read.

    Parameters
    ----------
    path : str, os.PathLike or seekable binary file object
        The file. An object is read from its start.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks that load together, as many as there are. The default is this process
        alone. A failure on one of them is raised on all.
    like : nested dict, list or tuple, optional
        What this rank wants: a state as for `save`, with arrays and `Shard` of the
        dtypes and shapes that are in the file. Each rank reads what it wants, and no
        more. What `PerRank` holds in it does not matter. Default: all that is there.
    into : {"new", "inplace"}
        Whether to read into fresh arrays or into those of `like`. When it fails, what
        was read by then is in these arrays.
    keys : str, tuple, or iterable of them, optional
        Load only a part. A str is a glob (``"encoder/*"``) for the parts of a key,
        joined by ``/``; a tuple is one key. What of `like` was not asked for stays as
        it is.
    device : str or None
        Where new arrays are made: ``"cpu"``, ``"cuda"``, the current device of CUDA, or
        ``"cuda:1"`` by its number. None: where the arrays of `like` are, else the host.
        Arrays on a device are CuPy arrays.
    mmap : bool
        Map arrays, read-only, without reading or verifying them.
    missing : {"error", "keep"}
        What of keys in `like` that the file has not; ``"keep"`` warns, and leaves the
        value of `like`.
    unexpected : {"error", "skip"}
        What of keys in the file that no rank has in `like`; ``"skip"`` warns.
    per_rank : callable, optional
        Called as ``per_rank(rank, saved)``: of the `saved` ranks that saved, the one
        whose `PerRank` values this one takes. Needed where their number differs.
    verify : bool
        Whether to check the CRC-32C of every block that is read; blocks of which only a
        part is wanted are then read whole. Files of others have none.
    timeout : float or None
        How many seconds a rank waits for the others in one step. None: for ever.
    allow_pickle : bool
        **Execute whatever the file says.** Pickles of other programs are then given to
        `pickle.load`, by every rank for itself, and so are files of mpisave with
        objects that only it gives back, once their skeleton was verified. Whoever can
        write the file can run any program as you. Default: refuse such files.

    Returns
    -------
    nested dict, list or tuple
        Without `like`: as it was saved, arrays as NumPy arrays in C order, those of
        ml_dtypes as such. A `PerRank` is a dict by rank without `comm`, and has this
        rank's value with it. With `like`: in its form.

    Raises
    ------
    FileFormatError
        If the file is empty, torn, altered, or nothing that mpisave reads.
    StateDictError
        If `like` and the file do not fit together.
    ArgumentError
        If an argument is not legal, or ranks disagree on it.
    ImportError
        If the file holds arrays of ml_dtypes, and that is not installed. On several
        ranks, a CollectiveError.
    OSError
        If the file system refuses.
    """
    options = _Options(
        *(into, missing, unexpected, mmap, verify, allow_pickle, device),
        *(keys, per_rank, timeout),
    )
    meant = SoloComm() if comm is None else communicator(comm)
    with private_comm(meant, "load", deadline(timeout)) as own:
        return _Load(own, path, options).run(like)


@dataclass(frozen=True, slots=True)
class _Options:
    into: str
    missing: str
    unexpected: str
    mmap: bool
    verify: bool
    allow_pickle: bool
    device: Any
    keys: Any
    per_rank: Any
    timeout: Any

    def check(self) -> tuple[Any, ...]:
        """Refuse what is not legal; return what has to be the same on all ranks."""
        legal = {
            "into": ("new", "inplace"),
            "missing": ("error", "keep"),
            "unexpected": ("error", "skip"),
            "mmap": (False, True),
            "verify": (False, True),
            "allow_pickle": (False, True),
        }
        for name, values in legal.items():
            value = getattr(self, name)
            if type(value) not in (str, bool) or value not in values:
                raise ArgumentError(f"{name} is {value!r}: it is one of {values}")
        if self.per_rank is not None and not callable(self.per_rank):
            raise ArgumentError(f"per_rank is {self.per_rank!r}: it is called")
        parse_timeout(self.timeout)
        if self.mmap and self.into == "inplace":
            raise ArgumentError("mmap=True maps arrays: they cannot be filled in place")
        self.place()
        return tuple((name, getattr(self, name)) for name in legal)

    def place(self) -> Place | None:
        """Return where new arrays are made; None: where those of `like` are."""
        device = self.device
        if device is None:
            return None
        found = isinstance(device, str) and re.fullmatch(
            r"cpu|cuda(:[0-9]{1,4})?", device
        )
        if not found:
            raise ArgumentError(
                f"device is {device!r}: it is 'cpu', 'cuda', 'cuda:1', or None"
            )
        if self.into == "inplace" or (self.mmap and device != "cpu"):
            what = "mmap=True maps" if self.mmap else "into='inplace' fills"
            raise ArgumentError(
                f"device is {device!r}, where new arrays are made: {what} others"
            )
        if device == "cpu":
            return HOST
        number = found[1]
        return Place(device_library(), None if number is None else int(number[1:]))


class _Load(Steps):
    """One call of load on one rank."""

    def __init__(self, own: Comm, path: Any, options: _Options) -> None:
        super().__init__(own)
        self.own = own
        self.path = path
        self.options = options

    def run(self, like: Any) -> Any:
        """Load, all ranks going on together or not at all."""
        own = self.own
        every = self.exchange("check arguments", lambda: self._check(like))
        where = [place for _, place in every]
        self.alike("check arguments", lambda: check_same([o for o, _ in every]))
        with contextlib.ExitStack() as opened:
            # Closed also where it is another rank that cannot open it.
            source, head = open_same(self, own, self.path, opened, index_of)
            # Files of others have no checksums.
            verify = (
                self.options.verify and head is not None and head[1] != index.FOREIGN
            )
            if head is None:
                return self.step("load", lambda: self._foreign(source, like))
            found = self._compare(head, like, source)
            wants = found.wants
            if len({host for host, *_ in where}) > 1:
                common, wants = self._in_common(wants)
                if common:
                    read_shared(own, source, common, verify=verify)
            if own.size > 1 and like is not None:
                wants = read_regrouped(own, source, wants, self._arrays, verify=verify)
            threads = threads_of(where, own.rank, MOST_READERS)

            def read_own() -> tuple[int, int]:
                with naming_file(source.name):
                    read(source, wants, verify=verify, threads=threads)
                    if not verify or self.options.mmap:
                        return 0, 0
                    # Last: pages that hold both payload and skeleton are there now.
                    return read_part(source, self._content, own.rank, own.size)

            parts = self.exchange("read", read_own)
            if verify and not self.options.mmap:
                self.alike("read", lambda: self._check_skeleton(source, parts))
            return found.state()

    def _check_skeleton(self, source: Source, parts: list[tuple[int, int]]) -> None:
        wrong = is_altered(self._content, parts)
        if wrong:
            raise FileFormatError(
                f"{source.name}: {wrong}. Other readers of the file see something else "
                f"than was saved. verify=False loads what the index says."
            )

    def _check(self, like: Any) -> tuple[Any, Any]:
        if self.options.into == "inplace" and like is None:
            raise ArgumentError("into='inplace' needs like= to read into")
        name = None
        if isinstance(self.path, (str, bytes, os.PathLike)):
            name = os.fsdecode(self.path)
        # Ranks with `like` and ranks without take different steps.
        given = (("path", name), ("like given", like is not None))
        return (*self.options.check(), *given), where_this_runs()

    def _foreign(self, source: Source, like: Any) -> Any:
        options = self.options
        with naming_file(source.name):
            is_plain = like is None and options.keys is None and not options.mmap
            if not is_plain or options.place() not in (None, HOST):
                raise FileFormatError(
                    "like=, keys=, device= and mmap= need a file of mpisave: this "
                    "pickle has no index. Load it whole."
                )
            if options.allow_pickle:
                return pkl.load_trusted(source)
            return unpickle(source)

    def _compare(
        self, head: tuple[bytes, str], like: Any, source: Source
    ) -> Match | All:
        """Return what is asked for, and where it goes; refuse what does not fit."""
        made: list[Match | All] = []

        def compare() -> tuple[bytes, bytes, list[Key]]:
            keys = self.options.keys
            self._asked = None if keys is None else Asked(keys)
            with naming_file(source.name):
                if head[1] == index.FOREIGN:
                    content = index.decode_foreign(head[0], source.nbytes)
                else:
                    content = index.decode(*head)
                if self.options.allow_pickle and content.container == "pickle":
                    content = _with_objects(source, content)
                self._content = content
                with garbage.kept():
                    self._order = [node.key for node in content.nodes]
                    self._arrays = content.arrays()
                    nodes = select(content, self._asked)
                    found = self._want(nodes, like, source)
            # What is filled may be in use still, by work that was queued before.
            settle(want.held for want in found.wants)
            made.append(found)
            leaves = {node.key for node in nodes if node.kind == "leaf"}
            return self._bits(leaves), self._bits(found.wanted), found.missing

        every = self.exchange("compare with like", compare)
        if like is not None:
            name = source.name
            judge = functools.partial(self._judge, every, name)
            warnings = self.alike("compare with like", judge)
            if warnings:
                self.step("compare with like", lambda: self._warn(warnings))
        return made[0]

    def _bits(self, keys: set[Key]) -> bytes:
        """Return a bit for each node of the file: whether it is one of `keys`."""
        return np.packbits([key in keys for key in self._order]).tobytes()

    def _want(self, nodes: Sequence[Node], like: Any, source: Source) -> Match | All:
        own, options = self.own, self.options
        make = mapped(source) if options.mmap else None
        rank: int | None = None
        if like is not None or not isinstance(own, SoloComm):
            saved = saved_ranks(nodes)
            if saved and like is not None:
                asked = {n.key for n in flatten(like) if n.kind == "per_rank"}
                saved = {key: ranks for key, ranks in saved.items() if key in asked}
            rank = rank_of(saved, own.rank, own.size, options.per_rank)
        if like is None:
            return All(nodes, rank, make, options.place())
        return Match(
            like,
            nodes,
            rank or 0,
            make,
            in_place=options.into == "inplace",
            place=options.place(),
            asks=self._asks,
        )

    def _asks(self, key: Key) -> bool:
        """Return whether a key is among those that `keys` asks for."""
        return self._asked is None or self._asked.has(key)

    def _judge(
        self, every: Sequence[tuple[bytes, bytes, list[Key]]], name: str
    ) -> list[str]:
        """Refuse, or return warnings of, keys that are on one side only."""
        asked, wanted = (
            np.bitwise_or.reduce([np.frombuffer(bits, np.uint8) for bits in column])
            for column in list(zip(*every, strict=True))[:2]
        )
        lacking: dict[Key, list[int]] = {}
        for rank, (*_, keys) in enumerate(every):
            for key in keys:
                lacking.setdefault(key, []).append(rank)
        left = np.unpackbits(asked & ~wanted, count=len(self._order)).tolist()
        missing = [f"{show_key(k)} ({show_ranks(r)})" for k, r in lacking.items()]
        unexpected = [show_key(key) for key in itertools.compress(self._order, left)]
        refused, warnings = [], []
        for what, allowed, names, where in (
            ("missing", "keep", missing, "in like, but not in the file"),
            ("unexpected", "skip", unexpected, "in the file, but in no rank's like"),
        ):
            if names:
                many = len(names)
                more = f" and {many - 20} more" if many > 20 else ""
                text = f"{many} key(s) are {where}: {', '.join(names[:20])}{more}"
                if getattr(self.options, what) == allowed:
                    warnings.append(f"{name}: {text}")
                else:
                    refused.append(f"{text}. {what}={allowed!r} goes on without them.")
        if refused:
            raise StateDictError("\n  ".join([f"{name}: {refused[0]}", *refused[1:]]))
        return warnings

    def _warn(self, texts: Sequence[str]) -> None:
        for text in texts if self.own.rank == 0 else ():
            warn_caller(text)

    def _in_common(self, wants: Sequence[Want]) -> tuple[list[Want], list[Want]]:
        """Return what all ranks want whole, and the rest of what this one wants."""
        # They are checked when all have come: not those of which others are seen then.
        lonely = set(map(id, alone(want.held for want in wants)))
        whole = {
            want.stored.key: want
            for want in wants
            if is_whole(want) and want.held.library is None and id(want.held) in lonely
        }
        every = self.exchange("find what all ranks want", lambda: self._bits({*whole}))
        bits = np.bitwise_and.reduce([np.frombuffer(b, np.uint8) for b in every])
        by_all = np.unpackbits(bits, count=len(self._order)).tolist()
        common = [whole[key] for key in itertools.compress(self._order, by_all)]
        taken = {id(want) for want in common}
        return common, [want for want in wants if id(want) not in taken]


def _with_objects(source: Source, content: index.Index) -> index.Index:
    """Return what a file holds, with the objects that `pickle.load` has to make."""
    if not any(isinstance(node.value, index.Opaque) for node in content.nodes):
        return content
    wrong = is_altered(content, [read_part(source, content, 0, 1)])
    if wrong:
        raise FileFormatError(f"{wrong}. It was not executed.")
    return pkl.with_objects(source, content)
