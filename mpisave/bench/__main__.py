"""Measurements: ``python -m mpisave.bench save``, ``load`` and more.

Every figure is a ratio against a reference that ran beside it: the sides take turns,
and medians are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpisave.bench.checksums import bench_checksums
from mpisave.bench.device import bench_device
from mpisave.bench.env import bench_env
from mpisave.bench.gather import bench_gather
from mpisave.bench.gpu import missing
from mpisave.bench.load import bench_load, write
from mpisave.bench.output import plot, table
from mpisave.bench.peers import close
from mpisave.bench.save import bench_save
from mpisave.bench.small import bench_layout, bench_memory, bench_plan, bench_traffic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpisave.bench.turns import Row

_JOBS = {
    "save": bench_save,
    "load": bench_load,
    "gather": bench_gather,
    "checksums": bench_checksums,
    "device": bench_device,
    "memory": bench_memory,
    "traffic": bench_traffic,
}
_ALONE = {"layout": bench_layout, "plan": bench_plan, "env": bench_env}
_RANKS = {"memory": [4], "traffic": [4], "plan": [256, 1024, 4096], "device": [1, 2, 4]}
_ARRAYS = {"plan": 1000, "device": 300}
# Open MPI binds each rank to a core, and mpisave then has no other for its threads.
_UNBOUND = {
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}
_NOTES = {
    "save": "of_bound: the time of 'bound: pwrite' by that of the side, same fsync. "
    "The bound is of one\nfile: sides that write a file a rank can pass 1.",
    "load": "The files lie in the page cache: no disk is read. of_bound: the time of "
    "the pread into\nready memory (sides that load in place) or into fresh memory "
    "(all others) by that of the side.",
    "gather": "Every side ends with fsync.",
    "device": "of_bound: the time of the slower bound by that of the side; of gather, "
    "of the slowest. Memory is\nwhat the first turn took above what was there: on the "
    "device by all ranks, pinned, and resident on\nthe host, where pinned memory may "
    "be counted too.",
    "checksums": "by_without: the time of the side by that of the same without "
    "checksums. A load reads each\nrank's arrays in place, from the page cache.",
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mpisave.bench", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", choices=(*_JOBS, *_ALONE))
    add("--ranks", type=_numbers, nargs="+", help="numbers of ranks")
    add("--mib", type=_numbers, nargs="+", help="size of the whole state")
    add("--many", type=int, metavar="N", help="N arrays instead, for save and load")
    add("--each", type=int, default=1024, metavar="BYTES", help="of --many")
    add("--moments", action="store_true", help="parameters and two Adam moments")
    add("--fsync", choices=("on", "off", "both"), help="of save")
    add("--writers", type=int, help="ranks that wrote what is loaded; default: same")
    add(
        *("--sides", "--only"),
        nargs="+",
        metavar="TEXT",
        help="only bounds, and names with TEXT; of device also save, load, gather",
    )
    add("--seconds", type=float, default=80, help="that 'device' may take in all")
    add("--repeats", type=int, default=5, help="after one that warms up")
    add("--dir", help="where to write; default: TMPDIR")
    add("--cap", default="64M", help="max_grouped_size of 'memory'")
    add("--arrays", type=int, help="of layout, plan, traffic and device")
    add("--json", type=Path, help="write the rows to this file too")
    add("--plot", type=Path, metavar="PNG", help="draw GB/s of save, load or gather")
    # What a job of mpirun is told: where to work, and in which part of 'load'.
    add("--job", type=Path, help=argparse.SUPPRESS)
    add("--readers", type=int, help=argparse.SUPPRESS)
    add("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ranks = _joined(args.ranks)
    args.mib = _joined(args.mib)
    if args.what == "device" and args.sides is not None:
        args.sides = [word for text in args.sides for word in text.split(",")]
    _check(parser, args)
    if args.fsync is None:
        args.fsync = "off" if args.what == "device" else "both"
    if args.ranks is None:
        args.ranks = _RANKS.get(args.what, [2, 4])
    if args.mib is None and args.what != "device":
        args.mib = [1024] if args.what == "memory" else [256, 1024]
    if args.many is not None or args.what == "traffic":
        args.mib = [0]  # one state, however large
    if args.arrays is None:
        args.arrays = _ARRAYS.get(args.what, 10_000)
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _joined(lists: list[list[int]] | None) -> list[int] | None:
    return None if lists is None else [number for some in lists for number in some]


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would be ignored, or fail after minutes of measuring."""
    if args.plot and args.what not in ("save", "load", "gather"):
        parser.error(f"--plot: {args.what} has no GB/s")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'mpisave[plot]'")
    of_all = ("save", "load", "checksums")
    if (args.many is not None or args.moments) and args.what not in of_all:
        parser.error(f"--many and --moments are of {of_all}, not of {args.what}")
    if args.writers is not None and args.what != "load":
        parser.error("--writers is of load")
    if args.each < 4 or args.each % 4:
        parser.error(f"--each: {args.each} bytes are no whole number of float32")


def _launch(argv: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """Run the measurement once for each number of ranks and each size."""
    rows: list[Row] = []
    for ranks in args.ranks:
        for mib in args.mib or [4096 if ranks == 1 else 1024]:
            # Made here, to be removed even where a job was killed.
            with tempfile.TemporaryDirectory(
                prefix="mpisave-bench-", dir=args.dir
            ) as folder:
                (Path(folder) / "files").mkdir()
                job = [*argv, "--mib", str(mib), "--job", folder]
                if args.what == "load":
                    writers = args.writers or ranks
                    job += ["--readers", str(ranks), "--writers", str(writers)]
                    # A job of its own: what reads has no memory of having written.
                    _mpirun(writers, [*job, "--write"])
                if args.what == "device":
                    job += ["--seconds", str(_seconds(args, ranks))]
                _mpirun(ranks, job, _UNBOUND if args.what == "device" else {})
                rows += json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _seconds(args: argparse.Namespace, ranks: int) -> float:
    """Return what one job of 'device' may take: one rank is also beside peers."""
    weights = [2 if number == 1 else 1 for number in args.ranks]
    own = 2 if ranks == 1 else 1
    share: float = args.seconds * own / sum(weights) / len(args.mib or [None])
    return share


def _mpirun(
    ranks: int, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> None:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    job = [sys.executable, "-m", "mpi4py", "-m", "mpisave.bench", *argv]
    environ = {**(environ or {}), **os.environ}
    subprocess.run([mpirun, "-n", str(ranks), *job], check=True, env=environ)


def _work(args: argparse.Namespace) -> None:
    """Measure, as one rank of a job."""
    from mpi4py import MPI

    comm: Any = MPI.COMM_WORLD.Dup()  # noqa: TID251 - a program, not a library
    if args.write:
        write(comm, args, args.job)
    else:
        rows = _JOBS[args.what](comm, args, args.job)
        if comm.rank == 0:
            (args.job / "rows.json").write_text(json.dumps(rows))
    close(comm)


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, and return the exit status."""
    args = _parse(argv)
    if args.job is not None:
        _work(args)
        return 0
    if args.what == "device" and (why := missing()):
        sys.stderr.write(f"there is no GPU to measure on: {why}\n")
        return 1
    try:
        alone = _ALONE.get(args.what)
        rows = alone(args) if alone else _launch(argv, args)
    except subprocess.CalledProcessError as exc:
        # Its ranks have said why.
        sys.stderr.write(f"mpirun ended with status {exc.returncode}\n")
        return 1
    print(table(rows))
    if args.what in _NOTES:
        print(_NOTES[args.what])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
