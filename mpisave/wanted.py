"""What a rank wants of a file: keys, boxes, and where they go. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import HeldArray, held_array, is_writable
from mpisave.errors import (
    ArgumentError,
    FileFormatError,
    Key,
    StateDictError,
    show_key,
)
from mpisave.formats.index import Opaque, Stored
from mpisave.shards import Point, Shard, Shards, boxes_of, lies_within
from mpisave.tree import Node, PerRank, flatten, rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    from mpisave.devices import DeviceLibrary

    # Returns the array of a box: stored, start, shape.
    Make: TypeAlias = Callable[[Stored, Point, Point], npt.NDArray[Any]]


@dataclass(slots=True, eq=False)
class Want:
    """A box of an array in a file, and the memory that it goes to."""

    stored: Stored
    start: Point
    held: HeldArray  # of the box's shape, and the array's dtype


def is_whole(want: Want) -> bool:
    """Return whether an array is wanted whole, where its bytes fit as they are."""
    held = want.held
    return held.is_contiguous and 0 < held.nbytes == want.stored.extent.nbytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where new arrays are made: on the host, or on a device."""

    library: DeviceLibrary | None = None
    device: Any = None  # its number, or an array that lies there; None: the current one

    def empty(self, stored: Stored, shape: Point) -> HeldArray:
        """Return a new array of the dtype of what is stored.

        Raises
        ------
        StateDictError
            If the device knows no such dtype.
        """
        if self.library is None:
            return HeldArray(np.empty(shape, stored.dtype), stored.dtype, shape)
        try:
            array = self.library.empty(shape, stored.dtype, self.device)
        except TypeError as exc:
            raise StateDictError(
                f"{show_key(stored.key)} is of dtype {_full(stored.dtype)}, which the "
                f"device does not know ({exc}): load it to the host, device='cpu'"
            ) from exc
        return HeldArray(array, stored.dtype, shape, self.library)


HOST = Place()


class _Wants:
    """What is to be read, and the arrays that it goes to.

    Attributes
    ----------
    wants : list of Want
        What is to be read.
    """

    def __init__(self, make: Make | None, place: Place | None) -> None:
        self.wants: list[Want] = []
        self._make = make
        self._place = place

    def fresh(
        self, stored: Stored, start: Point, shape: Point, place: Place = HOST
    ) -> Any:
        """Return an array for a box: one to be read, or one that is there already.

        Where the caller wants it, else in `place`.
        """
        if self._make is not None:
            return self._make(stored, start, shape)
        held = (self._place or place).empty(stored, shape)
        self.wants.append(Want(stored, start, held))
        return held.source

    def whole(self, stored: Stored) -> Any:
        """Return an array for all of a stored one."""
        return self.fresh(stored, (0,) * len(stored.shape), stored.shape)

    def subtree(self, nodes: Iterable[Node], depth: int = 0) -> Any:
        """Return the state of nodes, without the first parts of their keys."""
        plain = []
        for node in nodes:
            value = node.value
            if isinstance(value, Stored):
                value = self.whole(value)
            elif isinstance(value, Opaque):
                refuse_opaque(node.key, value)
            plain.append(Node(node.key[depth:], node.kind, value))
        return rebuild(plain)


