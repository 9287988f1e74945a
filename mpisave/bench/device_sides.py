"""The sides that save arrays of a device, each rank its own, and that load them."""

from __future__ import annotations

import functools
import os
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.content import STEP_NBYTES, seen_in_pickle
from mpisave.bench.copies import run_all, steps_of
from mpisave.bench.device_peers import (
    CupySave,
    DevicePeer,
    HandPickle,
    TorchSave,
)
from mpisave.bench.save import VERSION
from mpisave.bench.states import offsets
from mpisave.bench.turns import Side, empty, fsync, pread, pwrite, trim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mpisave.bench.content import Content
    from mpisave.bench.copies import Copies
    from mpisave.bench.meter import Meter
    from mpisave.bench.states import Arrays, Whole

WRITE = "bound: pwrite"
READ = "bound: pread"
COPY = "bound: copy"

_PEERS: tuple[type[DevicePeer], ...] = (TorchSave, CupySave, HandPickle)
# Timed turns of peers: they take longest, and warm up with the small arrays.
_MOST = 2
_PICKLE, _HDF5, _BARE = "pickle.params", "hdf5.params", "bound"


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank measures with: its part of a state, and where to save it."""

    comm: Any
    gpu: Any
    whole: Whole
    content: Content
    arrays: Arrays  # of this rank, on its device
    copies: Copies
    meter: Meter
    folder: Path  # emptied after each turn
    kept: Path  # what a phase leaves to the next
    writers: int  # threads of mpisave on this rank, to write
    readers: int  # and to read

    @property
    def shares(self) -> list[list[str]]:
        """The keys of each rank."""
        return self.whole.shares(self.comm.size)

    @property
    def keys(self) -> list[str]:
        """The keys of all ranks, in the order of a bare file."""
        return [key for keys in self.shares for key in keys]

    def clean(self) -> None:
        """Remove the files: a job, too, writes new ones each epoch."""
        if self.comm.rank == 0:
            empty(self.folder)
        trim()

    def side(self, phase: str, name: str, run: Any, bounds: Any, check: Any) -> Side:
        """Return a side of mpisave, whose memory is measured."""
        run = self.meter.around(f"{phase} {name}", run)
        return Side(name, run, bounds, check, VERSION)


def write_bare(work: Work, path: Path, *, durable: bool, keys: Sequence[str]) -> None:
    """Write the bytes of `keys` to one reserved file, and nothing else. Collective."""
    descriptor = -1
    if work.comm.rank == 0:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.posix_fallocate(descriptor, 0, max(1, work.whole.nbytes))
    work.comm.Barrier()
    if work.comm.rank != 0:
        descriptor = os.open(path, os.O_RDWR)
    places = offsets(work.whole.shapes, work.shares)

    def jobs() -> Iterator[Callable[[], object]]:
        for key in keys:
            for start, part in work.content.steps(key):
                offset = places[key] + start
                yield functools.partial(pwrite, descriptor, part.data, offset)

    run_all(work.writers, jobs())
    if durable:
        os.fsync(descriptor)
    os.close(descriptor)


def check_pickle(work: Work, path: Path) -> None:
    """Refuse a pickle that does not hold the arrays of all ranks."""
    if work.comm.rank == 0:
        work.content.check(seen_in_pickle(path), work.keys)


class SaveSides:
    """Each rank writes its own arrays to one file; peers only where there is one rank.

    Parameters
    ----------
    work : Work
        What is saved, and where.
    wanted : callable
        Returns whether a side of that name is: a library takes seconds to import.
    durable : bool
        Whether files are flushed to the disk.
    """

    def __init__(
        self, work: Work, wanted: Callable[[str], bool], *, durable: bool
    ) -> None:
        self._work = work
        self._durable = durable
        self._parts = steps_of(work.gpu, work.arrays.values())
        self._peers = peers(work, wanted, lambda kind: kind.saves)

    def all(self) -> list[Side]:
        """Return the sides."""
        work, bounds = self._work, (WRITE, COPY)
        own = list(work.arrays)

        def bare() -> None:
            write_bare(work, work.folder / _BARE, durable=self._durable, keys=own)

        def side(name: str, file: str, check: Any, *, hdf5: bool) -> Side:
            def run() -> None:
                mpisave.save(
                    work.arrays,
                    work.folder / file,
                    state_type="params",
                    use_binary_format=hdf5,
                    durable=self._durable,
                    comm=work.comm,
                )

            return work.side("save", name, run, bounds, check)

        return [
            Side(WRITE, bare, (WRITE,), self._check_bare),
            Side(COPY, lambda: work.copies.to_host(self._parts), (COPY,)),
            side("mpisave pickle", _PICKLE, self._check_pickle, hdf5=False),
            side("mpisave HDF5", _HDF5, self._check_hdf5, hdf5=True),
            *map(self._of_peer, self._peers),
        ]

    def _of_peer(self, peer: DevicePeer) -> Side:
        work = self._work

        def check(_: object) -> None:
            work.content.check(peer.saved(work.folder), work.keys)
            if peer.loads:
                self._keep(peer.file)

        return Side(
            peer.saves,
            lambda: peer.save(work.folder, durable=self._durable),
            (WRITE, COPY),
            check,
            peer.version(),
            _MOST,
        )

    def _check_bare(self, _: object) -> None:
        work = self._work
        places = offsets(work.whole.shapes, work.shares)
        if work.comm.rank == 0:
            data = np.memmap(work.folder / _BARE, np.uint8, "r")
            work.content.check(_views(work, data, places), work.keys)
        self._keep(_BARE)

    def _check_pickle(self, _: object) -> None:
        check_pickle(self._work, self._work.folder / _PICKLE)
        self._keep(_PICKLE)

    def _check_hdf5(self, _: object) -> None:
        import h5py

        work = self._work
        if work.comm.rank == 0:
            path = work.folder / _HDF5
            with h5py.File(path, "r") as file:
                kinds = {(file[key].dtype, file[key].shape) for key in work.keys}
                places = {key: file[key].id.get_offset() for key in work.keys}
            if kinds - {(np.dtype("<f4"), s) for s in work.whole.shapes.values()}:
                raise RuntimeError(f"datasets of {kinds} are in {path}")
            data = np.memmap(path, np.uint8, "r")
            work.content.check(_views(work, data, places), work.keys)

    def _keep(self, name: str) -> None:
        """Leave a file to the sides that load, on one rank."""
        work = self._work
        if work.comm.size == 1 and not (work.kept / name).exists():
            (work.folder / name).rename(work.kept / name)


class LoadSides:
    """One rank loads all arrays to its device, from files in the page cache.

    Parameters
    ----------
    work : Work
        What is loaded, and from where. Its arrays are loaded into.
    wanted : callable
        Returns whether a side of that name is.
    """

    def __init__(self, work: Work, wanted: Callable[[str], bool]) -> None:
        self._work = work
        self._parts = steps_of(work.gpu, work.arrays.values())
        self._peers = peers(work, wanted, lambda kind: kind.loads)
        self._free = deque(work.gpu.pinned(STEP_NBYTES) for _ in range(work.readers))
        for buffer in self._free:
            buffer[:] = 1
        self._write()
        self._spoil()

    def _write(self) -> None:
        """Write what no phase before has left; have all of it on the disk."""
        work = self._work
        if not (work.kept / _BARE).exists():
            write_bare(work, work.kept / _BARE, durable=False, keys=work.keys)
        if not (work.kept / _PICKLE).exists():
            path = work.kept / _PICKLE
            mpisave.save(work.arrays, path, state_type="params", comm=work.comm)
        for peer in self._peers:
            if not (work.kept / peer.file).exists():
                peer.save(work.kept, durable=False)
        # Or the disk would still write while the sides read.
        for path in work.kept.rglob("*"):
            if path.is_file():
                fsync(path)

    def all(self) -> list[Side]:
        """Return the sides."""
        work = self._work
        # Those that make new arrays last, and these have memory in CuPy's pool from
        # the turn that warms up.
        return [
            Side(READ, self._read, (READ,)),
            Side(COPY, lambda: work.copies.to_device(self._parts), (COPY,)),
            self._mpisave("mpisave in place", like=work.arrays, into="inplace"),
            self._mpisave(
                "mpisave in place, no verify",
                like=work.arrays,
                into="inplace",
                verify=False,
            ),
            self._mpisave("mpisave device=", device="cuda"),
            self._mpisave("mpisave device=, no verify", device="cuda", verify=False),
            *map(self._of_peer, self._peers),
            Side(
                "mpisave to the host, cupy.asarray",
                self._by_host,
                (READ, COPY),
                self._check,
                VERSION,
                _MOST,
            ),
        ]

    def _mpisave(self, name: str, **options: Any) -> Side:
        work = self._work

        def run() -> Any:
            loaded = mpisave.load(work.kept / _PICKLE, **options)
            work.gpu.synchronize()
            return loaded

        return work.side("load", name, run, (READ, COPY), self._check)

    def _of_peer(self, peer: DevicePeer) -> Side:
        return Side(
            peer.loads,
            lambda: peer.load(self._work.kept),
            (READ, COPY),
            self._check,
            peer.version(),
            _MOST,
        )

    def _by_host(self) -> Arrays:
        work = self._work
        loaded = mpisave.load(work.kept / _PICKLE)
        arrays = {key: work.gpu.asarray(array) for key, array in loaded.items()}
        work.gpu.synchronize()
        return arrays

    def _read(self) -> None:
        """Read the bare file to pinned memory, and nothing else."""
        work = self._work
        nbytes = work.whole.nbytes
        descriptor = os.open(work.kept / _BARE, os.O_RDONLY)

        def read(start: int) -> None:
            buffer = self._free.popleft()
            pread(descriptor, buffer[: nbytes - start].data, start)
            self._free.append(buffer)

        starts = range(0, nbytes, STEP_NBYTES)
        run_all(work.readers, (functools.partial(read, start) for start in starts))
        os.close(descriptor)

    def _check(self, loaded: Arrays) -> None:
        work = self._work
        work.copies.check(work.content, loaded, work.keys)
        # The next side that loads in place must not pass with what this one read.
        self._spoil()

    def _spoil(self) -> None:
        for array in self._work.arrays.values():
            self._work.gpu.spoil(array)


def peers(
    work: Work,
    wanted: Callable[[str], bool],
    name_of: Callable[[type[DevicePeer]], str],
) -> list[DevicePeer]:
    """Return the peers that work: each saves and loads the small arrays once, to see.

    That is also what warms them up. Only where one rank is alone.
    """
    least = min(map(work.content.nbytes, work.arrays), default=0)
    few = {
        key: array
        for key, array in work.arrays.items()
        if work.content.nbytes(key) <= max(least, 64 * 2**10)
    }
    found = []
    for kind in _PEERS if work.comm.size == 1 else ():
        if not name_of(kind) or not wanted(name_of(kind)):
            continue
        try:
            warm = kind(work.gpu, few)
            warm.save(work.folder, durable=False)
            if kind.loads:
                warm.load(work.folder)
            found.append(kind(work.gpu, work.arrays))
        except Exception as exc:  # noqa: BLE001 - of any library, absent or at odds
            why = f"{type(exc).__name__}: {exc}"
            sys.stderr.write(f"{name_of(kind)} is left out: {why}\n")
        work.clean()
    return found


def _views(work: Work, data: Any, places: dict[str, int]) -> Arrays:
    """Return the arrays that begin at some bytes of a file."""
    return {
        key: data[at : at + work.content.nbytes(key)]
        .view(np.float32)
        .reshape(work.whole.shapes[key])
        for key, at in places.items()
    }
