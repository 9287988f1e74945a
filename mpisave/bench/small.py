"""What is not time of payload: memory, layout, planning, small messages."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisave
from mpisave.bench.meter import reset_peak, status
from mpisave.bench.states import MIB, gpt2_like, many
from mpisave.formats.hdf5 import HDF5Format
from mpisave.formats.pkl import PickleFormat
from mpisave.merging import merge
from mpisave.metadata import Described, Description, describe
from mpisave.plan import cut
from mpisave.tree import flatten

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from mpisave.bench.turns import Row

CASES = ("disjoint", "replicated", "row shards")
_FORMATS = (("mpisave pickle", False), ("mpisave HDF5", True))


def bench_memory(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure the root's peak memory above what it had before, for each format."""
    rows = []
    for name, hdf5 in _FORMATS:
        state = gpt2_like(args.mib[0] * MIB, comm.rank, comm.size)
        comm.Barrier()
        reset_peak()
        before = status("VmRSS")
        report = mpisave.save(
            state,
            folder / "files" / f"{name.split()[-1]}.params",
            gather_to=0,
            state_type="params",
            use_binary_format=hdf5,
            max_grouped_size=args.cap,
            comm=comm,
        )
        extra = comm.bcast(status("VmHWM") - before)
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


def bench_layout(args: argparse.Namespace) -> list[Row]:
    """Time the layout of many arrays, in one process."""
    state = {f"layer{i}.weight": np.zeros(256, np.float32) for i in range(args.arrays)}
    _, _, description = describe(flatten(state))
    merged = merge([description])
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


def bench_plan(args: argparse.Namespace) -> list[Row]:
    """Time the planning of a save of many ranks, in one process."""
    rows = []
    for ranks in args.ranks:
        for case in CASES:
            times = [
                plan_case(case, ranks, args.arrays) for _ in range(args.repeats + 1)
            ]
            rows.append(
                {
                    "side": case,
                    "ranks": ranks,
                    "arrays": args.arrays,
                    "median_s": statistics.median(times[1:]),
                }
            )
    return rows


def plan_case(case: str, ranks: int, arrays: int) -> float:
    """Return the seconds that planning one save takes, without MPI.

    Parameters
    ----------
    case : {"disjoint", "replicated", "row shards"}
        Whether each array is on one rank, on all of them, or split by rows among all.
    ranks, arrays : int
        Simulated ranks, and arrays that each of them holds.
    """
    descriptions = [_describe_case(case, rank, ranks, arrays) for rank in range(ranks)]
    began = time.perf_counter()
    pieces, _ = cut(merge(descriptions))
    pieces.by_rank(ranks)
    return time.perf_counter() - began


def _describe_case(case: str, rank: int, ranks: int, arrays: int) -> Description:
    """Return what a simulated rank holds: `arrays` arrays of 64 floats, or rows."""
    shape = (ranks, 64) if case == "row shards" else (64,)
    first = f"r{rank}." if case == "disjoint" else ""
    described = [Described((), "dict", None)]
    described += [
        Described((f"{first}layer{number}.weight",), "array", ("<f4", shape))
        for number in range(arrays)
    ]
    is_cut = case == "row shards"
    boxes = [rank, 0, 1, 64] * arrays if is_cut else []
    return Description.pack(described, [int(is_cut)] * arrays, boxes)


def bench_traffic(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Count the bytes besides payload in two saves of one structure."""
    rows = []
    for name, hdf5 in _FORMATS:
        path = folder / "files" / f"{name.split()[-1]}.params"
        first, second = metadata_nbytes(comm, args.arrays, path, hdf5=hdf5)
        rows.append(
            {
                "side": name,
                "ranks": comm.size,
                "arrays": args.arrays,
                "first_max_bytes": first,
                "second_max_bytes": second,
            }
        )
    return rows


def metadata_nbytes(
    comm: Any, arrays: int, path: Path, *, hdf5: bool
) -> tuple[int, int]:
    """Return the bytes of small messages, of the rank that sent most.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All ranks write one file, of `arrays` arrays of a KiB.
    arrays : int
        Of all ranks together.
    path : pathlib.Path
        Where to save, twice.
    hdf5 : bool
        Whether to save HDF5, else a pickle.

    Returns
    -------
    tuple of int
        Of the first save, and of a second of the same structure.
    """
    whole = many(arrays, 1024)
    state = whole.state(whole.shares(comm.size)[comm.rank])
    sent = []
    for _ in range(2):
        report = mpisave.save(
            state, path, state_type="params", use_binary_format=hdf5, comm=comm
        )
        sent.append(max(comm.allgather(report.metadata_nbytes)))
    return sent[0], sent[1]
