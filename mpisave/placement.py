"""Where this process runs: communicator, launcher, host, cores, the caller."""

from __future__ import annotations

import os
import socket
import sys
import warnings
import zlib
from typing import TYPE_CHECKING, Any

from mpisave.comms import SoloComm
from mpisave.errors import ArgumentError, LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# Set for each rank by PMIx, PMI, Flux, HPE's PALS, IBM's jsrun: MPI knows the rest.
_RANK = ("PMIX_RANK", "PMI_RANK", "FLUX_TASK_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK")
# Set by the launchers of Open MPI, of MPICH and Slurm's PMI, of MVAPICH.
_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


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


# More threads than this in one rank wrote no faster: one process at a time writes to a
# file. Reading went on to gain, see docs/performance.md.
MOST_WRITERS = 4
MOST_READERS = 12


def threads_of(ranks: Sequence[tuple[str, int, int]], rank: int, most: int) -> int:
    """Return with how many threads a rank works: one for each core that it has alone.

    Parameters
    ----------
    ranks : sequence of (host, number of cores, which)
        What `where_this_runs` says on each rank.
    rank : int
        Which one is asked about.
    most : int
        As many at most.
    """
    own_cores = ranks[rank][1] // ranks.count(ranks[rank])
    return min(most, max(1, own_cores))


def where_this_runs() -> tuple[str, int, int]:
    """Return the host, how many cores this process may run on, and which, as a hash."""
    cores = sorted(os.sched_getaffinity(0))
    return socket.gethostname(), len(cores), zlib.crc32(repr(cores).encode())


def warn_caller(text: str) -> None:
    """Warn whoever called mpisave."""
    here = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120
    level, frame = 1, sys._getframe()  # noqa: SLF001 - until Python 3.12 is the oldest
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


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
