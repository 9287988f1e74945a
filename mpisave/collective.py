"""All ranks go on, or none does: private communicator and agreement.

A step runs an action on every rank and then exchanges what came of it. When it failed
anywhere, it raises everywhere, with the ranks and hosts on which it failed: nobody goes
on to wait for a rank that has given up. Actions must not communicate, but for the
moving of payload, which keeps all ranks in step by itself.
"""

from __future__ import annotations

import pickle
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from mpisave.errors import CollectiveError, Failure, LaunchError, collective_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

T = TypeVar("T")
U = TypeVar("U")


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

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    @property
    def raw(self) -> SoloComm:
        """Itself: nothing lies behind it."""
        return self

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


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of an action on one rank, ready to travel.

    Results are pickled within the step, so that one that does not pickle is a failure
    like any other; exceptions, which may not pickle, travel as text.
    """

    result: bytes = b""
    error: type[CollectiveError] | None = None
    failure: Failure | None = None


def _run(
    comm: Comm, action: Callable[[], T], *, travels: bool
) -> tuple[_Outcome, T | None, BaseException | None]:
    """Run an action; return what to tell the others, its result, what it raised."""
    try:
        result = action()
        return _Outcome(pickle.dumps(result) if travels else b""), result, None
    except BaseException as exc:  # noqa: BLE001 - whatever it is, all must hear of it
        try:
            text = str(exc)
        except Exception:  # noqa: BLE001 - of a class that is broken itself
            text = "(its text cannot be had)"
        number = exc.errno if isinstance(exc, OSError) else None
        kind = type(exc).__name__
        failure = Failure(comm.rank, socket.gethostname(), kind, text, number)
        return _Outcome(error=collective_class(exc), failure=failure), None, exc


def _raise_failed(
    step: str,
    size: int,
    outcomes: Sequence[_Outcome],
    exc: BaseException | None,
) -> NoReturn:
    """Raise the one error that stands for all failures of a step."""
    failed = [o for o in outcomes if o.failure]
    failures = {o.failure.rank: o.failure for o in failed if o.failure}
    texts = {f.message for f in failures.values()}
    # Errors of different kinds in one step: the kind that promises least.
    kinds = {o.error for o in failed if o.error}
    kind = kinds.pop() if len(kinds) == 1 else CollectiveError
    first = next(iter(failures.values()))
    if size == 1:
        message = f"{step}: {first.message}"
    elif len(texts) == 1 and len(failures) == size:
        message = f"{step} failed alike on all {size} ranks: {first.message}"
    else:
        lines = "".join(f"\n  {f}" for f in failures.values())
        message = f"{step} failed on {len(failures)} rank(s):{lines}"
    if exc is not None and not isinstance(exc, Exception):
        raise exc  # KeyboardInterrupt, SystemExit: here it stays what it is
    error = kind(message, step=step, failures=failures)
    if isinstance(error, OSError):
        error.errno = first.errno
    raise error from exc


def exchange(comm: Comm, step: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results, in rank order. Collective.

    Raises
    ------
    CollectiveError
        On every rank, if `action` raised on any; of the subclass that was raised.
    """
    outcome, _, exc = _run(comm, action, travels=True)
    outcomes = comm.allgather(outcome)
    if any(o.failure for o in outcomes):
        _raise_failed(step, comm.size, outcomes, exc)
    # Pickles that ranks of this job just made.
    return [pickle.loads(o.result) for o in outcomes]