class All(_Wants):
    """All that there is.

    Parameters
    ----------
    nodes : sequence of Node
        What there is.
    rank : int or None
        Which of the values of a `PerRank` this rank takes; None: a dict of all.
    make : callable or None
        Returns arrays that need not be read.
    place : Place or None
        Where arrays are made; None: on the host.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        rank: int | None,
        make: Make | None,
        place: Place | None = None,
    ) -> None:
        super().__init__(make, place)
        self.wanted = {node.key for node in nodes}
        self.missing: list[Key] = []
        if rank is None:
            self._state = self.subtree(nodes)
            return
        plain: list[Node] = []
        apart = {node.key for node in nodes if node.kind == "per_rank"}
        inside: dict[Key, list[Node]] = {(*key, rank): [] for key in apart}
        for node in nodes:
            key = node.key
            over = next(
                (key[:n] for n in range(len(key) + 1) if key[:n] in apart), None
            )
            if over is None or key == over:
                plain.append(node)
            elif key[: len(over) + 1] == (*over, rank):
                inside[(*over, rank)].append(node)
        values = {
            key[:-1]: PerRank(self.subtree(found, len(key)))
            for key, found in inside.items()
            if found
        }
        kinds = {node.key: node.kind for node in plain}
        self._state = self.subtree(
            Node(node.key, "leaf", values.get(node.key)) if node.key in apart else node
            for node in plain
            # This rank may have given none; the items of a list keep their places.
            if node.key not in apart
            or node.key in values
            or kinds.get(node.key[:-1]) in ("list", "tuple")
        )

    def state(self) -> Any:
        """Return the state, once all wants were read."""
        return self._state


class Match(_Wants):
    """A state of the caller's, laid over what a file holds.

    Parameters
    ----------
    like : nested dict, list or tuple
        What is wanted.
    nodes : sequence of Node
        What there is, or what of it was asked for.
    rank : int
        Which of the values of a `PerRank` this rank takes.
    make : callable or None
        Returns arrays that need not be read.
    in_place : bool
        Whether arrays are read into those of `like`.
    place : Place or None
        Where new arrays are made; None: where those of `like` are.
    asks : callable
        Returns whether a key is asked for: what else of `like` is not among the nodes
        stays as it is.

    Attributes
    ----------
    missing : list of tuple
        Keys of `like` that the file has not.
    wanted : set of tuple
        Keys of the nodes that are in `like`.

    Raises
    ------
    StateDictError
        If dtype, shape or kind do not fit.
    """

    def __init__(
        self,
        like: object,
        nodes: Sequence[Node],
        rank: int,
        make: Make | None,
        *,
        in_place: bool,
        asks: Callable[[Key], bool] = lambda _: True,
        place: Place | None = None,
    ) -> None:
        super().__init__(make, place)
        self._nodes = nodes
        self._in_place = in_place
        self._asks = asks
        self._rank = rank
        self._numbers = {node.key: number for number, node in enumerate(nodes)}
        self.missing: list[Key] = []
        self.wanted: set[Key] = set()
        self._result: list[Node] = []
        # Of PerRanks: what lies in them comes from the file, into these arrays.
        self._inside: dict[Key, Any] = {}
        own: Key | None = None
        every = list(flatten(like, rank))
        apart = {node.key for node in every if node.kind == "per_rank"}
        if in_place and apart:
            self._inside = {
                node.key: node.value
                for node in every
                if any(node.key[:depth] in apart for depth in range(len(node.key)))
            }
        for node in every:
            if own is not None and node.key[: len(own)] == own:
                continue
            number = self._numbers.get(node.key)
            if node.kind == "per_rank":
                own = node.key
                self._per_rank(node.key, like)
            elif node.kind != "leaf":
                self._result.append(node)
                if number is not None:
                    self._container(node, nodes[number])
            elif number is None:
                self._result.append(node)
                if self._asks(node.key):
                    self.missing.append(node.key)
            else:
                self.wanted.add(node.key)
                value = self._leaf(node, nodes[number])
                self._result.append(Node(node.key, "leaf", value))

    def state(self) -> Any:
        """Return the state, once all wants were read."""
        return rebuild(self._result)

    def whole(self, stored: Stored) -> Any:
        """Return an array for all of a stored one: that of `like`, if it fits.

        It may have had another size on the rank that saved it.
        """
        value = self._inside.get(stored.key)
        held = None if value is None else _held(Node(stored.key, "leaf", value))
        if (
            held is None
            or (held.dtype, held.shape) != (stored.dtype, stored.shape)
            or not is_writable(value, held)
        ):
            return super().whole(stored)
        return self._array(stored.key, value, held, (0,) * len(held.shape), stored)

    def _container(self, node: Node, found: Node) -> None:
        self.wanted.add(node.key)
        if node.kind != found.kind:
            raise StateDictError(
                f"{show_key(node.key)} is a {node.kind} in like, and {_show(found)} in "
                f"the file"
            )

    def _per_rank(self, key: Key, like: object) -> None:
        mine = (*key, self._rank)
        found = []
        number = self._numbers.get(key)
        if number is not None and self._nodes[number].kind != "per_rank":
            raise StateDictError(
                f"{show_key(key)} is a PerRank in like, and "
                f"{_show(self._nodes[number])} in the file"
            )
        for node in self._nodes:
            if node.key[: len(key)] == key:
                self.wanted.add(node.key)
                if node.key[: len(mine)] == mine:
                    found.append(node)
        if not found:
            if self._asks(key):
                self.missing.append(key)
            self._result.append(Node(key, "leaf", _at(like, key)))
            return
        value = PerRank(self.subtree(found, len(mine)))
        self._result.append(Node(key, "leaf", value))

    def _leaf(self, node: Node, found: Node) -> Any:
        shards = boxes_of(node.value)
        stored = found.value
        if shards is not None:
            read = [self._shard(node.key, shard, stored) for shard in shards]
            return Shards(*read) if isinstance(node.value, Shards) else read[0]
        held = _held(node)
        if held is None:
            if found.kind != "leaf" or isinstance(stored, Stored):
                raise StateDictError(
                    f"{show_key(node.key)} is {node.value!r:.80} in like, and "
                    f"{_show(found)} in the file"
                )
            if isinstance(stored, Opaque):
                refuse_opaque(node.key, stored)
            return stored
        return self._array(node.key, node.value, held, (0,) * len(held.shape), stored)

    def _shard(self, key: Key, shard: Shard, stored: Any) -> Shard:
        held = _held(Node(key, "leaf", shard.array))
        if held is None:
            raise StateDictError(f"{show_key(key)} is a shard of no array in like")
        if isinstance(stored, Stored) and stored.shape != shard.global_shape:
            raise StateDictError(
                f"{show_key(key)} has the global shape {shard.global_shape} in like, "
                f"and {_show_stored(stored)} is in the file"
            )
        shape, start = held.shape, shard.start
        if not lies_within(shard.global_shape, start, shape):
            raise StateDictError(
                f"{show_key(key)}: a box of shape {shape} that starts at {start} does "
                f"not lie within the global shape {shard.global_shape}"
            )
        array = self._array(key, shard.array, held, start, stored, shard=shard)
        return Shard(array, shard.global_shape, start)

    def _array(
        self,
        key: Key,
        value: Any,
        held: HeldArray,
        start: Point,
        stored: Any,
        *,
        shard: Shard | None = None,
    ) -> Any:
        shape, dtype = held.shape, held.dtype
        if not isinstance(stored, Stored):
            raise StateDictError(
                f"{show_key(key)} is an array in like, and "
                f"{_show(self._nodes[self._numbers[key]])} in the file"
            )
        if stored.dtype != dtype or (shard is None and stored.shape != shape):
            raise StateDictError(
                f"{show_key(key)} is an array of dtype {_full(dtype)} and shape "
                f"{shape} in like, and {_show_stored(stored)} in the file. mpisave "
                f"does not convert: give what is in the file, and convert that."
            )
        if not self._in_place:
            return self.fresh(stored, start, shape, Place(held.library, held.source))
        if not is_writable(value, held):
            raise StateDictError(
                f"{show_key(key)} cannot be filled in place: the array is read-only"
            )
        self.wants.append(Want(stored, start, held))
        return value


def _held(node: Node) -> HeldArray | None:
    """Return an array of `like`, or None for a small object."""
    try:
        return held_array(node.value)
    except Exception as exc:  # of any library whose arrays these are
        raise StateDictError(f"{show_key(node.key)}: {exc}") from exc


def _at(state: Any, key: Key) -> Any:
    for part in key:
        state = state[part]
    return state


def _show_stored(stored: Stored) -> str:
    return f"one of dtype {_full(stored.dtype)} and shape {stored.shape}"


def _full(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else f"{dtype.name} ({dtype.str})"


def _show(node: Node) -> str:
    if isinstance(node.value, Stored):
        return _show_stored(node.value).replace("one", "an array", 1)
    if isinstance(node.value, Opaque):
        return f"an object of type {node.value.type_name}"
    return f"{node.value!r:.80}" if node.kind == "leaf" else f"a {node.kind}"


def refuse_opaque(key: Key, value: Opaque) -> None:
    """Refuse an object that only `pickle.load` can give back."""
    raise FileFormatError(
        f"{show_key(key)} is an object of type {value.type_name}: mpisave runs no "
        f"code of a file. Only if you trust whoever wrote it: allow_pickle=True gives "
        f"it to pickle.load, which executes whatever it says."
    )


def saved_ranks(nodes: Iterable[Node]) -> dict[Key, int]:
    """Return how many ranks saved, for each `PerRank`."""
    return {node.key: node.value for node in nodes if node.kind == "per_rank"}


def rank_of(
    saved: Mapping[Key, int],
    rank: int,
    size: int,
    choose: Callable[[int, int], int] | None,
) -> int:
    """Return which saved rank's values this rank takes.

    Parameters
    ----------
    saved : mapping
        As `saved_ranks` returns it.
    rank, size : int
        Of this rank, and how many there are now.
    choose : callable or None
        Called with `rank` and the number of ranks that saved; None: they are the same.

    Raises
    ------
    ArgumentError
        If their number differs and nobody said what to do.
    """
    counts = {ranks: key for key, ranks in saved.items()}
    if not counts:
        return rank
    most = max(counts)
    if choose is not None:
        chosen = choose(rank, most)
        # NumPy's integers are as good; True and 0.0 are mistakes.
        is_number = type(chosen) is int or isinstance(chosen, np.integer)
        if not is_number or not 0 <= chosen < most:
            raise ArgumentError(
                f"per_rank({rank}, {most}) returned {chosen!r}: it is the rank, of the "
                f"{most} that saved, whose values this one takes"
            )
        return int(chosen)
    if most != size:
        raise ArgumentError(
            f"{show_key(counts[most])} has a value for each of {most} ranks, and there "
            f"are {size} now: say whose values each one takes, such as "
            f"per_rank=lambda rank, saved: rank % saved"
        )
    return rank
