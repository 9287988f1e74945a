"""A file in memory, mostly holes: what h5py writes metadata to."""

from __future__ import annotations

from typing import Any

_PAGE = 4096


class SparseFile:
    """A file in memory that holds only the pages that were written."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.nbytes = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset; return where that is."""
        base = (0, self._position, self.nbytes)[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the offset."""
        return self._position

    def write(self, data: Any) -> int:
        """Write all of `data` here, and move behind it."""
        position, done, nbytes = self._position, 0, len(data)
        while done < nbytes:
            page, start = divmod(position + done, _PAGE)
            part = data[done : done + _PAGE - start]
            held = self._pages.get(page)
            if held is None:
                held = self._pages[page] = bytearray(_PAGE)
            held[start : start + len(part)] = part
            done += len(part)
        self._position = stop = position + done
        if stop > self.nbytes:
            self.nbytes = stop
        return done

    def readinto(self, out: Any) -> int:
        """Fill `out`, or as much as there is left."""
        view = memoryview(out).cast("B")
        stop = min(self._position + view.nbytes, max(self.nbytes, self._position))
        data = self.peek(self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read(self, nbytes: int = -1) -> bytes:
        """Return up to `nbytes`, or all that is left."""
        stop = self.nbytes if nbytes < 0 else min(self.nbytes, self._position + nbytes)
        data = self.peek(self._position, stop)
        self._position += len(data)
        return data

    def truncate(self, nbytes: int | None = None) -> int:
        """Say where the file ends; what was written stays."""
        self.nbytes = self._position if nbytes is None else nbytes
        return self.nbytes

    def flush(self) -> None:
        """Do nothing: all is in memory."""

    def peek(self, start: int, stop: int) -> bytes:
        """Return bytes without moving; what was never written is zero."""
        page, skip = divmod(start, _PAGE)
        held = self._pages.get(page)
        if held is not None and skip + stop - start <= _PAGE:
            return bytes(held[skip : skip + stop - start])
        out = bytearray(max(0, stop - start))
        done = 0
        while done < len(out):
            page, skip = divmod(start + done, _PAGE)
            nbytes = min(_PAGE - skip, len(out) - done)
            held = self._pages.get(page)
            if held is not None:
                out[done : done + nbytes] = held[skip : skip + nbytes]
            done += nbytes
        return bytes(out)
