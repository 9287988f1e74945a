"""Communicators: that of a single process, and mpisave's own duplicate of the caller's.

Every message is waited for with a deadline, see `deadlines`: all collectives are
nonblocking ones, started in the same order on all ranks.
"""

from __future__ import annotations

import pickle
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mpisave.deadlines import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
_Bytes = npt.NDArray[np.uint8]

# What goes ahead of an object: its length, and all of it if it is as short.
_LENGTH_NBYTES = 8
_SHORT_NBYTES = 56
_HEAD_NBYTES = _LENGTH_NBYTES + _SHORT_NBYTES

# What one collective moves at most: before MPI-4, displacements are C ints.
_ROUND_NBYTES = 2**30


class Comm(Protocol):
    """What mpisave needs of a communicator."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def raw(self) -> Any:
        """The communicator of mpi4py behind this, for payload."""
        ...

    @property
    def kept(self) -> dict[str, Any]:
        """What lasts as long as the communicator."""
        ...

    @property
    def sent_nbytes(self) -> int:
        """Bytes of small messages that this rank has sent."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the ranks are out of step for good."""
        ...

    @property
    def where(self) -> str:
        """What was called, and the step of it."""
        ...

    def enter(self, step: str) -> None:
        """Say what this rank is doing."""
        ...

    def hear(self) -> None:
        """Raise if other ranks have given up, or left."""
        ...

    def told(self, exc: BaseException) -> None:
        """Note that all ranks know of an error that this one is about to raise."""
        ...

    def in_step(self) -> AbstractContextManager[None]:
        """Give a context that no rank may leave by an error without telling others."""
        ...

    def wait(self, request: Any) -> None:
        """Wait for a request of `raw`, until the deadline."""
        ...

    def part(self, colors: tuple[int, ...], /) -> Comm:
        """Return the communicator of the ranks of this rank's color. Collective."""
        ...

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return the objects of all ranks."""
        ...

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the root's object."""
        ...

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks, on the root."""
        ...

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """Return this rank's of the objects that the root has."""
        ...


class SoloComm:
    """The communicator of a process without MPI: rank 0 of 1."""

    rank = 0
    size = 1
    sent_nbytes = 0
    is_over = False

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    @property
    def raw(self) -> SoloComm:
        """Itself: nothing lies behind it."""
        return self

    where = ""

    def enter(self, _step: str) -> None:
        """Do nothing: nobody waits."""

    def hear(self) -> None:
        """Do nothing: nobody can have given up."""

    def told(self, _exc: BaseException) -> None:
        """Do nothing: nobody is to be told."""

    def in_step(self) -> AbstractContextManager[None]:
        """Do nothing: there is nobody to tell."""
        return nullcontext()

    def wait(self, _request: Any) -> None:
        """Do nothing: there is nobody to wait for."""

    def part(self, _colors: tuple[int, ...]) -> SoloComm:
        """Return itself: there is nobody to part from."""
        return self

    def allgather(self, sendobj: T) -> list[T]:
        """Return the one value there is."""
        return [sendobj]

    def bcast(self, obj: T, root: int = 0) -> T:  # noqa: ARG002
        """Return the one value there is."""
        return obj

    def gather(self, sendobj: T, root: int = 0) -> list[T]:  # noqa: ARG002
        """Return the one value there is."""
        return [sendobj]

    def scatter(self, sendobj: Sequence[T] | None, root: int = 0) -> T:  # noqa: ARG002
        """Return the one value there is."""
        if sendobj is None:
            raise TypeError("a single process scatters to itself")
        return sendobj[0]


