"""The border to the file system: stage, write at offsets, publish by rename.

What was at the final name stays there, whole, until the new file is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from mpisave.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGING_SUFFIX = ".mpisave-staging"

# What a file system answers that cannot reserve space.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Target(Protocol):
    """Where a file is written: at offsets from its start, by one rank at a time."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the file, once all was written."""
        ...

    def allocate(self, nbytes: int) -> None:
        """Make room, so that a full disk shows before a byte moves."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""
        ...

    def sync(self) -> None:
        """Return once what was written is durable."""
        ...

    def publish(self, *, durable: bool = True) -> None:
        """Make the file visible under its name, durably."""
        ...

    def close(self) -> None:
        """Be done with the file, where another rank publishes it."""
        ...

    def discard(self) -> None:
        """Undo what can be undone: nothing was published."""
        ...


@contextlib.contextmanager
def _naming(what: str, path: str | Path) -> Iterator[None]:
    """Say in an OSError what was tried, and with which path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        # The text has the number, since an exception crosses ranks as text.
        error = StorageError(f"cannot {what} {os.fspath(path)}: {exc}")
        error.errno = exc.errno
        raise error from exc


class StagedFile:
    """A file that is written beside its final name and then renamed to it.

    Parameters
    ----------
    path : str
        The final name. A symbolic link stays one: what it points to is replaced.

    Raises
    ------
    StorageError
        If the directory does not exist or cannot be written, or `path` is no file.
    """

    def __init__(self, path: str) -> None:
        final = Path(os.path.realpath(path)).name
        self._place(path, f".{final[:40]}.{secrets.token_hex(8)}{STAGING_SUFFIX}")
        if self._final.is_dir():
            raise StorageError(f"cannot save to {path}: it is a directory")
        if self._final.exists() and not self._final.is_file():
            raise StorageError(
                f"cannot save to {path}: it is a device, pipe or socket, which a file "
                f"would replace"
            )
        if not self._final.parent.is_dir():
            raise StorageError(
                f"cannot save to {path}: there is no directory "
                f"{self._final.parent}. Create it before saving."
            )
        with _naming("create the staging file for", path):
            # Not for reading: NFS would then fetch the pages that it changes.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._staging, flags, 0o666)

    def _place(self, path: str, staging_name: str) -> None:
        self.name = path
        self._final = Path(os.path.realpath(path))
        self._staging = self._final.with_name(staging_name)
        self._published = False
        self.nbytes = 0

    @classmethod
    def join(cls, path: str, staging_name: str) -> StagedFile:
        """Open the staging file that another rank created, to write to it as well.

        Raises
        ------
        OSError
            If it is not there for this rank, or cannot be written.
        """
        self = cls.__new__(cls)
        self._place(path, staging_name)
        # The name was never looked up here: no attribute cache can answer for the
        # server.
        self._fd = os.open(self._staging, os.O_WRONLY | os.O_CLOEXEC)
        return self

    @property
    def staging_name(self) -> str:
        """Name of the staging file: another rank that finds it sees the directory."""
        return self._staging.name

    def allocate(self, nbytes: int) -> None:
        """Reserve `nbytes` on the disk.

        Raises
        ------
        StorageError
            If there is no room for them.
        """
        with _naming(f"reserve {nbytes} bytes for", self.name):
            if nbytes == 0:
                return
            try:
                os.posix_fallocate(self._fd, 0, nbytes)
            except OSError as exc:
                if exc.errno not in _NOT_SUPPORTED:
                    raise
                os.ftruncate(self._fd, nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`.

        Raises
        ------
        StorageError
            If the file system refuses.
        """
        # Linux moves at most 0x7ffff000 bytes in a call, and may move fewer.
        while data.nbytes:
            try:
                done = os.pwrite(self._fd, data, offset)
            except OSError as exc:
                error = StorageError(
                    f"cannot write {data.nbytes} bytes at offset {offset} of "
                    f"{self.name}: {exc}"
                )
                error.errno = exc.errno
                raise error from exc
            data = data[done:]
            offset += done
            self.nbytes = max(self.nbytes, offset)

    def sync(self) -> None:
        """Flush to the disk. After a failure the file is lost: never tried again."""
        with _naming("flush", self.name):
            os.fsync(self._fd)

    def publish(self, *, durable: bool = True) -> None:
        """Rename to the final name, and make the rename durable."""
        with _naming("publish", self.name):
            self.close()
            self._staging.replace(self._final)
            self._published = True
            if not durable:
                return
            directory = os.open(self._final.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def discard(self) -> None:
        """Remove the staging file, if it was not published."""
        with contextlib.suppress(OSError):
            self.close()
        if not self._published:
            with contextlib.suppress(OSError):
                self._staging.unlink()

    def close(self) -> None:
        """Close the file, where this rank does not publish it."""
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            with _naming("close", self.name):
                os.close(descriptor)


class FileObject:
    """A seekable binary file object of the caller's, written from where it stands.

    There is no name to publish: when a save fails, the object is cut back to where it
    was, and what lay behind that place is lost.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.name = f"<{type(file).__name__}>"
        if _appends(file):
            raise StorageError(
                f"cannot save to {self.name}: it is open for appending, and the system "
                f"then ignores offsets. Open it with mode 'wb'."
            )
        self._file = file
        self._start = file.tell()
        self._stop = self._start
        self._is_changed = False

    def check(self, *, must_begin: bool) -> None:
        """Refuse an object that stands where a file of the format cannot begin.

        Raises
        ------
        StorageError
            If the format begins at the start of a file only, and the object does not
            stand there.
        """
        if must_begin and self._start:
            raise StorageError(
                f"cannot save HDF5 to {self.name} from byte {self._start} on: an HDF5 "
                f"file begins at byte 0. Call seek(0) before saving."
            )

    @property
    def nbytes(self) -> int:
        """Bytes from where the object stood to the end of what was written."""
        return self._stop - self._start

    def allocate(self, nbytes: int) -> None:
        """Do nothing: a file object cannot reserve."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset` from where the object stood."""
        with _naming("write to", self.name):
            self._is_changed = True
            self._file.seek(self._start + offset)
            while data.nbytes:
                done = self._file.write(data)
                if not done:  # None: of a class that forgot to return
                    raise OSError(f"write of {data.nbytes} bytes returned {done!r}")
                data = data[done:]
            self._stop = max(self._stop, self._file.tell())

    def sync(self) -> None:
        """Flush, and stand at the end of what was written."""
        with _naming("flush", self.name):
            self._file.seek(self._stop)
            self._file.truncate()
            self._file.flush()

    def publish(self, *, durable: bool = True) -> None:
        """Do nothing: what was written is there already."""

    def close(self) -> None:
        """Do nothing: the object is the caller's."""

    def discard(self) -> None:
        """Cut the object back to where it stood."""
        # Whatever a class of the caller's raises: the save has failed for a reason.
        with contextlib.suppress(Exception):
            if self._is_changed:
                self._file.seek(self._start)
                self._file.truncate()


def _appends(file: BinaryIO) -> bool:
    """Return whether the system puts whatever is written at the end of the file."""
    try:
        return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_APPEND)
    except (OSError, AttributeError):  # no file of the system
        return "a" in str(getattr(file, "mode", ""))


