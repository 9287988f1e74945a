"""Sides of a comparison that take turns, and what their times come to."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpisave.bench.states import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do the work.

    Parameters
    ----------
    name : str
        As the table shows it; bounds begin with "bound".
    run : callable
        Does the work, on every rank.
    bounds : tuple of str
        Names of the sides that nothing can be faster than.
    check : callable, optional
        Called with what the first `run` returned, on every rank, outside of the times.
        Raises if the work was not done.
    version : str
        Of the library that does the work.
    most : int, optional
        Timed turns that are enough. Such a side warms up by itself, before.
    """

    name: str
    run: Callable[[], Any]
    bounds: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None
    version: str = ""
    most: int | None = None


def choose(sides: Sequence[Side], wanted: Sequence[str] | None) -> list[Side]:
    """Return the sides whose name contains one of `wanted`, and the bounds."""
    if wanted is None:
        return list(sides)
    words = ["bound", *wanted]
    return [side for side in sides if any(word in side.name for word in words)]


def take_turns(
    comm: Any,
    sides: Sequence[Side],
    repeats: int,
    after: Callable[[], None],
    *,
    seconds: float | None = None,
    say: Callable[[int, str, float], None] | None = None,
) -> dict[str, list[float]]:
    """Run every side once, in turn, `repeats` times, after a time that warms up.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        All ranks of it take part in every side.
    sides : sequence of Side
        In the order of their turns.
    repeats : int
        How often each is timed.
    after : callable
        Called on every rank after each turn, outside of the times.
    seconds : float, optional
        No turns begin that would end later, by what they took before. Each side is
        timed once at least.
    say : callable, optional
        Told, after each turn, how many came before it, the side, and its seconds.

    Returns
    -------
    dict of str to list of float
        Seconds of each side, from all ranks being ready until all are done.
    """
    ends = None if seconds is None else time.perf_counter() + seconds
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    costs: dict[str, float] = {}
    for repeat in range(repeats + 1):
        taking = _taking(sides, repeat)
        if ends is not None and repeat > 1:
            left = ends - time.perf_counter()
            names = comm.bcast(_fitting(taking, costs, left))
            taking = [side for side in taking if side.name in names]
        if not taking and repeat:
            break
        for side in taking:
            comm.Barrier()
            began = time.perf_counter()
            result = side.run()
            comm.Barrier()
            elapsed = time.perf_counter() - began
            if repeat:  # the first one warms up
                times[side.name].append(elapsed)
            if side.check is not None and side.name not in costs:
                side.check(result)
            # Freed here, or the next side would run beside what this one returned.
            del result
            cleaning = time.perf_counter()
            after()
            costs[side.name] = elapsed + time.perf_counter() - cleaning
            if say is not None:
                say(repeat, side.name, elapsed)
    return times


def _taking(sides: Sequence[Side], repeat: int) -> list[Side]:
    """Return the sides that take a turn, if there is time."""
    return [side for side in sides if side.most is None or 0 < repeat < side.most + 1]


def _fitting(taking: Sequence[Side], costs: dict[str, float], left: float) -> set[str]:
    """Return the names of those that end in time: all that always turn, or none."""
    always = [side for side in taking if side.most is None]
    left -= sum(costs[side.name] for side in always)
    if left < 0:
        return set()
    names = {side.name for side in always}
    for side in taking:
        if side.most is not None and costs[side.name] <= left:
            left -= costs[side.name]
            names.add(side.name)
    return names


def rows_of(
    sides: Sequence[Side],
    times: dict[str, list[float]],
    nbytes: int,
    *,
    ratio: str = "of_bound",
    arrays: int | None = None,
    **columns: object,
) -> list[Row]:
    """Return a row for each side, of medians.

    Parameters
    ----------
    sides, times
        What took turns, and the seconds of each.
    nbytes : int
        Bytes of the whole state.
    ratio : str
        Name of the column with the time of the slower bound by that of the side.
    arrays : int, optional
        Number of arrays of the whole state: adds microseconds for each.
    **columns : object
        More columns, alike in all rows.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: list[Row] = []
    for side in sides:
        median = medians[side.name]
        bounds = [medians[name] for name in side.bounds if name in medians]
        row = {
            "side": side.name,
            **columns,
            "mib": round(nbytes / MIB),
            "median_s": median,
            "min_s": min(times[side.name]),
            "max_s": max(times[side.name]),
            "gb_per_s": nbytes / median / 1e9,
            ratio: max(bounds) / median if bounds else None,
        }
        if arrays is not None:
            row["arrays"] = arrays
            row["us_per_array"] = 1e6 * median / arrays
        rows.append({**row, "version": side.version})
    return rows


def trim() -> None:
    """Give memory that was freed back to the system.

    glibc keeps freed blocks of up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD), in which
    the next side would find ready what a loading job has to fault in.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # musl has none
        malloc_trim(0)


def empty(folder: Path) -> None:
    """Remove all that is in `folder`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def nbytes_in(folder: Path) -> int:
    """Return the bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
    """Write all of `data`; return how many bytes it has."""
    done = 0
    while done < data.nbytes:
        done += os.pwrite(descriptor, data[done:], offset + done)
    return done


def pread(descriptor: int, data: memoryview, offset: int) -> None:
    """Fill all of `data`."""
    done = 0
    while done < data.nbytes:
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends {data.nbytes - done} bytes too early")
        done += count


def fsync(path: Path) -> None:
    """Flush a file that another library has written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_bytes(array: Any) -> memoryview:
    """Return the bytes of a contiguous array where they lie."""
    view: memoryview = array.reshape(-1).view("uint8").data
    return view
