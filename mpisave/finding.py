"""What a file is, and where its index lies: by content, never by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpisave.errors import FileFormatError
from mpisave.formats import hdf5, index, pkl

if TYPE_CHECKING:
    from mpisave.source import Source

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PICKLE_PROTO = b"\x80"
_OLD_PICKLE = b"(])}cIJKMLFGNVX"  # opcodes that push a first value
# PROTO and its number, SHORT_BINBYTES and its length, and the mark itself.
_MARK_STOP = 4 + len(pkl.MARK)


def trailer_of(source: Source) -> bytes:
    """Return the last bytes of a file: where the index lies, if it has one."""
    start = max(0, source.nbytes - index.TRAILER_NBYTES)
    return source.read(start, index.TRAILER_NBYTES)


def find_index(source: Source) -> tuple[bytes, str] | None:
    """Return bytes of the index and kind of the file; None: a foreign pickle.

    The kind is ``"pickle"``, ``"hdf5"`` or `index.FOREIGN`: HDF5 of another program,
    which has no index.

    Raises
    ------
    FileFormatError
        If it is neither HDF5 nor a pickle, or one of mpisave without its index: what
        it holds can no longer be checked.
    """
    head = source.read(0, hdf5.MARK_OFFSET + len(hdf5.MARK))
    if not head:
        raise FileFormatError("the file is empty")
    is_hdf5 = head.startswith(_HDF5_SIGNATURE)
    if not is_hdf5 and not head.startswith(_PICKLE_PROTO):
        # Pickles of protocol 0 and 1 have no mark.
        if head[0] in _OLD_PICKLE and source.read(source.nbytes - 1, 1) == b".":
            return None
        raise FileFormatError(
            f"it begins with {head[:8]!r}: that is neither an HDF5 file nor a pickle"
        )
    found = index.find(trailer_of(source), source.nbytes)
    if found is not None:
        tail = source.read(found[0], source.nbytes - found[0])
        return tail, "hdf5" if is_hdf5 else "pickle"
    # The mark tells a file of ours that lost its index from one that never had any:
    # what the first holds is not what was saved.
    if is_hdf5 and head[hdf5.MARK_OFFSET :] == hdf5.MARK:
        raise FileFormatError(
            "an HDF5 file of mpisave without an index at its end: it is torn or "
            "altered, or another program changed it. Nothing in it can be checked any "
            "more; h5py opens it as it is."
        )
    if is_hdf5:
        return b"", index.FOREIGN
    if pkl.MARK in head[:_MARK_STOP]:
        raise FileFormatError(
            "a pickle of mpisave without an index at its end: it is torn or altered"
        )
    return None
