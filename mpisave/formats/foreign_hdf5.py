"""HDF5 files of other programs: where their arrays lie, without trusting them.

The HDF5 library crashes, hangs and takes memory when a file wants it to, and no
setting turns off what reaches for other files. So it runs in a process of its own,
see `hdf5_inspection`, that can open nothing, has limits, and gets the bytes that it
asks for from here. What it answers is checked once more, as an index is. Payload is
read here, at offsets, without HDF5.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from mpisave.errors import FileFormatError
from mpisave.formats.hdf5_inspection import ANSWER, LENGTH, MESSAGE, READ, receive

if TYPE_CHECKING:
    from mpisave.source import Source

# The process asks for a page every few microseconds, unless it was stopped.
_PATIENCE_S = 600.0

# A rank's child is no rank: what tells a process that it is one is not passed on. Nor
# what tells HDF5 to load plugins or to read in another way.
_NOT_PASSED_ON = (
    *("PMI", "PMIX_", "OMPI_", "ORTE_", "PRTE_", "MPI", "I_MPI_", "MV2_", "HYDRA_"),
    *("SLURM_", "PALS_", "FLUX_", "HDF5_"),
)
_ADDED = {
    "HDF5_PLUGIN_PRELOAD": "::",  # no plugins at all
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# Nothing is imported from the working directory that would not be imported here.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv.pop().split(chr(10)); "
    "from mpisave.formats.hdf5_inspection import main; main()"
)

# By version of the superblock: where the end of the file stands in it.
_END_AT = {0: 40, 1: 44, 2: 28, 3: 28}


def inspect(source: Source) -> bytes:
    """Return what `index.decode_foreign` turns into the index of an HDF5 file.

    Takes 0.1 to 0.4 s, and 0.1 ms for each object.

    Raises
    ------
    FileFormatError
        By path, if the file is torn, or holds anything but groups, hard links and
        contiguous datasets of plain numbers; or if HDF5 crashed on it, or took more
        memory or time than a file of this length needs.
    ImportError
        If h5py is not installed.
    """
    _check_end(source)
    here, there = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(here)
        with there:
            process = _start(there, source.nbytes)
        stack.callback(_end, process)
        here.settimeout(_PATIENCE_S)
        try:
            answer = _serve(here, source)
        except (EOFError, ConnectionError):
            raise FileFormatError(_why(process)) from None
        except TimeoutError:
            raise FileFormatError(
                f"the process that inspects the HDF5 file has asked for nothing for "
                f"{_PATIENCE_S:.0f} s: it was ended"
            ) from None
    return _nodes(answer)


def _check_end(source: Source) -> None:
    """Refuse a file that is shorter than it says."""
    head = source.read(0, 64)
    at = _END_AT.get(head[8]) if len(head) == 64 else None
    # Files with other sizes of offsets are for HDF5 to judge.
    if at is None or head[9 if head[8] >= 2 else 13] != 8:
        return
    end = int.from_bytes(head[at : at + 8], "little")
    if end > source.nbytes:
        raise FileFormatError(
            f"the HDF5 file is torn: {source.nbytes} of {end} bytes are there"
        )


def _start(there: socket.socket, nbytes: int) -> subprocess.Popen[bytes]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_PASSED_ON)
    }
    path = "\n".join(os.path.abspath(part) for part in sys.path)  # noqa: PTH100
    command = [sys.executable, "-c", _PROGRAM, str(there.fileno()), str(nbytes), path]
    return subprocess.Popen(  # noqa: S603 - this Python, and nothing of the file's
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[there.fileno()],
        env=environment | _ADDED,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _serve(here: socket.socket, source: Source) -> bytes:
    """Send what is asked for, until the answer comes."""
    while True:
        what, first, second = MESSAGE.unpack(receive(here, MESSAGE.size))
        if what == ANSWER and first <= 4 * source.nbytes + 2**20:
            return receive(here, first)
        if what != READ:
            raise EOFError
        data = b""
        if first < source.nbytes:
            data = source.read(first, min(second, 2**20))
        here.sendall(LENGTH.pack(len(data)) + data)


def _why(process: subprocess.Popen[bytes]) -> str:
    """Return what became of a process that gave no answer."""
    try:
        _, said = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        return "the process that inspects the HDF5 file gave an answer of no known form"
    if process.returncode == -signal.SIGXCPU:
        how = "took more processor time than a file of this length needs"
    elif process.returncode < 0:
        how = f"crashed ({signal.Signals(-process.returncode).name})"
    else:
        lines = said.decode(errors="replace").strip().splitlines() or ["no message"]
        how = f"failed: {lines[-1][:500]}"
    return (
        f"HDF5 {how} while it inspected the file: it is torn, altered, or made to do so"
    )


def _nodes(answer: bytes) -> bytes:
    try:
        content: Any = json.loads(answer)
        if "missing" in content:
            raise ImportError(f"HDF5 files of other programs need h5py: {content!s}")
        if "refused" in content:
            raise FileFormatError(f"HDF5 of another program: {content['refused']!s}")
        return json.dumps(content["nodes"], separators=(",", ":")).encode()
    except (LookupError, TypeError, ValueError, RecursionError) as exc:
        if isinstance(exc, FileFormatError):
            raise
        raise FileFormatError(f"the inspection gave no sensible answer: {exc}") from exc
