"""The measurements of devices on several ranks, with a stand-in for the device."""

import argparse

import numpy as np
import pytest
from fakes import FakeGpu, put_in_place
from helpers import assert_on_all_ranks

import mpisave
from mpisave.bench import device, device_gather, gpu

HOST = [
    *("bound: Gatherv, host", "bound: pwrite on the root", "bound: copy on the root"),
    "mpisave pickle, host",
]


@pytest.fixture
def measure(comm, shared_dir, monkeypatch):
    put_in_place(monkeypatch)
    return lambda *sides: measured(comm, shared_dir, FakeGpu(), sides)


def measured(comm, folder, on, sides=None):
    if comm.rank == 0:
        (folder / "files").mkdir()
    comm.Barrier()
    plain = {"mib": [6], "arrays": 20, "repeats": 2, "fsync": "off", "seconds": 600}
    args = argparse.Namespace(**plain, sides=sides)
    return device.measure(comm, args, folder, on)


@pytest.mark.mpi(min_size=2)
def test_each_rank_saves_its_part_of_one_file(comm, measure):
    rows = measure("save")

    assert_on_all_ranks(
        comm,
        [row["side"] for row in rows]
        == ["bound: pwrite", "bound: copy", "mpisave pickle", "mpisave HDF5"],
        "sides",
    )
    assert_on_all_ranks(comm, {row["mib"] for row in rows} == {6}, "whole state")
    assert_on_all_ranks(comm, {row["ranks"] for row in rows} == {comm.size}, "ranks")


@pytest.mark.mpi(min_size=2)
def test_gathering_by_device_is_left_out_where_it_is_refused(
    comm, measure, monkeypatch, capsys
):
    save = mpisave.save

    def refusing(*args, transport="auto", **options):
        if transport == "device":
            raise mpisave.ArgumentError("MPI knows\nno device")
        return save(*args, transport=transport, **options)

    monkeypatch.setattr(device_gather.mpisave, "save", refusing)

    rows = measure("gather")

    assert_on_all_ranks(comm, [row["side"] for row in rows] == HOST, "sides")
    said = capsys.readouterr().err
    expected = "gathering by device is left out: MPI knows no device" in said
    assert_on_all_ranks(comm, expected == (comm.rank == 0), "said by rank 0")


@pytest.mark.mpi(min_size=2)
def test_gathering_by_device_is_measured_where_mpi_takes_it(comm, measure, monkeypatch):
    chosen = []

    def choose(own, wanted, memory, **how):
        chosen.append(wanted)
        return argparse.Namespace(transport=wanted, how="as the test says")

    monkeypatch.setattr("mpisave.saving.choose", choose)

    rows = measure("gather")

    sides = {row["side"]: row for row in rows}
    assert_on_all_ranks(
        comm,
        [*sides] == ["bound: Gatherv, device", *HOST, "mpisave pickle, device"],
        "sides",
    )
    slowest = max(
        sides[name]["median_s"]
        for name in [
            *("bound: Gatherv, device", "bound: pwrite on the root"),
            "bound: copy on the root",
        ]
    )
    ratio = sides["mpisave pickle, device"]["of_bound"]
    expected = slowest / sides["mpisave pickle, device"]["median_s"]
    assert_on_all_ranks(comm, np.isclose(ratio, expected), "ratio")
    assert_on_all_ranks(comm, {*chosen} == {"device", "host"}, "transports")


@pytest.mark.gpu
@pytest.mark.mpi
def test_all_sides_run_on_a_gpu(comm, shared_dir):
    cupy = pytest.importorskip("cupy")
    if gpu.missing():
        pytest.skip(gpu.missing())

    try:
        rows = measured(comm, shared_dir, gpu.Gpu(comm.rank))
    finally:
        pool = cupy.get_default_pinned_memory_pool()
        cupy.cuda.set_pinned_memory_allocator(pool.malloc)

    # Each was checked: that it is there says that it was right.
    found = [row["side"] for row in rows if row["side"].startswith("mpisave")]
    first = ["mpisave pickle", "mpisave HDF5"]
    assert_on_all_ranks(comm, found[:2] == first, "save")
    more = "mpisave device=" if comm.size == 1 else "mpisave pickle, host"
    assert_on_all_ranks(comm, more in found, "load or gather")
    mine = [row for row in rows if row["side"] == more]
    assert_on_all_ranks(comm, mine[0]["pinned_mib"] > 0, "pinned memory")
