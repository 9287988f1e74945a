"""Parts of a communicator, which MPI makes by a call that blocks."""

import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import assert_on_all_ranks
from mpi4py import MPI

import mpisave
from mpisave import comms
from mpisave.transport.root import Root

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("level", ["THREAD_MULTIPLE", "THREAD_SERIALIZED"])
@pytest.mark.mpi(min_size=3)
def test_part_has_the_ranks_of_one_color_whatever_threads_mpi_allows(
    comm, monkeypatch, level
):
    monkeypatch.setattr(MPI, "Query_thread", lambda: getattr(MPI, level))
    colors = tuple(rank % 2 for rank in range(comm.size))

    with comms.private_comm(comm, "test", 20) as own:
        part = own.part(colors)
        found = part.allgather(comm.rank)

    assert_on_all_ranks(
        comm, found == list(range(comm.rank % 2, comm.size, 2)), f"{found}"
    )


@pytest.mark.parametrize("level", ["THREAD_MULTIPLE", "THREAD_SERIALIZED"])
def test_what_a_call_raises_is_raised_where_it_is_waited_for(monkeypatch, level):
    monkeypatch.setattr(MPI, "Query_thread", lambda: getattr(MPI, level))
    threads = []

    def fail():
        threads.append(threading.current_thread())
        raise RuntimeError("no context ids")

    call = comms._InThread(fail)

    if level == "THREAD_MULTIPLE":
        call._thread.join(10)
    with pytest.raises(RuntimeError, match="no context ids"):
        call.Test()
    is_here = threads == [threading.main_thread()]
    assert is_here == (level == "THREAD_SERIALIZED")


def test_threads_may_be_the_first_to_use_a_communicator_together(
    comm, tmp_path, monkeypatch
):
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("one thread at a time calls this MPI")
    made, duplicate = [], comms._duplicate

    def slow(*args):
        made.append(args)
        time.sleep(0.05)
        return duplicate(*args)

    monkeypatch.setattr(comms, "_duplicate", slow)
    alone = MPI.COMM_SELF.Dup()

    def save(number):
        path = tmp_path / f"{comm.rank}-{number}.params"
        mpisave.save({"x": np.full(9, number)}, path, comm=alone)
        return path

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(save, range(4)))

    found = [int(pickle.loads(path.read_bytes())["x"][0]) for path in paths]
    assert_on_all_ranks(comm, found == [0, 1, 2, 3], found)
    assert_on_all_ranks(comm, len(made) == 1, "duplicated once")
    alone.Free()


@pytest.mark.mpi(min_size=2)
def test_interrupt_between_a_message_and_the_wait_for_it_keeps_its_buffers(
    comm, shared_dir, monkeypatch
):
    other, buffers, caught = comm.Dup(), [], None
    gatherv, wait = Root._gatherv, comms.PrivateComm.wait

    def watched(self, buffer, *args):
        buffers.append(weakref.ref(buffer))
        return gatherv(self, buffer, *args)

    def interrupted(self, request):
        if len(buffers) == 2:
            raise KeyboardInterrupt
        return wait(self, request)

    with monkeypatch.context() as patch:
        if comm.rank == 0:
            patch.setattr(Root, "_gatherv", watched)
            patch.setattr(comms.PrivateComm, "wait", interrupted)
        try:
            mpisave.save(
                {f"x{comm.rank}": np.arange(100_000.0)},
                shared_dir / "x.params",
                gather_to=0,
                state_type="params",
                max_grouped_size="100K",
                comm=other,
                timeout=20,
            )
        except BaseException as exc:
            caught = type(exc)
    gc.collect()

    expected = mpisave.CollectiveError if comm.rank else KeyboardInterrupt
    assert_on_all_ranks(comm, caught is expected, f"{caught}")
    kept = not buffers or buffers[-1]() is not None
    assert_on_all_ranks(comm, kept, "MPI may still write to it")
