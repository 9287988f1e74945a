"""All ranks choose one transport: the least of what each says, tries and proves."""

import contextlib
import logging
import socket

import numpy as np
import pytest
from fakes import FakeDeviceArray
from helpers import assert_on_all_ranks
from ranks import assert_refused

from mpisave import ArgumentError, choosing
from mpisave.choosing import DeviceMemory, choose
from mpisave.comms import private_comm
from mpisave.cuda_aware import Answer, Trial
from mpisave.errors import CollectiveError

pytestmark = pytest.mark.mpi

YES, NO, UNKNOWN = Answer(True, "says yes"), Answer(False, "says no"), Answer(None, "?")
WORKS, FAULTS = Trial(True, "fine"), Trial(False, "ended by SIGSEGV")
NOT_TRIED = Trial(None, "no module cupy")


class FakeMemory:
    """Memory of a device that is the host's: MPI takes it for a device's."""

    def __init__(self, *, spoils=False, fails=False):
        self.spoils = spoils
        self.fails = fails
        self.made = []

    def buffer(self, nbytes):
        if self.fails:
            raise MemoryError("out of memory\non the device")
        self.made.append(nbytes)
        return FakeDeviceArray(np.full(nbytes, 0xA5, np.uint8))

    def copy(self, source, target):
        read, written = (
            x if isinstance(x, np.ndarray) else x._host for x in [source, target]
        )
        written[...] = read
        if self.spoils:
            written[-1] ^= 1


class Ranks:
    """What each rank is to say, and what it was asked."""

    def __init__(self, comm, monkeypatch):
        self.comm = comm
        self.answers = [UNKNOWN] * comm.size
        self.trials = [WORKS] * comm.size
        self.hosts = ["here"] * comm.size
        self.holders = set(range(comm.size))
        self.memory = FakeMemory()
        self.asked = self.tried = 0
        self.limits = []
        monkeypatch.setattr(choosing, "ask", self.ask)
        monkeypatch.setattr(choosing, "trial", self.trial)
        monkeypatch.setattr(choosing, "_host", lambda: self.hosts[comm.rank])

    def ask(self, world):
        assert world.size == self.comm.size
        self.asked += 1
        return self.answers[self.comm.rank]

    def trial(self, limit_s, ordinal):
        assert ordinal == 5
        self.tried += 1
        self.limits.append(limit_s)
        return self.trials[self.comm.rank]

    def choose(self, wanted="auto", timeout_s=None, roots=(0,)):
        memory = None
        if self.comm.rank in self.holders:
            memory = DeviceMemory(self.memory.buffer, self.memory.copy, ordinal=5)
        with private_comm(self.comm, "save", 30) as own:
            return choose(own, wanted, memory, roots=roots, timeout_s=timeout_s)

    def every(self, value):
        return self.comm.allgather(value)


@pytest.fixture
def ranks(comm, monkeypatch):
    return Ranks(comm, monkeypatch)


def assert_chosen(ranks, choice, transport, how=""):
    """Fail unless all ranks have chosen the same, with `how` in the reason."""
    every = ranks.every(choice)
    assert set(every) == {choice}
    assert choice.transport == transport, choice
    assert how in choice.how, choice


def test_one_rank_alone_and_host_on_purpose_ask_nothing(ranks):
    wanted = ["host"] if ranks.comm.size > 1 else ["host", "auto", "device"]

    for each in wanted:
        assert_chosen(ranks, ranks.choose(each), "host")

    assert_on_all_ranks(ranks.comm, ranks.asked == ranks.tried == 0, "not asked")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wanted", ["auto", "device"])
def test_states_without_device_arrays_ask_nothing(ranks, wanted):
    ranks.holders = set()

    choice = ranks.choose(wanted)

    assert_chosen(ranks, choice, "host", "no rank holds device arrays")
    assert_on_all_ranks(ranks.comm, ranks.asked == ranks.tried == 0, "not asked")


@pytest.mark.mpi(min_size=2)
def test_each_rank_that_gathers_proves_what_it_receives(ranks, monkeypatch):
    last = ranks.comm.size - 1
    check = choosing._Gathered.check

    def wrong_at_last(gathered):
        found = check(gathered)
        return "1 wrong" if ranks.comm.rank == gathered._root == last else found

    monkeypatch.setattr(choosing._Gathered, "check", wrong_at_last)

    assert_chosen(ranks, ranks.choose(roots=(0,)), "device")
    asked, tried = ranks.asked, ranks.tried
    choice = ranks.choose(roots=(0, last))
    assert_chosen(ranks, choice, "host", f"rank {last}")
    assert_chosen(ranks, ranks.choose(roots=(0,)), "device")
    once = (ranks.asked, ranks.tried) == (asked, tried)
    assert_on_all_ranks(ranks.comm, once, "a trial takes seconds")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("said", [YES, UNKNOWN])
