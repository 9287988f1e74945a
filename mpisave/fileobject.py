"""A file object of the caller's, as the target of a save."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import BinaryIO

from mpisave.errors import StorageError, naming_path


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

    def check_limit(self, stop: int) -> None:
        """Do nothing: what it may hold is its own affair."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset` from where the object stood."""
        with naming_path("write to", self.name):
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
        with naming_path("flush", self.name):
            self._file.seek(self._stop)
            self._file.truncate()
            self._file.flush()

    def complete(self, nbytes: int, *, durable: bool) -> None:  # noqa: ARG002
        """Flush, and check where the object ends. What it had behind is cut off.

        Raises
        ------
        StorageError
            If it cannot be flushed, or ends elsewhere.
        """
        self.sync()
        with naming_path("complete", self.name):
            stop = self._file.seek(0, os.SEEK_END)
        if stop - self._start != nbytes:
            raise StorageError(
                f"cannot complete {self.name}: it ends {stop - self._start} bytes "
                f"behind where it stood, and {nbytes} were written"
            )

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
