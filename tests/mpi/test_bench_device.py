"""The measurements of devices on several ranks, with a stand-in for the device."""

import argparse

import numpy as np
import pytest
from fakes import FakeGpu, put_in_place
from helpers import assert_on_all_ranks

import mpisave
from mpisave.bench import device, device_gather

pytestmark = pytest.mark.mpi(min_size=2)
MIB = 2**20
HOST = [
    *("bound: Gatherv, host", "bound: pwrite on the root", "bound: copy on the root"),
    "mpisave pickle, host",
]


@pytest.fixture
def measure(comm, shared_dir, monkeypatch):
    put_in_place(monkeypatch)
    if comm.rank == 0:
        (shared_dir / "files").mkdir()
    comm.Barrier()

    def run(*sides):
        args = argparse.Namespace(
            mib=[6],
            arrays=20,
            repeats=2,
            fsync="off",
            sides=sides,
            seconds=600,
        )
        return device.measure(comm, args, shared_dir, FakeGpu())

    return run


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


def test_gathering_by_device_is_measured_where_mpi_takes_it(comm, measure, monkeypatch):
    chosen = []

    def choose(own, wanted, memory, *, timeout_s):
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
