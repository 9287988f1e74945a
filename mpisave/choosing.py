"""Whether device arrays travel by the memory of the device or of the host.

What the MPI library says, a trial in a process alone, and a little that all ranks
gather, in this order: each could end what comes after it. All ranks decide alike.
"""

from __future__ import annotations

import logging
import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mpisave.collective import exchange, on_all_ranks, together
from mpisave.cuda_aware import TRIAL_S, Answer, Trial, ask, trial
from mpisave.errors import ArgumentError, CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpisave.comms import Comm

_log = logging.getLogger(__name__)

T = TypeVar("T")

_Bytes = npt.NDArray[np.uint8]

STEP = "choose the transport"

# The least of the ranks counts.
_RANKING = {False: 0, None: 1, True: 2}

# Of each rank, in a gather each: short and long messages travel in different ways, on
# one host by CUDA's interprocess memory. The root receives no more than the last.
_PROOF_NBYTES = (4096, 2**18)
_PROOF_MOST_NBYTES = 2**26
# Ranks that gather, of as many: of thousands the first tell.
_PROOF_ROOTS = 16

_ELSE = (
    "'python -m mpisave.bench env' shows what is there; transport='host' goes on "
    "without."
)
_INSTALL = (
    "Take an MPI library that is built with CUDA: Open MPI over UCX, both with CUDA; "
    f"on a Cray, MPICH with its GTL library and MPICH_GPU_SUPPORT_ENABLED=1. {_ELSE}"
)
_REPAIR = (
    "The library says that it can, so a part of it may be missing: with UCX, set "
    "UCX_MEMTYPE_CACHE=n, or see to it that libcudart is found (LD_LIBRARY_PATH). "
    f"{_ELSE}"
)
_VISIBLE = (
    "Where it is right in a process alone, ranks may not see one another's devices: "
    f"with Slurm, try --gpu-bind=none. {_ELSE}"
)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the device of this rank, such as MPI is to be given.

    Attributes
    ----------
    buffer : callable
        Takes a number of bytes, and returns as much memory, which mpi4py takes.
    copy : callable
        Takes source and target, each such memory or an array of bytes of the host; has
        copied when it returns.
    current : callable
        Returns a context in which this device is the current one.
    ordinal : int or None
        Which device, as CUDA counts. None: the one that this thread uses.
    """

    buffer: Callable[[int], Any]
    copy: Callable[[Any, Any], None]
    current: Callable[[], AbstractContextManager[Any]] = nullcontext
    ordinal: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """How payload of devices travels, and why."""

    transport: str  # "device" or "host"
    how: str


def choose(
    own: Comm,
    wanted: str,
    memory: DeviceMemory | None,
    *,
    roots: Sequence[int] = (0,),
    timeout_s: float | None = None,
) -> Choice:
    """Choose whether MPI is given device memory. Collective.

    Asked and tried once for each communicator and `wanted`, and proven for each set of
    roots; again when ranks hold device arrays that held none then.

    Parameters
    ----------
    own : Comm
        All ranks of the call.
    wanted : {"auto", "device", "host"}
        The same on all ranks.
    memory : DeviceMemory or None
        None on a rank that holds no device arrays.
    roots : sequence of int
        Ranks that gather: the same on all.
    timeout_s : float or None
        How long a rank waits for others; a trial takes half of it at most.

    Raises
    ------
    ArgumentError
        On every rank, if `wanted` is ``"device"`` and that does not work on some.
    """
    if wanted == "host":
        return Choice("host", "transport='host'")
    if own.size == 1:
        return Choice("host", "a single rank")
    where = exchange(own, STEP, lambda: (_host(), memory is not None))
    holders = frozenset(rank for rank, (_, holds) in enumerate(where) if holds)
    if not holders:
        return Choice("host", "no rank holds device arrays")
    key = f"{STEP}: {wanted}, {sorted(roots)}"
    known: dict[frozenset[int], Choice] = own.kept.setdefault(key, {})
    choice = _of_more(known, holders)
    if choice is None:
        hosts = [host for host, _ in where]
        search = _Search(own, wanted, memory, hosts, holders, roots)
        choice = search.choice(holders, timeout_s)
        known[holders] = choice
        if own.rank == 0:
            _log.info(
                "device arrays of %d of %d ranks travel by %s memory: %s",
                *(len(holders), own.size, choice.transport, choice.how),
            )
    return choice


def _of_more(known: dict[frozenset[int], T], holders: frozenset[int]) -> T | None:
    """Return what was found when all these ranks, or more, held device arrays."""
    return next((found for tried, found in known.items() if holders <= tried), None)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the libraries have said, and what came of the trials."""

    works: bool
    found: Sequence[str]


