"""HDF5: a contiguous dataset per array, laid out around the payload.

h5py writes the skeleton into a sparse memory file: datasets are allocated at once and
never filled, so that only metadata is written, and each tells where its bytes lie.
"""

from __future__ import annotations

import json
import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.dtypes import is_ml_dtype, stored_dtype
from mpisave.errors import StateDictError, show_key
from mpisave.formats.base import ALIGNMENT, Layout, gaps
from mpisave.formats.objects import stored_scalar, to_json
from mpisave.formats.sparse import SparseFile
from mpisave.plan import Extent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mpisave.errors import Key
    from mpisave.merging import Entry, Merged, MergedNode
    from mpisave.metadata import Described

# Attributes of ours begin so; a user's key that does is escaped.
_OURS = "mpisave."

# Name of the dataset, or attribute, of a state that is a single array, or object. No
# escaped key looks like it.
_ITSELF = "%itself"

# An object header holds at most 64 KiB; longer texts become datasets.
_LONGEST_ATTRIBUTE = 32 * 1024

_LONGEST_NAME = 16 * 1024

_MOST_AXES = 32  # H5S_MAX_RANK

# Behind the superblock of version 2, which has 48 bytes, nothing lies up to the next
# multiple of the alignment. A file that has this there, and no index, lost it.
MARK = b"mpisave-1"
MARK_OFFSET = 48

# The file is closed and opened again after this many objects, see `_File.count`. That
# takes 0.6 ms, as 40 datasets do.
_REOPEN_AFTER = 2000

# What a group counts, and an array shorter than the alignment: these gaps are tried.
_SMALL = 4

_NOWHERE = b"mpisave"  # HDF5 wants a name

# Tells keys that need no escape, nearly all, in a fifth of the time of the rules.
_is_plain_name = re.compile(rf"(?!{re.escape(_OURS)})[^-0-9.%/\0][^%/\0]*").fullmatch


def escape(name: str | int) -> str:
    """Return the name of a link or attribute for a key, as docs/formats.md says.

    ``/`` and NUL cannot be in a name, ``.`` cannot be one, and ``%`` escapes. A str
    that reads as an int is escaped, an int is not: they are different keys.
    """
    if isinstance(name, int):
        return str(name)
    if _is_plain_name(name):
        return name
    if not name:
        return "%"
    text = re.sub(r"[%/\0]", lambda found: f"%{ord(found[0]):02X}", name)
    if text in (".", "..") or text.startswith(_OURS) or re.fullmatch(r"-?[0-9]+", text):
        text = f"%{ord(text[0]):02X}{text[1:]}"
    return text


class HDF5Format:
    """HDF5 in the versions of 1.8 to 1.10: h5dump 1.10 reads it."""

    name = "hdf5"

    def check(self, described: Iterable[Described]) -> None:
        """Refuse objects that are neither numbers, strings, bytes nor None."""
        for node in described:
            _check(node)

    def layout(self, merged: Merged, facts: Mapping[str, str]) -> Layout:
        """Return skeleton and extents of `merged`."""
        import h5py

        memory = SparseFile()
        extents = _Builder(h5py, memory).build(merged, facts)
        nbytes = memory.nbytes
        # As far as HDF5 puts nothing there: a mark is no reason to spoil a file.
        if not any(memory.peek(MARK_OFFSET, MARK_OFFSET + len(MARK))):
            memory.seek(MARK_OFFSET)
            memory.write(MARK)
        begins, ends = (column.tolist() for column in gaps(extents, nbytes))
        skeleton = tuple(
            (offset, memory.peek(offset, stop))
            for offset, stop in zip(begins, ends, strict=True)
        )
        return Layout(skeleton, tuple(extents), nbytes)


def _check(node: Described) -> None:
    if node.kind == "array" and len(node.detail[1]) > _MOST_AXES:
        raise StateDictError(
            f"{show_key(node.key)} has {len(node.detail[1])} axes: HDF5 holds at most "
            f"{_MOST_AXES}. Reshape it, or save a pickle (use_binary_format=False)."
        )
    if len(escape(node.key[-1] if node.key else 0).encode()) > _LONGEST_NAME:
        raise StateDictError(
            f"{show_key(node.key)[:80]}... is too long for a name in HDF5: at most "
            f"{_LONGEST_NAME} bytes"
        )
    try:
        if node.kind == "object":
            to_json(pickle.loads(node.detail))  # noqa: S301 - of this rank's own making
    except TypeError as exc:
        raise StateDictError(
            f"{show_key(node.key)} is of type {node.type_name}: HDF5 holds arrays, "
            f"numbers, strings, bytes, None, and dicts, lists and tuples of them. "
            f"Convert it, or save a pickle (use_binary_format=False)."
        ) from exc


