"""Stage, write at offsets, publish by rename: and what is left when it fails."""

import errno
import io
import os
import stat

import numpy as np
import pytest
from helpers import files_in

import mpisave
from mpisave import room
from mpisave.errors import StorageError
from mpisave.fileobject import FileObject
from mpisave.source import Source
from mpisave.storage import StagedFile, sees_staging_file

STATE = {"w": np.arange(1000), "n": 5}
OLD = b"the file that was there before"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def written(path, data=b"0123456789"):
    """Go through all steps of a file."""
    staged = StagedFile(str(path))
    staged.allocate(len(data))
    staged.write(0, memoryview(data))
    staged.complete(len(data), durable=True)
    staged.publish()
    return staged


def test_file_appears_only_when_it_is_published(tmp_path):
    path = tmp_path / "x"
    staged = StagedFile(str(path))
    staged.write(3, memoryview(b"abc"))
    staged.write(0, memoryview(b"ABC"))
    staged.complete(6, durable=True)
    before = files_in(tmp_path)

    staged.publish()

    assert before == [staged.staging_name]
    assert before[0].startswith(".x.")
    assert files_in(tmp_path) == ["x"]
    assert path.read_bytes() == b"ABCabc"
    assert staged.nbytes == 6


def test_discard_leaves_nothing_behind_but_what_was_published(tmp_path):
    staged = StagedFile(str(tmp_path / "x"))
    staged.write(0, memoryview(b"abc"))

    staged.discard()
    staged.discard()

    assert files_in(tmp_path) == []

    published = written(tmp_path / "y")
    published.discard()

    assert files_in(tmp_path) == ["y"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def three_at_a_time(descriptor, data, offset):
        calls.append(offset)
        return real(descriptor, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", three_at_a_time)

    written(tmp_path / "x", b"0123456789")

    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert calls == [0, 3, 6, 9]


def test_state_saved_by_short_writes_is_whole(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))

    report = mpisave.save(STATE, tmp_path / "x")

    assert report.nbytes == (tmp_path / "x").stat().st_size
    assert mpisave.load(tmp_path / "x")["w"].tolist() == list(range(1000))


def test_blocks_are_reserved_before_a_byte_is_written(tmp_path):
    staged = StagedFile(str(tmp_path / "x"))

    staged.allocate(1_000_000)

    found = (tmp_path / staged.staging_name).stat()
    staged.discard()
    assert found.st_size == 1_000_000
    assert found.st_blocks * 512 >= 1_000_000


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_system_that_cannot_reserve_is_no_failure(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(room, "_fallocate", refuse)

    written(tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_nothing_to_reserve_is_no_failure(tmp_path):
    written(tmp_path / "x", b"")

    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize("use_binary_format", [False, True], ids=["pickle", "hdf5"])
@pytest.mark.parametrize("old", [OLD, None], ids=["over an older file", "new"])
@pytest.mark.parametrize(
    ("target", "name", "words"),
    [
        (room, "_fallocate", "cannot reserve"),
        (os, "pwrite", "cannot write"),
        (os, "fsync", "cannot flush"),
        ("pathlib.Path.replace", None, "cannot publish"),
    ],
    ids=["allocate", "write", "fsync", "rename"],
)
def test_failed_step_leaves_the_older_file_and_no_staging_file(
    tmp_path, monkeypatch, target, name, words, old, use_binary_format
):
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        if name is None:
            patch.setattr(target, no_space)
        else:
            patch.setattr(target, name, no_space)

        with pytest.raises(StorageError, match="No space left on device") as caught:
            mpisave.save(STATE, path, use_binary_format=use_binary_format)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Errno 28" in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert files_in(tmp_path) == (["x"] if old is not None else [])
    assert old is None or path.read_bytes() == old
    assert len(os.listdir("/proc/self/fd")) < 200


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_write_may_be_the_one_that_fails(tmp_path, monkeypatch, number):
    real, calls = os.pwrite, []

    def fail(descriptor, data, offset):
        calls.append(offset)
        return no_space() if len(calls) == number else real(descriptor, data, offset)

    (tmp_path / "x").write_bytes(OLD)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)

        with pytest.raises(StorageError, match="cannot write"):
            mpisave.save({f"w{i}": np.zeros(5000) for i in range(3)}, tmp_path / "x")

    assert files_in(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == OLD


def test_no_file_descriptor_is_left_open(tmp_path, monkeypatch):
    mpisave.save(STATE, tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(room, "_fallocate", no_space)

    for _ in range(5):
        with pytest.raises(StorageError):
            mpisave.save(STATE, tmp_path / "x")

    assert len(os.listdir("/proc/self/fd")) == before


def test_data_and_then_the_directory_are_flushed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.rename

    def record(descriptor):
        done.append("d" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "f")
        fsync(descriptor)

    def rename(self, target):
        done.append("rename")
        replace(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr("pathlib.Path.replace", rename)

    written(tmp_path / "x")

    assert done == ["f", "rename", "d"]


def test_interrupt_leaves_the_older_file_and_no_staging_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    (tmp_path / "x").write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", interrupt)

    with pytest.raises(KeyboardInterrupt):
        mpisave.save(STATE, tmp_path / "x")

    assert files_in(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == OLD


def test_symbolic_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real"
    real.write_bytes(OLD)
    link = tmp_path / "link"
    link.symlink_to(real)

    written(link)

    assert link.is_symlink()
    assert real.read_bytes() == b"0123456789"
    assert files_in(tmp_path) == ["elsewhere", "link"]
    assert files_in(tmp_path / "elsewhere") == ["real"]


def test_dangling_symbolic_link_is_filled(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")

    written(tmp_path / "link")

    assert (tmp_path / "real").read_bytes() == b"0123456789"


@pytest.mark.parametrize("path", ["a.opt/.", "a.opt/..", "absent/../z.opt", "absent/z"])
def test_path_that_nobody_could_open_is_refused(tmp_path, path):
    (tmp_path / "a.opt").write_bytes(b"old")

    with pytest.raises(
        StorageError, match=r"it names a directory|there is no directory"
    ):
        StagedFile(f"{tmp_path}/{path}")

    assert files_in(tmp_path) == ["a.opt"]


def test_directory_as_path_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()

    with pytest.raises(StorageError, match="folder: it is a directory"):
        mpisave.save(STATE, tmp_path / "folder")

    with pytest.raises(StorageError, match="new/: it names a directory"):
        mpisave.save(STATE, f"{tmp_path}/new/")
    assert files_in(tmp_path) == ["folder"]
    assert files_in(tmp_path / "folder") == []


def test_missing_directory_is_named_in_the_refusal(tmp_path):
    with pytest.raises(StorageError, match=r"no directory .*missing") as caught:
        mpisave.save(STATE, tmp_path / "missing" / "x")

    assert "Create it before saving" in str(caught.value)
    assert files_in(tmp_path) == []


def test_file_as_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(OLD)

    with pytest.raises(StorageError):
        mpisave.save(STATE, tmp_path / "file" / "x")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_of_the_file_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        written(tmp_path / "x")
    finally:
        os.umask(before)

    mode = stat.S_IMODE((tmp_path / "x").stat().st_mode)
    assert mode == 0o666 & ~umask


@pytest.mark.parametrize("name", ["x" * 250, "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 80])
def test_file_name_as_long_as_the_file_system_allows_is_saved_to(tmp_path, name):
    written(tmp_path / name)

    assert files_in(tmp_path) == [name]


def test_two_files_to_one_name_do_not_meet(tmp_path):
    first, second = (StagedFile(str(tmp_path / "x")) for _ in range(2))
    first.write(0, memoryview(b"first"))
    second.write(0, memoryview(b"second"))

    second.publish()
    first.publish()

    assert (tmp_path / "x").read_bytes() == b"first"
    assert files_in(tmp_path) == ["x"]


def test_staging_file_is_seen_beside_the_path_and_not_elsewhere(tmp_path):
    (tmp_path / "other").mkdir()
    staged = StagedFile(str(tmp_path / "x"))

    assert sees_staging_file(str(tmp_path / "x"), staged.staging_name)
    assert not sees_staging_file(str(tmp_path / "other" / "x"), staged.staging_name)

    staged.discard()

    assert not sees_staging_file(str(tmp_path / "x"), staged.staging_name)


class TestFileObject:
    def test_file_is_written_from_where_the_object_stands(self):
        buffer = io.BytesIO(b"before, and what lies behind: gone")
        buffer.seek(6)
        target = FileObject(buffer)

        target.write(2, memoryview(b"cd"))
        target.write(0, memoryview(b"ab"))
        target.sync()

        assert buffer.getvalue() == b"beforeabcd"
        assert buffer.tell() == 10
        assert target.nbytes == 4
        assert target.name == "<BytesIO>"

    def test_writes_that_take_a_part_are_continued(self):
        class Slow(io.BytesIO):
            def write(self, data):
                return super().write(data[:3])

        buffer = Slow()

        FileObject(buffer).write(0, memoryview(b"0123456789"))

        assert buffer.getvalue() == b"0123456789"

    @pytest.mark.parametrize("step", ["write", "flush"])
    def test_failure_cuts_it_back_to_where_it_stood(self, step, monkeypatch):
        buffer = io.BytesIO()

        class Full(io.BytesIO):
            def write(self, data):
                return (
                    no_space()
                    if step == "write" and self.tell()
                    else (super().write(data))
                )

            def flush(self):
                if step == "flush":
                    no_space()

        buffer = Full()
        io.BytesIO.write(buffer, b"before")

        with pytest.raises(StorageError, match=r"<Full>: .*No space left"):
            mpisave.save(STATE, buffer)

        assert buffer.getvalue() == b"before"
        assert buffer.tell() == 6

    def test_object_is_left_open(self, tmp_path):
        with (tmp_path / "x").open("w+b") as file:
            report = mpisave.save(STATE, file)

            assert not file.closed
            assert file.tell() == report.nbytes

        assert mpisave.load(tmp_path / "x")["n"] == 5

    def test_object_that_cannot_be_written_to_is_refused(self, tmp_path):
        (tmp_path / "x").write_bytes(OLD)

        with (tmp_path / "x").open("rb") as file, pytest.raises(StorageError):
            mpisave.save(STATE, file)

        assert (tmp_path / "x").read_bytes() == OLD

    def test_hdf5_begins_at_the_start_of_a_file_only(self):
        buffer = io.BytesIO(b"before")
        buffer.seek(6)

        with pytest.raises(StorageError, match=r"seek\(0\)"):
            mpisave.save(STATE, buffer, use_binary_format=True)

        assert buffer.getvalue() == b"before"


class TestSource:
    def test_bytes_are_read_at_offsets(self, tmp_path):
        (tmp_path / "x").write_bytes(b"0123456789")

        with Source(tmp_path / "x") as source:
            assert source.nbytes == 10
            assert source.read(3, 4) == b"3456"
            assert source.read(8, 4) == b"89"
            assert source.read(10, 4) == b""
            assert source.read(50, 4) == b""
            assert source.read(0, 0) == b""
            assert source.read(0, 2**62) == b"0123456789"

    def test_buffer_is_filled_as_far_as_there_are_bytes(self):
        out = bytearray(b"------")
        with Source(io.BytesIO(b"0123456789")) as source:
            assert source.read_into(7, memoryview(out)) == 3

        assert out == b"789---"

    def test_file_is_closed_unless_it_is_the_callers(self, tmp_path):
        (tmp_path / "x").write_bytes(OLD)
        buffer = io.BytesIO(OLD)
        with Source(tmp_path / "x") as named, Source(buffer):
            pass

        assert named._file.closed
        assert not buffer.closed


def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(StorageError, match="device, pipe or socket"):
        Source(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        Source(tmp_path)
