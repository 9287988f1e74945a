"""What checksums cost: saves and loads with and without them, in turns."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from unittest import mock

import mpisave
from mpisave.bench.save import VERSION, Saver, whole_of
from mpisave.bench.states import flat
from mpisave.bench.turns import Row, Side, choose, rows_of, take_turns

if TYPE_CHECKING:
    import argparse
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]
    from pathlib import Path

_WITHOUT = ", no checksums"


def bench_checksums(comm: Any, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time saves of all ranks to one file, loads of it in place, and verify."""
    whole = whole_of(args, least=comm.size)
    keys = whole.shares(comm.size)[comm.rank]
    saver = Saver(comm, whole, keys, folder / "files")
    kept = Saver(comm, whole, keys, folder / "kept")
    if comm.rank == 0:
        kept.folder.mkdir()
    comm.Barrier()
    rows: list[Row] = []
    for fsync in ("off", "on") if args.fsync == "both" else (args.fsync,):
        sides = choose(_saves(saver, durable=fsync == "on"), args.sides)
        times = take_turns(comm, sides, args.repeats, saver.clean)
        rows += _with_ratio(
            rows_of(sides, times, saver.nbytes, ranks=comm.size, fsync=fsync)
        )
    for hdf5 in (False, True):
        kept.mpisave(hdf5=hdf5, durable=True)
    sides = choose(_loads(kept, whole.ready(keys)), args.sides)
    times = take_turns(comm, sides, args.repeats, saver.clean)
    return rows + _with_ratio(
        rows_of(sides, times, saver.nbytes, ranks=comm.size, fsync=None)
    )


def _saves(saver: Saver, *, durable: bool) -> list[Side]:
    sides = []
    for name, hdf5 in (("save pickle", False), ("save HDF5", True)):
        run = functools.partial(saver.mpisave, hdf5=hdf5, durable=durable)
        sides.append(Side(name, run, (), saver.check, VERSION))
        without = functools.partial(_without_checksums, run)
        sides.append(Side(name + _WITHOUT, without, (), saver.check, VERSION))
    return sides


def _without_checksums(run: Any) -> None:
    """Save as ever, with zeros for checksums: such a file is refused on loading."""
    with mock.patch("mpisave.checksum._library", return_value=_no_sum):
        run()


def _no_sum(_data: Buffer, _value: int = 0) -> int:
    return 0


def _loads(kept: Saver, like: Any) -> list[Side]:
    """Return loads of each rank's arrays in place; `verify` checks all of the file."""

    def check(_: object) -> None:
        found = flat(like)
        if any((found[key] != array).any() for key, array in kept.arrays.items()):
            raise RuntimeError("what was loaded is not what was saved")
        for array in found.values():
            array.fill(1)  # the next side must not pass with what this one read

    sides = []
    for name, hdf5 in (("pickle", False), ("HDF5", True)):
        path = kept.path(hdf5=hdf5)
        for verify in (True, False):
            load = functools.partial(
                mpisave.load,
                path,
                comm=kept.comm,
                like=like,
                into="inplace",
                verify=verify,
            )
            title = f"load {name}{'' if verify else _WITHOUT}"
            sides.append(Side(title, load, (), check, VERSION))
        whole = functools.partial(mpisave.verify, path, comm=kept.comm)
        sides.append(Side(f"verify {name}", whole, (), None, VERSION))
    return sides


def _with_ratio(rows: list[Row]) -> list[Row]:
    """Put in what a side takes by what it takes without checksums."""
    medians = {row["side"]: row["median_s"] for row in rows}
    made = []
    for row in rows:
        without = medians.get(row["side"] + _WITHOUT)
        ratio = row["median_s"] / without if without else None
        plain = {key: value for key, value in row.items() if key != "of_bound"}
        version = plain.pop("version")
        made.append({**plain, "by_without": ratio, "version": version})
    return made
