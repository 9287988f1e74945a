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
    """

    name: str
    run: Callable[[], Any]
    bounds: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None
    version: str = ""


def choose(sides: Sequence[Side], wanted: Sequence[str] | None) -> list[Side]:
    """Return the sides whose name contains one of `wanted`, and the bounds."""
    if wanted is None:
        return list(sides)
    words = ["bound", *wanted]
    return [side for side in sides if any(word in side.name for word in words)]


def take_turns(
    comm: Any, sides: Sequence[Side], repeats: int, after: Callable[[], None]
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

    Returns
    -------
    dict of str to list of float
        Seconds of each side, from all ranks being ready until all are done.
    """
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for repeat in range(repeats + 1):
        for side in sides:
            comm.Barrier()
            began = time.perf_counter()
            result = side.run()
            comm.Barrier()
            elapsed = time.perf_counter() - began
            if repeat:  # the first one warms up
                times[side.name].append(elapsed)
            elif side.check is not None:
                side.check(result)
            # Freed here, or the next side would run beside what this one returned.
            del result
            after()
    return times


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