def test_what_works_and_is_proven_is_used(ranks, said, caplog):
    caplog.set_level(logging.INFO, logger="mpisave")
    ranks.answers = [YES] * (ranks.comm.size - 1) + [said]

    choice = ranks.choose()

    assert_chosen(ranks, choice, "device", "trial: fine; proof: the right bytes")
    assert said.how in choice.how
    made = [
        [nbytes - rank for rank in range(ranks.comm.size)] for nbytes in (4096, 2**18)
    ]
    mine = [
        sum(counts) if ranks.comm.rank == 0 else counts[ranks.comm.rank]
        for counts in made
    ]
    assert_on_all_ranks(ranks.comm, ranks.memory.made == mine, "device memory for MPI")
    lines = [r.getMessage() for r in caplog.records if r.name == "mpisave.choosing"]
    of_all = f"{ranks.comm.size} of {ranks.comm.size} ranks"
    line = f"device arrays of {of_all} travel by device memory: {choice.how}"
    expected = [] if ranks.comm.rank else [line]
    assert_on_all_ranks(ranks.comm, lines == expected, "one line of log, on rank 0")


@pytest.mark.mpi(min_size=2)
def test_a_no_on_one_rank_is_a_no_without_a_trial(ranks):
    last = ranks.comm.size - 1
    ranks.answers = [YES] * last + [NO]

    choice = ranks.choose()

    assert_chosen(ranks, choice, "host", f"rank {last} (here): says no")
    assert_on_all_ranks(ranks.comm, ranks.tried == 0, "no trial")


@pytest.mark.mpi(min_size=2)
def test_whoever_wants_it_has_it_tried_against_what_the_library_says(ranks):
    ranks.answers = [NO] * ranks.comm.size

    assert_chosen(ranks, ranks.choose("device"), "device", "says no")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("trial", [FAULTS, NOT_TRIED])
def test_trial_that_fails_leaves_the_host(ranks, trial):
    ranks.answers = [YES] * ranks.comm.size
    ranks.trials = [trial] * ranks.comm.size

    choice = ranks.choose()

    assert_chosen(ranks, choice, "host", f"rank 0 (here): trial: {trial.how}")
    assert_on_all_ranks(ranks.comm, ranks.memory.made == [], "MPI was given nothing")


@pytest.mark.mpi(min_size=2)
def test_one_rank_a_host_tries_of_those_that_hold_device_arrays(ranks):
    size = ranks.comm.size
    ranks.hosts = [f"node{rank // 2}" for rank in range(size)]
    ranks.holders = set(range(1, size))

    choice = ranks.choose(timeout_s=9)

    assert_chosen(ranks, choice, "device")
    assert ranks.every(ranks.tried) == [0, 1, 1, 0][:size]
    assert_on_all_ranks(ranks.comm, ranks.limits in ([], [4.5]), "time of the trial")
    made = ranks.every(len(ranks.memory.made))
    assert made == [0, 2, 2, 2][:size], "the root without a device has host memory"


@pytest.mark.mpi(min_size=3)
def test_trial_that_fails_on_one_host_counts_for_all(ranks):
    ranks.hosts = [f"node{rank}" for rank in range(ranks.comm.size)]
    ranks.trials[2] = FAULTS
    ranks.trials[1] = NOT_TRIED

    choice = ranks.choose()

    assert_chosen(ranks, choice, "host", "rank 2 (node2): trial: ended by SIGSEGV")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("trial", [WORKS, FAULTS])
def test_it_is_found_out_once_for_a_communicator(ranks, trial):
    ranks.trials = [trial] * ranks.comm.size

    first = ranks.choose()
    ranks.answers = [NO] * ranks.comm.size
    again = [ranks.choose() for _ in range(3)]

    assert_on_all_ranks(ranks.comm, again == [first] * 3, "the same choice")
    assert_on_all_ranks(ranks.comm, ranks.asked == 1, "asked once")
    assert sum(ranks.every(ranks.tried)) == 1


@pytest.mark.mpi(min_size=2)
def test_it_is_found_out_anew_when_other_ranks_hold_device_arrays(ranks):
    size = ranks.comm.size
    ranks.hosts = [f"node{rank}" for rank in range(size)]
    ranks.holders = {0, 1}
    ranks.choose()
    ranks.holders = {1}
    ranks.choose()
    before = ranks.every(ranks.tried)
    ranks.holders = set(range(size))

    ranks.choose()

    assert before == [1, 1, 0, 0][:size]
    anew = 1 if size > 2 else 0
    assert ranks.every(ranks.tried) == [1 + anew, 1 + anew, 1, 1][:size]


