"""Pickle: what `pickle.load` reads, laid out around the payload.

Each array is what NumPy's own pickles say, with its bytes left out. The file begins
with a mark that is pushed and popped again, payload is aligned in the same way, and the
index follows the STOP opcode, where no reader looks.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.dtypes import stored_dtype
from mpisave.errors import FileFormatError, show_key
from mpisave.formats.base import ALIGNMENT, Layout
from mpisave.formats.index import Index, Opaque
from mpisave.formats.objects import stored_scalar, to_json
from mpisave.metadata import OBJECT_PROTOCOL
from mpisave.plan import Extent
from mpisave.tree import Node, rebuild

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mpisave.errors import Key
    from mpisave.merging import Entry, Merged
    from mpisave.metadata import Described
    from mpisave.source import Source

# Pushed and popped right behind PROTO: a file of ours without an index is torn.
MARK = b"mpisave-1"

# The name that NumPy 1.24, 1.26 and 2.x all know without a warning; that which NumPy 2
# writes, numpy._core.multiarray, does not load on NumPy 1.24.
_MULTIARRAY = "numpy.core.multiarray"

_LONGEST_BINBYTES = 2**32 - 1


@dataclass(frozen=True, slots=True)
class _Object:
    """A leaf that is no array."""

    pickled: bytes


class PickleFormat:
    """Pickle of a given protocol.

    Payload is a bytes object of protocol 3 or 4 in every protocol, also in 2: before
    that, pickles could hold bytes only re-coded. Python 3.4 and later read them all.
    """

    name = "pickle"

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def check(self, described: Iterable[Described]) -> None:
        """Refuse nothing: what could be described can be pickled."""

    def layout(self, merged: Merged, facts: Mapping[str, str]) -> Layout:  # noqa: ARG002
        """Return skeleton and extents of `merged`; the index alone says `facts`."""
        return _Writer(self.protocol).layout(merged)


class _Writer:
    """Writes opcodes, and leaves holes where payload goes."""

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._out = bytearray()
        # Skeleton bytes before each hole, and what belongs into it.
        self._holes: list[tuple[int, Entry]] = []
        self._payload = 0
        self._memo: dict[object, int] = {}
        # What comes before the bytes of an array of a dtype and shape.
        self._heads: dict[tuple[object, tuple[int, ...]], bytes] = {}

    def layout(self, merged: Merged) -> Layout:
        self._out += pickle.PROTO + bytes([self._protocol])
        self._filler(MARK)
        self._value(rebuild(_leaves(merged)))
        self._out += pickle.STOP
        return self._cut(merged)

    def _cut(self, merged: Merged) -> Layout:
        """Take the skeleton apart at its holes."""
        skeleton, before, payload = [], 0, 0
        extents: dict[int, Extent] = {}
        for at, entry in [*self._holes, (len(self._out), None)]:
            if at > before:
                skeleton.append((before + payload, bytes(self._out[before:at])))
            before = at
            if entry is not None:
                extents[id(entry)] = Extent(at + payload, entry.nbytes)
                payload += entry.nbytes
        in_order = tuple(extents[id(entry)] for entry in merged.entries)
        return Layout(tuple(skeleton), in_order, len(self._out) + payload)

    def _value(self, value: Any) -> None:
        if isinstance(value, dict):
            self._out += pickle.EMPTY_DICT + pickle.MARK
            for name, item in value.items():
                self._out += _opcodes(name)
                self._value(item)
            self._out += pickle.SETITEMS
        elif isinstance(value, list):
            self._out += pickle.EMPTY_LIST + pickle.MARK
            for item in value:
                self._value(item)
            self._out += pickle.APPENDS
        elif isinstance(value, tuple):
            self._out += pickle.MARK
            for item in value:
                self._value(item)
            self._out += pickle.TUPLE
        elif isinstance(value, _Object):
            self._object(value.pickled)
        else:
            self._array(value)

    def _object(self, pickled: bytes) -> None:
        # Just made by a rank of this job from an object in its own memory.
        value = pickle.loads(pickled)
        if isinstance(value, (np.str_, np.bytes_)):
            self._out += _opcodes(value.item())
        elif isinstance(value, np.generic):
            scalar = stored_scalar(value)
            self._global(_MULTIARRAY, "scalar")
            self._dtype(scalar.dtype)
            self._out += _opcodes(scalar.tobytes()) + pickle.TUPLE2 + pickle.REDUCE
        else:
            self._out += _bare(pickled)

    def _array(self, entry: Entry) -> None:
        dtype = stored_dtype(entry.dtype)
        if not dtype.isnative:
            self._swapped_array(entry, dtype)
            return
        begin, known = len(self._out), len(self._memo)
        head = self._heads.get((dtype, entry.shape))
        if head is not None:
            self._out += head
        else:
            self._global(_MULTIARRAY, "_reconstruct")
            self._global("numpy", "ndarray")
            self._out += _opcodes((0,)) + _opcodes(b"b") + pickle.TUPLE3 + pickle.REDUCE
            # The state of an ndarray: version, shape, dtype, is it Fortran, bytes.
            self._out += pickle.MARK + _opcodes(1) + _opcodes(entry.shape)
            self._dtype(dtype)
            self._out += pickle.NEWFALSE
            if len(self._memo) == known:  # nothing was new: it is the same again
                self._heads[dtype, entry.shape] = bytes(self._out[begin:])
        self._hole(entry)
        self._out += pickle.TUPLE + pickle.BUILD

    def _swapped_array(self, entry: Entry, dtype: np.dtype[Any]) -> None:
        # NumPy's __setstate__ turns bytes into native order and forgets the other one:
        # call ndarray(shape, dtype, buffer) instead, on a buffer that can be written.
        self._global("numpy", "ndarray")
        self._out += _opcodes(entry.shape)
        self._dtype(dtype)
        if self._protocol >= 5:
            self._hole(entry, opcode=pickle.BYTEARRAY8)
        else:
            self._global("builtins", "bytearray")
            self._hole(entry)
            self._out += pickle.TUPLE1 + pickle.REDUCE
        self._out += pickle.TUPLE3 + pickle.REDUCE

    def _dtype(self, dtype: np.dtype[Any]) -> None:
        if self._known(dtype):
            return
        reduced: Any = dtype.__reduce__()
        function, arguments, state = reduced
        self._global("numpy", function.__name__)
        self._out += _opcodes(arguments) + pickle.REDUCE
        self._out += _opcodes(state) + pickle.BUILD
        self._remember(dtype)

    def _global(self, module: str, name: str) -> None:
        if self._known((module, name)):
            return
        if self._protocol >= 4:
            self._out += _opcodes(module) + _opcodes(name) + pickle.STACK_GLOBAL
        else:
            self._out += pickle.GLOBAL + f"{module}\n{name}\n".encode()
        self._remember((module, name))

    def _known(self, what: object) -> bool:
        if what not in self._memo:
            return False
        self._out += pickle.BINGET + bytes([self._memo[what]])
        return True

    def _remember(self, what: object) -> None:
        # There are fewer dtypes than 250, so one byte numbers them all.
        self._memo[what] = len(self._memo)
        self._out += pickle.BINPUT + bytes([self._memo[what]])

    def _hole(self, entry: Entry, opcode: bytes = pickle.BINBYTES8) -> None:
        """Write the opcode of a bytes object of the array's length, aligned."""
        nbytes = entry.nbytes
        head = opcode + struct.pack("<Q", nbytes)
        is_old = self._protocol < 4
        if is_old and nbytes <= _LONGEST_BINBYTES:
            head = pickle.BINBYTES + struct.pack("<I", nbytes)
        here = len(self._out) + self._payload
        self._filler(bytes(-(here + _FILLER_NBYTES + len(head)) % ALIGNMENT))
        self._out += head
        self._holes.append((len(self._out), entry))
        self._payload += nbytes

    def _filler(self, data: bytes) -> None:
        self._out += pickle.SHORT_BINBYTES + bytes([len(data)]) + data + pickle.POP


