"""What one rank holds, in the form in which the coordinator hears of it. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mpisave.arrays import HeldArray, held_array
from mpisave.dtypes import dtype_name
from mpisave.errors import Key, StateDictError, show_key
from mpisave.shards import boxes_of, is_countable, lies_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpisave.shards import Shard

Kind: TypeAlias = Literal["dict", "per_rank", "list", "tuple", "array", "object"]

# What a key stands for: kind, detail and type name, as in `Described`.
What: TypeAlias = tuple[Kind, Any, str]

# Protocol 3 has no frames: the bytes can be put into any pickle as they are.
OBJECT_PROTOCOL = 3

# They pass through the memory of the coordinator, all at once, beside the cap.
LARGEST_OBJECT_NBYTES = 2**20


class Described(NamedTuple):
    """A node of one rank's state, as it travels to the coordinator."""

    key: Key
    kind: Kind
    # dict: None. list, tuple: number of items. per_rank: number of ranks. array: name
    # of the dtype, and shape; of a shard, that of the global array. object: its pickle,
    # without shared references.
    detail: Any
    type_name: str = ""


def describe(
    nodes: Iterable[tuple[Key, str, Any]],
) -> tuple[list[Described], list[HeldArray], Description]:
    """Tell the arrays of a flattened state from its small objects.

    Returns
    -------
    described : list of Described
        A node each, in the order of `nodes`.
    held : list of HeldArray
        The arrays among them, in the same order, and the boxes of shards.
    description : Description
        The same without the arrays, as it travels.

    Raises
    ------
    StateDictError
        If a dtype cannot be saved, an object cannot be pickled, or a shard does not fit
        its global array.
    """
    described = []
    held: list[HeldArray] = []
    nboxes: list[int] = []
    boxes: list[int] = []
    for key, kind, value in nodes:
        if kind != "leaf":
            described.append(Described(key, kind, value))  # type: ignore[arg-type]
            continue
        shards = boxes_of(value)
        if shards is not None:
            described.append(_describe_shards(key, shards, held, boxes))
            nboxes.append(len(shards))
            continue
        array = _held(key, value)
        if array is not None:
            held.append(array)
            nboxes.append(0)
            detail: Any = (dtype_name(array.dtype), array.shape)
            described.append(Described(key, "array", detail))
        else:
            name = _type_name(value)
            described.append(Described(key, "object", _dump(key, value), name))
    return described, held, Description.pack(described, nboxes, boxes)


def _held(key: Key, value: object) -> HeldArray | None:
    try:
        return held_array(value, show_key(key))
    except Exception as exc:  # of any library whose arrays these are
        raise StateDictError(f"{show_key(key)}: {exc}") from exc


def _describe_shards(
    key: Key, shards: Sequence[Shard], held: list[HeldArray], boxes: list[int]
) -> Described:
    """Add the boxes of one array to `held` and `boxes`."""
    first = shards[0]
    what: set[tuple[str, tuple[int, ...]]] = set()
    for shard in shards:
        array = _held(key, shard.array)
        if array is None:
            raise StateDictError(
                f"{show_key(key)} is a shard of type {_type_name(shard.array)}: a "
                f"shard is made of an array"
            )
        shape, start = shard.global_shape, shard.start
        if not lies_within(shape, start, array.shape):
            raise StateDictError(
                f"{show_key(key)}: an array of shape {array.shape} that starts at "
                f"{start} does not lie within the global shape {shape}"
            )
        if not is_countable(shape, array.dtype.itemsize):
            raise StateDictError(
                f"{show_key(key)}: an array of the global shape {shape} would have "
                f"2**63 bytes or more, or axes too long for any array to have"
            )
        held.append(array)
        boxes += [*start, *array.shape]
        what.add((dtype_name(array.dtype), shape))
    if len(what) > 1:
        raise StateDictError(
            f"{show_key(key)}: boxes of one array differ in dtype or global shape: "
            f"{sorted(what)}"
        )
    return Described(key, "array", (dtype_name(held[-1].dtype), first.global_shape))


@dataclass(frozen=True, slots=True, eq=False)
class Description:
    """What one rank holds, as it travels to the coordinator: in columns.

    Ranks that hold the same keys have the same `structure`, whatever their boxes.
    """

    keys: list[Key]
    what: list[What]  # distinct ones
    which: npt.NDArray[np.int64]  # what each key stands for; shape (keys,)
    nboxes: npt.NDArray[np.int64]  # of each array; 0: this rank has all of it
    boxes: npt.NDArray[np.int64]  # start and count of each box, one after another
    structure: bytes  # digest of all but the boxes
    digest: bytes  # of all

    def with_boxes(self, boxes: npt.NDArray[np.int64]) -> Description:
        """Return what a rank of the same structure holds that has these boxes."""
        return dataclasses.replace(self, boxes=boxes)

    def starts_and_counts(self, key: Key) -> list[tuple[list[int], list[int]]]:
        """Return start and count of each box of an array; none if it is here whole."""
        arrays = [
            (at, self.what[number][1][1])
            for at, number in zip(self.keys, self.which.tolist(), strict=True)
            if self.what[number][0] == "array"
        ]
        first = 0
        for (at, shape), nboxes in zip(arrays, self.nboxes.tolist(), strict=True):
            stop = first + 2 * nboxes * len(shape)
            if at == key:
                points = self.boxes[first:stop].reshape(nboxes, 2, len(shape))
                return [(start, count) for start, count in points.tolist()]
            first = stop
        raise KeyError(key)

    @staticmethod
    def pack(
        described: Sequence[Described], nboxes: Sequence[int], boxes: Sequence[int]
    ) -> Description:
        """Put nodes into columns."""
        numbers: dict[What, int] = {}
        which = [numbers.setdefault(node[1:], len(numbers)) for node in described]
        column, counts, points = (np.array(c, np.int64) for c in (which, nboxes, boxes))
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, OBJECT_PROTOCOL)
        pickler.fast = True  # equal values give equal bytes
        keys = [node.key for node in described]
        pickler.dump((keys, list(numbers)))
        # Known to all ranks alike; no adversary is meant.
        structure = hashlib.blake2b(buffer.getbuffer(), digest_size=16)
        structure.update(column.data)
        structure.update(counts.data)
        digest = structure.copy()
        digest.update(points.data)
        return Description(
            keys,
            list(numbers),
            column,
            counts,
            points,
            structure.digest(),
            digest.digest(),
        )


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