class PrivateComm:
    """A communicator of mpi4py that only mpisave uses, for small messages.

    Attributes
    ----------
    raw : mpi4py.MPI.Intracomm
        For payload.
    watch : Watch
        Deadline and step, which all parts of a communicator share.
    sent_nbytes : int
        Bytes of small messages that this rank has sent.
    kept : dict of str to object
        What lasts as long as the communicator.
    """

    def __init__(self, raw: Any, watch: Watch) -> None:
        self.raw = raw
        self.watch = watch
        self.rank: int = raw.rank
        self.size: int = raw.size
        self.sent_nbytes = 0
        self.kept: dict[str, Any] = {}
        self._parts: dict[tuple[int, ...], PrivateComm | SoloComm] = {}

    @property
    def is_over(self) -> bool:
        """Whether the ranks are out of step for good."""
        return self.watch.is_over

    def enter(self, step: str) -> None:
        """Say what this rank is doing, for those who wait for it in vain."""
        self.watch.enter(step)

    @property
    def where(self) -> str:
        """What was called, and the step of it."""
        return self.watch.where

    def hear(self) -> None:
        """Look whether other ranks have given up, or left.

        Raises
        ------
        CollectiveTimeout, CollectiveError
            If so.
        """
        self.watch.hear()

    def told(self, exc: BaseException) -> None:
        """Note that all ranks know of an error that this one is about to raise."""
        self.watch.told(exc)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Give a context that no rank may leave by an error without telling others.

        Raises
        ------
        CollectiveError
            For an error that is none of those.
        """
        try:
            yield
        except BaseException as exc:  # noqa: BLE001 - leave raises it
            self.watch.leave(exc)

    def wait(self, request: Any) -> None:
        """Wait for a request of `raw`.

        Raises
        ------
        CollectiveTimeout
            At the deadline, and when others have reached theirs.
        """
        self.watch.wait(request)

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return the objects of all ranks."""
        data = self._dump(sendobj)
        heads, lengths = self._exchange_heads(data)

        def start(part: _Bytes, received: list[Any]) -> Any:
            return self.raw.Iallgatherv(_bytes(part), received)

        parts = self._collect(data, heads, lengths, start)
        # Pickles that ranks of this job just made; so are all others here.
        return [pickle.loads(part.data) for part in parts]

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks, on the root."""
        data = self._dump(sendobj)
        heads, lengths = self._exchange_heads(data)
        is_root = self.rank == root

        def start(part: _Bytes, received: list[Any]) -> Any:
            return self.raw.Igatherv(
                _bytes(part), received if is_root else None, root=root
            )

        parts = self._collect(data, heads, lengths, start)
        return [pickle.loads(part.data) for part in parts] if is_root else None

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the root's object."""
        data = self._dump(obj) if self.rank == root else np.empty(0, np.uint8)
        head = _head(data)
        self.wait(self.raw.Ibcast(_bytes(head), root=root))
        length = _length(head)
        if self.rank != root:
            data = np.empty(length, np.uint8)
            data[:_SHORT_NBYTES] = head[_LENGTH_NBYTES:][:length]
        if length > _SHORT_NBYTES:
            for first in range(0, length, _ROUND_NBYTES):
                part = data[first : first + _ROUND_NBYTES]
                self.wait(self.raw.Ibcast(_bytes(part), root=root))
        return obj if self.rank == root else pickle.loads(data.data)

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """Return this rank's of the objects that the root has."""
        lengths = np.zeros(self.size, np.int64)
        parts: list[_Bytes] = []
        if sendobj is not None:
            parts = [self._dump(obj) for obj in sendobj]
            lengths[:] = [part.size for part in parts]
        self.wait(self.raw.Ibcast(_bytes(lengths.view(np.uint8)), root=root))
        data = np.empty(int(lengths[self.rank]), np.uint8)
        for first, counts, displs in self._rounds(lengths):
            mine = data[first : first + int(counts[self.rank])]
            sent: list[Any] | None = None
            if self.rank == root:
                cut = [p[first : first + n] for p, n in zip(parts, counts, strict=True)]
                sent = [np.concatenate(cut), counts, displs, _byte()]
            self.wait(self.raw.Iscatterv(sent, _bytes(mine), root=root))
        return pickle.loads(data.data)

    def _dump(self, obj: Any) -> _Bytes:
        data = np.frombuffer(pickle.dumps(obj), np.uint8)
        self.sent_nbytes += data.size
        return data

    def _exchange_heads(self, data: _Bytes) -> tuple[_Bytes, npt.NDArray[np.int64]]:
        """Return the head of each rank's object, and how long these are."""
        heads = np.empty((self.size, _HEAD_NBYTES), np.uint8)
        self.wait(self.raw.Iallgather(_bytes(_head(data)), _bytes(heads)))
        return heads, np.array([_length(head) for head in heads], np.int64)

    def _collect(
        self, data: _Bytes, heads: _Bytes, lengths: npt.NDArray[np.int64], start: Any
    ) -> list[_Bytes]:
        """Return the objects of all ranks, from their heads if all are as short."""
        if lengths.max() <= _SHORT_NBYTES:
            return [
                head[_LENGTH_NBYTES:][:n]
                for head, n in zip(heads, lengths, strict=True)
            ]
        found: list[list[_Bytes]] = [[] for _ in lengths]
        for first, counts, displs in self._rounds(lengths):
            received = np.empty(sum(counts), np.uint8)
            mine = data[first : first + counts[self.rank]]
            self.wait(start(mine, [received, counts, displs, _byte()]))
            for parts, at, n in zip(found, displs, counts, strict=True):
                parts.append(received[at : at + n])
        return [p[0] if len(p) == 1 else np.concatenate(p) for p in found]

    def _rounds(
        self, lengths: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yield first byte, counts and displacements of each collective."""
        most = max(1, _ROUND_NBYTES // self.size)
        for first in range(0, int(lengths.max()), most):
            counts = np.clip(lengths - first, 0, most)
            displs = np.cumsum(counts) - counts
            yield first, counts.tolist(), displs.tolist()

    def part(self, colors: tuple[int, ...]) -> PrivateComm | SoloComm:
        """Return the communicator of the ranks of this rank's color. Collective.

        Parameters
        ----------
        colors : tuple of int
            That of every rank. The ranks of the same split share one for good.
        """
        mine = colors[self.rank]
        if len(set(colors)) == 1:
            return self
        if colors not in self._parts:
            part: PrivateComm | SoloComm = SoloComm()
            if len(set(colors)) < self.size:
                # All are here when it begins; then a rank can only stop or die in it.
                self.wait(self.raw.Ibarrier())
                split = _InThread(lambda: self.raw.Split(mine, self.rank))
                self.wait(split)
                part = PrivateComm(split.result, self.watch)
            self._parts[colors] = part
        return self._parts[colors]

    def free(self) -> None:
        """Free the communicator, and what was split from it."""
        if self.is_over:
            return  # requests are under way on it, for good
        for part in self._parts.values():
            if isinstance(part, PrivateComm):
                part.free()
        self.raw.Free()


class _InThread:
    """A call of MPI that has no nonblocking kind: to be waited for as requests are.

    A thread of its own makes it, where MPI allows threads to call it at the same time;
    elsewhere this one does, and waits for as long as it takes. A thread whose call was
    given up stays in it; the end of the process does not wait for it for more than a
    minute, see `deadlines`.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        from mpi4py import MPI

        self.result: Any = None
        self._call = call
        self._failed: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name="mpisave MPI call", daemon=True
        )
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as exc:  # noqa: BLE001 - Test raises it
            self._failed = exc

    def Test(self) -> bool:  # noqa: N802 - as mpi4py's requests have it
        """Return whether it is done; raise what it has raised."""
        if self._thread.is_alive():
            return False
        if self._failed is not None:
            raise self._failed
        return True


