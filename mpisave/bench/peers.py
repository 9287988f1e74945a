"""Other ways to save the same arrays, each where its library is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pickle
import platform
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.bench.turns import fsync

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpisave.bench.states import Arrays


class Peer:
    """One other way: a file for each rank, unless a class says otherwise.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks that save or load together.
    arrays : dict of str to numpy.ndarray
        What this rank saves, or the memory it loads into.
    """

    name = ""
    library = ""
    # Whether `load` fills the arrays that it was given, instead of making new ones.
    is_in_place = False
    # Whether other ranks, or more of them, can load than have saved.
    is_for_any_ranks = False

    def __init__(self, comm: Any, arrays: Arrays) -> None:
        self.comm = comm
        self.arrays = arrays

    @classmethod
    def is_installed(cls) -> bool:
        """Return whether the library can be imported."""
        return importlib.util.find_spec(cls.library) is not None

    @classmethod
    def version(cls) -> str:
        """Return the name and version of the library."""
        return f"{cls.library} {importlib.metadata.version(cls.library)}"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save what this rank holds, flushed to the disk if `durable`."""
        raise NotImplementedError

    def load(self, folder: Path) -> Any:
        """Load what this rank has saved; return it by flat key."""
        raise NotImplementedError

    def _path(self, folder: Path) -> Path:
        # Files of several peers lie side by side where they are loaded.
        return folder / f"{type(self).__name__}.{self.comm.rank}"


class Pickle4(Peer):
    """``pickle.dump`` in protocol 4, which copies every array."""

    name = "pickle protocol 4, a file a rank"
    library = "pickle"
    protocol = 4

    @classmethod
    def version(cls) -> str:
        """Return the version of Python."""
        return f"Python {platform.python_version()}"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Dump the dict."""
        dump(self.arrays, self._path(folder), self.protocol, durable=durable)

    def load(self, folder: Path) -> Any:
        """Load the dict."""
        with self._path(folder).open("rb") as file:
            return pickle.load(file)


class Pickle5(Pickle4):
    """``pickle.dump`` in protocol 5, in band."""

    name = "pickle protocol 5, a file a rank"
    protocol = 5


class Savez(Peer):
    """``np.savez``."""

    name = "np.savez, a file a rank"
    library = "numpy"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save as an uncompressed zip file."""
        with self._path(folder).open("wb") as file:
            np.savez(file, **self.arrays)
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def load(self, folder: Path) -> Any:
        """Load every array."""
        with np.load(self._path(folder)) as file:
            return {key: file[key] for key in file.files}


class H5py(Peer):
    """A dataset for each array."""

    name = "h5py, a file a rank"
    library = "h5py"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Create every dataset."""
        import h5py

        path = self._path(folder)
        with h5py.File(path, "w") as file:
            for key, array in self.arrays.items():
                file.create_dataset(key, data=array)
        if durable:
            fsync(path)

    def load(self, folder: Path) -> Any:
        """Read every dataset."""
        import h5py

        with h5py.File(self._path(folder), "r") as file:
            return {key: file[key][()] for key in self.arrays}


class Safetensors(Peer):
    """``safetensors.numpy``."""

    name = "safetensors, a file a rank"
    library = "safetensors"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save the dict."""
        from safetensors.numpy import save_file

        path = self._path(folder)
        save_file(self.arrays, path)
        if durable:
            fsync(path)

    def load(self, folder: Path) -> Any:
        """Load the dict."""
        from safetensors.numpy import load_file

        return load_file(self._path(folder))


class Torch(Peer):
    """``torch.save`` of tensors that share the memory of the arrays."""

    name = "torch.save, a file a rank"
    library = "torch"

    def __init__(self, comm: Any, arrays: Arrays) -> None:
        import torch

        super().__init__(comm, arrays)
        # A rank has a core: more threads would take those of other ranks.
        torch.set_num_threads(1)
        self.tensors = {key: torch.from_numpy(a) for key, a in arrays.items()}

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save the dict of tensors."""
        import torch

        path = self._path(folder)
        torch.save(self.tensors, path)
        if durable:
            fsync(path)

    def load(self, folder: Path) -> Any:
        """Load the dict of tensors."""
        import torch

        return torch.load(self._path(folder), weights_only=True)


class Dcp(Torch):
    """``torch.distributed.checkpoint``: a directory with a file for each rank.

    Its ranks talk over gloo, and meet in a file beside the directory that is measured.
    """

    name = "torch.distributed.checkpoint"
    is_in_place = True
    is_for_any_ranks = True

    def __init__(self, comm: Any, arrays: Arrays, meeting: Path) -> None:
        import torch.distributed

        super().__init__(comm, arrays)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{meeting.resolve()}",
                rank=comm.rank,
                world_size=comm.size,
            )

    def _path(self, folder: Path) -> Path:
        return folder / "dcp"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save the tensors of all ranks."""
        from torch.distributed import checkpoint

        writer = checkpoint.FileSystemWriter(self._path(folder), sync_files=durable)
        checkpoint.save(self.tensors, storage_writer=writer)

    def load(self, folder: Path) -> Any:
        """Load into the tensors, whichever ranks have saved them."""
        from torch.distributed import checkpoint

        reader = checkpoint.FileSystemReader(self._path(folder))
        checkpoint.load(self.tensors, storage_reader=reader)
        return self.tensors


class GatherPickle(Pickle4):
    """``comm.gather``, then one pickle of the whole state on rank 0."""

    name = "comm.gather + pickle.dump, one file"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Gather pickled dicts, and dump their union."""
        parts = self.comm.gather(self.arrays, root=0)
        if parts is not None:
            merged = {key: array for part in parts for key, array in part.items()}
            dump(merged, self._path(folder), self.protocol, durable=durable)


def peers(
    comm: Any,
    arrays: Arrays,
    meeting: Path,
    *,
    loads: bool,
    wanted: Sequence[str] | None = None,
) -> list[Peer]:
    """Return the peers that are installed and compare.

    Parameters
    ----------
    comm, arrays
        As every peer takes them.
    meeting : pathlib.Path
        A file that does not exist yet, for the ranks of torch to meet in.
    loads : bool
        Whether to leave out those that do not load as many ranks do.
    wanted : sequence of str, optional
        Leave out those whose name contains none of these.
    """

    def is_wanted(kind: type[Peer]) -> bool:
        # Asked before it is made: torch takes seconds and memory to import.
        is_named = wanted is None or any(word in kind.name for word in wanted)
        return is_named and kind.is_installed()

    simple = [Pickle4, Pickle5, Savez, H5py, Safetensors, Torch]
    found: list[Peer] = [kind(comm, arrays) for kind in simple if is_wanted(kind)]
    if is_wanted(Dcp):
        found.append(Dcp(comm, arrays, meeting))
    if is_wanted(GatherPickle) and not loads:
        found.append(GatherPickle(comm, arrays))
    return found


def close(comm: Any) -> None:
    """End what torch started. Collective over `comm`."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        comm.Barrier()  # no rank still talks to this one
        distributed.destroy_process_group()
        # A thread of gloo still asks for the GIL, to free what it sent last. Where
        # Python ends before it gets it, "terminate called without an active exception"
        # ends the job: 5 of 12 jobs of one rank, with torch 2.13.
        time.sleep(0.2)


def dump(arrays: Arrays, path: Path, protocol: int, *, durable: bool) -> None:
    """Pickle arrays to a file, flushed to the disk if `durable`."""
    with path.open("wb") as file:
        pickle.dump(arrays, file, protocol=protocol)
        if durable:
            file.flush()
            os.fsync(file.fileno())