class _Search:
    """How one choice is made. All ranks take the same way through it."""

    def __init__(
        self,
        own: Comm,
        wanted: str,
        memory: DeviceMemory | None,
        hosts: Sequence[str],
        holders: frozenset[int],
        roots: Sequence[int],
    ) -> None:
        self._own = own
        self._roots = roots
        self._wanted = wanted
        self._memory = memory
        self._hosts = hosts
        # On each host, the lowest of the ranks that hold device arrays.
        lowest = {hosts[rank]: rank for rank in sorted(holders, reverse=True)}
        self._tries = own.rank in lowest.values()
        self._found: list[str] = []

    def choice(self, holders: frozenset[int], timeout_s: float | None) -> Choice:
        """Ask and try, unless that was done; prove."""
        own = self._own
        key = f"{STEP}: {self._wanted}, trial"
        known: dict[frozenset[int], _Outcome] = own.kept.setdefault(key, {})
        outcome = _of_more(known, holders)
        if outcome is None:
            outcome = self._ask_and_try(timeout_s)
            known[holders] = outcome
        self._found = [*outcome.found]
        if not outcome.works:
            return Choice("host", "; ".join(self._found))
        wrong = self._prove()
        if wrong:
            first = min(wrong)
            self._note(first, wrong[first])
            self._refuse_if_asked(wrong, _VISIBLE)
            return Choice("host", "; ".join(self._found))
        return Choice("device", "; ".join([*self._found, "proof: the right bytes"]))

    def _ask_and_try(self, timeout_s: float | None) -> _Outcome:
        own, wanted = self._own, self._wanted
        answers = exchange(own, STEP, _ask)
        asked = min(range(own.size), key=lambda rank: _RANKING[answers[rank].says])
        says = answers[asked].says
        self._note(asked, answers[asked].how)
        if wanted == "auto" and says is False:
            return _Outcome(works=False, found=self._found)
        limit_s = TRIAL_S if timeout_s is None else min(TRIAL_S, timeout_s / 2)
        found = exchange(own, STEP, lambda: self._try(limit_s))
        trials = {rank: tried for rank, tried in enumerate(found) if tried is not None}
        worst = min(trials, key=lambda rank: _RANKING[trials[rank].works])
        works = trials[worst].works
        self._note(worst, f"trial: {trials[worst].how}")
        # Where it could not be tried, whoever wants it takes the library's word.
        if works or (wanted == "device" and works is None and says):
            return _Outcome(works=True, found=self._found)
        advice = _REPAIR if says and works is False else _INSTALL
        wrong = {r: f"trial: {t.how}" for r, t in trials.items() if t.works is works}
        self._refuse_if_asked(wrong, advice)
        return _Outcome(works=False, found=self._found)

    def _note(self, rank: int, what: str) -> None:
        self._found.append(f"rank {rank} ({self._hosts[rank]}): {what}")

    def _refuse_if_asked(self, wrong: Mapping[int, str], advice: str) -> None:
        """Raise on all ranks what is wrong on some, where the device was asked for."""
        if self._wanted == "auto":
            return
        said = self._found[0]

        def refuse() -> None:
            rank = self._own.rank
            if rank in wrong:
                raise ArgumentError(
                    f"transport='device' does not work on {self._hosts[rank]}: "
                    f"{wrong[rank]} (what the MPI library says: {said}). {advice}"
                )

        on_all_ranks(self._own, STEP, refuse)
        raise AssertionError("a rank that found it wrong has raised")

    def _try(self, limit_s: float) -> Trial | None:
        if not self._tries or self._memory is None:
            return None
        return trial(limit_s, self._memory.ordinal)

    def _prove(self) -> dict[int, str]:
        """Gather a little as payload is gathered; return what is wrong, by rank."""
        most = _PROOF_MOST_NBYTES // self._own.size
        gathers = [
            _Gathered(self._own, self._memory, min(nbytes, most), root)
            for root in list(self._roots)[:_PROOF_ROOTS]
            for nbytes in _PROOF_NBYTES
        ]
        ready = exchange(self._own, STEP, lambda: _text_of(gathers, _Gathered.prepare))
        if any(ready):
            return {rank: f"no device memory: {t}" for rank, t in enumerate(ready) if t}

        def move() -> None:
            memory = self._memory
            with nullcontext() if memory is None else memory.current():
                for gathered in gathers:
                    gathered.move()

        try:
            together(self._own, STEP, move)
        except CollectiveError as exc:
            # Ranks wait for messages that do not come: there is no way back from here.
            exc.args = (f"{exc}\n  This gave MPI device memory, to see. {_VISIBLE}",)
            raise
        found = exchange(self._own, STEP, lambda: _text_of(gathers, _Gathered.check))
        return {rank: f"proof: {text}" for rank, text in enumerate(found) if text}


