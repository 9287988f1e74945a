"""The index: a file's own table of what it holds, where, and with which checksums.

It ends every file of ours, behind all that readers of the format look at::

    skeleton and payload | JSON | trailer, 32 bytes

    trailer: offset of the JSON   u64, little-endian, as all that follows
             bytes of the JSON    u64
             version              u32
             CRC-32C              u32  of the JSON and the 20 bytes before this one
             magic                8 bytes
"""

from __future__ import annotations

import base64
import functools
import json
import math
import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisave import garbage
from mpisave.checksum import block_count, crc32c
from mpisave.dtypes import dtype_from_name, dtype_name, stored_dtype
from mpisave.errors import FileFormatError, Key, show_key
from mpisave.formats.objects import from_json, to_json
from mpisave.plan import Extent
from mpisave.tree import Node

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpisave.formats.base import Layout
    from mpisave.merging import Merged

# Keys of one hash. Of honest ones, those with -1 and -2 in them are: one takes the
# hash of the other. Keys of different hashes part after a dozen looks into a dict.
_MOST_ALIKE = 256

VERSION = 1
FOREIGN = "HDF5 of another program"
MAGIC = b"\x89mpisave"
_KEY_TYPES = frozenset({str, int})
_FIELDS = struct.Struct("<QQI")
TRAILER_NBYTES = _FIELDS.size + 4 + len(MAGIC)


