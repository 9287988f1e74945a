"""Time of saves in which all ranks write, against bare writes and peers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.peers import Peer, peers
from mpisave.bench.states import MIB, flat, gpt2, many, with_moments
from mpisave.bench.turns import (
    Row,
    Side,
    as_bytes,
    choose,
    empty,
    nbytes_in,
    pwrite,
    rows_of,
    take_turns,
    trim,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from mpisave.bench.states import Whole

BOUND = "bound: pwrite"
VERSION = f"mpisave {mpisave.__version__}"


def whole_of(args: argparse.Namespace, *, least: int) -> Whole:
    """Return the state that the command line asks for, `least` layers or more."""
    if args.many is not None:
        whole = many(args.many, args.each)
    else:
        nbytes = args.mib[0] * MIB
        whole = gpt2(nbytes // 3 if args.moments else nbytes, least=least)
    return with_moments(whole) if args.moments else whole


class Saver:
    """One rank's part in the sides that save one state."""

    def __init__(
        self, comm: Any, whole: Whole, keys: Sequence[str], folder: Path
    ) -> None:
        self.comm = comm
        self.state = whole.state(keys)
        self.state_type = whole.state_type
        self.arrays = flat(self.state)
        self.folder = folder
        totals = comm.allgather(sum(a.nbytes for a in self.arrays.values()))
        self.start = sum(totals[: comm.rank])
        self.nbytes = sum(totals)

    def path(self, *, hdf5: bool) -> Path:
        """Return the name of the one file that mpisave writes."""
        return self.folder / f"{'hdf5' if hdf5 else 'pickle'}.{self.state_type}"

    def bare(self, *, durable: bool) -> None:
        """Write the bytes of all ranks to one reserved file, and nothing else."""
        path = self.folder / "bound"
        descriptor = -1
        if self.comm.rank == 0:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.posix_fallocate(descriptor, 0, max(1, self.nbytes))
        self.comm.Barrier()
        if self.comm.rank != 0:
            descriptor = os.open(path, os.O_RDWR)
        offset = self.start
        for array in self.arrays.values():
            offset += pwrite(descriptor, as_bytes(array), offset)
        if durable:
            os.fsync(descriptor)
        os.close(descriptor)

    def mpisave(self, *, hdf5: bool, durable: bool) -> None:
        """Save to one file with mpisave; every rank writes its own arrays."""
        mpisave.save(
            self.state,
            self.path(hdf5=hdf5),
            state_type=self.state_type,
            use_binary_format=hdf5,
            durable=durable,
            comm=self.comm,
        )

    def check(self, _: object) -> None:
        """Refuse files that cannot hold the bytes of all ranks."""
        if self.comm.rank == 0 and (found := nbytes_in(self.folder)) < self.nbytes:
            raise RuntimeError(f"{found} bytes were written, not {self.nbytes}")

    def clean(self) -> None:
        """Remove the files: a job, too, writes new ones each epoch."""
        if self.comm.rank == 0:
            empty(self.folder)
        trim()


def sides_of(saver: Saver, others: list[Peer], *, durable: bool) -> list[Side]:
    """Return every side but the copy in memory."""

    def side(name: str, run: Any, version: str = VERSION) -> Side:
        return Side(name, run, (BOUND,), saver.check, version)

    def of_peer(peer: Peer) -> Side:
        return side(
            peer.name,
            lambda: peer.save(saver.folder, durable=durable),
            peer.version(),
        )

    return [
        side(BOUND, lambda: saver.bare(durable=durable), ""),
        side("mpisave pickle", lambda: saver.mpisave(hdf5=False, durable=durable)),
        side("mpisave HDF5", lambda: saver.mpisave(hdf5=True, durable=durable)),
        *map(of_peer, others),
    ]


def bench_save(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time all sides in turns, without fsync, with it, or both."""
    whole = whole_of(args, least=comm.size)
    keys = whole.shares(comm.size)[comm.rank]
    files = folder / "files"
    saver = Saver(comm, whole, keys, files)
    ready = flat(whole.ready(keys))

    def copy() -> None:
        for key, array in saver.arrays.items():
            np.copyto(ready[key], array)

    others = peers(
        comm, saver.arrays, folder / "meeting", loads=False, wanted=args.sides
    )
    rows: list[Row] = []
    for fsync in ("off", "on") if args.fsync == "both" else (args.fsync,):
        sides = [
            Side("bound: memcpy", copy, (BOUND,)),
            *sides_of(saver, others, durable=fsync == "on"),
        ]
        sides = choose(sides, args.sides)
        times = take_turns(comm, sides, args.repeats, saver.clean)
        rows += rows_of(
            sides,
            times,
            saver.nbytes,
            arrays=args.many,
            ranks=comm.size,
            fsync=fsync,
        )
    return rows
