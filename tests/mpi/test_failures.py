"""A failure on one rank is raised on every rank, and nothing is lost or left."""

import errno
import io
import os
import socket
import threading

import numpy as np
import pytest
from helpers import assert_on_all_ranks, failing_on, files_in
from ranks import Numpy, assert_nothing_lost, assert_refused, put_old

import mpisave
from mpisave import arrays, devices, moving, parts, saving, storage
from mpisave.formats import hdf5, pkl
from mpisave.transport import root

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore:the path .* does not end in"),
]

FULL = OSError(errno.ENOSPC, "No space left on device")


def state_of(rank, nbytes=200_000):
    return {f"w{rank}": np.full(nbytes, rank, np.uint8), "n": np.arange(3)}


@pytest.fixture
def old(comm, shared_dir):
    """Return the path of a state that was saved before."""
    return put_old(comm, shared_dir / "state.params")


def save(comm, path, state=None, **changed):
    arguments = {
        "gather_to": 0,
        "state_type": "params",
        "max_grouped_size": 65536,
        "comm": comm,
    }
    state = state_of(comm.rank) if state is None else state
    return mpisave.save(state, path, **(arguments | changed))


def fail_after(calls, exc, function):
    left = [calls]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise exc
        return function(*args, **kwargs)

    return wrapped


STEPS = {
    "describe": (saving, "flatten", "describe the state dict"),
    "stage": (storage.os, "open", "create the staging file"),
    "lay out": (pkl.PickleFormat, "layout", "plan"),
    "reserve": (storage.StagedFile, "allocate", "lay out the file"),
    "buffers": (moving, "Gather", "allocate buffers"),
    "write": (storage.os, "pwrite", "lay out the file"),
    "index": (saving.index, "encode", "seal"),
    "fsync": (storage.os, "fsync", "seal"),
    "rename": (storage.Path, "replace", "publish"),
}


@pytest.mark.parametrize("name", STEPS)
def test_failure_of_the_root_in_any_step_is_raised_everywhere(
    comm, old, monkeypatch, name
):
    target, function, step = STEPS[name]
    error = mpisave.StorageError
    with failing_on(comm, 0, monkeypatch, target, function, FULL):
        caught = assert_refused(
            comm, error, lambda: save(comm, old), "No space left on device", [0]
        )

    assert caught.step == step
    assert caught.failures[0].host == comm.bcast(socket.gethostname())
    assert_nothing_lost(comm, old)
    save(comm, old)
    assert_on_all_ranks(comm, len(mpisave.load(old)) == comm.size + 1, "next save")


def test_failure_of_the_coordinator_to_plan_is_raised_everywhere(
    comm, old, monkeypatch
):
    error = RuntimeError("no plan")
    with failing_on(comm, 0, monkeypatch, parts, "merge", error):
        caught = assert_refused(
            comm, mpisave.CollectiveError, lambda: save(comm, old), "no plan", [0]
        )

    assert caught.step == "plan"
    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("calls", [5, 6, 9])
def test_disk_that_fills_between_rounds_is_raised_everywhere(
    comm, old, monkeypatch, calls
):
    if comm.rank == 0:
        monkeypatch.setattr(
            storage.os, "pwrite", fail_after(calls, FULL, storage.os.pwrite)
        )

    caught = assert_refused(
        comm, mpisave.StorageError, lambda: save(comm, old), "cannot write", [0]
    )

    monkeypatch.undo()
    assert caught.step == "gather and write"
    assert str(old) in str(caught)
    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
def test_sender_that_cannot_read_its_array_is_raised_everywhere(comm, old, monkeypatch):
    last = comm.size - 1
    error = RuntimeError("device lost")
    with failing_on(comm, last, monkeypatch, arrays.HeldArray, "view", error):
        caught = assert_refused(
            comm,
            mpisave.CollectiveError,
            lambda: save(comm, old),
            "device lost",
            [last],
        )

    assert caught.step == "gather and write"
    assert_nothing_lost(comm, old)


