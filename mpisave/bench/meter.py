"""Memory that is in use while something runs, above what was before."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpisave.bench.states import MIB
from mpisave.bench.turns import trim

if TYPE_CHECKING:
    from collections.abc import Callable

_EVERY_S = 0.001


def status(field: str) -> int:
    """Return a memory field of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Have the high-water mark of this process begin at what it has now."""
    # Linux: 5 resets it (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")


def _can_reset_peak() -> bool:
    """Reset the high-water mark where the kernel has one."""
    try:
        reset_peak()
        status("VmHWM")
    except (OSError, RuntimeError):  # gVisor has neither
        return False
    return True


def _resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Measures the first run of each side that is put between. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All ranks of it run together.
    gpu : Gpu
        The device that they use.

    Attributes
    ----------
    found : dict of str to dict of str to float
        Of each name: MiB of ``device_mib``, on the device of rank 0 and of whichever
        rank; ``pinned_mib`` and ``host_mib``, of the rank that has most.
    """

    def __init__(self, comm: Any, gpu: Any) -> None:
        self._comm = comm
        self._gpu = gpu
        self.found: dict[str, dict[str, float]] = {}

    def around(self, name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return what does as `run`, and is measured when it is called first."""
        return functools.partial(self._run, name, run)

    def _run(self, name: str, run: Callable[[], Any]) -> Any:
        if name in self.found:
            return run()
        comm, gpu = self._comm, self._gpu
        # What earlier sides left in pools would be there already.
        gpu.free()
        trim()
        comm.Barrier()
        before = gpu.used_nbytes()
        comm.Barrier()
        resident = _resident_nbytes()
        has_mark = _can_reset_peak()
        peak = _Peak(gpu.used_nbytes, _resident_nbytes)
        try:
            result = run()
        finally:
            used, host = peak.stop()
        if has_mark:
            host = max(host, status("VmHWM"))
        of_all = comm.allgather((used - before, gpu.pinned_nbytes(), host - resident))
        self.found[name] = {
            "device_mib": of_all[0][0] / MIB,
            "pinned_mib": max(pinned for _, pinned, _ in of_all) / MIB,
            "host_mib": max(host for *_, host in of_all) / MIB,
        }
        return result


class _Peak:
    """The most that each of some functions returned, asked by a thread."""

    def __init__(self, *asks: Callable[[], int]) -> None:
        self._asks = asks
        self.most = [ask() for ask in asks]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        """Ask once more, and no longer; return what it came to."""
        self._ended.set()
        self._thread.join()
        self._ask()
        return self.most

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._ask()

    def _ask(self) -> None:
        self.most = [
            max(most, ask()) for most, ask in zip(self.most, self._asks, strict=True)
        ]
