"""How payload travels: in rounds, overlapped, within the cap, from any device."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_on_all_ranks, equal_on_rank

import mpisave
from mpisave import moving, storage

pytestmark = pytest.mark.mpi
MIB = 2**20


class Watched:
    """A communicator that tells of its Gatherv calls."""

    def __init__(self, inner, on_gatherv):
        self.inner = inner
        self.on_gatherv = on_gatherv

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def Igatherv(self, send, received, root):
        self.on_gatherv(send, received)
        return self.inner.Igatherv(send, received, root=root)


def watch(monkeypatch, on_gatherv):
    gather = moving.Gather

    def watched(comm, *rest, **how):
        own = Watched(comm, on_gatherv)
        own.raw = Watched(comm.raw, on_gatherv)
        return gather(own, *rest, **how)

    monkeypatch.setattr(moving, "Gather", watched)


@pytest.mark.mpi(min_size=2)
def test_a_round_is_written_while_the_next_one_travels(comm, shared_dir, monkeypatch):
    second_began = threading.Event()
    overlapped = []
    calls = []
    pwrite = storage.os.pwrite

    def on_gatherv(send, received):
        calls.append(received)
        if len(calls) == 2:
            second_began.set()

    def slow_pwrite(descriptor, data, offset):
        # The first payload on disk waits for the second Gatherv: without overlap it
        # would wait in vain.
        if calls and not overlapped:
            overlapped.append(second_began.wait(timeout=20))
        return pwrite(descriptor, data, offset)

    watch(monkeypatch, on_gatherv)
    monkeypatch.setattr(storage.os, "pwrite", slow_pwrite)
    state = {} if comm.rank == 0 else {f"w{comm.rank}": np.ones(4000)}

    mpisave.save(
        state,
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        max_grouped_size=16000,
        comm=comm,
    )

    assert_on_all_ranks(comm, len(calls) > 2, "rounds")
    assert_on_all_ranks(comm, comm.rank or overlapped == [True], "overlap")


@pytest.mark.mpi(min_size=2)
def test_payload_travels_as_bytes_in_rounds_within_the_cap(
    comm, shared_dir, monkeypatch
):
    cap = 10_000
    arrived = []

    def on_gatherv(send, received):
        if comm.rank == 0:
            buffer, counts, _displs, _ = received
            assert isinstance(buffer, np.ndarray)
            arrived.append((buffer.nbytes, sum(counts), counts[0]))
        else:
            assert isinstance(send[0], np.ndarray)
            assert send[0].dtype == np.uint8

    watch(monkeypatch, on_gatherv)

    report = mpisave.save(
        {f"w{comm.rank}": np.arange(5000.0) + comm.rank},
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        max_grouped_size=cap,
        comm=comm,
    )

    def check():
        assert max(2 * nbytes for nbytes, _, _ in arrived) <= cap
        assert sum(nbytes for _, nbytes, _ in arrived) == 40_000 * (comm.size - 1)
        assert all(own == 0 for _, _, own in arrived), "the root's part is in place"
        assert len(arrived) == report.rounds

    equal_on_rank(comm, 0, check)


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("use_binary_format", [False, True], ids=["pickle", "hdf5"])
@pytest.mark.parametrize(
    ("mib", "cap_mib"), [(200, 8), pytest.param(1024, 64, marks=pytest.mark.slow)]
)
def test_root_never_holds_the_gathered_state(
    comm, shared_dir, use_binary_format, mib, cap_mib
):
    nbytes = mib * MIB // comm.size
    strided = np.ones((nbytes // MIB, MIB // 8, 2), np.float32)[:, :, 0]
    state = {f"w{comm.rank}": np.ones(nbytes // 2, np.uint8), f"s{comm.rank}": strided}
    comm.Barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = resident("VmRSS")

    mpisave.save(
        state,
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size=cap_mib * MIB,
        comm=comm,
    )

    extra = resident("VmHWM") - before
    print(f"rank {comm.rank}: {extra / MIB:.1f} MiB above {before / MIB:.0f} MiB")
    assert_on_all_ranks(comm, extra <= (cap_mib + 48) * MIB, f"memory {extra}")


@pytest.mark.parametrize("use_binary_format", [False, True], ids=["pickle", "hdf5"])
@pytest.mark.parametrize("cap", [100, "3G"])
def test_device_arrays_are_staged_through_the_border_alone(
    comm, shared_dir, monkeypatch, use_binary_format, cap
):
    library = put_in_place(monkeypatch)
    host = np.arange(300.0).reshape(20, 15) + comm.rank
    state = {
        f"device{comm.rank}": FakeDeviceArray(host),
        f"strided{comm.rank}": FakeDeviceArray(host[::2, 1:7]),
        f"host{comm.rank}": host.astype(np.float32),
    }

    mpisave.save(
        state,
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size=cap,
        comm=comm,
    )

    found = mpisave.load(shared_dir / "x.params")
    assert_on_all_ranks(comm, len(library.calls) > 0, "staged by the border")
    for rank in range(comm.size):
        expected = np.arange(300.0).reshape(20, 15) + rank
        np.testing.assert_array_equal(found[f"device{rank}"], expected)
        np.testing.assert_array_equal(found[f"strided{rank}"], expected[::2, 1:7])
    if not use_binary_format and comm.rank == 0:
        with (shared_dir / "x.params").open("rb") as file:
            assert len(pickle.load(file)) == 3 * comm.size
