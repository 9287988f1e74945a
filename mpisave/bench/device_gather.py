"""The sides that gather arrays of devices to rank 0, which writes one file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.content import STEP_NBYTES
from mpisave.bench.device_sides import check_pickle
from mpisave.bench.states import offsets
from mpisave.bench.turns import Side, pwrite
from mpisave.plan import ROUND_NBYTES, displacements, rounds

if TYPE_CHECKING:
    from mpisave.bench.device_sides import Work
    from mpisave.bench.states import Arrays

BY_DEVICE = "bound: Gatherv, device"
BY_HOST = "bound: Gatherv, host"
WRITE = "bound: pwrite on the root"
COPY = "bound: copy on the root"


class GatherSides:
    """Several ranks, one of which writes.

    Parameters
    ----------
    work : Work
        What is saved, and where.
    durable : bool
        Whether files are flushed to the disk.
    """

    def __init__(self, work: Work, *, durable: bool) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._work = work
        self._durable = durable
        own = sum(map(work.content.nbytes, work.arrays))
        self._totals = np.array(work.comm.allgather(own), np.int64)
        self._host = np.ones(ROUND_NBYTES, np.uint8)
        self._device = work.gpu.buffer(ROUND_NBYTES)

    def all(self) -> list[Side]:
        """Return the sides; those by device only where MPI takes such memory."""
        why = self.refusal()
        if why and self._work.comm.rank == 0:
            sys.stderr.write(f"gathering by device is left out: {why}\n")
        sides = [
            Side(BY_HOST, lambda: self.gatherv(self._host), (BY_HOST,)),
            Side(WRITE, self._write, (WRITE,), self._check_bare),
            Side(COPY, self._copy, (COPY,)),
            self._mpisave("host", (BY_HOST, WRITE)),
        ]
        if not why:
            sides.insert(
                0, Side(BY_DEVICE, lambda: self.gatherv(self._device), (BY_DEVICE,))
            )
            sides.append(self._mpisave("device", (BY_DEVICE, WRITE, COPY)))
        return sides

    def refusal(self) -> str:
        """Return why device memory is not given to MPI, or nothing. Collective."""
        work = self._work
        key = min(work.arrays, key=work.content.nbytes)
        try:
            used = self._save("device", {key: work.arrays[key]}).transport
        except mpisave.ArgumentError as exc:
            return " ".join(str(exc).split())
        finally:
            work.clean()
        return "" if used == "gather (device)" else f"it came out as {used!r}"

    def _mpisave(self, transport: str, bounds: tuple[str, ...]) -> Side:
        name = f"mpisave pickle, {transport}"

        def check(_: object) -> None:
            check_pickle(self._work, self._work.folder / "x.params")

        def run() -> Any:
            return self._save(transport, self._work.arrays)

        return self._work.side("gather", name, run, bounds, check)

    def _save(self, transport: str, arrays: Arrays) -> Any:
        work = self._work
        return mpisave.save(
            arrays,
            work.folder / "x.params",
            gather_to=0,
            state_type="params",
            transport=transport,
            durable=self._durable,
            comm=work.comm,
        )

    def gatherv(self, memory: Any) -> None:
        """Move the bytes of the other ranks to the root in rounds, and nothing else."""
        comm, byte = self._work.comm, self._mpi.BYTE
        totals = self._totals.copy()
        totals[0] = 0
        for counts in rounds(totals, ROUND_NBYTES):
            if comm.rank == 0:
                displs = displacements(counts)
                received = [memory, counts.tolist(), displs.tolist(), byte]
                comm.Gatherv(self._mpi.IN_PLACE, received, root=0)
            else:
                nbytes = int(counts[comm.rank])
                comm.Gatherv([memory, nbytes, byte], None, root=0)

    def _write(self) -> None:
        """Write the bytes of all ranks on the root, to a reserved file."""
        work = self._work
        if work.comm.rank != 0:
            return
        path = work.folder / "bound"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.posix_fallocate(descriptor, 0, max(1, work.whole.nbytes))
        for key, offset in offsets(work.whole.shapes, work.shares).items():
            for start, part in work.content.steps(key):
                pwrite(descriptor, part.data, offset + start)
        if self._durable:
            os.fsync(descriptor)
        os.close(descriptor)

    def _check_bare(self, _: object) -> None:
        work = self._work
        if work.comm.rank == 0:
            found = (work.folder / "bound").stat().st_size
            if found != work.whole.nbytes:
                raise RuntimeError(f"{found} bytes, not {work.whole.nbytes}")

    def _copy(self) -> None:
        """Copy as many bytes as all ranks have, on the root, to the host."""
        work = self._work
        if work.comm.rank == 0:
            nbytes = work.whole.nbytes
            work.copies.to_host(
                self._device[: min(STEP_NBYTES, nbytes - start)]
                for start in range(0, nbytes, STEP_NBYTES)
            )
