"""Save arrays of every rank to one file, load it in one process, compare bit for bit.

::

    srun --mpi=pmi2 python -m mpi4py slurm/save_load.py --out runs/save_load --mib 64

Parameters and optimizer state, each as pickle and as HDF5, are gathered to rank 0.
There `mpisave.load` reads them, and so does a reader that knows nothing of mpisave:
`pickle.load` or h5py. Both must give what the ranks have saved.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np
from mpi4py import MPI

import mpisave

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

StateDict: TypeAlias = "dict[str, Any]"
Array: TypeAlias = "np.ndarray[Any, Any]"

LAYERS = 4  # a rank
COLUMNS = 64  # of a layer's weight


def make_array(key: str, rank: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Return the array of `key` on `rank`: the same wherever it is called."""
    random = np.random.default_rng([zlib.crc32(key.encode()), rank])
    return np.asarray(random.standard_normal(shape, np.float32)).astype(dtype)


def make_params(rank: int, nbytes: int) -> StateDict:
    """Return the parameters of one rank: `nbytes` of weights, and odd small arrays."""
    rows = nbytes // (LAYERS * COLUMNS * 4)
    shapes = {
        **{f"layer{i}.weight": ((rows, COLUMNS), "float32") for i in range(LAYERS)},
        "scale": ((), "float16"),
        "mask": ((3, 5), "bool"),
        "steps": ((7,), "int64"),
        "unused": ((0, 5), "complex64"),
    }
    keys = {f"rank{rank}.{name}": shape for name, shape in shapes.items()}
    return {key: make_array(key, rank, *shape) for key, shape in keys.items()}


def make_opt(rank: int, nbytes: int) -> StateDict:
    """Return the optimizer state of one rank: `nbytes` in two moments a weight."""
    rows = nbytes // (LAYERS * COLUMNS * 4 * 2)
    state: StateDict = {"master_weights": {}}
    for weight in (f"rank{rank}.layer{i}.weight" for i in range(LAYERS)):
        for name, shape in (
            (f"{weight}_moment1_0", (rows, COLUMNS)),
            (f"{weight}_moment2_0", (rows, COLUMNS)),
            (f"{weight}_beta1_pow_acc_0", (1,)),
        ):
            state[name] = make_array(name, rank, shape, "float32")
        master = make_array(f"master {weight}", rank, (16, COLUMNS), "float32")
        state["master_weights"][weight] = master
    # Small objects, the same on every rank.
    state["LR_Scheduler"] = {"last_epoch": 3, "last_lr": 0.01}
    return state


def leaves(state: StateDict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what a nested state holds, with its keys joined by slashes."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield "/".join((*above, key)), value


def load_mpisave(path: Path) -> StateDict:
    """Return what mpisave reads from a file, by joined key."""
    return dict(leaves(mpisave.load(path)))


def load_pickle(path: Path) -> StateDict:
    """Return what stock `pickle` reads from a file, by joined key."""
    with path.open("rb") as file:
        return dict(leaves(pickle.load(file)))


def load_hdf5(path: Path) -> StateDict:
    """Return the datasets that h5py finds in a file, by joined key."""
    found: StateDict = {}

    def read(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(read)
    return found


def is_same(found: object, saved: object) -> bool:
    """Return whether two arrays have one dtype, shape and bytes, or objects equal."""
    if not isinstance(saved, np.ndarray):
        return type(found) is type(saved) and found == saved
    # h5py gives a scalar for a dataset without axes.
    array = np.asarray(found)
    if (array.dtype, array.shape) != (saved.dtype, saved.shape):
        return False
    # By bytes: a NaN is not equal to itself.
    ours, theirs = (np.ascontiguousarray(a).reshape(-1) for a in (saved, array))
    return np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))


def compare(
    found: StateDict, make: Callable[[int], StateDict], size: int, *, arrays_only: bool
) -> list[str]:
    """Compare one file's content with what all ranks have saved.

    Parameters
    ----------
    found : dict
        The file's content, by joined key.
    make : callable
        Returns the state of a rank. Ranks are gone through one by one, so that only
        one rank's state is held beside the file's.
    size : int
        Number of ranks.
    arrays_only : bool
        Whether to leave out small objects: HDF5 has no one way to store them.

    Returns
    -------
    list of str
        One line a difference.
    """
    differences = []
    expected = set()
    for rank in range(size):
        for key, saved in leaves(make(rank)):
            if arrays_only and not isinstance(saved, np.ndarray):
                continue
            expected.add(key)
            if key not in found:
                differences.append(f"{key}: missing")
            elif not is_same(found[key], saved):
                differences.append(f"{key}: not what rank {rank} saved")
    extra = () if arrays_only else found.keys() - expected
    return [*differences, *(f"{key}: saved by no rank" for key in sorted(extra))]


def check(path: Path, make: Callable[[int], StateDict], size: int) -> list[str]:
    """Load a file with mpisave and with a stock reader; return all differences."""
    is_hdf5 = h5py.is_hdf5(path)
    stock, reader = (load_hdf5, "h5py") if is_hdf5 else (load_pickle, "pickle.load")
    differences = []
    for name, load in (("mpisave.load", load_mpisave), (reader, stock)):
        arrays_only = load is load_hdf5
        lines = compare(load(path), make, size, arrays_only=arrays_only)
        print(f"{path.name}: {name}: {'differs' if lines else 'equal'}")
        differences += [f"{path.name}: {name}: {line}" for line in lines]
    return differences


def count_nodes(comm: MPI.Intracomm) -> tuple[int, list[str]]:
    """Return the number of nodes that MPI sees, and their names. Collective."""
    on_node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = comm.allreduce(int(on_node.rank == 0))
    on_node.Free()
    # Slurm's name of the node: the one by which a user asks for it.
    name = os.environ.get("SLURMD_NODENAME", MPI.Get_processor_name())
    return nodes, sorted(set(comm.allgather(name)))


def main() -> None:
    """Save, load and compare; exit with 1 at any difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--mib", type=int, default=64, help="MiB in each file")
    parser.add_argument(
        "--max-grouped-size",
        default="1M",
        help="cap of one round; small by default, so that there are several",
    )
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    nbytes = args.mib * 2**20 // comm.size
    nodes, names = count_nodes(comm)
    if comm.rank == 0:
        where = f"{comm.size} rank(s) on {nodes} node(s)"
        print(f"save_load: {where}: {' '.join(names)}")
        # Nobody waits for it: the other ranks do not touch the file system.
        args.out.mkdir(parents=True, exist_ok=True)

    saved: list[tuple[Path, Callable[[int], StateDict]]] = []
    for state_type, make_state in (("params", make_params), ("opt", make_opt)):
        make = functools.partial(make_state, nbytes=nbytes)
        state = make(comm.rank)
        for format_name in ("pickle", "hdf5"):
            path = args.out / f"{format_name}.pd{state_type}"
            report = mpisave.save(
                state,
                path,
                use_binary_format=format_name == "hdf5",
                gather_to=0,
                state_type=state_type,
                max_grouped_size=args.max_grouped_size,
                comm=comm,
            )
            if comm.rank == 0:
                print(report)
                saved.append((path, make))

    # One process from here on: `saved` is empty on all ranks but 0.
    lines = [line for path, make in saved for line in check(path, make, comm.size)]
    if lines:
        sys.exit("\n".join([*lines[:20], "save_load: FAILED"]))
    if comm.rank == 0:
        print("save_load: ok")


if __name__ == "__main__":
    main()