@pytest.mark.mpi(min_size=2)
def test_ranks_that_hold_device_arrays_in_turn_try_once_each(ranks):
    ranks.hosts = [f"node{rank}" for rank in range(ranks.comm.size)]

    for _ in range(3):
        for rank in (0, 1):
            ranks.holders = {rank}
            ranks.choose()

    assert ranks.every(ranks.tried) == [1, 1, 0, 0][: ranks.comm.size]


@pytest.mark.mpi(min_size=2)
def test_another_communicator_is_asked_for_itself(ranks):
    ranks.choose()
    other = ranks.comm.Dup()

    with private_comm(other, "save", 30) as own:
        memory = DeviceMemory(ranks.memory.buffer, ranks.memory.copy, ordinal=5)
        choose(own, "auto", memory)

    other.Free()
    assert_on_all_ranks(ranks.comm, ranks.asked == 2, "asked twice")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("said", "trial", "advice"),
    [
        (YES, FAULTS, "UCX_MEMTYPE_CACHE=n"),
        (UNKNOWN, FAULTS, "built with CUDA"),
        (NO, FAULTS, "built with CUDA"),
        (NO, NOT_TRIED, "MPICH_GPU_SUPPORT_ENABLED=1"),
        (UNKNOWN, NOT_TRIED, "built with CUDA"),
    ],
)
def test_device_that_does_not_work_is_refused_alike_everywhere(
    ranks, said, trial, advice
):
    size = ranks.comm.size
    last = size - 1
    ranks.hosts = [f"node{rank}" for rank in range(size)]
    ranks.answers = [said] * size
    ranks.trials[last] = trial

    caught = assert_refused(
        ranks.comm, ArgumentError, lambda: ranks.choose("device"), advice, [last]
    )

    assert caught.step == "choose the transport"
    assert f"rank {last} (" in str(caught)
    assert f"does not work on node{last}: trial: {trial.how}" in str(caught)
    assert said.how in str(caught)
    assert "transport='host'" in str(caught)
    assert_on_all_ranks(ranks.comm, ranks.memory.made == [], "MPI was given nothing")
    # Nobody is out of step, and what was refused is found out anew.
    ranks.trials[last] = WORKS
    assert_chosen(ranks, ranks.choose("device"), "device")


@pytest.mark.mpi(min_size=2)
def test_device_on_the_word_of_the_library_where_it_cannot_be_tried(ranks):
    ranks.answers = [YES] * ranks.comm.size
    ranks.trials = [NOT_TRIED] * ranks.comm.size

    choice = ranks.choose("device")

    assert_chosen(ranks, choice, "device", "no module cupy; proof: the right bytes")


@pytest.mark.mpi(min_size=2)
def test_wrong_bytes_leave_the_host_or_are_refused(ranks):
    last = ranks.comm.size - 1
    ranks.memory.spoils = ranks.comm.rank == last
    how = f"1 wrong of {4096 - last} bytes gathered from rank {last}"

    assert_chosen(ranks, ranks.choose(), "host", how)
    caught = assert_refused(
        ranks.comm, ArgumentError, lambda: ranks.choose("device"), how, [0]
    )

    assert "--gpu-bind=none" in str(caught)


@pytest.mark.mpi(min_size=2)
def test_rank_without_device_memory_leaves_the_host_or_is_refused(ranks):
    ranks.memory.fails = ranks.comm.rank == 1
    how = "no device memory: MemoryError: out of memory on the device"

    assert_chosen(ranks, ranks.choose(), "host", how)
    assert_refused(ranks.comm, ArgumentError, lambda: ranks.choose("device"), how, [1])


@pytest.mark.mpi(min_size=2)
def test_failure_in_a_trial_is_raised_on_every_rank(ranks, monkeypatch):
    def fail(*args):
        raise RuntimeError("no trial")

    if ranks.comm.rank == 0:
        monkeypatch.setattr(choosing, "trial", fail)

    assert_refused(ranks.comm, CollectiveError, ranks.choose, "no trial", [0])


@pytest.mark.mpi(min_size=2)
def test_mpi_that_refuses_device_memory_is_heard_of_everywhere(comm, monkeypatch):
    own_comm = comm.Dup()
    ranks = Ranks(own_comm, monkeypatch)
    last = comm.size - 1
    if comm.rank == last:

        def refuse(*args):
            raise ValueError("MPI_ERR_BUFFER")

        monkeypatch.setattr(choosing._Gathered, "move", refuse)

    caught = None
    with contextlib.redirect_stderr(None):
        try:
            ranks.choose()
        except CollectiveError as exc:
            caught = exc

    assert_on_all_ranks(comm, caught is not None, "raised")
    assert_on_all_ranks(comm, "transport='host'" in str(caught), "advice")
    assert_on_all_ranks(comm, "MPI_ERR_BUFFER" in str(caught), "cause")


def test_hosts_are_those_of_the_machine(comm):
    assert choosing._host() == socket.gethostname()
