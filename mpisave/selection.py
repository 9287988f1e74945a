"""Which keys of a file are asked for. Pure."""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING

from mpisave.errors import ArgumentError, show_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpisave.errors import Key
    from mpisave.formats.index import Index
    from mpisave.tree import Node

_GLOB = re.compile(r"[*?[]")


def select(index: Index, asked: Asked | None) -> tuple[Node, ...]:
    """Return the nodes of an index that are asked for, with what holds them.

    Parameters
    ----------
    index : Index
        What the file holds.
    asked : Asked or None
        A str is a glob, for the parts of a key joined by ``/``; a tuple is one key. A
        container is taken with all that it holds. None: everything.

    Raises
    ------
    ArgumentError
        If one of them matches nothing, or takes a part of a list.
    """
    if asked is None:
        return index.nodes
    every = [node.key for node in index.nodes if node.key]
    taken = asked.find(every)
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


class Asked:
    """The keys that are asked for.

    Parameters
    ----------
    keys : str, tuple, or iterable of them
        As `select` has them.

    Raises
    ------
    ArgumentError
        If there can be no such.
    """

    def __init__(self, keys: object) -> None:
        self._patterns = [keys] if isinstance(keys, (str, tuple)) else _listed(keys)
        self._keys: set[Key] = set()
        self._names: set[str] = set()
        self._globs: dict[str, Callable[[str], object]] = {}
        for pattern in self._patterns:
            if isinstance(pattern, tuple):
                try:
                    self._keys.add(pattern)
                except TypeError as exc:
                    raise ArgumentError(f"keys: {pattern!r} is no key: {exc}") from exc
            elif not isinstance(pattern, str):
                raise ArgumentError(f"keys: {pattern!r} is neither a str nor a tuple")
            elif _GLOB.search(pattern):
                self._globs[pattern] = re.compile(fnmatch.translate(pattern)).match
            else:
                self._names.add(pattern)

    def find(self, every: Sequence[Key]) -> set[Key]:
        """Return those of `every` key that are asked for.

        Raises
        ------
        ArgumentError
            If a pattern matches none of them.
        """
        names = ["/".join(map(str, key)) for key in every]
        taken = {key for key in every if key in self._keys}
        found: set[object] = {*taken}
        for key, name in zip(every, names, strict=True):
            if name in self._names:
                taken.add(key)
                found.add(name)
        for pattern, match in self._globs.items():
            matching = [
                key for key, name in zip(every, names, strict=True) if match(name)
            ]
            taken.update(matching)
            if matching:
                found.add(pattern)
        for wanted in self._patterns:
            if wanted not in found:
                close = difflib.get_close_matches(str(wanted), names, n=3)
                hint = f": did you mean {', '.join(close)}?" if close else ""
                raise ArgumentError(
                    f"keys: nothing in the file matches {wanted!r}{hint}"
                )
        return taken

    def has(self, key: Key) -> bool:
        """Return whether a key, or one of a container that it lies in, is asked for."""
        for depth in range(1, len(key) + 1):
            if key[:depth] in self._keys:
                return True
            name = "/".join(map(str, key[:depth]))
            if name in self._names or any(m(name) for m in self._globs.values()):
                return True
        return False


def _listed(keys: object) -> list[object]:
    try:
        return [*keys]  # type: ignore[misc]
    except TypeError as exc:
        raise ArgumentError(f"keys is {keys!r}: {exc}") from exc
