"""Whether MPI may be given device memory: what it says, and what a trial shows.

A wrong guess ends in a segmentation fault of the job, and what libraries say of
themselves is not to be relied on: a process of its own tries.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from mpisave.cuda_trial import PREFIX, STARTS_MPI

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_log = logging.getLogger(__name__)

# ---- what the library says

# Switches, and not a word on whether the library has what they switch on.
_SWITCHES = ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "I_MPI_OFFLOAD", "PSP_CUDA")
_MPIX_GPU_SUPPORT_CUDA = 0  # mpi.h of MPICH


@dataclass(frozen=True, slots=True)
class Answer:
    """What the MPI library says about device memory."""

    says: bool | None  # None: nothing, or two things
    how: str  # where it says so, and what


def ask(world: Any) -> Answer:
    """Return what the MPI library says, without touching a device.

    Parameters
    ----------
    world : mpi4py.MPI.Intracomm
        COMM_WORLD: the info of others need not say.

    Notes
    -----
    A no in one place and a yes in another is unknown. Open MPI 6 names device memory in
    ``mpi_memory_alloc_kinds`` only where it was asked for (open-mpi/ompi#13055), and
    the switches of one library may be set while another is used.
    """
    kinds = _by_info(world)
    if kinds.says:
        return kinds
    answers = [kinds, _by_query(mapped_libraries()), _by_environment(os.environ)]
    answers = [answer for answer in answers if answer.says is not None]
    if not answers:
        return Answer(None, "the MPI library does not say")
    if len({answer.says for answer in answers}) == 1:
        return answers[0]
    return Answer(None, " but ".join(answer.how for answer in answers))


def _by_info(world: Any) -> Answer:
    """Ask as MPI 4.1 has it, section 11.4.3."""
    try:
        info = world.Get_info()
        kinds = info.Get("mpi_memory_alloc_kinds")
        info.Free()
    except Exception:  # noqa: BLE001 - an MPI that cannot be asked says nothing
        kinds = None
    if kinds is None:
        return Answer(None, "no mpi_memory_alloc_kinds")
    names = {kind.strip().partition(":")[0] for kind in kinds.split(",")}
    return Answer("cuda" in names, f"mpi_memory_alloc_kinds = {kinds}")


def _by_query(paths: Sequence[str]) -> Answer:
    """Ask by the extensions of MPICH and of Open MPI."""
    for path in paths:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        # First: MPIX_Query_cuda_support of MPICH before 4 ends the process where the
        # library was built without GPUs (AMReX-Codes/amrex#4820).
        if hasattr(library, "MPIX_GPU_query_support"):
            found = ctypes.c_int(0)
            kind = ctypes.c_int(_MPIX_GPU_SUPPORT_CUDA)
            if library.MPIX_GPU_query_support(kind, ctypes.byref(found)) == 0:
                how = f"MPIX_GPU_query_support = {found.value}"
                return Answer(found.value != 0, how)
            return Answer(None, "MPIX_GPU_query_support fails")
        if hasattr(library, "MPIX_Query_cuda_support"):
            value = library.MPIX_Query_cuda_support()
            return Answer(value == 1, f"MPIX_Query_cuda_support = {value}")
    return Answer(None, "no MPIX_Query_cuda_support")


def mapped_libraries() -> list[str]:
    """Return the files of the MPI library in this process, the main one first.

    mpi4py opens it for itself alone, so that it is not found but by its very path.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            paths = {line.rstrip("\n").partition("/")[2] for line in file}
    except OSError:
        paths = set()
    found = [
        f"/{path}"
        for path in sorted(paths)
        if re.match(r"libmpi[a-z_0-9]*\.so", os.path.basename(path))  # noqa: PTH119
        and os.path.exists(f"/{path}")  # noqa: PTH110
    ]
    found.sort(key=lambda path: not re.search(r"/libmpi(ch|_abi)?\.so[^/]*$", path))
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.__file__:  # linked into it, at last
        found.append(mpi.__file__)
    return found


def _by_environment(environ: Mapping[str, str]) -> Answer:
    for name in _SWITCHES:
        value = environ.get(name, "").strip()
        if value.isdigit():
            return Answer(int(value) != 0, f"{name}={value}")
    return Answer(None, "no switch is set")


# ---- what a trial shows

# Of launchers: with these, a process takes itself for one of the job.
_LAUNCH = re.compile(
    r"PMI\d?_|PMIX_(?!MCA_|PREFIX$)|PRTE_(?!MCA_|PREFIX$)|HYDRA_|HYDI_|MPI_LOCAL|"
    r"OMPI_(?!MCA_|ALLOW_)|OMPI_MCA_(?:orte_|ess|pmix|num_procs$|initial_wdir$|PREFIXES$)|"
    r"MV2_COMM_WORLD_|MPISPAWN_|MPIRUN_|SLURM_|SLURMD_|FLUX_|PALS_|ALPS_|JSM_"
)
_CHILD = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from mpisave.cuda_trial import main; "
    "main(given['ordinal'], cupy_first=given['cupy_first'])"
)
# Python, CuPy and MPI start in seconds, where the file system is slow in tens of them.
TRIAL_S = 60.0
_TAIL_NBYTES = 65536


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of giving MPI device memory, in a process alone."""

    works: bool | None  # None: it could not be tried
    how: str


def launch_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the names of what a launcher has set for this rank."""
    return sorted(name for name in environ if _LAUNCH.match(name))