def bad_states(rank):
    yield {"w": np.array([object()])}, "dtype object"
    yield {"w": np.zeros(2, [("a", "i4")])}, "cannot be saved"
    yield {"w": np.array(["text"])}, "cannot be saved"
    yield {"nested": {"w": np.zeros(2)}}, "flat dict"
    yield {"number": 3}, "'number'"
    yield {(1, 2): np.zeros(1)}, "keys are str or int"
    yield [np.zeros(1)], "is a dict of arrays"
    yield {"f": lambda: None}, "'f'"
    yield {"w": np.ma.masked_array([1, 2], [0, 1])}, "masked"


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("victim", [0, -1])
def test_state_that_cannot_be_saved_on_one_rank_is_refused_on_all(
    comm, old, number, victim
):
    victim %= comm.size
    bad, match = list(bad_states(comm.rank))[number]
    state = bad if comm.rank == victim else state_of(comm.rank)

    assert_refused(
        comm,
        mpisave.StateDictError,
        lambda: save(comm, old, state),
        match,
        [victim],
    )

    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("mine", "other", "matches"),
    [
        (np.zeros(3, "f4"), np.zeros(3, "f8"), ["float32", "float64"]),
        (np.zeros(3), np.zeros((3, 1)), ["(3,)", "(3, 1)"]),
        (np.zeros(3, "<i4"), np.zeros(3, ">i4"), ["<i4", ">i4"]),
        (np.zeros(3), 3.0, ["an array", "3.0"]),
        (np.zeros(3), {"x": np.zeros(3)}, ["an array", "a dict"]),
        (0.1, 0.2, ["0.1", "0.2"]),
        (1, 1.0, ["1 (int)", "1.0 (float)"]),
        ([np.zeros(1)], [np.zeros(1)] * 2, ["list of 1", "list of 2"]),
        ([1], (1,), ["a list", "a tuple"]),
    ],
    ids=str,
)
def test_key_that_differs_between_ranks_is_refused_with_both_values(
    comm, old, mine, other, matches
):
    last = comm.size - 1
    state = {"key": other if comm.rank == last else mine}

    caught = assert_refused(
        comm,
        mpisave.StateDictError,
        lambda: save(comm, old, state, state_type="opt"),
        "'key' differs between ranks",
    )

    for match in [*matches, "on rank 0", f"on rank {last}"]:
        assert match in str(caught)
    assert_nothing_lost(comm, old)


