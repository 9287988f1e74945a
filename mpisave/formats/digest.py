"""Digests of arrays and of whole states, whatever wrote them, and in which format.

docs/formats.md says what is hashed, fit for a second implementation.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mpisave.checksum import BLOCK_NBYTES, combine
from mpisave.dtypes import dtype_name
from mpisave.formats.index import Opaque, Stored
from mpisave.formats.objects import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpisave.errors import Key
    from mpisave.tree import Node


def array_crc32c(stored: Stored) -> int:
    """Return the CRC-32C of all bytes of an array, from those of its blocks."""
    value, left = 0, stored.extent.nbytes
    for block in stored.sums:
        nbytes = min(left, BLOCK_NBYTES)
        value = combine(value, block, nbytes)
        left -= nbytes
    return value


def state_digest(nodes: Iterable[Node], digests: dict[Key, int]) -> str:
    """Return the digest of a state: 64 hexadecimal digits.

    Parameters
    ----------
    nodes : iterable of Node
        Those of an index, in any order.
    digests : dict of key to int
        The CRC-32C of each array.
    """
    whole = hashlib.sha256()
    # Dicts are equal whatever the order of their keys. Nodes of lists have theirs.
    for node in sorted(nodes, key=lambda node: _rank_of(node.key)):
        line = json.dumps(_described(node, digests), separators=(",", ":"))
        whole.update(line.encode() + b"\n")
    return whole.hexdigest()


def _rank_of(key: Key) -> tuple[tuple[bool, str | int], ...]:
    """Return what keys are ordered by: ints before strings, which do not compare."""
    return tuple((isinstance(part, str), part) for part in key)


def _described(node: Node, digests: dict[Key, int]) -> list[Any]:
    key, kind, value = node
    if isinstance(value, Stored):
        what = [dtype_name(value.dtype), list(value.shape), digests[key]]
        return [key, "array", *what]
    if isinstance(value, Opaque):
        return [key, "opaque", value.type_name]
    if kind == "leaf":
        return [key, "object", to_json(value)]
    return [key, kind, value]