@dataclass(slots=True)  # frozen, it would take four times as long to make
class Stored:
    """An array in a file."""

    key: Key
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    extent: Extent
    # CRC-32C of each block, see checksum.BLOCK_NBYTES; none in files of others.
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that only `pickle.load` can give back."""

    type_name: str


@dataclass(frozen=True, slots=True)
class Index:
    """What a file holds."""

    container: str  # "pickle" or "hdf5", or `FOREIGN`
    facts: Mapping[str, str]  # version of mpisave, state type
    nbytes: int  # of skeleton and payload
    skeleton_crc32c: int
    nodes: tuple[Node, ...]  # a leaf is a Stored array, Opaque, or a small object

    def arrays(self) -> dict[Key, Stored]:
        """Return the arrays by key."""
        found = ((node.key, node.value) for node in self.nodes)
        return {key: value for key, value in found if isinstance(value, Stored)}


@garbage.kept()
def encode(
    merged: Merged,
    layout: Layout,
    checksums: Sequence[npt.NDArray[np.uint32]],
    *,
    container: str,
    facts: Mapping[str, str],
) -> bytes:
    """Return the index, trailer included, to be put at ``layout.nbytes``.

    Parameters
    ----------
    merged, layout : Merged, Layout
        What the file holds, and where.
    checksums : sequence of ndarray of uint32, one an entry
        CRC-32C of each block of each array.
    container : str
        Name of the format.
    facts : mapping of str to str
        What else the file says of itself.
    """
    arrays = iter(zip(layout.extents, checksums, strict=True))
    nodes: list[list[Any]] = []
    for node in merged.nodes:
        if node.kind == "array":
            extent, sums = next(arrays)
            entry = node.detail
            where = [extent.offset, extent.nbytes, _sums_to_json(sums)]
            array = [dtype_name(entry.dtype), list(entry.shape), *where]
            nodes.append([node.key, "array", *array])
        elif node.kind == "object":
            # Made by a rank of this job, see metadata.describe.
            value = pickle.loads(node.detail)  # noqa: S301
            try:
                nodes.append([node.key, "object", to_json(value)])
            except TypeError:
                nodes.append([node.key, "opaque", node.type_name])
        else:
            nodes.append([node.key, node.kind, node.detail])
    content = {
        "mpisave": VERSION,
        "container": container,
        "facts": dict(facts),
        "skeleton_crc32c": layout.skeleton_crc32c,
        "nodes": nodes,
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    fields = _FIELDS.pack(layout.nbytes, len(text), VERSION)
    own = crc32c(fields, crc32c(text))
    return text + fields + struct.pack("<I", own) + MAGIC


def _sums_to_json(sums: npt.NDArray[np.uint32]) -> int | str:
    """Return one number for one block, base64 of little-endian numbers for more."""
    if len(sums) < 2:
        return int(sums[0]) if len(sums) else 0
    return base64.b64encode(sums.astype("<u4").tobytes()).decode()


def _sums_from_json(data: int | str, nbytes: int) -> tuple[int, ...]:
    blocks = block_count(_whole(nbytes))
    if blocks == 1:  # as most are
        return (_crc(data),)
    if isinstance(data, str):
        raw = base64.b64decode(data, validate=True)
        if blocks < 2 or len(raw) != 4 * blocks:
            raise ValueError(f"{len(raw)} bytes of checksums for {blocks} blocks")
        return struct.unpack(f"<{blocks}I", raw)
    if blocks > 1:
        raise ValueError(f"one checksum for {blocks} blocks")
    return (_crc(data),) * blocks


def find(trailer: bytes, file_nbytes: int) -> tuple[int, int] | None:
    """Return offset and length of the index by the last bytes of a file, or None.

    Parameters
    ----------
    trailer : bytes
        The last `TRAILER_NBYTES` bytes, or fewer if there are not as many.
    file_nbytes : int
        Bytes of the whole file.

    Raises
    ------
    FileFormatError
        If they are a trailer, but not that of a whole file of this version.
    """
    if len(trailer) < TRAILER_NBYTES or not trailer.endswith(MAGIC):
        return None
    offset, nbytes, version = _FIELDS.unpack_from(trailer)
    if version != VERSION:
        raise FileFormatError(
            f"the index has version {version}, this mpisave reads version {VERSION}: "
            f"the file is altered, or a newer mpisave wrote it"
        )
    if offset + nbytes + TRAILER_NBYTES != file_nbytes:
        raise FileFormatError(
            f"the index ends at byte {offset + nbytes + TRAILER_NBYTES}, the file at "
            f"byte {file_nbytes}: bytes were lost or added"
        )
    return offset, nbytes


@garbage.kept()
def decode(tail: bytes, container: str) -> Index:
    """Return the index of the bytes from its offset to the end of the file.

    Raises
    ------
    FileFormatError
        If a bit of it was altered, or it does not fit the file.
    """
    text, trailer = tail[:-TRAILER_NBYTES], tail[-TRAILER_NBYTES:]
    nbytes, _, _ = _FIELDS.unpack_from(trailer)
    (expected,) = struct.unpack_from("<I", trailer, _FIELDS.size)
    found = crc32c(trailer[: _FIELDS.size], crc32c(text))
    if found != expected:
        raise FileFormatError(
            f"the index is altered: its CRC-32C is {found:#010x}, not {expected:#010x}"
        )
    try:
        content = json.loads(text)
        index = Index(
            content["container"],
            _texts(content["facts"]),
            nbytes,
            _crc(content["skeleton_crc32c"]),
            tuple(_node(*node) for node in content["nodes"]),
        )
        _check(index, container)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise FileFormatError(f"the index makes no sense: {exc}") from exc
    return index


def decode_foreign(nodes: bytes, nbytes: int) -> Index:
    """Return the index of a file of another program, from what was found in it.

    Parameters
    ----------
    nodes : bytes
        JSON of the nodes, those of arrays without checksums.
    nbytes : int
        Bytes of the file.

    Raises
    ------
    FileFormatError
        If they are no state, or do not fit the file.
    """
    try:
        found = tuple(_foreign_node(*node) for node in json.loads(nodes))
        index = Index(FOREIGN, {}, nbytes, 0, found)
        _check(index, FOREIGN)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise FileFormatError(f"the HDF5 file makes no sense: {exc}") from exc
    return index


def _foreign_node(key: list[str], kind: str, *detail: Any) -> Node:
    where = tuple(key)
    if any(type(part) is not str for part in where):
        raise ValueError(f"{where} is no path")
    if kind == "array":
        name, shape, offset, nbytes = detail
        return Node(where, "leaf", _stored(where, name, shape, offset, nbytes, ()))
    if kind == "dict" and detail == (None,):
        return Node(where, "dict", None)
    raise ValueError(f"{show_key(where)} is of the unknown kind {kind!r}")


def _node(key: list[str | int], kind: str, *detail: Any) -> Node:
    where = tuple(key)
    if not _KEY_TYPES.issuperset(map(type, where)):
        raise ValueError(f"{where} is no key")
    if kind == "array":
        name, shape, offset, nbytes, checksums = detail
        sums = _sums_from_json(checksums, nbytes)
        return Node(where, "leaf", _stored(where, name, shape, offset, nbytes, sums))
    if kind == "object":
        return Node(where, "leaf", from_json(detail[0]))
    if kind == "opaque":
        return Node(where, "leaf", Opaque(str(detail[0])))
    if kind == "dict" and detail == (None,):
        return Node(where, "dict", None)
    if kind in ("list", "tuple", "per_rank"):
        return Node(where, kind, _whole(detail[0]))  # type: ignore[arg-type]
    raise ValueError(f"{show_key(where)} is of the unknown kind {kind!r}")


def _stored(
    key: Key,
    name: str,
    shape: list[int],
    offset: int,
    nbytes: int,
    sums: tuple[int, ...],
) -> Stored:
    if type(shape) is not list:
        raise ValueError(f"{shape!r:.80} is no shape")
    for number in (offset, *shape):
        if type(number) is not int or number < 0:  # without a call: there are many
            _whole(number)
    dtype, same_shape, expected = _array(name, tuple(shape))
    if type(nbytes) is not int or nbytes != expected:
        raise ValueError(f"{show_key(key)} of shape {shape} has {nbytes} bytes")
    return Stored(key, dtype, same_shape, Extent(offset, nbytes), sums)


@functools.lru_cache(maxsize=4096)
def _array(
    name: str, shape: tuple[int, ...]
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype, shape and bytes of an array; many are alike."""
    dtype = dtype_from_name(name)
    # No memory is taken: NumPy's own limits on axes and sizes.
    np.broadcast_to(np.empty((), dtype), shape)
    return dtype, shape, math.prod(shape) * stored_dtype(dtype).itemsize


