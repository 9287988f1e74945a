"""Measurements: ``python -m mpisave.bench gather | memory | layout``.

Every figure is a ratio against a reference that ran beside it: the sides take turns,
and medians are compared. Each side ends with the bytes flushed to the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.formats.hdf5 import HDF5Format
from mpisave.formats.pkl import PickleFormat
from mpisave.metadata import describe, merge
from mpisave.plan import ROUND_NBYTES, displacements, rounds
from mpisave.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
State = dict[str, Any]

# The shapes of one block of GPT-2 (Radford et al., 2019), hidden size 768.
_BLOCK = {
    "ln_1.weight": (768,),
    "ln_1.bias": (768,),
    "attn.c_attn.weight": (768, 2304),
    "attn.c_attn.bias": (2304,),
    "attn.c_proj.weight": (768, 768),
    "attn.c_proj.bias": (768,),
    "ln_2.weight": (768,),
    "ln_2.bias": (768,),
    "mlp.c_fc.weight": (768, 3072),
    "mlp.c_fc.bias": (3072,),
    "mlp.c_proj.weight": (3072, 768),
    "mlp.c_proj.bias": (768,),
}


def gpt2_like(nbytes: int, rank: int, size: int) -> State:
    """Return this rank's blocks of a float32 state of about `nbytes` in all."""
    block_nbytes = 4 * sum(int(np.prod(shape)) for shape in _BLOCK.values())
    blocks = max(size, round(nbytes / block_nbytes))
    rng = np.random.default_rng(rank)
    state = {}
    for block in range(rank, blocks, size):
        for name, shape in _BLOCK.items():
            state[f"h.{block}.{name}"] = rng.standard_normal(shape, np.float32)
    return state


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

    def all(self) -> dict[str, Callable[[], None]]:
        """Return the sides by name."""
        return {
            "bound: Gatherv rounds": self.bare_gatherv,
            "bound: pwrite": self.bare_pwrite,
            "mpisave pickle": lambda: self.mpisave("x.params", hdf5=False),
            "mpisave HDF5": lambda: self.mpisave("x.h5.params", hdf5=True),
            "(a) comm.gather + pickle.dump": self.naive_pickle,
            "(b) Gatherv + h5py": self.gatherv_h5py,
        }

    def mpisave(self, name: str, *, hdf5: bool) -> None:
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
            offset += _pwrite(descriptor, array.reshape(-1).view(np.uint8).data, offset)
        while offset < self.nbytes:
            part = self.warm[: self.nbytes - offset].data
            offset += _pwrite(descriptor, part, offset)
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
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
    """Write all of `data`; return how many bytes it has."""
    done = 0
    while done < data.nbytes:
        done += os.pwrite(descriptor, data[done:], offset + done)
    return done