def environment_alone(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which MPI starts alone, with all of its settings."""
    return {name: environ[name] for name in environ if not _LAUNCH.match(name)}


def current_device() -> int | None:
    """Return the device that this thread uses, as CUDA counts; None if it uses none."""
    number = ctypes.c_int(-1)
    try:
        code = ctypes.CDLL("libcuda.so.1").cuCtxGetDevice(ctypes.byref(number))
    except (OSError, AttributeError):  # no driver
        return None
    return number.value if code == 0 else None


def trial(timeout_s: float, ordinal: int | None = None) -> Trial:
    """Try in a process alone whether MPI can be given device memory.

    Parameters
    ----------
    timeout_s : float
        After so many seconds it is ended.
    ordinal : int or None
        Device to use. None: the one that this thread uses, else the default.
    """
    if ordinal is None:
        ordinal = current_device()
    began = time.monotonic()
    try:
        code, out, err = run_alone(_command(ordinal), timeout_s)
    except (OSError, ValueError) as exc:
        return Trial(None, f"no process could be started: {exc}")
    seconds = time.monotonic() - began
    _log.debug("trial: status %s after %.1f s\n%s\n%s", code, seconds, out, err)
    return _verdict(code, out, err, timeout_s)


def _command(ordinal: int | None) -> list[str]:
    loaded = list(sys.modules)  # in the order of import
    cupy_first = "cupy" in loaded and (
        "mpi4py.MPI" not in loaded or loaded.index("cupy") < loaded.index("mpi4py.MPI")
    )
    path = [str(entry) for entry in sys.path]  # wherever this process finds them
    given = {"path": path, "ordinal": ordinal, "cupy_first": cupy_first}
    return [sys.executable or "python3", "-c", _CHILD, json.dumps(given)]


def run_alone(command: Sequence[str], timeout_s: float) -> tuple[int | None, str, str]:
    """Run a program as if no launcher had started this one.

    Returns
    -------
    int or None
        Status, negative for a signal; None if it was ended after `timeout_s` seconds.
    str, str
        The end of its standard output, and of its standard error.
    """
    # Files: a daemon that a library leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(  # noqa: S603 - this Python
            command,
            env=environment_alone(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, and what it started
            process.wait()
        return code, _tail(out), _tail(err)


def _tail(file: IO[bytes]) -> str:
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, nbytes - _TAIL_NBYTES))
    return file.read().decode(errors="replace")


def _verdict(code: int | None, out: str, err: str, timeout_s: float) -> Trial:
    told: dict[str, Any] = {}
    for line in out.splitlines():
        _, prefix, content = line.partition(PREFIX)
        with contextlib.suppress(ValueError):
            said = json.loads(content) if prefix else None
            told.update(said if isinstance(said, dict) else {})
    mpi = sys.modules.get("mpi4py.MPI")
    if "library" in told and mpi is not None and mpi.Is_initialized():
        mine, other = mpi.Get_library_version(), told["library"]
        if other != mine:
            return Trial(None, f"alone, it found another MPI library: {other[:80]!r}")
    if "works" in told:
        return Trial(told["works"], told["how"])
    at = told.get("at", "it had said nothing")
    if code is None:
        return Trial(None, f"not done after {timeout_s:g} s: {at}")
    words = next((w for w in reversed(err.splitlines()) if w.strip()), "").strip()
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else -code
        # A library that cannot start without its launcher may abort.
        works = None if at == STARTS_MPI else False
        return Trial(works, f"ended by {name} when {at}")
    works = False if told.get("sends") else None
    return Trial(works, f"ended with status {code} when {at}: {words[:200]}")