class _File:
    """An HDF5 file that is being written, with its open groups."""

    def __init__(self, h5py: Any, memory: SparseFile) -> None:
        self._h5f, self._h5g, h5p = h5py.h5f, h5py.h5g, h5py.h5p
        self._access = h5p.create(h5p.FILE_ACCESS)
        self._access.set_fclose_degree(self._h5f.CLOSE_STRONG)
        self._access.set_fileobj_driver(h5py.h5fd.fileobj_driver, memory)
        # Many attributes of one group cost quadratic time in older versions.
        self._access.set_libver_bounds(self._h5f.LIBVER_V18, self._h5f.LIBVER_V110)
        self._access.set_alignment(1, ALIGNMENT)
        # The same state gives the same bytes.
        creation = h5p.create(h5p.FILE_CREATE)
        creation.set_obj_track_times(False)
        self._group_creation = h5p.create(h5p.GROUP_CREATE)
        self._group_creation.set_obj_track_times(False)
        self._id = self._h5f.create(
            _NOWHERE, self._h5f.ACC_TRUNC, fcpl=creation, fapl=self._access
        )
        self._paths: dict[Key, bytes] = {(): b"/"}
        self._open: dict[Key, Any] = {}
        self._left = _REOPEN_AFTER

    def group(self, key: Key) -> Any:
        """Return the group of a container."""
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = self._h5g.open(self._id, self._paths[key])
        return found

    def create_group(self, key: Key) -> Any:
        """Return a new group in that of ``key[:-1]``."""
        name = escape(key[-1]).encode()
        made = self._h5g.create(self.group(key[:-1]), name, gcpl=self._group_creation)
        self._paths[key] = b"%b/%b" % (self._paths[key[:-1]], name)
        self._open[key] = made
        return made

    def count(self, weight: int) -> None:
        """Count an object to come, and let HDF5 forget gaps if they are many.

        HDF5 remembers the gaps that alignment leaves, and tries all that are long
        enough whenever it allocates: 20,000 scalars took 8 s. It forgets them when it
        closes the file. Another strategy for file space would do, but HDF5 1.8 cannot
        open a file with one.
        """
        self._left -= weight
        if self._left < 0:
            self.close()
            self._id = self._h5f.open(_NOWHERE, self._h5f.ACC_RDWR, self._access)
            self._left = _REOPEN_AFTER

    def close(self) -> None:
        """Let HDF5 write all."""
        self._open.clear()
        self._id.close()


