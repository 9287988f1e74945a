"""Nested state to a flat table of nodes, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from mpisave.errors import Key, StateDictError, show_key

# "per_rank": a dict of what each rank gave, by rank.
Kind: TypeAlias = Literal["dict", "per_rank", "list", "tuple", "leaf"]

# Deeper states are taken for a mistake: a container that holds itself by a proxy.
MAX_DEPTH = 64


class Node(NamedTuple):
    """A container, or a leaf, of a nested state."""

    key: Key  # the way to it from the top: dict keys and list indices
    kind: Kind
    # Of a leaf; the number of items of a list or tuple, of ranks of a per_rank; None.
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class PerRank:
    """A value that each rank has of its own: random state, data position.

    Saved as a dict of the ranks' values, by rank; loaded, each rank has its own.

    Parameters
    ----------
    value : whatever a state may hold
        This rank's value.
    """

    value: Any


def flatten(state: object, rank: int = 0, size: int = 1) -> list[Node]:
    """Return the nodes of `state`, a container before what it holds.

    Mappings count as dicts, subclasses of list and tuple as what they derive from, and
    `PerRank` as a dict in which `rank` has its value.

    Raises
    ------
    StateDictError
        If a key is neither str nor int, or a container holds itself.
    """
    nodes: list[Node] = []
    _walk(nodes, state, (), (), (rank, size))
    return nodes


def _walk(
    nodes: list[Node],
    value: Any,
    key: Key,
    above: tuple[int, ...],
    rank: tuple[int, int] | None,
) -> None:
    """Append the node of a value, and those of what it holds."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        nodes.append(Node(key, "dict", None))
        items = value.items()
    elif isinstance(value, (list, tuple)):
        kind: Kind = "list" if isinstance(value, list) else "tuple"
        nodes.append(Node(key, kind, len(value)))
        items = enumerate(value)
    elif isinstance(value, PerRank):
        if rank is None:
            raise StateDictError(f"{show_key(key)} is a PerRank within a PerRank")
        nodes.append(Node(key, "per_rank", rank[1]))
        items, rank = [(rank[0], value.value)], None
    else:
        nodes.append(Node(key, "leaf", value))
        return
    if id(value) in above or len(above) >= MAX_DEPTH:
        raise StateDictError(
            f"{show_key(key[:4])} is nested deeper than {MAX_DEPTH} levels, or holds "
            f"itself"
        )
    above = (*above, id(value))
    for name, item in items:
        if type(name) not in (str, int):
            raise StateDictError(
                f"{show_key(key)} has the key {name!r} of type {type(name).__name__}: "
                f"keys are str or int"
            )
        if isinstance(name, str) and not _is_text(name):
            raise StateDictError(
                f"{show_key(key)} has the key {name!a}: it is no valid Unicode"
            )
        _walk(nodes, item, (*key, name), above, rank)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def rebuild(nodes: Iterable[Node]) -> Any:
    """Return the nested state of `nodes`: the inverse of `flatten`.

    A dict has its keys in the order in which they come in `nodes`, wherever these
    stand: a container only has to come before what it holds.
    """
    built: dict[Key, Any] = {}
    tuples = []
    for key, kind, value in nodes:
        item: Any = value if kind == "leaf" else []
        if kind in ("dict", "per_rank"):
            item = {}
        built[key] = item
        if kind == "tuple":
            tuples.append(key)
        if key:
            parent = built[key[:-1]]
            if isinstance(parent, dict):
                parent[key[-1]] = item
            else:
                parent.append(item)
    # Inner ones first: a tuple cannot be changed once it is made.
    for key in reversed(tuples):
        item = tuple(built[key])
        built[key] = item
        if key:
            built[key[:-1]][key[-1]] = item
    return built[()]
