"""Names of staging files, those of dead jobs, modes, and publishing to a new name."""

import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from helpers import files_in

import mpisave
from mpisave import staging
from mpisave.errors import StorageError
from mpisave.storage import StagedFile

STATE = {"w": np.arange(1000), "n": 5}
OLD = b"the file that was there before"
DAY = 24 * 3600


@pytest.fixture
def umask():
    """Have the umask that most have."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def left_behind(path, machine=None, age=0.0):
    """Leave a staging file as a process does that is killed; return it."""
    with pytest.MonkeyPatch.context() as patch:
        if machine is not None:
            patch.setattr(staging, "_machine", lambda: machine)
        found, descriptor = staging.create(path, 0o666)
    os.write(descriptor, b"half of it")
    os.close(descriptor)
    then = time.time() - age
    os.utime(found, (then, then))
    return found


ELSEWHERE = "0123456789abcdef"

# Saves until it is killed: the first time it is about to flush, it says so.
KILLED = """
import os, sys, time
import h5py
import numpy as np
import mpisave
def stop(descriptor):
    print("ready", flush=True)
    time.sleep(600)
os.fsync = stop
mpisave.save({"w": np.zeros(1000)}, sys.argv[1])
"""


@pytest.fixture
def job(tmp_path):
    """Return a process that is in the middle of a save to `tmp_path / "x"`."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


