"""Files that are written: staged, written at offsets, published by rename.

What was at the final name stays there, whole, until the new file is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpisave import room, staging
from mpisave.errors import StorageError, naming_path, numbered

if TYPE_CHECKING:
    from collections.abc import Iterator


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

    def check_limit(self, stop: int) -> None:
        """Refuse to write up to `stop` where that is bound to fail."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""
        ...

    def sync(self) -> None:
        """Return once what was written is durable."""
        ...

    def complete(self, nbytes: int, *, durable: bool) -> None:
        """Return once all of the file is there, `nbytes` long, and closed."""
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


class StagedFile:
    """A file that is written beside its final name and then renamed to it.

    Parameters
    ----------
    path : str
        The final name. A symbolic link stays one: what it points to is replaced.
    overwrite : bool
        Whether a file of that name may be replaced.

    Raises
    ------
    StorageError
        If the directory does not exist or cannot be written, `path` is no file, or is
        there and may not be replaced.
    """

    _staging: Path | None  # None: not created yet

    def __init__(self, path: str, *, overwrite: bool = True) -> None:
        self._place(path)
        self._overwrite = overwrite
        mode = self._check_final()
        try:
            with naming_path("create the staging file for", path):
                parent = self._final.parent
                # Now, so that a directory that cannot be opened is known before.
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                self._directory = os.open(parent, flags)
                self._staging, self._fd = staging.create(self._final, mode)
                # Holds the lock from the close of the other to the rename.
                self._lock = os.dup(self._fd)
        except BaseException:
            self.discard()
            raise
        staging.remove_stale(self._final, self._staging)

    def _place(self, path: str) -> None:
        self.name = path
        self._final = Path(os.path.realpath(path))
        self._staging = None
        self._fd = self._lock = self._directory = -1
        self._published = False
        self.nbytes = 0

    def _check_final(self) -> int:
        """Refuse what no file can be renamed to; return the mode to create with."""
        folder, last = os.path.split(self.name)
        if last in ("", ".", ".."):
            raise StorageError(f"cannot save to {self.name}: it names a directory")
        with naming_path("save to", self.name):
            # As it was given, too: "absent/../x" is nowhere.
            for parent in (Path(folder), self._final.parent):
                if not parent.is_dir():
                    raise StorageError(
                        f"cannot save to {self.name}: there is no directory {parent}. "
                        f"Create it before saving, where all ranks that write see it."
                    )
            try:
                # The name is looked up: one that is too long is refused here.
                found = self._final.stat()
            except FileNotFoundError:
                return 0o666
        if stat.S_ISDIR(found.st_mode):
            raise StorageError(f"cannot save to {self.name}: it is a directory")
        if not stat.S_ISREG(found.st_mode):
            raise StorageError(
                f"cannot save to {self.name}: it is a device, pipe or socket, which a "
                f"file would replace"
            )
        if not self._overwrite:
            raise _refused(self.name, "there is a file of that name")
        # No more than the old file shows to others, but for this user's other ranks.
        return found.st_mode & 0o666 | 0o600

    @classmethod
    def join(cls, path: str, staging_name: str) -> StagedFile:
        """Open the staging file that another rank created, to write to it as well.

        The lock is the other's. It alone publishes: if it dies, the file is lost.

        Raises
        ------
        OSError
            If it is not there for this rank, or cannot be written.
        """
        self = cls.__new__(cls)
        self._place(path)
        self._staging = self._final.with_name(staging_name)
        # The name was never looked up here: no attribute cache can answer for the
        # server.
        self._fd = os.open(self._staging, os.O_WRONLY | os.O_CLOEXEC)
        return self

    @property
    def staging_name(self) -> str:
        """Name of the staging file: another rank that finds it sees the directory."""
        return self._staging.name if self._staging else ""

    def allocate(self, nbytes: int) -> None:
        """Reserve `nbytes` on the disk.

        Raises
        ------
        StorageError
            If there is no room for them, or this process may not write so many.
        """
        if nbytes:
            with self._explaining(f"reserve {nbytes} bytes for {self.name}"):
                room.reserve(self._fd, nbytes)

    def check_limit(self, stop: int) -> None:
        """Refuse to write up to `stop` if this process may not: limits differ by rank.

        Raises
        ------
        StorageError
            If a write would fail.
        """
        with self._explaining(f"write {self.name} up to byte {stop}"):
            room.check_limit(stop)

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
                done = room.write(self._fd, data, offset)
            except OSError as exc:
                what = f"write {data.nbytes} bytes at offset {offset} of {self.name}"
                raise self._explained(what, exc) from exc
            data = data[done:]
            offset += done
            self.nbytes = max(self.nbytes, offset)

    @contextlib.contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self._explained(what, exc) from exc

    def _explained(self, what: str, exc: OSError) -> StorageError:
        text = f"cannot {what}: {exc}{room.explain(exc, self._fd)}"
        return numbered(text, exc.errno)

    def sync(self) -> None:
        """Flush to the disk. After a failure the file is lost: never tried again."""
        with naming_path("flush", self.name):
            os.fsync(self._fd)

    def complete(self, nbytes: int, *, durable: bool) -> None:
        """Make sure that all of the file is there, `nbytes` long. It is then closed.

        Raises
        ------
        StorageError
            If it cannot be flushed or closed, or has another size.
        """
        staging.keep_mode(self._fd, self._final)
        if durable:
            self.sync()
        with naming_path("complete", self.name):
            found = os.fstat(self._fd).st_size
        if found != nbytes:
            raise StorageError(
                f"cannot complete {self.name}: the staging file has {found} bytes, and "
                f"{nbytes} were written. Another program has changed it, or the file "
                f"system has lost some. Save again."
            )
        self.close()

    def publish(self, *, durable: bool = True) -> None:
        """Rename to the final name, and make the rename durable.

        Raises
        ------
        StorageError
            If it cannot be renamed; or if it was, but that cannot be flushed.
        """
        try:
            self._rename()
            self._unlock()  # readers may want locks of their own, as HDF5 does
            if durable:
                with naming_path("flush the directory of", self.name):
                    staging.flush_directory(self._directory)
        finally:
            self._release()

    def _rename(self) -> None:
        if self._staging is None:
            return
        with naming_path("publish", self.name):
            try:
                if self._overwrite:
                    self._staging.replace(self._final)
                else:
                    staging.rename_to_new(self._staging, self._final)
            except FileExistsError as exc:
                what = "a file of that name was made in the meantime"
                raise _refused(self.name, what) from exc
            self._published = True

    def discard(self) -> None:
        """Remove the staging file, if it was not published."""
        with contextlib.suppress(OSError):
            self.close()
        if not self._published and self._staging is not None:
            with contextlib.suppress(OSError):
                self._staging.unlink()
        self._release()

    def _release(self) -> None:
        """Give up the lock, and the directory."""
        self._unlock()
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                os.close(self._directory)
        self._directory = -1

    def _unlock(self) -> None:
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                os.close(self._lock)
        self._lock = -1

    def close(self) -> None:
        """Close the file. On some systems, it is flushed now and may fail."""
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            with naming_path("close", self.name):
                os.close(descriptor)


def _refused(name: str, why: str) -> StorageError:
    text = f"cannot save to {name}: {why}, and overwrite=False"
    return numbered(text, errno.EEXIST)


def sees_staging_file(path: str, staging_name: str) -> bool:
    """Return whether this rank finds another rank's staging file beside `path`.

    The name was never looked up here, so no attribute cache can answer for the server.
    """
    return Path(os.path.realpath(path)).with_name(staging_name).exists()