_FILLER_NBYTES = 3  # SHORT_BINBYTES, a length, POP


def _leaves(merged: Merged) -> Iterable[Node]:
    for node in merged.nodes:
        if node.kind == "array":
            yield Node(node.key, "leaf", node.detail)
        elif node.kind == "object":
            yield Node(node.key, "leaf", _Object(node.detail))
        else:
            yield Node(node.key, node.kind, node.detail)


def _opcodes(value: object) -> bytes:
    """Return the opcodes that push a small object."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, OBJECT_PROTOCOL)
    pickler.fast = True  # the memo is ours
    pickler.dump(value)
    return _bare(buffer.getvalue())


def _bare(pickled: bytes) -> bytes:
    """Return a pickle without PROTO and STOP: opcodes to put into another."""
    return pickled[2:-1]


def is_only_for_pickle(node: Described) -> bool:
    """Return whether `node` is an object that `pickle.load` alone gives back."""
    if node.kind != "object":
        return False
    try:
        to_json(pickle.loads(node.detail))
    except TypeError:
        return True
    return False


class _File(io.RawIOBase):
    """A source as the file that `pickle.load` reads."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        """Fill `out`, or as much as there is left."""
        view = memoryview(out).cast("B")
        done = self._source.read_into(
            self._at, view[: max(0, self._source.nbytes - self._at)]
        )
        self._at += done
        return done


def load_trusted(source: Source) -> Any:
    """Return what `pickle.load` makes of a file, executing what the file says.

    Called only where the caller of load said ``allow_pickle=True``.
    """
    try:
        return pickle.load(io.BufferedReader(_File(source), 2**16))
    except Exception as exc:
        raise FileFormatError(f"pickle.load failed: {exc!r:.500}") from exc


def with_objects(source: Source, index: Index) -> Index:
    """Return `index` with the objects that only `pickle.load` gives back in it.

    **It executes what the file says.** The caller has found its skeleton to be as it
    was saved. Payload is not looked at here: no opcode is in it.
    """
    state = load_trusted(source)
    nodes = []
    for node in index.nodes:
        value = node.value
        if isinstance(value, Opaque):
            value = _at(state, node.key)
        nodes.append(Node(node.key, node.kind, value))
    return replace(index, nodes=tuple(nodes))


def _at(state: Any, key: Key) -> Any:
    try:
        return functools.reduce(lambda inner, part: inner[part], key, state)
    except (LookupError, TypeError) as exc:
        raise FileFormatError(
            f"the pickle has no {show_key(key)}, which the index has"
        ) from exc
