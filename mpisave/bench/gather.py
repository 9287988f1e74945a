"""Time of saves that gather to rank 0, against bounds and simple ways."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.states import MIB, gpt2_like
from mpisave.bench.turns import (
    Row,
    Side,
    as_bytes,
    choose,
    empty,
    fsync,
    pwrite,
    rows_of,
    take_turns,
)
from mpisave.plan import ROUND_NBYTES, displacements, rounds

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from mpisave.bench.states import State

_BOUNDS = ("bound: Gatherv rounds", "bound: pwrite")


class Sides:
    """The sides of the comparison, for one state."""

    def __init__(self, comm: Any, state: State, folder: Path) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        self.comm = comm
        self.state = state
        self.folder = folder
        self.is_root = comm.rank == 0
        own = sum(array.nbytes for array in state.values())
        self.totals = np.array(comm.allgather(own), np.int64)
        self.nbytes = int(self.totals.sum())
        self.warm = np.ones(ROUND_NBYTES, np.uint8)

    def all(self) -> list[Side]:
        """Return the sides."""
        return [
            Side("bound: Gatherv rounds", self.bare_gatherv, _BOUNDS),
            Side("bound: pwrite", self.bare_pwrite, _BOUNDS),
            Side("mpisave pickle", lambda: self.mpisave("x.params"), _BOUNDS),
            Side(
                "mpisave HDF5", lambda: self.mpisave("x.h5.params", hdf5=True), _BOUNDS
            ),
            Side("(a) comm.gather + pickle.dump", self.naive_pickle, _BOUNDS),
            Side("(b) Gatherv + h5py", self.gatherv_h5py, _BOUNDS),
        ]

    def mpisave(self, name: str, *, hdf5: bool = False) -> None:
        """Gather and save with mpisave."""
        mpisave.save(
            self.state,
            self.folder / name,
            gather_to=0,
            state_type="params",
            use_binary_format=hdf5,
            comm=self.comm,
        )

    def bare_gatherv(self) -> None:
        """Move the bytes of the other ranks to the root in rounds, and nothing else."""
        totals = self.totals.copy()
        totals[0] = 0
        byte = self.mpi.BYTE
        for counts in rounds(totals, ROUND_NBYTES):
            if self.is_root:
                displs = displacements(counts)
                received = [self.warm, counts.tolist(), displs.tolist(), byte]
                self.comm.Gatherv(self.mpi.IN_PLACE, received, root=0)
            else:
                nbytes = int(counts[self.comm.rank])
                self.comm.Gatherv([self.warm, nbytes, byte], None, root=0)

    def bare_pwrite(self) -> None:
        """Write as many bytes on the root, to a preallocated file.

        Its own arrays from where they lie, the others' from one round buffer.
        """
        if not self.is_root:
            return
        descriptor = os.open(self.folder / "bound", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.posix_fallocate(descriptor, 0, self.nbytes)
        offset = 0
        for array in self.state.values():
            offset += pwrite(descriptor, as_bytes(array), offset)
        while offset < self.nbytes:
            part = self.warm[: self.nbytes - offset].data
            offset += pwrite(descriptor, part, offset)
        os.fsync(descriptor)
        os.close(descriptor)

    def naive_pickle(self) -> None:
        """Gather pickled dicts, then pickle.dump, as the reference does it."""
        parts = self.comm.gather(self.state, root=0)
        if parts is not None:
            merged = {key: array for part in parts for key, array in part.items()}
            with (self.folder / "a.pkl").open("wb") as file:
                pickle.dump(merged, file, protocol=4)
                file.flush()
                os.fsync(file.fileno())

    def gatherv_h5py(self) -> None:
        """Gather all bytes at once, then write them with h5py."""
        import h5py

        shapes = self.comm.gather(
            {key: array.shape for key, array in self.state.items()}, root=0
        )
        packed = np.concatenate([array.reshape(-1) for array in self.state.values()])
        if not self.is_root:
            self.comm.Gatherv([packed, self.mpi.FLOAT], None, root=0)
            return
        whole = np.empty(self.nbytes // 4, np.float32)
        counts = (self.totals // 4).tolist()
        self.comm.Gatherv([packed, self.mpi.FLOAT], [whole, counts], root=0)
        path = self.folder / "b.h5"
        with h5py.File(path, "w") as file:
            start = 0
            for part in shapes:
                for key, shape in part.items():
                    stop = start + int(np.prod(shape))
                    file.create_dataset(key, data=whole[start:stop].reshape(shape))
                    start = stop
        fsync(path)

    def clean(self) -> None:
        """Remove the files: a job, too, writes new ones each epoch."""
        if self.is_root:
            empty(self.folder)


def bench_gather(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time all sides in turns."""
    state = gpt2_like(args.mib[0] * MIB, comm.rank, comm.size)
    sides = Sides(comm, state, folder / "files")
    chosen = choose(sides.all(), args.sides)
    times = take_turns(comm, chosen, args.repeats, sides.clean)
    return rows_of(
        chosen, times, sides.nbytes, ratio="of_slower_bound", ranks=comm.size
    )
