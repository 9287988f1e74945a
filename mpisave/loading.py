"""The steps of load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.checksum import crc32c
from mpisave.errors import FileFormatError, show_key
from mpisave.formats import index, pkl
from mpisave.formats.unpickle import unpickle
from mpisave.storage import Source

if TYPE_CHECKING:
    import os
    from typing import BinaryIO

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PICKLE_PROTO = b"\x80"
# PROTO and its number, SHORT_BINBYTES and its length, and the mark itself.
_MARK_STOP = 4 + len(pkl.MARK)


def load(path: str | os.PathLike[str] | BinaryIO, *, verify: bool = True) -> Any:
    """Load a file into this process. Independent.

    What the file is shows in its content, not in its name. A file of mpisave is read
    through its index; any other pickle by an interpreter that knows arrays, plain
    containers and scalars. Nothing that a file names is imported or called.

    Parameters
    ----------
    path : str, os.PathLike or seekable binary file object
        The file. An object is read from its start.
    verify : bool
        Whether to check the CRC-32C of every array.

    Returns
    -------
    nested dict, list or tuple
        As it was saved: arrays as NumPy arrays in C order, those of ml_dtypes as such.

    Raises
    ------
    FileFormatError
        If the file is empty, torn, altered, or nothing that mpisave reads.
    ImportError
        If the file holds arrays of ml_dtypes, and that is not installed.
    OSError
        If the file system refuses.
    """
    with Source(path) as source:
        try:
            return _load(source, verify=verify)
        except FileFormatError as exc:
            raise FileFormatError(f"{source.name}: {exc}") from exc


def _load(source: Source, *, verify: bool) -> Any:
    head = source.read(0, 32)
    if not head:
        raise FileFormatError("the file is empty")
    is_hdf5 = head.startswith(_HDF5_SIGNATURE)
    if not is_hdf5 and not head.startswith(_PICKLE_PROTO):
        raise FileFormatError(
            f"it begins with {head[:8]!r}: that is neither an HDF5 file nor a pickle "
            f"of protocol 2 or later"
        )
    trailer = source.read(
        max(0, source.nbytes - index.TRAILER_NBYTES), index.TRAILER_NBYTES
    )
    found = index.find(trailer, source.nbytes)
    if found is not None:
        tail = source.read(found[0], source.nbytes - found[0])
        return _load_by_index(
            source, index.decode(tail, "hdf5" if is_hdf5 else "pickle"), verify=verify
        )
    if is_hdf5:
        raise FileFormatError(
            "an HDF5 file without the index of mpisave at its end: it is torn, or was "
            "changed after it was saved, or another program wrote it. h5py opens it."
        )
    if pkl.MARK in head[:_MARK_STOP]:
        raise FileFormatError(
            "a pickle of mpisave without an index at its end: it is torn or altered"
        )
    return unpickle(source)


def _load_by_index(source: Source, content: index.Index, *, verify: bool) -> Any:
    def read(stored: index.Stored) -> np.ndarray[Any, Any]:
        array = np.empty(stored.shape, stored.dtype)
        data = array.reshape(-1).view(np.uint8)
        done = source.read_into(stored.extent.offset, data.data)
        if done < data.size:
            raise FileFormatError(
                f"{show_key(stored.key)} is torn: {done} of {data.size} bytes are there"
            )
        if verify and (checksum := crc32c(data)) != stored.crc32c:
            raise FileFormatError(
                f"{show_key(stored.key)} is altered: the CRC-32C of its "
                f"{data.size} bytes at offset {stored.extent.offset} is "
                f"{checksum:#010x}, not {stored.crc32c:#010x}"
            )
        return array

    return content.state(read)
