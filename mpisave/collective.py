"""All ranks go on, or none does: agreement on what came of a step.

A step runs an action on every rank and then exchanges what came of it. When it failed
anywhere, it raises everywhere, with the ranks and hosts on which it failed: nobody goes
on to wait for a rank that has given up. Actions must not communicate, but for those of
`together`, which keep all ranks in step by themselves.
"""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mpisave.comms import SoloComm
from mpisave.errors import CollectiveError, Failure, collective_class, show_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpisave.comms import Comm

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

# Set by `testing`: called with the name of a step when this rank begins it.
before_action: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of an action on one rank, ready to travel.

    Results are pickled within the step, so that one that does not pickle is a failure
    like any other; exceptions, which may not pickle, travel as text.
    """

    result: bytes = b""
    where: str = ""  # what this rank has called
    error: type[CollectiveError] | None = None
    failure: Failure | None = None


def _announced(step: str, action: Callable[[], T]) -> Callable[[], T]:
    """Return an action before which `testing` may have something happen."""

    def announced() -> T:
        if before_action is not None:
            before_action(step)
        return action()

    return announced


def _run(
    comm: Comm, step: str, action: Callable[[], T], *, travels: bool
) -> tuple[_Outcome, T | None, BaseException | None]:
    """Run an action; return what to tell the others, its result, what it raised."""
    comm.enter(step)
    try:
        result = action()
        data = pickle.dumps(result) if travels else b""
        return _Outcome(data, comm.where), result, None
    except BaseException as exc:
        if comm.is_over:  # all have heard of it, and nobody listens any more
            raise
        try:
            text = str(exc)
        except Exception:  # noqa: BLE001 - of a class that is broken itself
            text = "(its text cannot be had)"
        number = exc.errno if isinstance(exc, OSError) else None
        kind = type(exc).__name__
        failure = Failure(comm.rank, socket.gethostname(), kind, text, number)
        return _Outcome(error=collective_class(exc), failure=failure), None, exc


def _raise_failed(
    comm: Comm,
    step: str,
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
    if comm.size == 1:
        message = f"{step}: {first.message}"
    elif len(texts) == 1 and len(failures) == comm.size:
        message = f"{step} failed alike on all {comm.size} ranks: {first.message}"
    else:
        lines = "".join(f"\n  {f}" for f in failures.values())
        message = f"{step} failed on {len(failures)} rank(s):{lines}"
    if exc is not None and not isinstance(exc, Exception):
        comm.told(exc)
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
    outcome, _, exc = _run(comm, step, _announced(step, action), travels=True)
    outcomes = comm.allgather(outcome)
    _check_same_call(step, outcomes)
    if any(o.failure for o in outcomes):
        _raise_failed(comm, step, outcomes, exc)
    # Pickles that ranks of this job just made.
    return [pickle.loads(o.result) for o in outcomes]


def _check_same_call(step: str, outcomes: Sequence[Any]) -> None:
    """Refuse to go on with ranks that have called something else."""
    places: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if type(outcome) is not _Outcome or not outcome.failure:
            where = getattr(outcome, "where", "another step")
            places.setdefault(where, []).append(rank)
    if len(places) > 1:
        every = "; ".join(f"{show_ranks(r)} in {where}" for where, r in places.items())
        raise CollectiveError(
            f"ranks have called different things: {every}. All ranks of comm have to "
            f"make the same calls, in the same order.",
            step=step,
        )


def on_all_ranks(comm: Comm, step: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; return its result here. Collective.

    As `exchange`, but results stay where they are.
    """
    return _agree(comm, step, _announced(step, action))


def _agree(comm: Comm, step: str, action: Callable[[], T]) -> T:
    outcome, result, exc = _run(comm, step, action, travels=False)
    outcomes = comm.allgather(outcome if exc else None)
    if any(outcomes):
        failed = [o for o in outcomes if o and o.failure]
        if not failed:  # a result, to one who expects none
            other = next(o for o in outcomes if o)
            raise CollectiveError(
                f"other ranks have called something else: {other.where}", step=step
            )
        _raise_failed(comm, step, failed, exc)
    return result  # type: ignore[return-value]