class _Builder:
    """Creates groups, datasets and attributes of a merged state."""

    def __init__(self, h5py: Any, memory: SparseFile) -> None:
        self._h5py = h5py
        self._file = _File(h5py, memory)
        self._made: dict[Any, tuple[Any, Any, int, str]] = {}
        self._types: dict[np.dtype[Any], tuple[Any, Any]] = {}
        self._spaces: dict[tuple[int, ...], Any] = {}
        self._text_dtype = h5py.string_dtype()
        h5p, h5d = h5py.h5p, h5py.h5d
        self._create = h5d.create
        self._creation = h5p.create(h5p.DATASET_CREATE)
        self._creation.set_layout(h5d.CONTIGUOUS)
        self._creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        self._creation.set_fill_time(h5d.FILL_TIME_NEVER)
        # The same state gives the same bytes.
        self._creation.set_obj_track_times(False)
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_char_encoding(h5py.h5t.CSET_UTF8)

    def build(self, merged: Merged, facts: Mapping[str, str]) -> list[Extent]:
        """Create all, and return where the arrays lie."""
        try:
            for name, value in facts.items():
                self._put(self._file.group(()), _OURS + name, value)
            return self._build(merged.nodes)
        finally:
            self._file.close()

    def _build(self, nodes: Iterable[MergedNode]) -> list[Extent]:
        texts = _Texts(nodes, _holders(nodes))
        extents = []
        for node in nodes:
            key, kind = node.key, node.kind
            if kind == "array":
                extents.append(self._dataset(key, node.detail))
            elif texts.holds(key):
                continue
            elif kind == "object":
                # Made by a rank of this job, see metadata.describe.
                self._attribute(key, pickle.loads(node.detail))  # noqa: S301
            elif key in texts.roots:
                self._json(key, texts.roots[key])
            else:
                self._group(key, kind)
        return extents

    def _place(self, key: Key) -> tuple[Any, str]:
        """Return the group in which `key` lies, and its name there."""
        if key:
            return self._file.group(key[:-1]), escape(key[-1])
        return self._file.group(()), _ITSELF

    def _group(self, key: Key, kind: str) -> None:
        self._file.count(_SMALL)
        group = self._file.create_group(key) if key else self._file.group(())
        if kind != "dict":
            self._put(group, _OURS + "kind", kind)

    def _dataset(self, key: Key, entry: Entry) -> Extent:
        what = entry.dtype, entry.shape
        made = self._made.get(what)
        if made is None:
            made = self._made[what] = self._make(entry)
        kind, space, nbytes, name_of_dtype = made
        self._file.count(_SMALL if nbytes < ALIGNMENT else 1)
        parent, name = self._place(key)
        dataset = self._create(
            parent, name.encode(), kind, space, self._creation, self._links
        )
        if name_of_dtype:
            self._put(dataset, _OURS + "dtype", name_of_dtype)
        # HDF5 allocates nothing for an empty dataset.
        return Extent((dataset.get_offset() or 0) if nbytes else 0, nbytes)

    def _make(self, entry: Entry) -> tuple[Any, Any, int, str]:
        """Return what all datasets of one dtype and shape have in common."""
        kind, _ = self._type(stored_dtype(entry.dtype))
        name = entry.dtype.name if is_ml_dtype(entry.dtype) else ""
        return kind, self._space(entry.shape), entry.nbytes, name

    def _type(self, dtype: np.dtype[Any]) -> tuple[Any, Any]:
        """Return the type in the file, and that in memory."""
        if dtype not in self._types:
            create = self._h5py.h5t.py_create
            self._types[dtype] = create(dtype, logical=True), create(dtype)
        return self._types[dtype]

    def _space(self, shape: tuple[int, ...]) -> Any:
        if shape not in self._spaces:
            h5s = self._h5py.h5s
            self._spaces[shape] = (
                h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
            )
        return self._spaces[shape]

    def _put(self, where: Any, name: str, value: Any) -> None:
        """Create an attribute."""
        is_text = isinstance(value, str)
        data = np.asarray(value, dtype=self._text_dtype if is_text else None)
        kind, in_memory = self._type(data.dtype)
        space = self._space(data.shape)
        made = self._h5py.h5a.create(where, name.encode(), kind, space)
        made.write(data, mtype=in_memory)

    def _attribute(self, key: Key, value: Any) -> None:
        self._file.count(1)
        parent, name = self._place(key)
        if isinstance(value, np.generic) and not isinstance(
            value, (np.str_, np.bytes_)
        ):
            self._put(parent, name, stored_scalar(value))
        elif isinstance(value, (bool, float, complex)) or _is_int64(value):
            self._put(parent, name, value)
        elif isinstance(value, str) and _is_plain(value):
            self._put(parent, name, str(value))
        elif isinstance(value, (bytes, bytearray)) and len(value) < _LONGEST_ATTRIBUTE:
            self._put(parent, name, np.frombuffer(value, np.uint8))
        else:
            self._json(key, json.dumps(_readable(value)))

    def _json(self, key: Key, text: str) -> None:
        """Put a text that may be long beside the arrays: JSON."""
        parent, name = self._place(key)
        if len(text) < _LONGEST_ATTRIBUTE:
            self._put(parent, name, text)
            return
        kind = self._h5py.string_dtype("utf-8", len(text))
        self._h5py.Group(parent).create_dataset(
            name, data=text, dtype=kind, track_times=False
        )


def _holders(nodes: Iterable[MergedNode]) -> set[Key]:
    """Return the keys of all containers that hold an array at any depth."""
    found: set[Key] = set()
    for node in nodes:
        key = node.key
        while node.kind == "array" and key and (key := key[:-1]) not in found:
            found.add(key)
    return found


class _Texts:
    """Lists and tuples without arrays: each is one JSON text on what holds it."""

    def __init__(self, nodes: Iterable[MergedNode], with_arrays: set[Key]) -> None:
        self.roots: dict[Key, str] = {}
        self._below: set[Key] = set()
        trees: dict[Key, Any] = {}
        top: dict[Key, Any] = {}
        for node in nodes:
            key = node.key
            is_inside = bool(key) and key[:-1] in trees
            starts = node.kind in ("list", "tuple") and key and key not in with_arrays
            if not is_inside and not starts:
                continue
            value: Any = {} if node.kind in ("dict", "per_rank") else []
            if node.kind == "object":
                value = _readable(pickle.loads(node.detail))  # noqa: S301 - as above
            if is_inside:
                self._below.add(key)
                parent = trees[key[:-1]]
                if isinstance(parent, dict):
                    parent[key[-1]] = value
                else:
                    parent.append(value)
            else:
                top[key] = value
            if node.kind != "object":
                trees[key] = value
        self.roots = {key: json.dumps(value) for key, value in top.items()}

    def holds(self, key: Key) -> bool:
        """Return whether `key` is within a text."""
        return key in self._below


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _is_plain(text: str) -> bool:
    """Return whether `text` can be an attribute as it is."""
    try:
        return "\0" not in text and len(text.encode()) < _LONGEST_ATTRIBUTE
    except UnicodeEncodeError:
        return False


def _readable(value: Any) -> Any:
    """Return what JSON shows of a small object; the index alone is exact."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() < _MOST_BITS:
        return value
    return value if isinstance(value, (float, str)) else to_json(value)


# Python reads no decimals of more than 4,300 digits.
_MOST_BITS = 14_000
