"""Files that are read: at offsets, by several threads at a time."""

from __future__ import annotations

import io
import os
import stat
import threading
from typing import Any, BinaryIO

from mpisave.errors import ArgumentError, StorageError


def _open_without_waiting(name: str, flags: int) -> int:
    # A pipe would be waited for until somebody writes to it.
    return os.open(name, flags | os.O_NONBLOCK)


def _is_text(file: object) -> bool:
    return isinstance(file, io.TextIOBase)


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
            self._file: Any = open(  # noqa: SIM115 - Path.open has no opener
                self.name, "rb", buffering=0, opener=_open_without_waiting
            )
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.close()
                raise StorageError(
                    f"cannot read {self.name}: it is a device, pipe or socket"
                )
            # Lustre gives up reads of such a file where another node has it locked.
            os.set_blocking(self._file.fileno(), True)
        elif not hasattr(file, "seek") or _is_text(file):
            raise ArgumentError(
                f"path is {file!r:.80}: it is a path, or a seekable binary file object"
            )
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
