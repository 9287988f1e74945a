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

from mpisave.arrays import is_ml_dtype, stored_dtype
from mpisave.errors import StateDictError, show_key
from mpisave.formats.base import ALIGNMENT, Layout, gaps
from mpisave.formats.objects import stored_scalar, to_json
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

_PAGE = 4096


def escape(name: str | int) -> str:
    """Return the name of a link or attribute for a key, as docs/formats.md says.

    ``/`` and NUL cannot be in a name, ``.`` cannot be one, and ``%`` escapes. A str
    that reads as an int is escaped, an int is not: they are different keys.
    """
    if isinstance(name, int):
        return str(name)
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

        memory = _SparseFile()
        with h5py.File(
            memory,
            "w",
            # Many attributes of one group cost quadratic time in older versions.
            libver=("v108", "v110"),
            alignment_threshold=1,
            alignment_interval=ALIGNMENT,
        ) as file:
            for name, value in facts.items():
                file.attrs[_OURS + name] = value
            extents = _Builder(h5py, file).build(merged)
        nbytes = memory.nbytes
        skeleton = tuple(
            (offset, memory.peek(offset, stop))
            for offset, stop in gaps(extents, nbytes)
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


class _Builder:
    """Creates groups, datasets and attributes of a merged state."""

    def __init__(self, h5py: Any, file: Any) -> None:
        self._h5py = h5py
        self._groups: dict[Key, Any] = {(): file}
        self._types: dict[np.dtype[Any], Any] = {}
        self._spaces: dict[tuple[int, ...], Any] = {}
        h5p, h5d = h5py.h5p, h5py.h5d
        self._creation = h5p.create(h5p.DATASET_CREATE)
        self._creation.set_layout(h5d.CONTIGUOUS)
        self._creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        self._creation.set_fill_time(h5d.FILL_TIME_NEVER)
        # The same state gives the same bytes.
        self._creation.set_obj_track_times(False)
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_char_encoding(h5py.h5t.CSET_UTF8)

    def build(self, merged: Merged) -> list[Extent]:
        with_arrays = {
            node.key[:depth]
            for node in merged.nodes
            if node.kind == "array"
            for depth in range(len(node.key))
        }
        texts = _Texts(merged.nodes, with_arrays)
        extents = []
        for node in merged.nodes:
            key = node.key
            if texts.holds(key):
                continue
            if node.kind == "array":
                extents.append(self._dataset(key, node.detail))
            elif node.kind == "object":
                # Made by a rank of this job, see metadata.describe.
                self._attribute(key, pickle.loads(node.detail))  # noqa: S301
            elif key in texts.roots:
                self._text(key, texts.roots[key])
            else:
                self._group(key, node.kind)
        return extents

    def _place(self, key: Key) -> tuple[Any, str]:
        """Return the group in which `key` lies, and its name there."""
        return (
            (self._groups[key[:-1]], escape(key[-1]))
            if key
            else (
                self._groups[()],
                _ITSELF,
            )
        )

    def _group(self, key: Key, kind: str) -> None:
        if key:
            parent, name = self._place(key)
            group = parent.create_group(name.encode(), track_order=False)
            self._groups[key] = group
        if kind != "dict":
            self._groups[key].attrs[_OURS + "kind"] = kind

    def _dataset(self, key: Key, entry: Entry) -> Extent:
        parent, name = self._place(key)
        h5py, dtype = self._h5py, stored_dtype(entry.dtype)
        if dtype not in self._types:
            self._types[dtype] = h5py.h5t.py_create(dtype, logical=True)
        if entry.shape not in self._spaces:
            self._spaces[entry.shape] = (
                h5py.h5s.create_simple(entry.shape)
                if entry.shape
                else h5py.h5s.create(h5py.h5s.SCALAR)
            )
        dataset = h5py.h5d.create(
            parent.id,
            name.encode(),
            self._types[dtype],
            self._spaces[entry.shape],
            self._creation,
            self._links,
        )
        if is_ml_dtype(entry.dtype):
            wrapped = h5py.Dataset(dataset)
            wrapped.attrs[_OURS + "dtype"] = entry.dtype.name
        # HDF5 allocates nothing for an empty dataset.
        return Extent((dataset.get_offset() or 0) if entry.nbytes else 0, entry.nbytes)

    def _attribute(self, key: Key, value: Any) -> None:
        parent, name = self._place(key)
        if isinstance(value, np.generic) and not isinstance(
            value, (np.str_, np.bytes_)
        ):
            parent.attrs[name] = stored_scalar(value)
        elif isinstance(value, (bool, float, complex)) or _is_int64(value):
            parent.attrs[name] = value
        elif isinstance(value, str) and _is_plain(value):
            parent.attrs[name] = str(value)
        elif isinstance(value, (bytes, bytearray)) and len(value) < _LONGEST_ATTRIBUTE:
            parent.attrs[name] = np.frombuffer(value, np.uint8)
        else:
            self._text(key, json.dumps(_readable(value)))

    def _text(self, key: Key, text: str) -> None:
        """Put a text that may be long beside the arrays: JSON."""
        parent, name = self._place(key)
        if len(text) < _LONGEST_ATTRIBUTE:
            parent.attrs[name] = text
            return
        kind = self._h5py.string_dtype("utf-8", len(text))
        parent.create_dataset(name, data=text, dtype=kind, track_times=False)


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


class _SparseFile:
    """A file in memory that holds only the pages that were written."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.nbytes = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self.nbytes)[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        position, done = self._position, 0
        while done < view.nbytes:
            page, start = divmod(position + done, _PAGE)
            part = view[done : done + _PAGE - start]
            held = self._pages.get(page)
            if held is None:
                held = self._pages[page] = bytearray(_PAGE)
            held[start : start + part.nbytes] = part
            done += part.nbytes
        self._position += done
        self.nbytes = max(self.nbytes, self._position)
        return done

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        stop = min(self._position + view.nbytes, max(self.nbytes, self._position))
        data = self.peek(self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read(self, nbytes: int = -1) -> bytes:
        stop = self.nbytes if nbytes < 0 else min(self.nbytes, self._position + nbytes)
        data = self.peek(self._position, stop)
        self._position += len(data)
        return data

    def truncate(self, nbytes: int | None = None) -> int:
        self.nbytes = self._position if nbytes is None else nbytes
        return self.nbytes

    def flush(self) -> None:
        """Do nothing: all is in memory."""

    def peek(self, start: int, stop: int) -> bytes:
        """Return bytes without moving; what was never written is zero."""
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
