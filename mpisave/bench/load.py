"""Time of loads in which every rank wants its part, against bare reads and peers.

The files were written by a job before this one, and lie in the page cache.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.peers import Peer, peers
from mpisave.bench.save import VERSION, Saver, sides_of, whole_of
from mpisave.bench.states import flat, offsets
from mpisave.bench.turns import (
    Row,
    Side,
    as_bytes,
    choose,
    pread,
    rows_of,
    take_turns,
    trim,
)

if TYPE_CHECKING:
    import argparse

    from mpisave.bench.states import Arrays, Whole

READY = "bound: pread into ready memory"
FRESH = "bound: pread into fresh memory"


def write(comm: Any, args: argparse.Namespace, folder: Path) -> None:
    """Write what is loaded, a file or more for each side, as the ranks of this job."""
    readers = args.readers
    whole = whole_of(args, least=max(comm.size, readers))
    keys = whole.shares_of_writers(comm.size, readers)[comm.rank]
    saver = Saver(comm, whole, keys, folder / "files")
    others = _peers(comm, saver.arrays, args, folder / "meeting-to-write")
    # Flushed, or the disk would still write while the ranks read.
    # Sides of other names load what mpisave has saved.
    wanted = args.sides and [*args.sides, "mpisave"]
    sides = choose(sides_of(saver, others, durable=True), wanted)
    for side in sides:
        comm.Barrier()
        side.run()
    if comm.rank == 0:
        # The files, what the ranks hold, make anew or check, and whole states.
        needed = (len(sides) + 4 + readers) * whole.nbytes
        if needed > (free := _available()):
            sys.stderr.write(
                f"about {needed >> 20} MiB of memory are needed, and {free >> 20} are "
                f"free: files may not stay in the page cache\n"
            )


def bench_load(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time all sides in turns."""
    whole = whole_of(args, least=max(comm.size, args.writers))
    loader = Loader(comm, whole, args.writers, folder / "files")
    others = _peers(comm, loader.ready, args, folder / "meeting-to-read")
    sides = choose([*loader.sides(), *map(loader.side_of, others)], args.sides)
    times = take_turns(comm, sides, args.repeats, trim)
    return rows_of(
        sides,
        times,
        whole.nbytes,
        arrays=args.many,
        ranks=comm.size,
        writers=args.writers,
    )


def _peers(
    comm: Any, arrays: Arrays, args: argparse.Namespace, meeting: Path
) -> list[Peer]:
    return [
        peer
        for peer in peers(comm, arrays, meeting, loads=True, wanted=args.sides)
        if peer.is_for_any_ranks or args.writers == args.readers
    ]


class Loader:
    """One rank's part in the sides that load one state."""

    def __init__(self, comm: Any, whole: Whole, writers: int, folder: Path) -> None:
        self.comm = comm
        self.whole = whole
        self.folder = folder
        keys = whole.shares(comm.size)[comm.rank]
        self.expected = flat(whole.state(keys))
        self.like = whole.ready(keys)
        self.ready = flat(self.like)
        every = offsets(whole.shapes, whole.shares_of_writers(writers, comm.size))
        self.offsets = {key: every[key] for key in keys}

    def sides(self) -> list[Side]:
        """Return the bounds, and mpisave in each way."""
        found = [
            Side(READY, self.read_ready, (READY,), self.check),
            Side(FRESH, self.read_fresh, (FRESH,), self.check),
        ]
        for into, bound in (("inplace", READY), ("new", FRESH)):
            for format_ in ("pickle", "hdf5"):
                for verify in (True, False):
                    name = f"mpisave {into}, {'HDF5' if format_ == 'hdf5' else format_}"
                    found.append(
                        Side(
                            name if verify else f"{name}, no verify",
                            functools.partial(
                                self.load,
                                format_,
                                like=self.like,
                                into=into,
                                verify=verify,
                            ),
                            (bound,),
                            self.check,
                            VERSION,
                        )
                    )
        whole = functools.partial(self.load, "pickle")
        name = "whole: mpisave on every rank"
        return [*found, Side(name, whole, (FRESH,), self.check, VERSION)]

    def side_of(self, peer: Peer) -> Side:
        """Return the side of a peer."""
        return Side(
            peer.name,
            lambda: peer.load(self.folder),
            (READY if peer.is_in_place else FRESH,),
            self.check,
            peer.version(),
        )

    def read_ready(self) -> Arrays:
        """Read this rank's bytes into arrays whose memory was touched before."""
        self._read(self.ready)
        return self.ready

    def read_fresh(self) -> Arrays:
        """Read this rank's bytes into new arrays."""
        arrays = {
            key: np.empty(array.shape, array.dtype) for key, array in self.ready.items()
        }
        self._read(arrays)
        return arrays

    def _read(self, arrays: Arrays) -> None:
        descriptor = os.open(self.folder / "bound", os.O_RDONLY)
        for key, array in arrays.items():
            pread(descriptor, as_bytes(array), self.offsets[key])
        os.close(descriptor)

    def load(self, format_: str, **options: Any) -> Any:
        """Load with mpisave, together with the other ranks."""
        path = self.folder / f"{format_}.{self.whole.state_type}"
        return mpisave.load(path, comm=self.comm, **options)

    def check(self, loaded: Any) -> None:
        """Refuse arrays that are not what was saved, and spoil the ready memory."""
        arrays = flat(loaded)
        wrong = [
            key
            for key, array in self.expected.items()
            if not np.array_equal(np.asarray(arrays[key]), array)
        ]
        if wrong:
            raise RuntimeError(f"{len(wrong)} arrays differ, {wrong[0]!r} first")
        # The next side that loads in place must not pass with what this one read.
        for array in self.ready.values():
            array.fill(1)


def _available() -> int:
    """Return the bytes of memory that programs and the page cache can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