def together(
    comm: Comm,
    step: str,
    move: Callable[[], BaseException | None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run an action in which ranks wait for one another. Collective.

    Parameters
    ----------
    comm : Comm
        All of its ranks begin, or none does.
    step : str
        What the error says has failed.
    move : callable
        Keeps pace with the other ranks to the end, and returns what failed meanwhile.
        What it raises is the end of the communicator: other ranks hear of it at once.
    after : callable
        What each rank does next by itself, where nothing has failed.

    Raises
    ------
    CollectiveError
        On every rank, if `move` or `after` failed on any.
    """
    on_all_ranks(comm, step, lambda: None)
    with comm.in_step():
        failed = move()

    def tell() -> None:
        if failed is not None:
            raise failed
        after()

    _agree(comm, step, tell)


class Steps:
    """The steps of a call that one process may make alone.

    Alone, what is raised is raised as it is; with others it is agreed on.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._is_alone = isinstance(comm, SoloComm)

    def step(self, name: str, action: Callable[[], T]) -> T:
        """Run a step of this rank; go on when all ranks do."""
        if self._is_alone:
            return _announced(name, action)()
        return on_all_ranks(self._comm, name, action)

    def alike(self, name: str, action: Callable[[], T]) -> T:
        """Run what gives the same on every rank."""
        return action() if self._is_alone else alike(self._comm, name, action)

    def exchange(self, name: str, action: Callable[[], T]) -> list[T]:
        """Run a step, and return what each rank made of it."""
        if self._is_alone:
            return [_announced(name, action)()]
        return exchange(self._comm, name, action)


def alike(comm: Comm, step: str, action: Callable[[], T]) -> T:
    """Run what gives the same on every rank; nothing has to be said. Independent.

    `action` is pure, and works on what all ranks have.

    Raises
    ------
    CollectiveError
        On every rank, if `action` raised; of the subclass that was raised.
    """
    outcome, result, exc = _run(comm, step, action, travels=False)
    if isinstance(exc, MemoryError) or (exc and not isinstance(exc, Exception)):
        raise exc  # of this rank alone
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
    combine: Callable[[list[T]], tuple[Sequence[U], V]],
    *,
    root: int,
) -> tuple[U, V]:
    """Run `action` on every rank, `combine` on one, and hand each its part. Collective.

    Parameters
    ----------
    comm : Comm
        Three collectives: a gather, a scatter, a broadcast.
    step : str
        What the error says has failed.
    action : callable
        What each rank contributes.
    combine : callable
        Called on `root` with the contributions in rank order; returns one part a rank,
        and what all of them get.
    root : int
        The coordinator.

    Raises
    ------
    CollectiveError
        On every rank, if `action` raised on any, or `combine` on the coordinator.
    """
    outcome, _, exc = _run(comm, step, _announced(step, action), travels=True)
    outcomes = comm.gather(outcome, root=root)
    answers: list[tuple[bytes, list[_Outcome]]] | None = None
    own: list[U] = []
    common = b""

    def prepare(sent: list[_Outcome]) -> tuple[list[bytes], U, bytes]:
        parts, of_all = combine([pickle.loads(o.result) for o in sent])
        # The coordinator's own part, often the largest, stays.
        data = [b"" if r == root else pickle.dumps(p) for r, p in enumerate(parts)]
        return data, parts[root], pickle.dumps(of_all)

    if outcomes is not None:
        failed = [o for o in outcomes if o.failure]
        if not failed:
            merged, made, exc = _run(
                comm, step, lambda: prepare(outcomes), travels=False
            )
            failed = [merged] if merged.failure else []
            if made is not None:
                data, mine, common = made
                own.append(mine)
                answers = [(part, failed) for part in data]
        if failed:
            answers = [(b"", failed)] * comm.size
    part, failed = comm.scatter(answers, root=root)
    if failed:
        _raise_failed(comm, step, failed, exc)
    common = comm.bcast(common, root=root)
    # Last: a rank that has no memory for these is not waited for in vain.
    return (own[0] if own else pickle.loads(part)), pickle.loads(common)