def _bytes(data: npt.NDArray[Any]) -> list[Any]:
    # Without a count, which would be one for each rank.
    return [data, _byte()]


def _byte() -> Any:
    from mpi4py import MPI

    return MPI.BYTE


def _head(data: _Bytes) -> _Bytes:
    head = np.zeros(_HEAD_NBYTES, np.uint8)
    head[:_LENGTH_NBYTES] = np.array([data.size], np.int64).view(np.uint8)
    short = data[:_SHORT_NBYTES]
    head[_LENGTH_NBYTES : _LENGTH_NBYTES + short.size] = short
    return head


def _length(head: _Bytes) -> int:
    return int(head[:_LENGTH_NBYTES].view(np.int64)[0])


@contextmanager
def private_comm(
    comm: Any, call: str, timeout_s: float | None
) -> Iterator[PrivateComm | SoloComm]:
    """Give a duplicate of `comm` that only mpisave uses. Collective at first use.

    The duplicate is kept with the caller's communicator and freed with it, so that
    saving often does not use up context ids.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or SoloComm
        The caller's.
    call : str
        What was called, for messages.
    timeout_s : float or None
        How many seconds a rank waits for others; None: for ever.

    Raises
    ------
    CollectiveTimeout
        If other ranks do not come, or an earlier call has given them up.
    """
    if isinstance(comm, SoloComm):
        yield comm
        return
    keyval = _keyval()
    own = comm.Get_attr(keyval)
    if own is None:
        with _first_use(comm):
            own = comm.Get_attr(keyval)
            if own is None:  # no other thread was first
                own = _duplicate(comm, call, timeout_s)
                comm.Set_attr(keyval, own)
    with own.watch.calling(call, timeout_s):
        yield own


# Of each communicator that is being duplicated.
_FIRST: dict[int, threading.RLock] = {}


@contextmanager
def _first_use(comm: Any) -> Iterator[None]:
    """Keep other threads from the first use of a communicator meanwhile.

    Not from that of others: which of several comes first may differ between ranks. A
    handler of signals, in this thread, is not kept from it.
    """
    handle = comm.handle
    with _FIRST.setdefault(handle, threading.RLock()):
        try:
            yield
        finally:
            _FIRST.pop(handle, None)


def _duplicate(comm: Any, call: str, timeout_s: float | None) -> PrivateComm:
    # Until there is one, it is the caller's communicator on which ranks are missed.
    watch = Watch(comm)
    with watch.calling(call, timeout_s):
        raw, request = comm.Idup()
        watch.wait(request)
    watch = Watch(raw)
    own = PrivateComm(raw, watch)
    with watch.calling(call, timeout_s):
        watch.hosts = own.allgather(watch.host)
    return own


_KEYVAL: list[int] = []


def _keyval() -> int:
    """Return the key of the attribute under which duplicates are kept."""
    if not _KEYVAL:
        from mpi4py import MPI

        def free(_comm: object, _keyval: int, own: PrivateComm) -> None:
            own.free()

        _KEYVAL.append(MPI.Comm.Create_keyval(delete_fn=free))
    return _KEYVAL[0]
