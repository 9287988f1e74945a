"""What each rank holds, and what all ranks hold together. Pure."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from mpisave.arrays import HeldArray, dtype_from_name, dtype_name, held_array
from mpisave.errors import Key, StateDictError, show_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

Kind: TypeAlias = Literal["dict", "list", "tuple", "array", "object"]

# Protocol 3 has no frames: the bytes can be put into any pickle as they are.
OBJECT_PROTOCOL = 3

# They pass through the memory of the coordinator, all at once, beside the cap.
LARGEST_OBJECT_NBYTES = 2**20


class Described(NamedTuple):
    """A node of one rank's state, as it travels to the coordinator."""

    key: Key
    kind: Kind
    # dict: None. list, tuple: number of items. array: name of the dtype, and shape.
    # object: its pickle, without shared references.
    detail: Any
    type_name: str = ""


def describe(
    nodes: Iterable[tuple[Key, str, Any]],
) -> tuple[list[Described], list[HeldArray]]:
    """Tell the arrays of a flattened state from its small objects.

    Returns
    -------
    described : list of Described
        A node each, in the order of `nodes`.
    held : list of HeldArray
        The arrays among them, in the same order.

    Raises
    ------
    StateDictError
        If a dtype cannot be saved, or an object cannot be pickled.
    """
    described = []
    held = []
    for key, kind, value in nodes:
        if kind != "leaf":
            described.append(Described(key, kind, value))  # type: ignore[arg-type]
            continue
        try:
            array = held_array(value)
        except Exception as exc:  # of any library whose arrays these are
            raise StateDictError(f"{show_key(key)}: {exc}") from exc
        if array is not None:
            held.append(dataclasses.replace(array, name=show_key(key)))
            detail: Any = (dtype_name(array.dtype), array.shape)
            described.append(Described(key, "array", detail))
        else:
            name = _type_name(value)
            described.append(Described(key, "object", _dump(key, value), name))
    return described, held


def _type_name(value: object) -> str:
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _dump(key: Key, value: object) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, OBJECT_PROTOCOL)
    # No memo: equal objects give equal bytes, and the bytes fit into another pickle.
    pickler.fast = True
    try:
        pickler.dump(value)
    except Exception as exc:
        raise StateDictError(
            f"{show_key(key)} of type {_type_name(value)} cannot be saved: it is no "
            f"array, and cannot be pickled ({type(exc).__name__}: {exc})"
        ) from exc
    nbytes = buffer.tell()
    if nbytes > LARGEST_OBJECT_NBYTES:
        raise StateDictError(
            f"{show_key(key)} of type {_type_name(value)} has {nbytes} bytes: small "
            f"objects have at most {LARGEST_OBJECT_NBYTES}. Save it as an array: "
            f"numpy.frombuffer(value, numpy.uint8) for bytes."
        )
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of the merged state."""

    key: Key
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    # Who has it, ascending, and the how-manieth array of that rank's state it is.
    holders: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


class MergedNode(NamedTuple):
    """A node of the merged state, a container before what it holds."""

    key: Key
    kind: Kind
    # dict: None. list, tuple: number of items. array: an Entry. object: its pickle.
    detail: Any
    type_name: str = ""


@dataclass(frozen=True, slots=True)
class Merged:
    """The union of what all ranks hold.

    The keys of a dict are in the order in which they first appear, lowest rank first.
    """

    nodes: tuple[MergedNode, ...]
    entries: tuple[Entry, ...] = field(init=False)

    def __post_init__(self) -> None:
        entries = tuple(n.detail for n in self.nodes if n.kind == "array")
        object.__setattr__(self, "entries", entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.nbytes for entry in self.entries)


def merge(descriptions: Sequence[Sequence[Described]]) -> Merged:
    """Return the union of the states that all ranks described, in rank order.

    Raises
    ------
    StateDictError
        If a key stands for different things on different ranks: another kind, dtype,
        shape, number of items, or value of a small object.

    Notes
    -----
    Linear in the number of nodes of all ranks together.
    """
    first: dict[Key, tuple[int, Described]] = {}
    holders: dict[Key, list[tuple[int, int]]] = {}
    for rank, description in enumerate(descriptions):
        ordinal = 0
        for node in description:
            known = first.setdefault(node.key, (rank, node))
            if known[1] is not node and known[1][1:] != node[1:]:
                _check_same(known[0], known[1], rank, node)
            if node.kind == "array":
                holders.setdefault(node.key, []).append((rank, ordinal))
                ordinal += 1
    dtypes: dict[str, np.dtype[Any]] = {}
    nodes = []
    for key, (_, node) in first.items():
        detail = node.detail
        if node.kind == "array":
            name, shape = detail
            if name not in dtypes:
                dtypes[name] = dtype_from_name(name)
            detail = Entry(key, dtypes[name], shape, tuple(holders[key]))
        nodes.append(MergedNode(key, node.kind, detail, node.type_name))
    return Merged(tuple(nodes))


def _check_same(rank: int, node: Described, other_rank: int, other: Described) -> None:
    """Refuse two nodes of one key that differ."""
    if node.kind == other.kind == "object" and _is_same_object(node, other):
        return
    advice = {
        "array": "Save them under different keys, or cast them to one dtype and shape",
        "object": "Small objects are saved once: make them equal on every rank, or "
        "save them under different keys",
    }.get(node.kind, "Save them under different keys")
    raise StateDictError(
        f"{show_key(node.key)} differs between ranks: {_show(node)} on rank {rank}, "
        f"{_show(other)} on rank {other_rank}. {advice}."
    )


def _is_same_object(node: Described, other: Described) -> bool:
    """Return whether objects with different pickles are equal: sets, say."""
    if node.type_name != other.type_name:
        return False
    # Pickles that ranks of this job just made from objects in their own memory.
    return bool(pickle.loads(node.detail) == pickle.loads(other.detail))


def _show(node: Described) -> str:
    if node.kind == "array":
        name, shape = node.detail
        dtype = dtype_from_name(name)
        return f"an array of dtype {dtype.name} ({name}) and shape {tuple(shape)}"
    if node.kind == "object":
        text = repr(pickle.loads(node.detail))
        return f"{text[:80] + '...' * (len(text) > 80)} ({node.type_name})"
    items = "" if node.detail is None else f" of {node.detail} items"
    return f"a {node.kind}{items}"