def on_all_ranks(comm: Comm, step: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; return its result here. Collective.

    As `exchange`, but results stay where they are.
    """
    outcome, result, exc = _run(comm, action, travels=False)
    outcomes = comm.allgather(outcome if exc else None)
    if any(outcomes):
        _raise_failed(step, comm.size, [o for o in outcomes if o], exc)
    return result  # type: ignore[return-value]


def alike(comm: Comm, step: str, action: Callable[[], T]) -> T:
    """Run what gives the same on every rank; nothing has to be said. Independent.

    `action` is pure, and works on what all ranks have.

    Raises
    ------
    CollectiveError
        On every rank, if `action` raised; of the subclass that was raised.
    """
    outcome, result, exc = _run(comm, action, travels=False)
    if outcome.failure:
        error = outcome.error or CollectiveError
        failures = {comm.rank: outcome.failure}
        message = f"{step}: {outcome.failure.message}"
        raise error(message, step=step, failures=failures) from exc
    return result  # type: ignore[return-value]


def through_coordinator(
    comm: Comm,
    step: str,
    action: Callable[[], T],
    combine: Callable[[list[T]], Sequence[U]],
    *,
    root: int,
) -> U:
    """Run `action` on every rank, `combine` on one, and hand each its part. Collective.

    Parameters
    ----------
    comm : Comm
        Two collectives: one gather, one scatter.
    step : str
        What the error says has failed.
    action : callable
        What each rank contributes.
    combine : callable
        Called on `root` with the contributions in rank order; returns one part a rank.
    root : int
        The coordinator.

    Raises
    ------
    CollectiveError
        On every rank, if `action` raised on any, or `combine` on the coordinator.
    """
    outcome, _, exc = _run(comm, action, travels=True)
    outcomes = comm.gather(outcome, root=root)
    answers: list[tuple[bytes | None, list[_Outcome]]] | None = None
    own: U | None = None
    if outcomes is not None:
        failed = [o for o in outcomes if o.failure]
        if not failed:
            merged, parts, exc = _run(
                comm,
                lambda: [
                    # The coordinator's own part, often the largest, stays.
                    (None, part) if rank == root else (pickle.dumps(part), None)
                    for rank, part in enumerate(
                        combine([pickle.loads(o.result) for o in outcomes])
                    )
                ],
                travels=False,
            )
            failed = [merged] if merged.failure else []
            if parts is not None:
                own = parts[root][1]
            answers = [(part, failed) for part, _ in parts or ()]
        if failed:
            answers = [(None, failed)] * comm.size
    part, failed = comm.scatter(answers, root=root)
    if failed:
        _raise_failed(step, comm.size, failed, exc)
    return own if part is None else pickle.loads(part)  # type: ignore[return-value]


class PrivateComm:
    """A communicator of mpi4py that only mpisave uses, for small messages.

    Attributes
    ----------
    raw : mpi4py.MPI.Intracomm
        For payload.
    sent_nbytes : int
        Bytes of small messages that this rank has sent.
    kept : dict of str to object
        What lasts as long as the communicator.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.rank: int = raw.rank
        self.size: int = raw.size
        self.sent_nbytes = 0
        self.kept: dict[str, Any] = {}
        self._parts: dict[tuple[int, ...], PrivateComm | SoloComm] = {}

    def _dump(self, obj: Any) -> bytes:
        data = pickle.dumps(obj)
        self.sent_nbytes += len(data)
        return data

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return the objects of all ranks."""
        # Pickles that ranks of this job just made; so are all others here.
        return [pickle.loads(data) for data in self.raw.allgather(self._dump(sendobj))]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the root's object."""
        data = self._dump(obj) if self.rank == root else None
        data = self.raw.bcast(data, root=root)
        return obj if self.rank == root else pickle.loads(data)

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks, on the root."""
        every = self.raw.gather(self._dump(sendobj), root=root)
        return None if every is None else [pickle.loads(data) for data in every]

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """Return this rank's of the objects that the root has."""
        parts = None if sendobj is None else [self._dump(obj) for obj in sendobj]
        return pickle.loads(self.raw.scatter(parts, root=root))

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
            is_apart = len(set(colors)) == self.size
            self._parts[colors] = (
                SoloComm() if is_apart else PrivateComm(self.raw.Split(mine, self.rank))
            )
        return self._parts[colors]

    def free(self) -> None:
        """Free the communicator, and what was split from it."""
        for part in self._parts.values():
            if isinstance(part, PrivateComm):
                part.free()
        self.raw.Free()


@contextmanager
def private_comm(comm: Any) -> Iterator[PrivateComm | SoloComm]:
    """Give a duplicate of `comm` that only mpisave uses. Collective at first use.

    The duplicate is kept with the caller's communicator and freed with it, so that
    saving often does not use up context ids.
    """
    if isinstance(comm, SoloComm):
        yield comm
        return
    keyval = _keyval()
    own = comm.Get_attr(keyval)
    if own is None:
        own = PrivateComm(comm.Dup())
        comm.Set_attr(keyval, own)
    yield own


_KEYVAL: list[int] = []


def _keyval() -> int:
    """Return the key of the attribute under which duplicates are kept."""
    if not _KEYVAL:
        from mpi4py import MPI

        def free(_comm: object, _keyval: int, own: PrivateComm) -> None:
            own.free()

        _KEYVAL.append(MPI.Comm.Create_keyval(delete_fn=free))
    return _KEYVAL[0]


# Set for each rank by PMIx, PMI, Flux, HPE's PALS, IBM's jsrun: MPI knows the rest.
_RANK = ("PMIX_RANK", "PMI_RANK", "FLUX_TASK_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK")
# Set by the launchers of Open MPI, of MPICH and Slurm's PMI, of MVAPICH.
_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_tasks(environ: Mapping[str, str]) -> tuple[int, str]:
    """Return how many processes a launcher started beside this one, and who says so.

    An ``srun`` task has SLURM_PROCID and SLURM_NTASKS. So has the shell of a batch
    script, in which a single process is no mistake: it has no SLURM_STEP_ID.
    """
    for name in _WORLD_SIZE:
        if environ.get(name, "").isdigit():
            return int(environ[name]), name
    in_step = "SLURM_STEP_ID" in environ or (
        "SLURM_PROCID" in environ and environ.get("ENVIRONMENT") != "BATCH"
    )
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if in_step and environ.get(name, "").isdigit():
            return int(environ[name]), name
    return 1, ""


def is_under_mpi(environ: Mapping[str, str]) -> bool:
    """Return whether this process is one of an MPI job, without starting MPI."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        return True
    return launched_tasks(environ)[0] > 1 or any(n in environ for n in _RANK)


def check_launch(world_size: int, environ: Mapping[str, str]) -> None:
    """Refuse to save from processes that should be ranks of one job and are not.

    Raises
    ------
    LaunchError
        If a launcher started several processes, and MPI says that this one is alone:
        each would write over the files of the others.
    """
    tasks, source = launched_tasks(environ)
    if world_size == 1 and tasks > 1:
        raise LaunchError(
            f"the launcher started {tasks} processes ({source}={tasks}), but MPI says "
            f"that this one is alone (size 1): {tasks} processes would write over one "
            f"another. Under Slurm, give srun the --mpi that fits the MPI library: "
            f"--mpi=pmi2 for MPICH, --mpi=pmix for Open MPI ('srun --mpi=list' shows "
            f"what there is); with mpirun, take the one that belongs to mpi4py's MPI "
            f"library; without mpi4py, install it. If each process is meant to save "
            f"alone, pass comm=MPI.COMM_SELF."
        )
