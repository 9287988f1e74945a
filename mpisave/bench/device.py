"""Saves and loads of arrays that lie on a GPU, against bare copies, writes and reads.

One rank saves and loads, beside other libraries; several save, each its own part, and
gather to one of them.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from mpisave.bench.content import Content
from mpisave.bench.copies import Copies
from mpisave.bench.device_gather import GatherSides
from mpisave.bench.device_sides import LoadSides, SaveSides, Work
from mpisave.bench.gpu import Gpu
from mpisave.bench.meter import Meter
from mpisave.bench.states import MIB, mixed
from mpisave.bench.turns import Row, Side, rows_of, take_turns
from mpisave.placement import (
    MOST_READERS,
    MOST_WRITERS,
    threads_of,
    where_this_runs,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

PHASES = ("save", "load", "gather")
# What of the time of a job each may take, by that of the others.
_WEIGHTS = {"save": 1, "load": 1, "gather": 2}
_NO_MEMORY = dict.fromkeys(("device_mib", "pinned_mib", "host_mib"))


def bench_device(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure on the GPU of this rank."""
    return measure(comm, args, folder, Gpu(comm.rank))


def measure(comm: Any, args: argparse.Namespace, folder: Path, gpu: Any) -> list[Row]:
    """Take all phases that are asked for, and return their rows. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    args : argparse.Namespace
        ``mib``, ``arrays``, ``repeats``, ``fsync``, ``sides`` and ``seconds`` of the
        command line.
    folder : pathlib.Path
        Where to write: has a folder "files".
    gpu : Gpu
        The device of this rank.
    """
    ends = time.perf_counter() + args.seconds
    work = _work(comm, args, folder, gpu)
    _say(comm, f"{gpu.name}, {gpu.version}, {comm.size} ranks, {args.mib[0]} MiB")
    phases = _phases(comm.size, args)
    rows: list[Row] = []
    for number, (phase, fsync) in enumerate(phases):
        wanted = _wanted(phase, args.sides)
        sides = [
            side
            for side in _sides(work, phase, wanted, durable=fsync == "on")
            if side.name.startswith("bound") or wanted(side.name)
        ]
        if all(side.name.startswith("bound") for side in sides):
            continue
        share = _WEIGHTS[phase] / sum(_WEIGHTS[name] for name, _ in phases[number:])
        times = take_turns(
            comm,
            sides,
            args.repeats,
            work.clean,
            seconds=(ends - time.perf_counter()) * share,
            say=_Progress(phase) if comm.rank == 0 else None,
        )
        _say(comm, "")
        rows += _rows(work, sides, times, phase, fsync)
    return rows


def _work(comm: Any, args: argparse.Namespace, folder: Path, gpu: Any) -> Work:
    whole = mixed(args.mib[0] * MIB, args.arrays)
    content = Content(whole.shapes)
    kept = folder / "kept"
    if comm.rank == 0:
        kept.mkdir()
    keys = whole.shares(comm.size)[comm.rank]
    where = comm.allgather(where_this_runs())
    return Work(
        comm,
        gpu,
        whole,
        content,
        {key: gpu.array(content.array(key)) for key in keys},
        Copies(gpu),
        Meter(comm, gpu),
        folder / "files",
        kept,
        threads_of(where, comm.rank, MOST_WRITERS),
        threads_of(where, comm.rank, MOST_READERS),
    )


def _phases(size: int, args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return what is measured, and with fsync or not."""
    fsyncs = ("off", "on") if args.fsync == "both" else (args.fsync,)
    found: list[tuple[str, str | None]] = [("save", fsync) for fsync in fsyncs]
    if size == 1:
        found.append(("load", None))
    else:
        found += [("gather", fsync) for fsync in fsyncs]
    words = args.sides
    if words is None or any(word not in PHASES for word in words):
        return found
    return [(phase, fsync) for phase, fsync in found if phase in words]


def _wanted(phase: str, words: Sequence[str] | None) -> Callable[[str], bool]:
    """Return what says whether a side is: a word names a phase, or a part of a side."""

    def wanted(name: str) -> bool:
        return words is None or any(
            word == phase if word in PHASES else word in name for word in words
        )

    return wanted


def _sides(
    work: Work, phase: str, wanted: Callable[[str], bool], *, durable: bool
) -> list[Side]:
    if phase == "save":
        return SaveSides(work, wanted, durable=durable).all()
    if phase == "load":
        return LoadSides(work, wanted).all()
    return GatherSides(work, durable=durable).all()


def _rows(
    work: Work,
    sides: Sequence[Side],
    times: dict[str, list[float]],
    phase: str,
    fsync: str | None,
) -> list[Row]:
    """Return rows of medians, with memory where it was measured."""
    # A root that gathers writes with one.
    threads = {"save": work.writers, "load": work.readers}.get(phase, 1)
    found = rows_of(
        sides,
        times,
        work.whole.nbytes,
        ranks=work.comm.size,
        threads=threads,
        fsync=fsync,
    )
    rows = []
    for row in found:
        name, version = row.pop("side"), row.pop("version")
        memory = work.meter.found.get(f"{phase} {name}", _NO_MEMORY)
        rows.append(
            {
                "what": phase,
                "side": name,
                **row,
                "turns": len(times[name]),
                **memory,
                "version": version or f"{work.gpu.name}, {work.gpu.version}",
            }
        )
    return rows


def _say(comm: Any, text: str) -> None:
    if comm.rank == 0:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class _Progress:
    """Says how long each turn took, a line for each round of turns."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._repeat = -1

    def __call__(self, repeat: int, name: str, elapsed: float) -> None:
        if repeat != self._repeat:
            end = "\n" if repeat else ""
            sys.stderr.write(f"{end}{self._phase} {repeat or 'warms up'}:")
            self._repeat = repeat
        sys.stderr.write(f" {name} {elapsed:.2f};")
        sys.stderr.flush()
