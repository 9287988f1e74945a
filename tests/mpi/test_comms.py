"""Parts of a communicator, which MPI makes by a call that blocks."""

import threading

import pytest
from helpers import assert_on_all_ranks
from mpi4py import MPI

from mpisave import comms

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