def _texts(facts: Any) -> dict[str, str]:
    if type(facts) is not dict or any(type(text) is not str for text in facts.values()):
        raise ValueError(f"{facts!r:.80} are no facts")
    return facts


def _crc(number: Any) -> int:
    value = _whole(number)
    if value >> 32:
        raise ValueError(f"{value} is no CRC-32C")
    return value


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no number of bytes or items")
    return number


def _check(index: Index, container: str) -> None:
    """Refuse an index that does not fit its file, before anything is allocated."""
    if index.container != container:
        raise ValueError(f"it is that of a {index.container} file, in a {container}")
    _check_keys(index.nodes)
    _check_tree(index.nodes)
    extents = [n.value.extent for n in index.nodes if type(n.value) is Stored]
    places = sorted([(extent.offset, extent.nbytes) for extent in extents])
    stop = 0
    for offset, nbytes in places:
        if offset < stop or offset + nbytes > index.nbytes:
            extent = Extent(offset, nbytes)
            raise ValueError(f"{extent} overlaps another, or what follows payload")
        stop = offset + nbytes


def _check_keys(nodes: Sequence[Node]) -> None:
    """Refuse keys that were made such that a dict of them takes for ever.

    Texts are hashed with a secret, but numbers are not.
    """
    hashes = np.fromiter((hash(key) for key, *_ in nodes), np.int64, len(nodes))
    if np.unique(hashes, return_counts=True)[1].max(initial=0) > _MOST_ALIKE:
        raise ValueError(f"more than {_MOST_ALIKE} keys have the same hash")


def _check_tree(nodes: Sequence[Node]) -> None:
    """Refuse nodes that are no state: without a container, twice, out of order."""
    if not nodes or nodes[0].key:
        raise ValueError("the state itself is not the first node")
    kinds: dict[Key, str] = {}
    items: dict[Key, list[int]] = {}  # how many there were, and are to be
    ranks: dict[Key, int] = {}
    for key, kind, value in nodes:
        if key in kinds:
            raise ValueError(f"{show_key(key)} is there twice")
        kinds[key] = kind
        if kind in ("list", "tuple"):
            items[key] = [0, value]
        elif kind == "per_rank":
            ranks[key] = value
        if not key:
            continue
        above = kinds.get(key[:-1], "missing")
        if above in ("missing", "leaf"):
            raise ValueError(f"{show_key(key)} lies in no container")
        if above == "per_rank":
            if type(key[-1]) is not int or not 0 <= key[-1] < ranks[key[:-1]]:
                raise ValueError(f"{show_key(key)} is of none of the ranks that saved")
        elif above != "dict":
            if type(key[-1]) is not int or key[-1] != items[key[:-1]][0]:
                raise ValueError(f"{show_key(key)} is out of order")
            items[key[:-1]][0] += 1
    for key, (found, expected) in items.items():
        if found != expected:
            raise ValueError(f"{show_key(key)} has not as many items as it says")
