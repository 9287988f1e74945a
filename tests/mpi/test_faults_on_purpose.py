"""mpisave.testing on several ranks: a failure at any step is raised on all of them."""

import errno
import os
import pickle

import numpy as np
import pytest
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_on_all_ranks, steps_of

import mpisave
from mpisave import testing

pytestmark = pytest.mark.mpi

SHORT_RUNS = 64  # columns, whose runs are short: they are exchanged


def state_of(comm, value, make=np.asarray):
    whole = np.full((8, SHORT_RUNS), float(value))
    part = SHORT_RUNS // comm.size
    start = comm.rank * part
    stop = SHORT_RUNS if comm.rank == comm.size - 1 else start + part
    shard = mpisave.Shard(make(whole[:, start:stop]), whole.shape, (0, start))
    return {"columns": shard, f"own{comm.rank}": make(np.full(3, float(value)))}


@pytest.mark.parametrize(
    ("gather_to", "action", "make"),
    [
        (None, "fail", np.asarray),
        (None, "full_disk", np.asarray),
        (0, "fail", np.asarray),
        (0, "full_disk", np.asarray),
        (0, "fail", FakeDeviceArray),
    ],
)
def test_fault_at_each_step_of_a_save_is_raised_on_every_rank(
    comm, shared_dir, monkeypatch, gather_to, action, make
):
    if make is FakeDeviceArray:
        put_in_place(monkeypatch)
    path = shared_dir / "x.params"
    options = {"gather_to": gather_to, "state_type": "params", "timeout": 20}

    def save(value):
        state = state_of(comm, value, make)
        mpisave.save(state, path, comm=comm, **options)

    save(1)
    steps = comm.bcast(steps_of(lambda: save(1)))
    is_choice = make is FakeDeviceArray and comm.size > 1
    assert ("choose the transport" in steps) == is_choice
    for step in steps:
        for rank in range(comm.size):
            made = {
                "fail": testing.fail(OSError(errno.EIO, "injected")),
                "full_disk": testing.full_disk(),
            }[action]
            raised = None
            try:
                with testing.fault(step, rank=rank, action=made, comm=comm):
                    save(2)
            except mpisave.StorageError as exc:
                raised = exc

            kinds = comm.allgather(raised is not None)
            is_alike = all(kinds) or (action == "full_disk" and not any(kinds))
            assert_on_all_ranks(comm, is_alike, f"{step}, rank {rank}: {kinds}")
            comm.Barrier()
            found = pickle.loads(path.read_bytes())["columns"]
            expected = {1.0 if any(kinds) else 2.0}
            if step == "publish":  # others may have renamed it: docs/reliability.md
                expected = {1.0, 2.0} if any(kinds) else {2.0}
            assert_on_all_ranks(comm, found.min() == found.max(), f"{step}: a mixture")
            assert_on_all_ranks(comm, found.min() in expected, f"{step}: {found.min()}")
            names = os.listdir(shared_dir)
            assert_on_all_ranks(comm, names == ["x.params"], f"{step}: {names}")
            comm.Barrier()
            save(1)


@pytest.mark.mpi(min_size=2)
def test_fault_at_each_step_of_a_load_is_raised_on_every_rank(comm, shared_dir):
    path = shared_dir / "x.params"
    mpisave.save(state_of(comm, 1), path, comm=comm)

    def load():
        mpisave.load(path, comm=comm, like=state_of(comm, 0), timeout=20)

    steps = comm.bcast(steps_of(load))
    for step in steps:
        for rank in range(comm.size):
            action = testing.fail(OSError(errno.EIO, "injected"))
            raised = None
            try:
                with testing.fault(step, rank=rank, action=action, comm=comm):
                    load()
            except mpisave.StorageError as exc:
                raised = exc

            failures = comm.allgather(raised and sorted(raised.failures))
            is_alike = failures == [[rank]] * comm.size
            assert_on_all_ranks(comm, is_alike, f"{step}, rank {rank}: {failures}")
    load()
    assert_on_all_ranks(comm, {"read", "read and exchange"} <= set(steps), f"{steps}")