class TestStale:
    def test_file_of_a_killed_job_is_removed_by_the_next_save(self, tmp_path, job):
        job.kill()
        job.wait()
        assert len(files_in(tmp_path)) == 1

        mpisave.save(STATE, tmp_path / "x")

        assert files_in(tmp_path) == ["x"]

    @pytest.mark.parametrize("is_stopped", [False, True])
    def test_file_of_a_job_that_lives_stays(self, tmp_path, job, is_stopped):
        if is_stopped:
            job.send_signal(signal.SIGSTOP)
        mine = files_in(tmp_path)
        long_ago = time.time() - 30 * DAY
        os.utime(tmp_path / mine[0], (long_ago, long_ago))

        mpisave.save(STATE, tmp_path / "x")

        assert files_in(tmp_path) == [*mine, "x"]

    def test_room_of_a_dead_file_is_there_for_the_new_one(self, tmp_path, monkeypatch):
        left_behind(tmp_path / "x")
        seen = []
        monkeypatch.setattr(
            "mpisave.room.reserve", lambda *_: seen.append(files_in(tmp_path))
        )

        mpisave.save(STATE, tmp_path / "x")

        assert [len(names) for names in seen] == [1]

    @pytest.mark.parametrize(
        ("age", "is_removed"), [(0, False), (DAY - 60, False), (DAY + 60, True)]
    )
    def test_file_of_another_machine_has_to_be_old(self, tmp_path, age, is_removed):
        found = left_behind(tmp_path / "x", ELSEWHERE, age)

        mpisave.save(STATE, tmp_path / "x")

        assert found.exists() is not is_removed

    def test_file_of_another_machine_that_is_locked_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(staging, "_machine", lambda: ELSEWHERE)
        found, descriptor = staging.create(tmp_path / "x", 0o666)
        monkeypatch.undo()
        os.utime(found, (0, 0))

        mpisave.save(STATE, tmp_path / "x")

        os.close(descriptor)
        assert found.exists()
        mpisave.save(STATE, tmp_path / "x")
        assert not found.exists()

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
    @pytest.mark.parametrize(("age", "is_removed"), [(60, False), (DAY + 60, True)])
    def test_without_locks_only_old_files_are_removed(
        self, tmp_path, monkeypatch, number, age, is_removed
    ):
        def refuse(*args):
            raise OSError(number, os.strerror(number))

        found = left_behind(tmp_path / "x", age=age)
        monkeypatch.setattr(staging.fcntl, "flock", refuse)

        mpisave.save(STATE, tmp_path / "x")

        assert found.exists() is not is_removed
        assert (tmp_path / "x").exists()

    def test_file_that_could_not_be_locked_is_not_taken_for_dead(
        self, tmp_path, monkeypatch
    ):
        def no_locks_left(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        with monkeypatch.context() as patch:
            patch.setattr(staging.fcntl, "flock", no_locks_left)
            staged = StagedFile(str(tmp_path / "x"))
        assert files_in(tmp_path) == [staged.staging_name]

        mpisave.save(STATE, tmp_path / "x")

        assert (tmp_path / staged.staging_name).exists()
        staged.discard()
        assert files_in(tmp_path) == ["x"]

    def test_files_for_other_names_stay(self, tmp_path):
        others = ["y", "x2", ".x", "x.params", "a" * 200, "a" * 201]
        kept = {left_behind(tmp_path / name, age=30 * DAY).name for name in others}
        plain = [".x.mpisave-staging", ".x.0123456789abcdef.mpisave-staging", "x~"]
        for name in plain:
            (tmp_path / name).write_bytes(OLD)

        mpisave.save(STATE, tmp_path / "x")
        mpisave.save(STATE, tmp_path / ("a" * 202))

        assert set(files_in(tmp_path)) == {*kept, *plain, "x", "a" * 202}

    @pytest.mark.parametrize("name", ["a" * 255, "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 85])
    def test_file_for_a_long_name_is_recognised(self, tmp_path, name):
        found = left_behind(tmp_path / name)

        mpisave.save(STATE, tmp_path / name)

        assert len(os.fsencode(found.name)) <= 143
        assert files_in(tmp_path) == [name]

    def test_name_of_any_bytes_has_a_staging_file(self, tmp_path):
        name = os.fsdecode(b"\xff\xfe" * 60)
        left_behind(tmp_path / name)

        mpisave.save(STATE, tmp_path / name)

        assert files_in(tmp_path) == [name]

    def test_what_is_no_file_stays(self, tmp_path):
        head = staging._head("x") + staging._machine()
        tails = [f".{number:016x}{staging.SUFFIX}" for number in range(3)]
        (tmp_path / (head + tails[0])).mkdir()
        os.mkfifo(tmp_path / (head + tails[1]))
        (tmp_path / "precious").write_bytes(OLD)
        (tmp_path / (head + tails[2])).symlink_to(tmp_path / "precious")

        mpisave.save(STATE, tmp_path / "x")

        assert len(files_in(tmp_path)) == 5
        assert (tmp_path / "precious").read_bytes() == OLD

    @pytest.mark.parametrize("name", ["listdir", "stat"])
    def test_directory_that_cannot_be_listed_is_no_failure(
        self, tmp_path, monkeypatch, name
    ):
        def refuse(*args, **kwargs):
            raise OSError(errno.EIO, "Input/output error")

        left_behind(tmp_path / "x")
        target = staging.os if name == "listdir" else staging
        with monkeypatch.context() as patch:
            if name == "listdir":
                patch.setattr(target, "listdir", refuse)
            else:
                patch.setattr(target, "_remove_dead", refuse)
            mpisave.save(STATE, tmp_path / "x")

        assert len(files_in(tmp_path)) == 2

    def test_file_that_is_removed_before_it_is_locked_is_made_again(
        self, tmp_path, monkeypatch
    ):
        lock, first = staging._hold, []

        def late(descriptor):
            if not first:
                first.extend(files_in(tmp_path))
                # Another job lists the directory at this very moment.
                staging.remove_stale(tmp_path / "x", tmp_path)
            return lock(descriptor)

        monkeypatch.setattr(staging, "_hold", late)

        staged = StagedFile(str(tmp_path / "x"))

        assert len(first) == 1
        assert files_in(tmp_path) == [staged.staging_name] != first
        staged.discard()

    def test_file_that_others_always_hold_is_given_up(self, tmp_path, monkeypatch):
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(staging, "_hold", lambda _: False)

        with pytest.raises(StorageError, match="cannot create the staging file"):
            mpisave.save(STATE, tmp_path / "x")

        assert files_in(tmp_path) == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_lock_is_held_until_the_file_has_its_name(self, tmp_path, monkeypatch):
        replace, seen = staging.Path.replace, []

        def watched(self, target):
            mine = files_in(tmp_path)
            staging.remove_stale(tmp_path / "x", tmp_path)
            seen.append(files_in(tmp_path) == mine)
            replace(self, target)

        monkeypatch.setattr(staging.Path, "replace", watched)

        mpisave.save(STATE, tmp_path / "x")

        assert seen == [True]
        assert files_in(tmp_path) == ["x"]

    def test_many_saves_to_one_name_at_a_time_do_not_harm_one_another(self, tmp_path):
        errors = []

        def save():
            try:
                for _ in range(20):
                    staged = StagedFile(str(tmp_path / "x"))
                    staged.write(0, memoryview(b"0123456789"))
                    staged.complete(10, durable=False)
                    staged.publish(durable=False)
            except Exception as exc:
                errors.append(exc)

        threads = [threading.Thread(target=save) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert errors == []
        assert files_in(tmp_path) == ["x"]

    def test_writes_go_on_when_the_file_is_removed(self, tmp_path):
        # As where a lock does not reach the other machine: the save fails, no more.
        (tmp_path / "x").write_bytes(OLD)
        staged = StagedFile(str(tmp_path / "x"))
        joined = StagedFile.join(str(tmp_path / "x"), staged.staging_name)
        (tmp_path / staged.staging_name).unlink()

        joined.write(0, memoryview(b"0123456789"))
        joined.close()
        staged.complete(10, durable=True)
        with pytest.raises(StorageError, match="cannot publish"):
            staged.publish()

        assert (tmp_path / "x").read_bytes() == OLD
        assert files_in(tmp_path) == ["x"]


@pytest.mark.usefixtures("umask")
class TestMode:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755, 0o000])
    def test_mode_of_the_file_that_is_replaced_is_kept(self, tmp_path, mode):
        path = tmp_path / "x"
        path.write_bytes(OLD)
        path.chmod(mode)

        mpisave.save(STATE, path)

        assert mode_of(path) == mode
        assert path.stat().st_size > len(OLD)

    def test_bits_that_a_write_in_place_would_clear_are_not_kept(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(OLD)
        path.chmod(0o6755)

        mpisave.save(STATE, path)

        assert mode_of(path) == 0o755

    def test_staging_file_never_shows_more_than_the_old_file(
        self, tmp_path, monkeypatch
    ):
        path, modes = tmp_path / "x", []
        path.write_bytes(OLD)
        path.chmod(0o400)
        pwrite = os.pwrite

        def watched(descriptor, data, offset):
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", watched)

        mpisave.save(STATE, path)

        assert set(modes) == {0o600}

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_owner_and_group_are_kept_where_permitted(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(OLD)
        os.chown(path, 12345, 23456)

        mpisave.save(STATE, path)

        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)

    @pytest.mark.parametrize(
        ("mode", "expected"), [(0o640, 0o600), (0o664, 0o644), (0o770, 0o700)]
    )
    def test_another_group_is_granted_what_all_are(
        self, tmp_path, monkeypatch, mode, expected
    ):
        def refuse(*args):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        path = tmp_path / "x"
        path.write_bytes(OLD)
        path.chmod(mode)
        monkeypatch.setattr(os, "fchown", refuse)

        mpisave.save(STATE, path)

        assert mode_of(path) == expected

    def test_mode_that_cannot_be_set_is_no_failure(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        path = tmp_path / "x"
        path.write_bytes(OLD)
        path.chmod(0o640)
        monkeypatch.setattr(os, "fchmod", refuse)

        mpisave.save(STATE, path)

        assert mode_of(path) == 0o640

    def test_mode_is_durable_with_the_file(self, tmp_path, monkeypatch):
        path, done = tmp_path / "x", []
        path.write_bytes(OLD)
        fsync, fchmod = os.fsync, os.fchmod
        monkeypatch.setattr(os, "fsync", lambda fd: done.append("flush") or fsync(fd))
        monkeypatch.setattr(
            os, "fchmod", lambda fd, mode: done.append("mode") or fchmod(fd, mode)
        )

        mpisave.save(STATE, path)

        assert done == ["mode", "flush", "flush"]

    def test_other_hard_links_keep_the_old_file(self, tmp_path):
        (tmp_path / "x").write_bytes(OLD)
        (tmp_path / "link").hardlink_to(tmp_path / "x")

        mpisave.save(STATE, tmp_path / "x")

        assert (tmp_path / "link").read_bytes() == OLD
        assert (tmp_path / "x").stat().st_nlink == 1


def no_hard_links(*args, **kwargs):
    raise PermissionError(errno.EPERM, "Operation not permitted")


class TestOverwrite:
    def test_file_that_is_there_is_refused_before_a_byte_moves(
        self, tmp_path, monkeypatch
    ):
        path, calls = tmp_path / "x", []
        path.write_bytes(OLD)
        monkeypatch.setattr(os, "pwrite", lambda *_: calls.append(1))

        with pytest.raises(StorageError, match="overwrite=False") as caught:
            mpisave.save(STATE, path, overwrite=False)

        assert caught.value.errno == errno.EEXIST
        assert str(path) in str(caught.value)
        assert calls == []
        assert path.read_bytes() == OLD
        assert files_in(tmp_path) == ["x"]

    @pytest.mark.parametrize("has_links", [True, False])
    def test_new_file_is_saved(self, tmp_path, monkeypatch, has_links):
        if not has_links:
            monkeypatch.setattr(os, "link", no_hard_links)

        mpisave.save(STATE, tmp_path / "x", overwrite=False)

        assert files_in(tmp_path) == ["x"]
        assert (tmp_path / "x").stat().st_nlink == 1
        assert pickle.loads((tmp_path / "x").read_bytes())["n"] == 5

    @pytest.mark.parametrize("has_links", [True, False])
    def test_file_that_appears_meanwhile_is_refused(
        self, tmp_path, monkeypatch, has_links
    ):
        path, fsync = tmp_path / "x", os.fsync

        def appear(descriptor):
            path.write_bytes(OLD)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", appear)
        if not has_links:
            monkeypatch.setattr(os, "link", no_hard_links)

        with pytest.raises(StorageError, match="made in the meantime") as caught:
            mpisave.save(STATE, path, overwrite=False)

        assert caught.value.errno == errno.EEXIST
        assert path.read_bytes() == OLD
        assert files_in(tmp_path) == ["x"]

    @pytest.mark.parametrize("has_links", [True, False])
    def test_of_many_at_a_time_one_is_saved(self, tmp_path, monkeypatch, has_links):
        if not has_links:
            monkeypatch.setattr(os, "link", no_hard_links)
        staged = [StagedFile(str(tmp_path / "x"), overwrite=False) for _ in range(8)]
        outcomes = []

        def publish(number, file):
            data = b"%d" % number * 10
            file.write(0, memoryview(data))
            file.complete(10, durable=False)
            try:
                file.publish(durable=False)
                outcomes.append(data)
            except StorageError as exc:
                outcomes.append(exc.errno)
                file.discard()

        threads = [
            threading.Thread(target=publish, args=item) for item in enumerate(staged)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        winners = [found for found in outcomes if found != errno.EEXIST]
        assert len(outcomes) == 8
        assert winners == [(tmp_path / "x").read_bytes()]
        assert files_in(tmp_path) == ["x"]

    def test_answer_that_was_lost_on_the_way_is_no_failure(self, tmp_path, monkeypatch):
        link = os.link

        def twice(*args):  # NFS asks again when the first answer does not come
            link(*args)
            link(*args)

        monkeypatch.setattr(os, "link", twice)

        mpisave.save(STATE, tmp_path / "x", overwrite=False)

        assert files_in(tmp_path) == ["x"]

    @pytest.mark.parametrize("has_links", [True, False])
    def test_other_failures_leave_nothing(self, tmp_path, monkeypatch, has_links):
        def fail(*args, **kwargs):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "link", fail if has_links else no_hard_links)
        monkeypatch.setattr(staging.Path, "replace", fail)

        with pytest.raises(StorageError, match="cannot publish") as caught:
            mpisave.save(STATE, tmp_path / "x", overwrite=False)

        assert caught.value.errno == errno.EIO
        assert files_in(tmp_path) == []

    def test_second_name_that_stays_is_removed_by_a_later_save(
        self, tmp_path, monkeypatch
    ):
        path = tmp_path / "x"
        with monkeypatch.context() as patch:
            patch.setattr(staging.Path, "unlink", no_hard_links)
            mpisave.save(STATE, path, overwrite=False)
        assert path.stat().st_nlink == 2

        mpisave.save(STATE, path)

        assert files_in(tmp_path) == ["x"]

    def test_link_to_nothing_is_filled_and_one_to_a_file_refused(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "real")

        mpisave.save(STATE, tmp_path / "link", overwrite=False)
        with pytest.raises(StorageError, match="overwrite=False"):
            mpisave.save(STATE, tmp_path / "link", overwrite=False)

        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").is_file()

    def test_file_object_is_written_all_the_same(self, tmp_path):
        with (tmp_path / "x").open("w+b") as file:
            file.write(OLD)
            file.seek(0)
            mpisave.save(STATE, file, overwrite=False)

        assert pickle.loads((tmp_path / "x").read_bytes())["n"] == 5


@pytest.mark.parametrize("moment", ["the rename", "the flush of the directory"])
def test_published_file_is_open_to_readers_that_lock(tmp_path, monkeypatch, moment):
    # HDF5 asks for a shared lock, and does not wait for it.
    path = tmp_path / "x.h5"
    read = []
    replace, flush = staging.Path.replace, staging.flush_directory

    def look():
        with h5py.File(path, "r") as file:
            read.append(file["w"][()].tolist())

    def replaced(staged, final):
        result = replace(staged, final)
        if moment == "the rename":
            look()
        return result

    def flushed(descriptor):
        if moment != "the rename":
            look()
        flush(descriptor)

    monkeypatch.setattr(staging.Path, "replace", replaced)
    monkeypatch.setattr(staging, "flush_directory", flushed)

    mpisave.save({"w": np.arange(3)}, path, use_binary_format=True)

    assert read == [[0, 1, 2]]