class Odd:
    """An object that can neither be compared nor shown."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        raise ValueError("ambiguous")

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.mpi(min_size=2)
def test_object_that_cannot_be_compared_is_refused_by_key(comm, old):
    last = comm.size - 1
    state = {"cfg": Odd(comm.rank == last)}

    caught = assert_refused(
        comm,
        mpisave.StateDictError,
        lambda: save(comm, old, state, state_type="opt"),
        "'cfg' differs between ranks: an object that cannot be shown (RuntimeError: no",
    )

    assert f"test_failures.Odd) on rank {last}" in str(caught)
    assert_nothing_lost(comm, old)


def test_object_that_hdf5_cannot_hold_is_refused_by_key_and_type(comm, old):
    state = {"fine": np.zeros(2), "sched": {"odd": {1, 2}}}

    caught = assert_refused(
        comm,
        mpisave.StateDictError,
        lambda: save(comm, old, state, state_type="opt", use_binary_format=True),
        "['sched']['odd'] is of type set",
    )

    assert caught.step == "describe the state dict"
    assert_nothing_lost(comm, old)


BAD_ARGUMENTS = [
    ("protocol", 1, "protocol is 1"),
    ("protocol", 6, "protocol is 6"),
    ("protocol", "4", "protocol is '4'"),
    ("protocol", True, "protocol is True"),
    ("use_binary_format", 1, "use_binary_format is 1"),
    ("gather_to", -1, "gather_to is -1"),
    ("gather_to", 99, "gather_to is 99"),
    ("gather_to", [0, 0], "twice"),
    ("gather_to", [], "empty"),
    ("gather_to", (), "empty"),
    ("gather_to", True, "bool"),
    ("gather_to", [0, False], "bool"),
    ("gather_to", "0", "str"),
    ("gather_to", 0.0, "float"),
    ("state_type", "adam", "'params', 'opt'"),
    ("state_type", 3, "state_type is 3"),
    ("max_grouped_size", "3GB ", "max_grouped_size is '3GB '"),
    ("max_grouped_size", "-1M", "max_grouped_size"),
    ("max_grouped_size", "3g", "max_grouped_size"),
    ("max_grouped_size", "", "max_grouped_size"),
    ("max_grouped_size", "0K", "max_grouped_size"),
    ("max_grouped_size", 0, "max_grouped_size is 0"),
    ("max_grouped_size", 1.5, "max_grouped_size is 1.5"),
    ("max_grouped_size", True, "max_grouped_size is True"),
    ("max_grouped_size", None, "max_grouped_size is None"),
]


@pytest.mark.parametrize(("name", "value", "match"), BAD_ARGUMENTS, ids=str)
@pytest.mark.parametrize("victims", ["all", "last"])
def test_argument_that_is_not_legal_is_refused_on_all_ranks(
    comm, old, name, value, match, victims
):
    last = comm.size - 1
    changed = {name: value} if victims == "all" or comm.rank == last else {}

    assert_refused(
        comm, mpisave.ArgumentError, lambda: save(comm, old, **changed), match
    )

    assert_nothing_lost(comm, old)


def test_unknown_argument_is_a_type_error_that_names_the_close_match(comm, old):
    def call():
        save(comm, old, **({"gather_two": 1} if comm.rank == comm.size - 1 else {}))

    caught = assert_refused(
        comm, mpisave.UnknownArgumentError, call, "did you mean 'gather_to'?"
    )

    assert isinstance(caught, TypeError)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("protocol", 4, 5),
        ("use_binary_format", False, True),
        ("gather_to", 0, [0, 1]),
        ("gather_to", 0, None),
        ("state_type", "params", "opt"),
        ("max_grouped_size", "1M", "2M"),
    ],
)
def test_argument_that_differs_is_refused_with_ranks_and_both_values(
    comm, old, name, first, other
):
    last = comm.size - 1

    caught = assert_refused(
        comm,
        mpisave.ArgumentError,
        lambda: save(comm, old, **{name: other if comm.rank == last else first}),
        f"{name} differs between ranks",
    )

    assert f"on rank {last}" in str(caught)
    assert "on rank 0" in str(caught)
    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
def test_path_that_differs_is_refused(comm, old):
    path = old.with_name(f"{comm.rank}.params")

    caught = assert_refused(
        comm, mpisave.ArgumentError, lambda: save(comm, path), "path differs"
    )

    assert "0.params" in str(caught)
    assert "1.params" in str(caught)


@pytest.mark.mpi(min_size=2)
def test_two_names_of_one_file_are_refused_with_advice(comm, old):
    # Ranks that do not know that they share a file would each write a part of it.
    other = old.parent / "link"
    if comm.rank == 0:
        other.symlink_to(old.parent, target_is_directory=True)
    comm.Barrier()
    path = old if comm.rank == 0 else other / old.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.os.path, "realpath", os.fspath)
        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, path, gather_to=None),
            "different paths",
        )

    comm.Barrier()
    if comm.rank == 0:
        other.unlink()
    assert "{rank}" in str(caught)
    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
def test_state_type_is_required_when_gathering(comm, old):
    assert_refused(
        comm,
        mpisave.ArgumentError,
        lambda: save(comm, old, state_type=None),
        "state_type is None",
    )


def test_missing_directory_is_raised_everywhere_with_advice(comm, old):
    path = old.parent / "missing" / "x.params"

    caught = assert_refused(
        comm, mpisave.StorageError, lambda: save(comm, path), "no directory", [0]
    )

    assert str(path) in str(caught)
    assert isinstance(caught, OSError)


@pytest.mark.parametrize("name", ["x.params", "state.opt"])
@pytest.mark.filterwarnings("always:the path")
def test_path_that_does_not_end_in_the_state_type_is_warned_about_once(
    comm, old, name, recwarn
):
    save(comm, old.with_name(name), state_type="params")

    texts = [str(w.message) for w in recwarn if "does not end in" in str(w.message)]
    counts = comm.allgather(len(texts))
    assert sum(counts) == (name == "state.opt"), counts


@pytest.mark.mpi(min_size=2)
def test_without_gathering_one_failing_rank_fails_all(comm, shared_dir):
    last = comm.size - 1
    folder = shared_dir / f"rank{comm.rank}"
    if comm.rank != last:
        folder.mkdir()
    comm.Barrier()

    assert_refused(
        comm,
        mpisave.StorageError,
        lambda: mpisave.save(
            state_of(comm.rank), shared_dir / "rank{rank}" / "x", comm=comm
        ),
        "no directory",
        [last],
    )

    comm.Barrier()
    assert all(not files_in(p) for p in shared_dir.iterdir())


def test_hdf5_that_fails_to_lay_out_leaves_nothing(comm, old, monkeypatch):
    error = RuntimeError("HDF5 says no")
    with failing_on(comm, 0, monkeypatch, hdf5._Builder, "build", error):
        assert_refused(
            comm,
            mpisave.CollectiveError,
            lambda: save(comm, old, use_binary_format=True),
            "HDF5 says no",
        )

    assert_nothing_lost(comm, old)


def test_communicators_are_not_used_up_by_saving_often(comm, shared_dir):
    # MPICH has about 2,000 context ids.
    state = {"w": np.zeros(1)}
    for _ in range(50):
        own = comm.Dup()
        for _ in range(3):
            mpisave.save(
                state,
                shared_dir / "x.params",
                gather_to=0,
                state_type="params",
                comm=own,
            )
        own.Free()


def test_intercommunicator_or_no_communicator_is_refused(comm, shared_dir):
    with pytest.raises(mpisave.ArgumentError, match="intracommunicator"):
        mpisave.save({}, shared_dir / "x", comm="world")


def test_processes_that_do_not_know_each_other_are_refused(
    comm, shared_dir, monkeypatch
):
    if comm.size > 1:
        pytest.skip("one process that should be one of four")
    for name in list(os.environ):
        if name.startswith(("PMI_", "OMPI_", "MV2_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")

    with pytest.raises(mpisave.LaunchError, match="--mpi=pmi2"):
        mpisave.save({"w": np.zeros(1)}, shared_dir / "x")

    assert files_in(shared_dir) == []


class BrokenError(Exception):
    def __str__(self):
        raise ValueError("this exception has no text")


class OddState(dict):
    def items(self):
        raise BrokenError


@pytest.mark.parametrize("victim", [0, -1])
def test_exception_without_a_text_is_raised_everywhere(comm, old, victim):
    victim %= comm.size
    state = OddState() if comm.rank == victim else state_of(comm.rank)

    assert_refused(
        comm, mpisave.CollectiveError, lambda: save(comm, old, state), "cannot be had"
    )

    assert_nothing_lost(comm, old)


def test_error_of_a_class_of_the_callers_is_raised_everywhere(comm, old, monkeypatch):
    class LocalError(mpisave.StateDictError):
        def __init__(self, number):
            super().__init__(f"number {number}")

    class Picky:
        def check(self, key, kind, type_name):
            if comm.rank == comm.size - 1:
                raise LocalError(7)

    monkeypatch.setitem(mpisave.state_types._REGISTRY, "params", Picky())

    assert_refused(comm, mpisave.StateDictError, lambda: save(comm, old), "number 7")

    assert_nothing_lost(comm, old)


def test_path_of_a_str_subclass_is_a_path(comm, old):
    class Local(str):
        __slots__ = ()

    report = save(comm, Local(old))

    assert_on_all_ranks(comm, type(report.path) is str, "a plain str")


def test_interrupt_on_one_rank_stays_one_and_ends_the_save_of_all(
    comm, old, monkeypatch
):
    last = comm.size - 1
    with failing_on(comm, last, monkeypatch, saving, "flatten", KeyboardInterrupt()):
        try:
            save(comm, old)
            caught = None
        except BaseException as exc:
            caught = exc

    expected = KeyboardInterrupt if comm.rank == last else mpisave.CollectiveError
    assert_on_all_ranks(comm, type(caught) is expected, f"{caught!r}")
    assert_nothing_lost(comm, old)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_call_different_things_are_told_who_does_what(comm, old):
    last = comm.size - 1

    def call():
        if comm.rank == last:
            mpisave.load(old, comm=comm)
        else:
            save(comm, old)

    for _ in range(2):  # in step with each other afterwards
        caught = assert_refused(
            comm,
            mpisave.CollectiveError,
            call,
            f"rank {last} in load, step 'check arguments'. All ranks of comm",
        )
        assert " in save, step 'check arguments'; " in str(caught)
    assert_nothing_lost(comm, old)
    save(comm, old)


def test_writer_that_cannot_start_is_raised_everywhere(comm, old, monkeypatch):
    error = RuntimeError("can't start new thread")
    with failing_on(comm, 0, monkeypatch, root.threading.Thread, "start", error):
        caught = assert_refused(
            comm, mpisave.CollectiveError, lambda: save(comm, old), "new thread", [0]
        )

    assert caught.step == "allocate buffers"
    assert_nothing_lost(comm, old)
    save(comm, old)
    assert_on_all_ranks(comm, len(mpisave.load(old)) == comm.size + 1, "next save")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("victim", [0, -1])
def test_rank_without_memory_for_buffers_is_raised_everywhere(
    comm, old, monkeypatch, victim
):
    victim %= comm.size
    error = MemoryError("no buffer")
    # The second of the two rounds of the root.
    calls = 1 if victim == 0 else 0
    with monkeypatch.context() as patch:
        if comm.rank == victim:
            patch.setattr(devices, "np", Numpy(fail_after(calls, error, np.empty)))
        caught = assert_refused(
            comm,
            mpisave.CollectiveError,
            lambda: save(comm, old),
            "no buffer",
            [victim],
        )

    assert caught.step == "allocate buffers"
    assert_nothing_lost(comm, old)
    threads = [t.name for t in threading.enumerate() if "mpisave" in t.name]
    assert_on_all_ranks(comm, not threads, f"threads left: {threads}")


def test_writer_thread_that_is_ended_is_no_success(comm, old, monkeypatch):
    if comm.rank == 0:
        monkeypatch.setattr(
            storage.os, "pwrite", fail_after(4, SystemExit(3), storage.os.pwrite)
        )

    with pytest.raises((mpisave.CollectiveError, SystemExit)):
        save(comm, old)

    monkeypatch.undo()
    assert_nothing_lost(comm, old)


def test_error_of_the_file_system_has_its_number_and_the_key(comm, old, monkeypatch):
    pwrite = storage.os.pwrite

    def full_for_large_writes(descriptor, data, offset):
        if len(data) > 50_000:
            raise FULL
        return pwrite(descriptor, data, offset)

    if comm.rank == 0:
        monkeypatch.setattr(storage.os, "pwrite", full_for_large_writes)

    caught = assert_refused(
        comm, mpisave.StorageError, lambda: save(comm, old), "'w0': cannot write"
    )

    assert caught.errno == errno.ENOSPC


def test_file_object_that_was_not_written_to_keeps_its_content(comm, monkeypatch):
    buffer = io.BytesIO(b"the old state") if comm.rank == 0 else None
    error = RuntimeError("no layout")
    with failing_on(comm, 0, monkeypatch, pkl.PickleFormat, "layout", error):
        assert_refused(
            comm, mpisave.CollectiveError, lambda: save(comm, buffer), "no layout", [0]
        )

    assert_on_all_ranks(
        comm, comm.rank or buffer.getvalue() == b"the old state", "content"
    )


@pytest.mark.mpi(min_size=2)
def test_object_that_is_not_small_is_refused_by_key(comm, old):
    state = {"blob": bytes(2**21)} if comm.rank else {}

    assert_refused(
        comm,
        mpisave.StateDictError,
        lambda: save(comm, old, state, state_type="opt"),
        "'blob' of type bytes has",
    )
