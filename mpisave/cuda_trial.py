"""A process alone that gives MPI device memory: its parent sees whether it survives.

An MPI library without CUDA reads device memory as if it were the host's, and ends in a
segmentation fault. Some that say that they know device memory do so too. So the first
to try is this program, which sends to itself, and says on standard output where it is
and what it found: lines of JSON behind `PREFIX`.
"""

from __future__ import annotations

import json
import os
import resource
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

PREFIX = "mpisave trial: "
STARTS_MPI = "it started MPI"

# Short messages go at once, long ones by other protocols.
_NBYTES = (64, 8192, 2**22)


class _NotTriedError(Exception):
    """It could not come to a trial."""


def _tell(**content: object) -> None:
    # Not through a buffer: what is told must be out when the process ends.
    os.write(1, f"{PREFIX}{json.dumps(content)}\n".encode())


def main(ordinal: int | None, *, cupy_first: bool) -> None:
    """Try, and tell.

    Parameters
    ----------
    ordinal : int or None
        Device to use, as CUDA counts those that are visible. None: the default.
    cupy_first : bool
        Whether CuPy is imported before MPI is started. What either finds loaded already
        can decide whether device memory is recognised.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # to be ready for a fault
    try:
        works, how = _try(ordinal, cupy_first=cupy_first)
    except _NotTriedError as exc:
        works, how = None, str(exc)
    _tell(works=works, how=how)


def _try(ordinal: int | None, *, cupy_first: bool) -> tuple[bool, str]:
    pairs: list[tuple[str, Any, Any]] = []
    if cupy_first:
        cupy = _start_cupy(ordinal)
        pairs.append(("older than MPI", _empty(cupy), _empty(cupy)))
        mpi = _start_mpi()
    else:
        mpi = _start_mpi()
        cupy = _start_cupy(ordinal)
    pairs.append(("younger than MPI", _empty(cupy), _empty(cupy)))
    for age, first, second in pairs:
        for nbytes in _NBYTES:
            what = f"{nbytes} bytes of device memory {age}"
            try:
                _send_to_itself(mpi, cupy, what, first[:nbytes], second[:nbytes])
            except _WrongBytesError as exc:
                return False, str(exc)
            except Exception as exc:  # noqa: BLE001 - of MPI or CUDA: it does not work
                return False, f"{type(exc).__name__} with {what}: {_line(exc)}"
    name = f"device {cupy.cuda.Device().id}"
    return True, f"{name} to itself, {_NBYTES[0]} B to {_NBYTES[-1] >> 20} MiB"


def _start_cupy(ordinal: int | None) -> Any:
    _tell(at="it imported CuPy")
    try:
        import cupy
    except ImportError as exc:
        if exc.name == "cupy":
            raise _NotTriedError("no module cupy") from exc
        raise _NotTriedError(f"CuPy cannot be imported: {_line(exc)}") from exc
    _tell(at="it asked for a device")
    try:
        if ordinal is not None:
            cupy.cuda.Device(ordinal).use()
        cupy.cuda.runtime.deviceSynchronize()
    except Exception as exc:  # noqa: BLE001 - whatever CUDA has against it
        _no_device(exc)
    return cupy


def _empty(cupy: Any) -> Any:
    try:
        return cupy.empty(_NBYTES[-1], np.uint8)
    except Exception as exc:  # noqa: BLE001 - as above
        _no_device(exc)


def _no_device(exc: BaseException) -> NoReturn:
    raise _NotTriedError(f"no device: {_line(exc)}") from exc


def _start_mpi() -> Any:
    _tell(at=STARTS_MPI)
    try:
        from mpi4py import MPI
    except Exception as exc:
        raise _NotTriedError(f"MPI does not start: {_line(exc)}") from exc
    size = MPI.COMM_WORLD.size  # noqa: TID251 - a program, not a library
    if size != 1:
        raise _NotTriedError(f"MPI did not start alone, but as one of {size} ranks")
    _tell(library=MPI.Get_library_version())
    return MPI


class _WrongBytesError(Exception):
    """Other bytes arrived than were sent."""


def _send_to_itself(mpi: Any, cupy: Any, what: str, source: Any, target: Any) -> None:
    """Send from device to device, and from device to host and back, in every way."""
    nbytes = source.size
    data = (np.arange(nbytes) * 7 % 251).astype(np.uint8)

    def sendrecv(sent: Any, received: Any) -> None:
        mpi.COMM_SELF.Sendrecv([sent, mpi.BYTE], 0, recvbuf=[received, mpi.BYTE])

    def isend(sent: Any, received: Any) -> None:
        receives = mpi.COMM_SELF.Irecv([received, mpi.BYTE], 0)
        mpi.Request.Waitall([receives, mpi.COMM_SELF.Isend([sent, mpi.BYTE], 0)])

    def gatherv(_sent: Any, received: Any) -> None:
        # As a root that gathers does, whose own part is in place.
        into = [received, [nbytes], [0], mpi.BYTE]
        mpi.COMM_SELF.Igatherv(mpi.IN_PLACE, into, root=0).Wait()

    def check(name: str, way: Any, sent: Any, received: Any) -> None:
        _tell(at=f"it gave MPI {what}: {name}", sends=True)
        # MPI does not know of the streams on which these were filled.
        cupy.cuda.runtime.deviceSynchronize()
        way(sent, received)
        cupy.cuda.runtime.deviceSynchronize()
        found = received if isinstance(received, np.ndarray) else received.get()
        wrong = int(np.count_nonzero(found != data))
        if wrong:
            raise _WrongBytesError(
                f"{name} delivered {wrong} wrong of {what}, without an error"
            )

    for name, way in (("Sendrecv", sendrecv), ("Isend", isend)):
        source.set(data)
        target.set(np.zeros_like(data))
        check(f"{name} to the device", way, source, target)
        host: npt.NDArray[np.uint8] = np.zeros_like(data)
        check(f"{name} to the host", way, source, host)
        target.set(np.zeros_like(data))
        check(f"{name} from the host", way, data, target)
    check("Igatherv in place", gatherv, None, target)


def _line(exc: BaseException) -> str:
    """Return the text of an exception as one short line."""
    return " ".join(str(exc).split())[:200]
