"""Faults on purpose: what a job does when a rank fails, is late, dies, or cannot write.

::

    with mpisave.testing.fault("publish", rank=1, action=mpisave.testing.kill()):
        mpisave.save(state, "step100.h5", use_binary_format=True)

All of it is in this process: nothing happens to files that mpisave does not write.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpisave import collective, room
from mpisave.errors import ArgumentError
from mpisave.placement import communicator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

# In the order in which a call comes to them; which ones depends on the call.
STEPS_OF_SAVE = (
    "check arguments",
    "describe the state dict",
    "choose the transport",
    "plan",
    "create the staging file",
    "look for the staging file",
    "open the staging file",
    "exchange",
    "allocate buffers",
    "lay out the file",
    "write",
    "gather and write",
    "exchange and write",
    "compare replicas",
    "seal",
    "publish",
)
STEPS_OF_LOAD = (
    "check arguments",
    "read the index",
    "open the file",
    "compare with like",
    "find what all ranks want",
    "find what several ranks want",
    "allocate buffers",
    "read and exchange",
    "read",
    "verify",
)


@dataclass(slots=True)
class Fault:
    """What `fault` gives.

    Attributes
    ----------
    happened : bool
        Whether it has happened on this rank. A call may not come to a step: one whose
        plan is kept makes none.
    """

    happened: bool = False


@contextlib.contextmanager
def fault(
    step: str,
    *,
    rank: int,
    action: Callable[[], None],
    comm: MPI.Intracomm | None = None,
) -> Iterator[Fault]:
    """Have something happen the next time that a rank comes to a step. Independent.

    Every rank may use it alike: it does nothing on the others. One fault at a time.

    Parameters
    ----------
    step : str
        One of `STEPS_OF_SAVE` or `STEPS_OF_LOAD`, which `verify` shares. It happens
        when the rank begins the step, once.
    rank : int
        The rank of `comm`.
    action : callable
        What happens: `fail`, `delay`, `kill`, `stop`, `full_disk`, or a function of
        your own; what that raises is a failure of the step.
    comm : mpi4py.MPI.Intracomm, optional
        As for `mpisave.save`.

    Yields
    ------
    Fault
        Whether it has happened.

    Raises
    ------
    ArgumentError
        If there is no such step or rank, or a fault is waiting already.
    """
    if step not in (*STEPS_OF_SAVE, *STEPS_OF_LOAD):
        raise ArgumentError(
            f"step is {step!r}: save has {STEPS_OF_SAVE}, load has {STEPS_OF_LOAD}"
        )
    own = communicator(comm)
    if not 0 <= rank < own.size:
        raise ArgumentError(f"rank is {rank!r}: there are {own.size}, from 0")
    if collective.before_action is not None:
        raise ArgumentError("a fault is waiting already: one at a time")
    found = Fault()

    def happen(name: str) -> None:
        if own.rank == rank and name == step and not found.happened:
            found.happened = True
            action()

    collective.before_action = happen
    try:
        yield found
    finally:
        collective.before_action = None
        room.is_full = False


def fail(error: BaseException) -> Callable[[], None]:
    """Return an action that raises `error`."""

    def action() -> None:
        raise error

    return action


def delay(seconds: float) -> Callable[[], None]:
    """Return an action that is late by as many seconds."""
    return lambda: time.sleep(seconds)


def kill() -> Callable[[], None]:
    """Return an action that ends the process at once, with nothing cleaned up."""
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def stop() -> Callable[[], None]:
    """Return an action that stops the process until it gets SIGCONT."""
    return lambda: os.kill(os.getpid(), signal.SIGSTOP)


def full_disk() -> Callable[[], None]:
    """Return an action after which mpisave finds no room on the disk.

    Whatever it reserves or writes in this process fails with ENOSPC, until the fault
    is taken back. Files that are written already stay.
    """

    def action() -> None:
        room.is_full = True

    return action
