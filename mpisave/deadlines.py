"""Waiting for other ranks: until a deadline, and then saying who did not come.

A rank whose deadline passes calls the roll: it tells some ranks, the witnesses, where
it is. These ask all others, collect who answers, and tell them: each rank that waits
then raises, with the same list of those that are missing. A communicator on which this
has happened cannot be used again: its ranks are out of step.

Messages of the roll are the only ones from rank to rank. They are small, and nobody
waits until they are sent.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import signal
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from mpisave.errors import (
    CollectiveError,
    CollectiveTimeout,
    Failure,
    show_ranks,
)
from mpisave.watchdog import dump_stacks, watchdog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_log = logging.getLogger(__name__)

# A rank that waits looks at once for what may be there, then lets others have the core,
# and then sleeps: a 64th of the time that it has waited. Measured to be as fast as
# MPI's own waiting, and with more ranks than cores up to twice as fast.
_LOOKS = 50
_YIELDS_S = 1e-3
_LONGEST_SLEEP_S = 5e-3

# A log line is written when others are this late.
_LATE_S = 60.0

# How long witnesses collect answers. A rank that waits looks for questions every few
# milliseconds; one that shares its core with others may need longer.
_GRACE_S = 2.0

# As many ranks are witnesses: enough of them live, and few enough for thousands of
# ranks to write to.
_WITNESSES = 8

# Below the least tag that MPI promises, 32767 (MPI 4.1, section 9.1.2).
_TAG = 32766

# How long a process that gave others up may take to end MPI, which waits for them too.
_FINALIZE_S = 60

# What holds the buffers of requests that will never complete: MPI may still write to
# them.
_ABANDONED: list[Any] = []


@dataclass(frozen=True, slots=True)
class _Present:
    """A rank that answered the roll, and where it is."""

    rank: int
    where: str


@dataclass(slots=True)
class _Roll:
    """What one rank knows of a roll."""

    reason: str
    present: dict[int, _Present] = field(default_factory=dict)
    is_told: bool = False  # by a witness, whose list this is
    failure: Failure | None = None  # of a rank that left, if that is the reason


class Watch:
    """How long this rank waits for the others of a communicator.

    Parameters
    ----------
    raw : mpi4py.MPI.Intracomm
        All ranks of the call.

    Attributes
    ----------
    step : str
        What this rank is doing.
    hosts : list of str
        Of each rank, as far as known.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.rank: int = raw.rank
        self.size: int = raw.size
        self.host = socket.gethostname()
        self.hosts = ["unknown host"] * self.size
        self.step = ""
        self._call = ""
        self._timeout_s: float | None = None
        self._over: str | None = None
        self._went_on = time.monotonic()
        self._waits = False
        self._told: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether the ranks are out of step for good."""
        return self._over is not None

    @contextmanager
    def calling(self, call: str, timeout_s: float | None) -> Iterator[None]:
        """Give the context of a call, in which this rank waits for the others so long.

        Raises
        ------
        CollectiveTimeout
            If an earlier call on this communicator was given up.
        """
        if self._over is not None:
            raise CollectiveTimeout(
                f"{call}: an earlier call on this communicator was given up: "
                f"{self._over} Its ranks are out of step. If all of them live, give a "
                f"new communicator (comm.Dup()); else end the job.",
                step="begin",
            )
        self._call, self._timeout_s = call, timeout_s
        self.enter("begin")
        try:
            with watchdog(self._stuck, timeout_s if self.size > 1 else None):
                yield
        except CollectiveError:
            raise  # all ranks have agreed on it
        except BaseException as exc:
            # An interrupt between two steps, say, or no memory: others would wait.
            if exc is self._told or self.size == 1:
                raise
            self.leave(exc)
        finally:
            self._told = None

    def told(self, exc: BaseException) -> None:
        """Note that all ranks know of an error that this one is about to raise."""
        self._told = exc

    def enter(self, step: str) -> None:
        """Note what this rank is doing from now on."""
        self.step = step
        self._went_on = time.monotonic()

    def _stuck(self) -> tuple[float, str]:
        # A rank that waits for others sees to its deadline itself.
        seconds = 0.0 if self._waits else time.monotonic() - self._went_on
        return seconds, f"rank {self.rank} ({self.host}) is in {self.where},"

    def wait(self, request: Any) -> None:
        """Wait for a request.

        Raises
        ------
        CollectiveTimeout
            If it is not complete at the deadline, or another rank has reached its own.
        CollectiveError
            If another rank has left the call, or MPI fails.
        """
        try:
            for _ in range(_LOOKS):
                if request.Test():
                    return
            self._waits = True
            self._wait_long(request)
        except BaseException as exc:  # noqa: BLE001 - leave raises it
            # A deadline, KeyboardInterrupt, or an error of MPI.
            _ABANDONED.append(request)
            self.leave(exc)
        finally:
            self._went_on = time.monotonic()
            self._waits = False

    def _wait_long(self, request: Any) -> None:
        began = time.monotonic()
        is_late = False
        while not request.Test():
            waited = time.monotonic() - began
            if waited < _YIELDS_S:
                os.sched_yield()
                continue
            self.hear(looks=1)
            if self._timeout_s is not None and waited > self._timeout_s:
                self._call_the_roll(
                    _Roll(
                        f"rank {self.rank} ({self.host}) waited {waited:.1f} s in step "
                        f"{self.step!r} of {self._call}."
                    )
                )
            if waited > _LATE_S and not is_late:
                is_late = True
                _log.warning(
                    "rank %d (%s) has waited for other ranks for %.0f s in step %r of "
                    "%s; it gives up %s",
                    *(self.rank, self.host, waited, self.step, self._call),
                    "never"
                    if self._timeout_s is None
                    else f"after {self._timeout_s:g} s",
                )
            time.sleep(min(waited / 64, _LONGEST_SLEEP_S))

    # ---- the roll

    @property
    def where(self) -> str:
        """What was called, and the step of it."""
        return f"{self._call}, step {self.step!r}"

    @property
    def _witnesses(self) -> list[int]:
        most = min(self.size, _WITNESSES)
        return [self.size * number // most for number in range(most)]

    def hear(self, looks: int = _LOOKS) -> None:
        """Join a roll that others have called; leave with those that have left.

        Parameters
        ----------
        looks : int
            How often to look: the first look may only have MPI fetch what is there.

        Raises
        ------
        CollectiveTimeout, CollectiveError
            If others have given up, or left.
        """
        roll = _Roll("")
        for _ in range(looks):
            while (message := self._receive()) is not None:
                _note(roll, message)
        if roll.reason:
            self._call_the_roll(roll)

    def _call_the_roll(self, roll: _Roll) -> NoReturn:
        """Find out who is there, and raise."""
        self._over = roll.reason
        mine = _Present(self.rank, self.where)
        roll.present[self.rank] = mine
        others = [rank for rank in range(self.size) if rank != self.rank]
        is_witness = self.rank in self._witnesses
        if roll.failure is None:
            # Those that wait look for what they are sent, and so answer.
            asked = others if is_witness else self._witnesses
            self._send(asked, ("here", roll.reason, mine))
            # Witnesses first; others wait for what these found.
            grace_s = _GRACE_S if is_witness else 2 * _GRACE_S + 1
            until = time.monotonic() + grace_s
            while time.monotonic() < until and len(roll.present) < self.size:
                message = self._receive()
                if message is None:
                    time.sleep(1e-3)
                    continue
                _note(roll, message)
                if roll.is_told and not is_witness:
                    break
            if is_witness:
                told = [rank for rank in roll.present if rank != self.rank]
                self._send(told, ("roll", roll.reason, list(roll.present.values())))
        _end_without_waiting()
        # Of this rank only: the others are where nobody can look.
        dump_stacks(f"rank {self.rank} ({self.host}) gives others up in {mine.where}.")
        raise self._error(roll)

    def leave(self, exc: BaseException) -> NoReturn:
        """Raise `exc`, of this rank, where others wait for it: tell them all.

        Raises
        ------
        CollectiveError
            For any other Exception.
        """
        if not isinstance(exc, Exception):
            # It may have come between the start of a message and the wait for it. The
            # frames that it has left so far hold the buffers.
            _ABANDONED.append(exc.__traceback__)
        if self._over is None:
            failure = Failure(self.rank, self.host, type(exc).__name__, str(exc))
            self._over = f"{failure} left step {self.step!r} of {self._call}."
            others = [rank for rank in range(self.size) if rank != self.rank]
            self._send(others, ("left", self._over, failure))
            _end_without_waiting()
        if isinstance(exc, CollectiveError) or not isinstance(exc, Exception):
            raise exc
        raise CollectiveError(f"{self.where}: {self._over}", step=self.step) from exc

    def _error(self, roll: _Roll) -> CollectiveError:
        if roll.failure is not None:
            return CollectiveError(
                f"{self.where}: {roll.reason}",
                step=self.step,
                failures={roll.failure.rank: roll.failure},
            )
        missing = [rank for rank in range(self.size) if rank not in roll.present]
        by_place: dict[str, list[int]] = {}
        for rank, present in sorted(roll.present.items()):
            by_place.setdefault(present.where, []).append(rank)
        lines = [f"{self.where}: {roll.reason}"]
        lines += [f"rank {r} ({self.hosts[r]}) did not arrive" for r in missing[:20]]
        if len(missing) > 20:
            lines.append(f"nor did {len(missing) - 20} more: {show_ranks(missing)}")
        lines += [f"{show_ranks(r)} in {where}" for where, r in by_place.items()]
        advice = (
            "What did not arrive is dead, stopped, slow, or elsewhere in the program: "
            "all ranks of comm have to make the same calls. A longer timeout= waits "
            "longer."
        )
        failures = {
            rank: Failure(rank, self.hosts[rank], "CollectiveTimeout", "did not arrive")
            for rank in missing
        }
        return CollectiveTimeout(
            "\n  ".join([*lines, advice]), step=self.step, failures=failures
        )

    # ---- messages from rank to rank

    def _send(self, ranks: Iterable[int], message: tuple[str, str, Any]) -> None:
        from mpi4py import MPI

        data = pickle.dumps(message)
        for rank in ranks:
            if rank != self.rank:
                sent = self._raw.Isend([data, len(data), MPI.BYTE], rank, _TAG)
                _ABANDONED.append(sent)

    def _receive(self) -> tuple[str, str, Any] | None:
        from mpi4py import MPI

        status = MPI.Status()
        if not self._raw.Iprobe(MPI.ANY_SOURCE, _TAG, status):
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        self._raw.Recv([data, len(data), MPI.BYTE], status.Get_source(), _TAG)
        message: tuple[str, str, Any]
        message = pickle.loads(data)  # a rank of this job made it
        return message


def _note(roll: _Roll, message: tuple[str, str, Any]) -> None:
    """Take what a message says into a roll."""
    kind, reason, content = message
    roll.reason = roll.reason or reason
    if kind == "left":
        roll.failure, roll.reason = content, reason
    elif kind == "here":
        roll.present[content.rank] = content
    else:
        roll.is_told = True
        roll.present.update({present.rank: present for present in content})


_ENDS_SOON: list[bool] = []


def _end_without_waiting() -> None:
    """See to it that this process does not wait for lost ranks when it ends.

    MPI_Finalize waits for all ranks. A process that ends by an uncaught error ends the
    job, as ``python -m mpi4py`` does; any other has a minute to finalize.
    """
    if not _ENDS_SOON:
        _ENDS_SOON.append(True)
        atexit.register(_end)


def _end() -> None:
    from mpi4py import MPI

    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    if getattr(sys, "last_value", None) is not None:
        MPI.COMM_WORLD.Abort(1)  # noqa: TID251 - all of the job
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_FINALIZE_S)
