"""Which keys of a file are asked for. Pure."""

from __future__ import annotations

import difflib
import fnmatch
from typing import TYPE_CHECKING

from mpisave.errors import ArgumentError, show_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.errors import Key
    from mpisave.formats.index import Index
    from mpisave.tree import Node


def select(index: Index, keys: object) -> tuple[Node, ...]:
    """Return the nodes of an index that are asked for, with what holds them.

    Parameters
    ----------
    index : Index
        What the file holds.
    keys : str, tuple, iterable of them, or None
        A str is a glob, for the parts of a key joined by ``/``; a tuple is one key. A
        container is taken with all that it holds. None: everything.

    Raises
    ------
    ArgumentError
        If one of them is no key, matches nothing, or takes a part of a list.
    """
    if keys is None:
        return index.nodes
    asked = listed(keys)
    every = [node.key for node in index.nodes if node.key]
    taken: set[Key] = set()
    for pattern in asked:
        found = _matching(every, pattern)
        if not found:
            names = ["/".join(map(str, key)) for key in every]
            close = difflib.get_close_matches(str(pattern), names, n=3)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise ArgumentError(f"keys: nothing in the file matches {pattern!r}{hint}")
        taken.update(found)
    above = {key[:depth] for key in taken for depth in range(len(key))} | {()}
    below: set[Key] = set()
    nodes = []
    kinds = {node.key: node.kind for node in index.nodes}
    for node in index.nodes:
        if node.key in taken or node.key[:-1] in below:
            below.add(node.key)
        if node.key in below or node.key in above:
            nodes.append(node)
            continue
        kind = kinds[node.key[:-1]]
        if node.key[:-1] in above and kind in ("list", "tuple", "per_rank"):
            raise ArgumentError(
                f"keys: {show_key(node.key[:-1])} is a {kind} of which only a part was "
                f"asked for: ask for all of it"
            )
    return tuple(nodes)


def listed(keys: object) -> list[object]:
    """Return each of the keys that are asked for.

    Raises
    ------
    ArgumentError
        If there can be no such.
    """
    if isinstance(keys, (str, tuple)):
        return [keys]
    try:
        return [*keys]  # type: ignore[misc]
    except TypeError as exc:
        raise ArgumentError(f"keys is {keys!r}: {exc}") from exc


def is_asked(key: Key, asked: Sequence[object]) -> bool:
    """Return whether a key, or one of a container that it lies in, is asked for."""
    above = [key[:depth] for depth in range(1, len(key) + 1)]
    return any(_matching(above, pattern) for pattern in asked)


def _matching(every: Sequence[Key], pattern: object) -> list[Key]:
    if isinstance(pattern, tuple):
        return [key for key in every if key == pattern]
    if not isinstance(pattern, str):
        raise ArgumentError(f"keys: {pattern!r} is neither a str nor a tuple")
    return [
        key for key in every if fnmatch.fnmatchcase("/".join(map(str, key)), pattern)
    ]