def _host() -> str:
    return socket.gethostname()


def _ask() -> Answer:
    from mpi4py import MPI

    return ask(MPI.COMM_WORLD)  # noqa: TID251 - only its info says what there is


def _text_of(gathers: Sequence[_Gathered], action: Callable[[_Gathered], str]) -> str:
    """Run an action on each; return what is wrong, in one line, or nothing."""
    try:
        texts = [action(gathered) for gathered in gathers]
    except Exception as exc:  # noqa: BLE001 - of the device: it can be done without
        return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
    return next((text for text in texts if text), "")


class _Gathered:
    """Known bytes of all ranks, gathered to a root from devices to its device.

    A rank that holds no device arrays sends and receives memory of the host.
    """

    def __init__(
        self, own: Comm, memory: DeviceMemory | None, nbytes: int, root: int
    ) -> None:
        self._own, self._root = own, root
        self._memory = memory
        # Not the same number of each, so that displacements count.
        counts = np.maximum(nbytes - np.arange(own.size), 1)
        self._counts: list[int] = counts.tolist()
        self._displs: list[int] = (np.cumsum(counts) - counts).tolist()
        self._given: Any = None

    def _bytes_of(self, rank: int) -> _Bytes:
        steps = np.arange(self._counts[rank], dtype=np.int64)
        return ((steps * 7 + rank * 31 + 1) % 251).astype(np.uint8)

    def prepare(self) -> str:
        """Fill what MPI is given."""
        rank, data = self._own.rank, self._bytes_of(self._own.rank)
        if rank == self._root:
            at, own = self._displs[rank], data
            data = np.zeros(sum(self._counts), np.uint8)
            data[at : at + own.size] = own
        self._given = data
        if self._memory is not None:
            self._given = self._memory.buffer(data.size)
            self._memory.copy(data, self._given)
        return ""

    def move(self) -> None:
        """Gather, with the root's own part in place. Collective."""
        from mpi4py import MPI

        own = self._own
        if own.rank == self._root:
            into = [self._given, self._counts, self._displs, MPI.BYTE]
            request = own.raw.Igatherv(MPI.IN_PLACE, into, root=self._root)
        else:
            sent = [self._given, self._counts[own.rank], MPI.BYTE]
            request = own.raw.Igatherv(sent, None, root=self._root)
        own.wait(request)

    def check(self) -> str:
        """Compare what has arrived; return what is wrong."""
        if self._own.rank != self._root:
            return ""
        found = self._given
        if self._memory is not None:
            found = np.zeros(sum(self._counts), np.uint8)
            self._memory.copy(self._given, found)
        for rank, (at, nbytes) in enumerate(
            zip(self._displs, self._counts, strict=True)
        ):
            wrong = np.count_nonzero(found[at : at + nbytes] != self._bytes_of(rank))
            if wrong:
                return f"{wrong} wrong of {nbytes} bytes gathered from rank {rank}"
        return ""