def sees_staging_file(path: str, staging_name: str) -> bool:
    """Return whether this rank finds another rank's staging file beside `path`.

    The name was never looked up here, so no attribute cache can answer for the server.
    """
    return Path(os.path.realpath(path)).with_name(staging_name).exists()


class Source:
    """A file, or file object, that is read at offsets.

    Parameters
    ----------
    file : path, or seekable binary file object
        A file object is read from its start.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        self._owned = isinstance(file, (str, bytes, os.PathLike))
        if isinstance(file, (str, bytes, os.PathLike)):
            self.name = os.fsdecode(file)
            self._file: Any = Path(self.name).open("rb", buffering=0)  # noqa: SIM115
        else:
            self.name = f"<{type(file).__name__}>"
            self._file = file
        self.nbytes = self._file.seek(0, os.SEEK_END)
        self._one_at_a_time = threading.Lock()  # a file object has one position

    @property
    def descriptor(self) -> int | None:
        """The file descriptor, or None for a file object."""
        return self._file.fileno() if self._owned else None

    def read_into(self, offset: int, out: memoryview) -> int:
        """Fill `out` from `offset`; return how many bytes there were.

        Several threads may do so at a time.
        """
        done = 0
        if self._owned:
            descriptor = self._file.fileno()
            while done < out.nbytes:
                # At most 0x7ffff000 bytes in a call.
                part = os.preadv(descriptor, [out[done:]], offset + done)
                if not part:
                    break
                done += part
            return done
        with self._one_at_a_time:
            return self._read_object(offset, out)

    def _read_object(self, offset: int, out: memoryview) -> int:
        self._file.seek(offset)
        done = 0
        while done < out.nbytes:
            # A raw file gives what it has; others all.
            part = self._read_some(out[done:])
            if not part:
                break
            done += part
        return done

    def _read_some(self, out: memoryview) -> int:
        readinto = getattr(self._file, "readinto", None)
        if readinto is not None:
            return int(readinto(out) or 0)
        data = self._file.read(out.nbytes)
        out[: len(data)] = data
        return len(data)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return up to `nbytes` from `offset`: fewer at the end of the file."""
        out = bytearray(max(0, min(nbytes, self.nbytes - offset)))
        return bytes(memoryview(out)[: self.read_into(offset, memoryview(out))])

    def close(self) -> None:
        """Close the file, unless it is the caller's object."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Source:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
