"""What all ranks hold together: the union of their states, in columns. Pure."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpisave.dtypes import dtype_from_name
from mpisave.errors import Key, StateDictError, show_key
from mpisave.metadata import Described, Description, Kind, What
from mpisave.shards import Points, gap, is_tiling, overlap, show_box

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of the merged state."""

    key: Key
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


class MergedNode(NamedTuple):
    """A node of the merged state, a container before what it holds."""

    key: Key
    kind: Kind
    # As in `Described`, but for an array, which is an Entry.
    detail: Any
    type_name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """Ranks that hold the same arrays whole, in the same order."""

    ranks: npt.NDArray[np.int64]  # ascending
    entries: npt.NDArray[np.int64]
    ordinals: npt.NDArray[np.int64]  # the how-manieth array of each rank's state


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """The boxes of one sharded array: every holder's, lowest rank first.

    Arrays of int64; those of points have shape (n, ndim). No box is empty.
    """

    ranks: npt.NDArray[np.int64]
    ordinals: npt.NDArray[np.int64]
    starts: Points
    counts: Points
    box: npt.NDArray[np.int64]  # the same number for replicas of one box


@dataclass(frozen=True, eq=False)
class Merged:
    """The union of what all ranks hold.

    The keys of a dict are in the order in which they first appear, lowest rank first.
    """

    keys: list[Key]
    what: list[What]
    which: npt.NDArray[np.int64]
    holdings: list[Holding]  # by lowest rank
    sharded: dict[int, Boxes]  # by entry

    def __reduce__(self) -> tuple[object, ...]:
        names = ("keys", "what", "which", "holdings", "sharded")
        return Merged, tuple(getattr(self, name) for name in names)

    @functools.cached_property
    def nodes(self) -> list[MergedNode]:
        """The nodes, with an Entry for each array."""
        details = [self._detail(what) for what in self.what]
        nodes = []
        for key, number in zip(self.keys, self.which.tolist(), strict=True):
            kind, detail, type_name = details[number]
            if kind == "array":
                detail = Entry(key, *detail)
            nodes.append(MergedNode(key, kind, detail, type_name))
        return nodes

    @staticmethod
    def _detail(what: What) -> What:
        if what[0] != "array":
            return what
        name, shape = what[1]
        return "array", (dtype_from_name(name), tuple(shape)), ""

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The arrays among the nodes."""
        return [node.detail for node in self.nodes if node.kind == "array"]

    def entry_details(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return bytes of an element and shape of each entry."""
        known = {
            number: (dtype_from_name(what[1][0]).itemsize, tuple(what[1][1]))
            for number, what in enumerate(self.what)
            if what[0] == "array"
        }
        return [known[n] for n in self.which.tolist() if n in known]

    def nbytes_of_entries(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each entry."""
        nbytes = np.full(len(self.what), -1, np.int64)
        for number, what in enumerate(self.what):
            if what[0] == "array":
                itemsize = dtype_from_name(what[1][0]).itemsize
                nbytes[number] = math.prod(what[1][1]) * itemsize
        every = nbytes[self.which]
        return every[every >= 0]


def merge(descriptions: Sequence[Description]) -> Merged:
    """Return the union of the states that all ranks described, in rank order.

    Raises
    ------
    StateDictError
        If a key stands for different things on different ranks: another kind, dtype,
        shape, number of items, or value of a small object; or if shards do not make
        their array.

    Notes
    -----
    Linear in the number of keys of all ranks that differ in structure, and in that of
    boxes.
    """
    groups: dict[bytes, list[int]] = {}
    for rank, description in enumerate(descriptions):
        groups.setdefault(description.structure, []).append(rank)
    table = _Table(descriptions)
    numbers = [table.add(ranks[0]) for ranks in groups.values()]
    is_array = np.array([what[0] == "array" for what in table.what], bool)[table.which]
    entry_of = np.cumsum(is_array) - 1
    keys = list(itertools.compress(table.keys, is_array))
    holdings = []
    parts: dict[int, list[tuple[npt.NDArray[np.int64], ...]]] = {}
    for ranks, ids in zip(groups.values(), numbers, strict=True):
        first = descriptions[ranks[0]]
        entries = entry_of[ids[is_array[ids]]]
        boxes = np.maximum(first.nboxes, 1)
        ordinals = np.cumsum(boxes) - boxes
        whole = first.nboxes == 0
        everyone = np.array(ranks, np.int64)
        if whole.any():
            holdings.append(Holding(everyone, entries[whole], ordinals[whole]))
        if not whole.all():
            _collect_boxes(descriptions, everyone, entries, ordinals, parts, table)
    if parts:
        holdings = _join_whole(holdings, parts, table, is_array)
    sharded = {
        entry: _boxes(keys[entry], table.shape(is_array, entry), found)
        for entry, found in parts.items()
        if math.prod(table.shape(is_array, entry))
    }
    merged = Merged(table.keys, table.what, table.which, holdings, sharded)
    total = merged.nbytes_of_entries().sum(dtype=np.float64)  # integers would wrap
    if total >= 2**63:
        raise StateDictError(
            f"the arrays have {total:.4g} bytes in all, and a file less than 2**63"
        )
    return merged


class _Table:
    """Keys as they come, and what each stands for."""

    def __init__(self, descriptions: Sequence[Description]) -> None:
        self._descriptions = descriptions
        self.keys: list[Key] = []
        self.what: list[What] = []
        self._known: dict[Key, int] = {}
        self._numbers: dict[What, int] = {}
        self._which = np.empty(1024, np.int64)
        self._ranks = np.empty(1024, np.int64)  # that had the key first
        self._shapes: dict[int, tuple[int, ...]] = {}

    @property
    def which(self) -> npt.NDArray[np.int64]:
        """What each key stands for."""
        return self._which[: len(self.keys)]

    def shape(self, is_array: npt.NDArray[np.bool_], entry: int) -> tuple[int, ...]:
        """Return the shape of an entry."""
        if not self._shapes:
            numbers = self.which[is_array].tolist()
            self._shapes = {e: tuple(self.what[n][1][1]) for e, n in enumerate(numbers)}
        return self._shapes[entry]

    def add(self, rank: int) -> npt.NDArray[np.int64]:
        """Add the keys of a rank; return the number of each."""
        description = self._descriptions[rank]
        remap = np.empty(len(description.what), np.int64)
        for place, what in enumerate(description.what):
            remap[place] = self._numbers.setdefault(what, len(self._numbers))
            if len(self._numbers) > len(self.what):
                self.what.append(what)
        which = remap[description.which]
        n = len(description.keys)
        absent = itertools.repeat(-1, n)
        ids = np.fromiter(map(self._known.get, description.keys, absent), np.int64, n)
        is_new = ids < 0
        before = len(self.keys)
        ids[is_new] = np.arange(before, before + np.count_nonzero(is_new))
        fresh = list(itertools.compress(description.keys, is_new))
        self.keys += fresh
        self._known.update(zip(fresh, range(before, len(self.keys)), strict=True))
        if len(self.keys) > len(self._which):
            more = 2 * len(self.keys)
            self._which = np.resize(self._which, more)
            self._ranks = np.resize(self._ranks, more)
        self._which[before : len(self.keys)] = which[is_new]
        self._ranks[before : len(self.keys)] = rank
        for place in np.flatnonzero(self._which[ids] != which).tolist():
            node = int(ids[place])
            known = Described(self.keys[node], *self.what[self._which[node]])
            other = Described(self.keys[node], *self.what[which[place]])
            if not _is_same_object(known, other):
                both = ((int(self._ranks[node]), known), (rank, other))
                _refuse_difference(both, self._descriptions)
        return ids


def _collect_boxes(
    descriptions: Sequence[Description],
    ranks: npt.NDArray[np.int64],
    entries: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    parts: dict[int, list[tuple[npt.NDArray[np.int64], ...]]],
    table: _Table,
) -> None:
    """Add to `parts` the boxes of ranks of one structure, by entry."""
    first = descriptions[int(ranks[0])]
    every = np.stack([descriptions[rank].boxes for rank in ranks.tolist()])
    shapes = [table.what[n][1][1] for n in _arrays_of(first, table)]
    done = 0
    for place in np.flatnonzero(first.nboxes).tolist():
        nboxes, ndim = int(first.nboxes[place]), len(shapes[place])
        numbers = every[:, done : done + 2 * nboxes * ndim]
        done += 2 * nboxes * ndim
        numbers = numbers.reshape(len(ranks) * nboxes, 2, ndim)
        order = np.arange(ordinals[place], ordinals[place] + nboxes)
        columns = (
            np.repeat(ranks, nboxes),
            np.tile(order, len(ranks)),
            numbers[:, 0],
            numbers[:, 1],
        )
        parts.setdefault(int(entries[place]), []).append(columns)


def _arrays_of(description: Description, table: _Table) -> list[int]:
    """Return what each array of a description is, by its number in the table."""
    numbers = [table._numbers[what] for what in description.what]  # noqa: SLF001
    return [
        numbers[n]
        for n in description.which.tolist()
        if description.what[n][0] == "array"
    ]


def _join_whole(
    holdings: list[Holding],
    parts: dict[int, list[tuple[npt.NDArray[np.int64], ...]]],
    table: _Table,
    is_array: npt.NDArray[np.bool_],
) -> list[Holding]:
    """Turn whole holders of an array that others hold sharded into boxes."""
    kept = []
    for holding in holdings:
        is_sharded = np.isin(holding.entries, list(parts))
        for place in np.flatnonzero(is_sharded).tolist():
            entry = int(holding.entries[place])
            n, shape = len(holding.ranks), table.shape(is_array, entry)
            counts = np.tile(np.array(shape, np.int64), (n, 1))
            ordinals = np.full(n, holding.ordinals[place])
            whole = (holding.ranks, ordinals, np.zeros_like(counts), counts)
            parts[entry].append(whole)
        left = ~is_sharded
        kept.append(
            Holding(holding.ranks, holding.entries[left], holding.ordinals[left])
        )
    return kept


def _boxes(
    key: Key,
    shape: tuple[int, ...],
    found: Sequence[tuple[npt.NDArray[np.int64], ...]],
) -> Boxes:
    """Return the boxes of an array, or refuse them if they do not make it."""
    if len(found) == 1:
        ranks, ordinals, starts, counts = found[0]
    else:
        columns = zip(*found, strict=True)
        ranks, ordinals, starts, counts = (np.concatenate(c) for c in columns)
    is_filled = (counts > 0).all(axis=1)
    if not is_filled.all():
        ranks, ordinals = ranks[is_filled], ordinals[is_filled]
        starts, counts = starts[is_filled], counts[is_filled]
    if len(found) > 1:
        order = np.argsort(ranks, kind="stable")
        ranks, ordinals = ranks[order], ordinals[order]
        starts, counts = starts[order], counts[order]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    corner = starts @ np.array(strides, np.int64)
    _, firsts, box = np.unique(corner, return_index=True, return_inverse=True)
    same = (counts == counts[firsts][box]).all()
    if not (same and is_tiling(shape, starts[firsts], counts[firsts])):
        _refuse_boxes(key, shape, ranks, starts, counts)
    return Boxes(ranks, ordinals, starts, counts, box)


def _refuse_boxes(
    key: Key,
    shape: tuple[int, ...],
    ranks: npt.NDArray[np.int64],
    starts: Points,
    counts: Points,
) -> NoReturn:
    """Say which boxes overlap, or what none of them covers."""
    both = np.concatenate([starts, counts], axis=1)
    _, firsts = np.unique(both, axis=0, return_index=True)
    firsts = np.sort(firsts)
    starts, counts, ranks = starts[firsts], counts[firsts], ranks[firsts]
    pair = overlap(starts, counts)
    if pair is not None:
        texts = [
            f"{show_box(starts[p].tolist(), counts[p].tolist())} of rank {ranks[p]}"
            for p in pair
        ]
        raise StateDictError(
            f"{show_key(key)} of global shape {shape}: the boxes {' and '.join(texts)} "
            f"overlap without being the same box"
        )
    missing = gap(shape, starts, counts)
    where = f": nobody has {show_box(*missing)}" if missing else ""
    some = ", ".join(
        f"{show_box(start, count)} (rank {rank})"
        for start, count, rank in zip(
            starts[:4].tolist(), counts[:4].tolist(), ranks[:4].tolist(), strict=True
        )
    )
    more = f" and {len(starts) - 4} more" if len(starts) > 4 else ""
    raise StateDictError(
        f"{show_key(key)} of global shape {shape} has a gap{where}. There are "
        f"{some or 'no boxes that hold an element'}{more}."
    )


def _refuse_difference(
    both: Sequence[tuple[int, Described]], descriptions: Sequence[Description]
) -> NoReturn:
    """Say what two ranks have under one key."""
    node = both[0][1]
    advice = {
        "array": "Save them under different keys, or cast them to one dtype and shape",
        "object": "Small objects are saved once: make them equal on every rank, or "
        "save them under different keys",
    }.get(node.kind, "Save them under different keys")
    first, second = (
        f"{_show(node, descriptions[rank])} on rank {rank}" for rank, node in both
    )
    raise StateDictError(
        f"{show_key(node.key)} differs between ranks: {first}, {second}. {advice}."
    )


def _is_same_object(node: Described, other: Described) -> bool:
    """Return whether objects with different pickles are equal: sets, say."""
    if {node.kind, other.kind} != {"object"} or node.type_name != other.type_name:
        return False
    try:
        # Pickles that ranks of this job just made from objects in their own memory.
        return bool(pickle.loads(node.detail) == pickle.loads(other.detail))
    except Exception:  # noqa: BLE001 - of any class: one with arrays in it, say
        return False


def _show(node: Described, description: Description) -> str:
    if node.kind == "array":
        name, shape = node.detail
        dtype = dtype_from_name(name)
        text = f"an array of dtype {dtype.name} ({name}) and shape {tuple(shape)}"
        boxes = description.starts_and_counts(node.key)
        if not boxes or not shape:
            return text
        some = ", ".join(f"box {show_box(*box)}" for box in boxes[:4])
        more = f" and {len(boxes) - 4} more" if len(boxes) > 4 else ""
        return f"{text}, {some}{more},"
    if node.kind == "object":
        try:
            text = repr(pickle.loads(node.detail))
        except Exception as exc:  # noqa: BLE001 - of any class
            text = f"an object that cannot be shown ({type(exc).__name__}: {exc})"
        return f"{text[:80] + '...' * (len(text) > 80)} ({node.type_name})"
    items = "" if node.detail is None else f" of {node.detail} items"
    return f"a {node.kind}{items}"
