"""What is known before a byte moves: room, limits, names; and what errors say."""

import contextlib
import errno
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import files_in, watch_writes
from mounts import mounted, mounted_image

import mpisave
from mpisave import room
from mpisave.errors import StorageError
from mpisave.storage import StagedFile

OLD = b"the file that was there before"
MIB = 2**20


@pytest.fixture
def folder(tmp_path):
    """Return an empty folder to mount on."""
    (tmp_path / "mounted").mkdir()
    return tmp_path / "mounted"


@pytest.fixture
def written(monkeypatch):
    return watch_writes(monkeypatch)


@contextlib.contextmanager
def files_of_at_most(nbytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("use_binary_format", [False, True], ids=["pickle", "hdf5"])
class TestFull:
    def test_full_disk_is_known_before_a_byte_is_written(
        self, folder, written, use_binary_format
    ):
        with mounted(folder, "tmpfs", "size=4m"):
            (folder / "x").write_bytes(OLD)
            free = os.statvfs(folder).f_bavail

            with pytest.raises(StorageError, match="cannot reserve") as caught:
                mpisave.save(
                    {"w": np.zeros(5 * MIB, "u1")},
                    folder / "x",
                    use_binary_format=use_binary_format,
                )

            assert written == []
            assert files_in(folder) == ["x"]
            assert (folder / "x").read_bytes() == OLD
            assert os.statvfs(folder).f_bavail == free
        assert caught.value.errno == errno.ENOSPC
        assert re.search(r"; \d+ bytes are available there", str(caught.value))

    def test_file_system_that_cannot_reserve_is_asked_for_its_room(
        self, folder, written, use_binary_format
    ):
        how = {"use_binary_format": use_binary_format}
        with mounted_image(folder, "ext2", 4 * MIB):
            (folder / "x").write_bytes(OLD)
            found = os.statvfs(folder)
            free = found.f_bavail * found.f_frsize

            with pytest.raises(StorageError, match="cannot reserve") as caught:
                mpisave.save({"w": np.zeros(5 * MIB, "u1")}, folder / "x", **how)

            assert written == []
            assert [name for name in files_in(folder) if "x" in name] == ["x"]
            assert (folder / "x").read_bytes() == OLD
            mpisave.save({"w": np.ones(2 * MIB, "u1")}, folder / "x", **how)
            assert mpisave.load(folder / "x")["w"].sum() == 2 * MIB
        assert caught.value.errno == errno.ENOSPC
        assert f"; {free} bytes are available there" in str(caught.value)

    def test_file_system_that_does_not_say_its_room_is_written_to(
        self, folder, use_binary_format
    ):
        with mounted(folder, "ramfs"):
            mpisave.save(
                {"w": np.arange(1000)},
                folder / "x",
                use_binary_format=use_binary_format,
            )

            assert mpisave.load(folder / "x")["w"].tolist() == list(range(1000))

    def test_limit_of_the_process_is_known_before_a_byte_is_written(
        self, tmp_path, written, use_binary_format
    ):
        (tmp_path / "x").write_bytes(OLD)

        with (
            files_of_at_most(100_000),
            pytest.raises(StorageError, match="cannot reserve") as caught,
        ):
            mpisave.save(
                {"w": np.zeros(200_000, "u1")},
                tmp_path / "x",
                use_binary_format=use_binary_format,
            )

        assert written == []
        assert caught.value.errno == errno.EFBIG
        assert "may write files of 100000 bytes at most (ulimit -f)" in str(
            caught.value
        )
        assert files_in(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == OLD

    @pytest.mark.parametrize("more", [0, 100, 300])
    def test_limit_that_the_index_meets_fails_the_save(
        self, tmp_path, written, use_binary_format, more
    ):
        how = {"use_binary_format": use_binary_format}
        state = {f"w{i}": np.zeros(50_000, "u1") for i in range(4)}
        mpisave.save(state, tmp_path / "x", **how)
        before, nbytes = (tmp_path / "x").read_bytes(), sum(written)
        most = nbytes - written[-1] + more

        with files_of_at_most(most), pytest.raises(StorageError) as caught:
            mpisave.save(state, tmp_path / "x", **how)

        assert caught.value.errno == errno.EFBIG
        assert "ulimit -f" in str(caught.value)
        assert files_in(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize("size", ["64k", "512k", "1m", "2300k"])
def test_really_full_disk_leaves_the_older_file(folder, size):
    with mounted(folder, "tmpfs", f"size={size}"):
        mpisave.save({"w": np.zeros(1000)}, folder / "x")
        before = (folder / "x").read_bytes()

        with pytest.raises(StorageError) as caught:
            mpisave.save(
                {f"w{i}": np.ones(2**19, "u1") for i in range(5)}, folder / "x"
            )

        assert caught.value.errno == errno.ENOSPC
        assert files_in(folder) == ["x"]
        assert (folder / "x").read_bytes() == before
        mpisave.save({"w": np.ones(1000)}, folder / "x")


def test_quota_is_named_in_the_refusal(tmp_path, monkeypatch):
    def exceeded(*args):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(room, "_fallocate", exceeded)

    with pytest.raises(StorageError, match=r"cannot reserve .*quota") as caught:
        mpisave.save({"w": np.zeros(3)}, tmp_path / "x")

    assert caught.value.errno == errno.EDQUOT
    assert "needs its room until the new one is whole" in str(caught.value)
    assert files_in(tmp_path) == []


def test_interrupted_call_to_reserve_is_made_again(tmp_path, monkeypatch):
    function, calls = room._function(), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) < 3:
            room.ctypes.set_errno(errno.EINTR)
            return -1
        return function(*args)

    monkeypatch.setattr(room, "_function", lambda: interrupted)
    staged = StagedFile(str(tmp_path / "x"))

    staged.allocate(10_000)

    assert len(calls) == 3
    assert (tmp_path / staged.staging_name).stat().st_size == 10_000
    staged.discard()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_reservation_that_fails_has_the_number_of_the_system(
    tmp_path, monkeypatch, number
):
    def fail(*args):
        room.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(room, "_function", lambda: fail)

    with pytest.raises(StorageError, match="cannot reserve") as caught:
        mpisave.save({"w": np.zeros(3)}, tmp_path / "x")

    assert caught.value.errno == number


def test_library_without_the_call_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(room.ctypes, "CDLL", lambda *_, **__: object())
    room._function.cache_clear()
    try:
        mpisave.save({"w": np.arange(3)}, tmp_path / "x")
    finally:
        room._function.cache_clear()

    assert mpisave.load(tmp_path / "x")["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000, "\N{EURO SIGN}" * 86])
def test_name_that_is_too_long_is_refused_before_a_byte_moves(tmp_path, written, name):
    with pytest.raises(StorageError, match="cannot save to") as caught:
        mpisave.save({"w": np.zeros(3)}, tmp_path / name)

    assert caught.value.errno == errno.ENAMETOOLONG
    assert written == []
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 255, "\N{EURO SIGN}" * 85])
def test_longest_name_is_saved_to(tmp_path, name):
    mpisave.save({"w": np.zeros(3)}, tmp_path / name)
    mpisave.save({"w": np.ones(3)}, tmp_path / name)

    assert files_in(tmp_path) == [name]


def test_directory_with_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot save to"):
        mpisave.save({"w": np.zeros(3)}, tmp_path / ("x" * 300) / "y")


def test_read_only_file_system_is_refused_before_a_byte_moves(folder, written):
    with mounted(folder, "tmpfs", "size=1m,ro"):
        with pytest.raises(StorageError, match="cannot create the staging") as caught:
            mpisave.save({"w": np.zeros(3)}, folder / "x")

        assert caught.value.errno == errno.EROFS
        assert written == []


def test_socket_and_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(StorageError, match="device, pipe or socket"):
        mpisave.save({"w": np.zeros(3)}, tmp_path / "pipe")

    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert files_in(tmp_path) == ["pipe"]


AS_NOBODY = """
import os, sys
import numpy as np
import mpisave
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    mpisave.save({"w": np.zeros(3)}, sys.argv[1], durable=False)
except mpisave.errors.StorageError as exc:
    print(exc.errno, exc)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o555, "cannot create the staging file for"),
        (0o733, "cannot create the staging file for"),
        (0o700, "cannot save to"),
    ],
)
def test_directory_that_cannot_be_read_or_written_is_refused(mode, words):
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)  # pytest's folders are closed to others
        folder = Path(above, "folder")
        folder.mkdir()
        folder.chmod(mode)

        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(folder / "x")],
            capture_output=True,
            text=True,
            check=True,
        )

        assert files_in(folder) == []
    assert done.stdout.startswith(f"{errno.EACCES} "), done
    assert f"{words} {folder / 'x'}: " in done.stdout
    assert "Permission denied" in done.stdout


@pytest.mark.parametrize("change", [-1, 1, 100])
def test_file_that_is_not_as_long_as_what_was_written_is_never_published(
    tmp_path, monkeypatch, change
):
    path = tmp_path / "x"
    path.write_bytes(OLD)
    fsync, seen = os.fsync, []

    def other_length(descriptor):
        fsync(descriptor)
        if not seen:
            seen.append(os.fstat(descriptor).st_size)
            os.ftruncate(descriptor, seen[0] + change)

    monkeypatch.setattr(os, "fsync", other_length)

    with pytest.raises(StorageError, match="cannot complete") as caught:
        mpisave.save({"w": np.zeros(300)}, path)

    assert f"has {seen[0] + change} bytes, and {seen[0]} were" in str(caught.value)
    assert files_in(tmp_path) == ["x"]
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("durable", [True, False])
def test_error_of_close_fails_the_save(tmp_path, monkeypatch, durable):
    # NFS and FUSE flush when a file is closed, and say then that it failed.
    path, close = tmp_path / "x", os.close
    path.write_bytes(OLD)

    def fail(descriptor):
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        close(descriptor)
        if is_file:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", fail)

    with pytest.raises(StorageError, match="cannot close") as caught:
        mpisave.save({"w": np.zeros(300)}, path, durable=durable)

    assert caught.value.errno == errno.EIO
    assert files_in(tmp_path) == ["x"]
    assert path.read_bytes() == OLD


def test_flush_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def fail_once(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x").write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", fail_once)

    with pytest.raises(StorageError, match="cannot flush"):
        mpisave.save({"w": np.zeros(300)}, tmp_path / "x")

    assert len(calls) == 1
    assert (tmp_path / "x").read_bytes() == OLD
    assert files_in(tmp_path) == ["x"]


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, 0), (errno.EIO, 1)])
def test_directory_that_has_no_flush_is_no_failure(
    tmp_path, monkeypatch, number, is_error
):
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    expectation = contextlib.nullcontext()
    if is_error:
        expectation = pytest.raises(StorageError, match="cannot flush the directory of")

    with expectation:
        mpisave.save({"w": np.zeros(300)}, tmp_path / "x")

    # In either case it has its name: all that is open is whether it keeps it.
    assert files_in(tmp_path) == ["x"]
    assert len(mpisave.load(tmp_path / "x")["w"]) == 300
