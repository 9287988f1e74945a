"""What is known before a byte moves, and how a file gets its name, on several ranks."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import time

import numpy as np
import pytest
from helpers import assert_on_all_ranks, failing_on, files_in, watch_writes
from ranks import assert_nothing_lost, assert_refused, grid, held_boxes, put_old

import mpisave
from mpisave import moving, room, staging, storage

pytestmark = pytest.mark.mpi

FULL = OSError(errno.ENOSPC, "No space left on device")
ROADS = pytest.mark.parametrize("gather_to", [None, 0, [0, -1]], ids=str)


def state_of(comm, nbytes=100_000):
    return {f"w{comm.rank}": np.full(nbytes, comm.rank, np.uint8), "n": np.arange(3)}


def save(comm, path, state=None, *, gather_to=None, **changed):
    if isinstance(gather_to, list):
        gather_to = sorted({root % comm.size for root in gather_to})
    state = state_of(comm) if state is None else state
    how = {"gather_to": gather_to, "state_type": "opt", "max_grouped_size": 65536}
    return mpisave.save(state, path, comm=comm, **(how | changed))


@pytest.fixture
def old(comm, shared_dir):
    """Return the path of a state that was saved before, ending in its state type."""
    return put_old(comm, shared_dir / "state.opt")


@pytest.fixture
def small(comm, shared_dir):
    """Return a folder on a file system of 4 MiB."""
    folder = shared_dir / "small"
    done = False
    if comm.rank == 0:
        folder.mkdir()
        command = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=4m"]
        done = (
            subprocess.run([*command, "none", str(folder)], check=False).returncode == 0
        )
    if not comm.bcast(done):
        pytest.skip("cannot mount a tmpfs")
    yield folder
    comm.Barrier()
    if comm.rank == 0:
        subprocess.run([shutil.which("umount"), str(folder)], check=True)


class TestOverwrite:
    @ROADS
    def test_file_that_is_there_is_refused_on_all_ranks(
        self, comm, old, monkeypatch, gather_to
    ):
        calls = watch_writes(monkeypatch)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, gather_to=gather_to, overwrite=False),
            "there is a file of that name, and overwrite=False",
        )

        assert caught.step == "create the staging file"
        assert caught.errno == errno.EEXIST
        assert_on_all_ranks(comm, not calls, "nothing was written")
        assert_nothing_lost(comm, old)

    @ROADS
    def test_file_that_appears_meanwhile_is_refused_on_all_ranks(
        self, comm, shared_dir, monkeypatch, gather_to
    ):
        path = shared_dir / "new.opt"
        rename = staging.rename_to_new

        def late(mine, final):
            put = final.with_name("other")
            put.write_bytes(b"of another job")
            put.rename(final)
            rename(mine, final)

        monkeypatch.setattr(staging, "rename_to_new", late)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, path, gather_to=gather_to, overwrite=False),
            "made in the meantime, and overwrite=False",
        )

        comm.Barrier()
        assert caught.step == "publish"
        assert caught.errno == errno.EEXIST
        assert_on_all_ranks(comm, files_in(shared_dir) == ["new.opt"], "nothing left")
        assert path.read_bytes() == b"of another job"

    @ROADS
    def test_new_file_is_saved(self, comm, shared_dir, gather_to):
        save(comm, shared_dir / "new.opt", gather_to=gather_to, overwrite=False)

        comm.Barrier()
        assert_on_all_ranks(comm, files_in(shared_dir) == ["new.opt"], "nothing left")
        assert len(mpisave.load(shared_dir / "new.opt")) == comm.size + 1

    def test_one_file_of_many_that_is_there_refuses_all(self, comm, shared_dir):
        last = comm.size - 1
        if comm.rank == last:
            (shared_dir / f"{last}.opt").write_bytes(b"old")
        comm.Barrier()

        assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, shared_dir / "{rank}.opt", overwrite=False),
            "overwrite=False",
            [last],
        )

        comm.Barrier()
        assert_on_all_ranks(comm, files_in(shared_dir) == [f"{last}.opt"], "no other")

    @pytest.mark.mpi(min_size=2)
    def test_argument_that_differs_is_refused(self, comm, old):
        assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: save(comm, old, overwrite=comm.rank == 0),
            "overwrite differs between ranks",
        )
        assert_nothing_lost(comm, old)


class TestBefore:
    """Nothing was written yet when these are raised."""

    @ROADS
    @pytest.mark.parametrize("use_binary_format", [False, True])
    def test_disk_that_is_too_small(
        self, comm, small, monkeypatch, gather_to, use_binary_format
    ):
        put_old(comm, small / "x.opt")
        calls = watch_writes(monkeypatch)
        state = state_of(comm, 5 * 2**20 // comm.size)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(
                comm,
                small / "x.opt",
                state,
                gather_to=gather_to,
                use_binary_format=use_binary_format,
            ),
            "bytes are available there",
            [0],
        )

        assert caught.step == "lay out the file"
        assert caught.errno == errno.ENOSPC
        assert_on_all_ranks(comm, not calls, "nothing was written")
        assert_nothing_lost(comm, small / "x.opt")

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("victim", [0, -1])
    def test_limit_of_one_rank(self, comm, old, monkeypatch, victim):
        victim %= comm.size
        calls = watch_writes(monkeypatch)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if comm.rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            caught = assert_refused(
                comm, mpisave.StorageError, lambda: save(comm, old), "ulimit", [victim]
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        assert caught.step == "lay out the file"
        assert caught.errno == errno.EFBIG
        # The rank that lays out may have written what is not payload.
        assert_on_all_ranks(comm, max(calls, default=0) < 2000, f"payload: {calls}")
        assert_nothing_lost(comm, old)

    @pytest.mark.parametrize("victim", [0, -1])
    @pytest.mark.parametrize("what", ["Gather", "Exchange"])
    @pytest.mark.parametrize("gather_to", [None, 0])
    def test_memory_for_buffers(self, comm, old, monkeypatch, what, gather_to, victim):
        if (what == "Gather" and gather_to is None) or comm.size == 1:
            pytest.skip("there are no buffers")
        victim %= comm.size
        calls = watch_writes(monkeypatch)
        shape = (60, 8 * comm.size)
        box = grid(shape, (1, comm.size))[comm.rank]
        state = {"x": held_boxes(np.arange(60 * 8 * comm.size).reshape(shape), [box])}
        error = MemoryError("no buffer")
        with failing_on(comm, victim, monkeypatch, moving, what, error):
            caught = assert_refused(
                comm,
                mpisave.CollectiveError,
                lambda: save(comm, old, state, gather_to=gather_to),
                "no buffer",
                [victim],
            )

        assert caught.step == "allocate buffers"
        assert_on_all_ranks(comm, not calls, "nothing was written")
        assert_nothing_lost(comm, old)

    @ROADS
    @pytest.mark.filterwarnings("ignore:the path .* does not end in")
    def test_name_that_is_too_long(self, comm, old, monkeypatch, gather_to):
        calls = watch_writes(monkeypatch)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old.with_name("x" * 256), gather_to=gather_to),
            "File name too long",
        )

        assert caught.step == "create the staging file"
        assert caught.errno == errno.ENAMETOOLONG
        assert_on_all_ranks(comm, not calls, "nothing was written")
        assert_nothing_lost(comm, old)

    @pytest.mark.mpi(min_size=2)
    def test_only_ranks_that_create_a_file_ask_about_its_name(
        self, comm, old, monkeypatch
    ):
        asked = []
        check = storage.StagedFile._check_final

        def watched(self):
            asked.append(self.name)
            return check(self)

        monkeypatch.setattr(storage.StagedFile, "_check_final", watched)

        save(comm, old)

        assert_on_all_ranks(comm, len(asked) == (comm.rank == 0), "one asks")


class TestWhole:
    @ROADS
    def test_file_of_another_length_is_not_published(
        self, comm, old, monkeypatch, gather_to
    ):
        complete = storage.StagedFile.complete

        def cut(self, nbytes, *, durable):
            os.ftruncate(self._fd, nbytes - 1)
            complete(self, nbytes, durable=durable)

        monkeypatch.setattr(storage.StagedFile, "complete", cut)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, gather_to=gather_to),
            "cannot complete",
            [0],
        )

        assert caught.step == "seal"
        assert_nothing_lost(comm, old)

    @ROADS
    @pytest.mark.parametrize("victim", [0, -1])
    def test_failed_flush_of_one_rank_is_final(
        self, comm, old, monkeypatch, gather_to, victim
    ):
        # After the first failure the kernel takes the pages for clean, and says yes.
        victim %= comm.size
        if gather_to is not None:
            victim = 0
        calls, fsync = [], os.fsync

        def fail_once(descriptor):
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        if comm.rank == victim:
            monkeypatch.setattr(os, "fsync", fail_once)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, gather_to=gather_to),
            "cannot flush",
            [victim],
        )

        assert caught.errno == errno.EIO
        assert_on_all_ranks(comm, len(calls) == (comm.rank == victim), "no retry")
        assert_nothing_lost(comm, old)

    @ROADS
    def test_failed_close_of_one_rank_is_final(self, comm, old, monkeypatch, gather_to):
        victim = comm.size - 1 if gather_to is None else 0
        close = os.close

        def fail(descriptor):
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            close(descriptor)
            if is_file:
                raise OSError(errno.EIO, "Input/output error")

        if comm.rank == victim:
            monkeypatch.setattr(os, "close", fail)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: save(comm, old, gather_to=gather_to),
            "cannot close",
            [victim],
        )

        assert caught.step == "seal"
        assert_nothing_lost(comm, old)

    @ROADS
    def test_mode_of_the_older_file_is_kept(self, comm, old, gather_to):
        if comm.rank == 0:
            old.chmod(0o604)
        comm.Barrier()

        save(comm, old, gather_to=gather_to)

        comm.Barrier()
        mode = stat.S_IMODE(old.stat().st_mode)
        assert_on_all_ranks(comm, mode == 0o604, f"mode {mode:o}")


class TestStale:
    @ROADS
    def test_file_of_a_dead_job_is_removed_and_one_in_use_stays(
        self, comm, old, monkeypatch, gather_to
    ):
        held = -1
        if comm.rank == 0:
            dead, descriptor = staging.create(old, 0o666)
            os.close(descriptor)
            alive, held = staging.create(old, 0o666)
            os.utime(alive, (0, 0))
            monkeypatch.setattr(staging, "_machine", lambda: "0123456789abcdef")
            fresh, descriptor = staging.create(old, 0o666)
            os.close(descriptor)
            monkeypatch.undo()
            assert dead.exists()
            stay = sorted([alive.name, fresh.name])
        stay = comm.bcast(stay if comm.rank == 0 else None)

        save(comm, old, gather_to=gather_to)

        comm.Barrier()
        found = files_in(old.parent)
        comm.Barrier()
        if comm.rank == 0:
            os.close(held)
        assert_on_all_ranks(comm, found == [*stay, old.name], f"{found}")

    @pytest.mark.mpi(min_size=2)
    def test_files_of_all_ranks_that_save_alone_stay(self, comm, shared_dir):
        for _ in range(3):
            save(comm, shared_dir / "{rank}.opt")

        comm.Barrier()
        expected = sorted(f"{rank}.opt" for rank in range(comm.size))
        assert_on_all_ranks(comm, files_in(shared_dir) == expected, "files")

    @pytest.mark.mpi(min_size=2)
    def test_jobs_that_save_to_one_name_do_not_remove_each_others_files(
        self, comm, shared_dir
    ):
        # Two jobs: halves of the ranks, that know nothing of one another.
        job = comm.Split(comm.rank % 2, comm.rank)
        state = {"w": np.full(50_000, comm.rank % 2, np.uint8)}
        error = None
        try:
            for _ in range(30):
                mpisave.save(state, shared_dir / "x", comm=job, durable=False)
        except mpisave.MpisaveError as exc:
            error = exc
        job.Free()

        comm.Barrier()
        found = set(mpisave.load(shared_dir / "x")["w"].tolist())
        assert_on_all_ranks(comm, error is None, f"{error}")
        assert_on_all_ranks(comm, found in ({0}, {1}), "one of the two")
        assert_on_all_ranks(comm, files_in(shared_dir) == ["x"], "nothing left")


def test_preflight_and_cleaning_cost_little(comm, shared_dir):
    """A thousand files beside it are listed, not looked at."""
    if comm.rank == 0:
        for number in range(1000):
            (shared_dir / f"step{number}.opt").touch()
    comm.Barrier()
    began = time.perf_counter()
    for _ in range(10):
        save(comm, shared_dir / "x.opt", {"w": np.zeros(1)}, durable=False)
    seconds = time.perf_counter() - began

    assert_on_all_ranks(comm, seconds < 10, f"{seconds:.1f} s")


def test_reservation_that_fails_names_the_quota(comm, old, monkeypatch):
    exceeded = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with failing_on(comm, 0, monkeypatch, room, "_fallocate", exceeded):
        caught = assert_refused(
            comm, mpisave.StorageError, lambda: save(comm, old), "a quota of", [0]
        )

    assert caught.errno == errno.EDQUOT
    assert_nothing_lost(comm, old)
