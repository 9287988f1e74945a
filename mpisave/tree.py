"""Nested state to a flat table of nodes, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from mpisave.errors import Key, StateDictError, show_key

Kind: TypeAlias = Literal["dict", "list", "tuple", "leaf"]

# Deeper states are taken for a mistake: a container that holds itself by a proxy.
MAX_DEPTH = 64


class Node(NamedTuple):
    """A container, or a leaf, of a nested state."""

    key: Key  # the way to it from the top: dict keys and list indices
    kind: Kind
    value: Any  # of a leaf; the number of items of a list or tuple; else None


def flatten(state: object) -> list[Node]:
    """Return the nodes of `state`, a container before what it holds.

    Mappings count as dicts, subclasses of list and tuple as what they derive from.

    Raises
    ------
    StateDictError
        If a key is neither str nor int, or a container holds itself.
    """
    return list(_walk(state, (), ()))


def _walk(value: Any, key: Key, above: tuple[int, ...]) -> Iterator[Node]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        yield Node(key, "dict", None)
        items = value.items()
    elif isinstance(value, (list, tuple)):
        yield Node(key, "list" if isinstance(value, list) else "tuple", len(value))
        items = enumerate(value)
    else:
        yield Node(key, "leaf", value)
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
        yield from _walk(item, (*key, name), above)


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
        item: Any = {} if kind == "dict" else value if kind == "leaf" else []
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
