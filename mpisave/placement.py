"""Where this process runs: the communicator that is meant, host, cores, the caller."""

from __future__ import annotations

import os
import socket
import sys
import warnings
import zlib
from typing import TYPE_CHECKING, Any

from mpisave.collective import SoloComm, check_launch, is_under_mpi
from mpisave.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence


def communicator(comm: Any) -> Any:
    """Return the communicator that is meant, or refuse what is none."""
    if comm is None and not is_under_mpi(os.environ):
        return SoloComm()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI library for it
        check_launch(1, os.environ)
        return SoloComm()
    if MPI.Is_finalized():
        raise ArgumentError("MPI is finalized: the ranks can no longer work together")
    world = MPI.COMM_WORLD  # noqa: TID251 - the default communicator
    if comm is None:
        comm = world
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ArgumentError(f"comm is {comm!r}: it is an intracommunicator of mpi4py")
    if comm != MPI.COMM_SELF:  # given on purpose, it means: this process alone
        check_launch(world.size, os.environ)
    return comm


def cores_of(ranks: Sequence[tuple[str, int, int]], rank: int) -> int:
    """Return how many cores a rank has for itself.

    Parameters
    ----------
    ranks : sequence of (host, number of cores, which)
        What `where_this_runs` says on each rank.
    rank : int
        Which one is asked about.
    """
    return max(1, ranks[rank][1] // ranks.count(ranks[rank]))


def where_this_runs() -> tuple[str, int, int]:
    """Return the host, how many cores this process may run on, and which, as a hash."""
    cores = sorted(os.sched_getaffinity(0))
    return socket.gethostname(), len(cores), zlib.crc32(repr(cores).encode())


def warn_caller(text: str) -> None:
    """Warn whoever called mpisave."""
    here = os.path.dirname(__file__)  # noqa: PTH120
    level, frame = 1, sys._getframe()  # noqa: SLF001 - until Python 3.12 is the oldest
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