def bench_gather(comm: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all sides for each size, in turns; return a row a side."""
    rows = []
    for mib in args.mib:
        with _shared_folder(comm, args.dir) as folder:
            sides = Sides(comm, gpt2_like(mib * MIB, comm.rank, comm.size), folder)
            times: dict[str, list[float]] = {name: [] for name in sides.all()}
            for repeat in range(args.repeats + 1):
                for name, side in sides.all().items():
                    comm.Barrier()
                    began = time.perf_counter()
                    side()
                    comm.Barrier()
                    if repeat:  # the first one warms up
                        times[name].append(time.perf_counter() - began)
                    # A new file each time, as a job writes one each epoch.
                    if comm.rank == 0:
                        for path in folder.iterdir():
                            path.unlink()
            rows += _rows(times, sides.nbytes, comm.size)
    return rows


def _rows(
    times: dict[str, list[float]], nbytes: int, ranks: int
) -> list[dict[str, Any]]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    slower = max(value for name, value in medians.items() if name.startswith("bound"))
    return [
        {
            "side": name,
            "ranks": ranks,
            "mib": round(nbytes / MIB),
            "median_s": median,
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "gb_per_s": nbytes / median / 1e9,
            "of_slower_bound": slower / median,
        }
        for name, median in medians.items()
    ]


def bench_memory(comm: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the root's peak memory above what it had before, for each format."""
    rows = []
    for name, hdf5 in (("mpisave pickle", False), ("mpisave HDF5", True)):
        for mib in args.mib:
            with _shared_folder(comm, args.dir) as folder:
                state = gpt2_like(mib * MIB, comm.rank, comm.size)
                comm.Barrier()
                # Linux: 5 resets the high-water mark (proc(5), clear_refs).
                Path("/proc/self/clear_refs").write_text("5")
                before = _status("VmRSS")
                report = mpisave.save(
                    state,
                    folder / "x.params",
                    gather_to=0,
                    state_type="params",
                    use_binary_format=hdf5,
                    max_grouped_size=args.cap,
                    comm=comm,
                )
                extra = comm.bcast(_status("VmHWM") - before)
                rows.append(
                    {
                        "side": name,
                        "ranks": comm.size,
                        "mib": report.payload_nbytes / MIB,
                        "cap": args.cap,
                        "root_extra_mib": extra / MIB,
                    }
                )
    return rows


def _status(field: str) -> int:
    """Return a memory field of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def bench_layout(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the layout of many arrays, in one process."""
    state = {f"layer{i}.weight": np.zeros(256, np.float32) for i in range(args.arrays)}
    merged = merge([describe(flatten(state))[0]])
    rows = []
    for format_ in (PickleFormat(4), HDF5Format()):
        times = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            format_.layout(merged, {})
            times.append(time.perf_counter() - began)
        median = statistics.median(times[1:])
        rows.append({"side": format_.name, "arrays": args.arrays, "median_s": median})
    return rows


class _shared_folder:  # noqa: N801 - used as a function
    """A folder that all ranks know, removed at the end."""

    def __init__(self, comm: Any, parent: str | None) -> None:
        self._comm = comm
        made = tempfile.mkdtemp(prefix="mpisave-bench-", dir=parent)
        self._path = Path(comm.bcast(made))
        if str(self._path) != made:
            Path(made).rmdir()

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *exc: object) -> None:
        self._comm.Barrier()
        if self._comm.rank == 0:
            shutil.rmtree(self._path)
        self._comm.Barrier()


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with aligned columns."""
    names = list(rows[0])
    cells = [names] + [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mpisave.bench", description=__doc__
    )
    parser.add_argument("what", choices=("gather", "memory", "layout"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mib", type=int, nargs="+", help="size of the whole state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="where to write; default: TMPDIR")
    parser.add_argument("--cap", default="64M", help="max_grouped_size of 'memory'")
    parser.add_argument("--arrays", type=int, default=10_000, help="of 'layout'")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--rank-job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.mib is None:
        args.mib = [1024] if args.what == "memory" else [256, 1024]
    if args.what == "memory" and "--ranks" not in argv:
        args.ranks = [4]
    return args


def _launch(argv: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the measurement once for each number of ranks, an mpirun each."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            job = [sys.executable, "-m", "mpi4py", "-m", "mpisave.bench", *argv]
            subprocess.run(
                [mpirun, "-n", str(ranks), *job, "--rank-job", str(out)], check=True
            )
            rows += json.loads(out.read_text())
    return rows


def main(argv: list[str]) -> int:
    """Measure, print a table, and return the exit status."""
    args = _parse(argv)
    if args.what == "layout":
        rows = bench_layout(args)
    elif args.rank_job is None:
        rows = _launch(argv, args)
    else:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD.Dup()  # noqa: TID251 - a program, not a library
        measure = bench_gather if args.what == "gather" else bench_memory
        rows = measure(comm, args)
        if comm.rank == 0:
            args.rank_job.write_text(json.dumps(rows))
        return 0
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
