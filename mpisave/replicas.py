"""Arrays that several ranks hold: whether all of them have the same bytes. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpisave.checksum import crc32c
from mpisave.errors import StateDictError, naming, show_key, show_ranks
from mpisave.shards import show_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mpisave.arrays import HeldArray
    from mpisave.merging import Merged
    from mpisave.plan import Column

_STAGED_NBYTES = 2**20

# As many ranks are named with their hosts.
_FEW = 4


def replicated(merged: Merged, size: int) -> list[tuple[Column, Column]]:
    """Return, for each rank, what it holds that others hold as well.

    Parameters
    ----------
    merged : Merged
        What all ranks hold.
    size : int
        Number of ranks.

    Returns
    -------
    list of (ordinals, sets), length size
        Which of its arrays, and the number of the set of replicas that each is in:
        that of the entry, or of a box behind all entries.
    """
    entries = len(merged.nbytes_of_entries())
    holders = np.zeros(entries, np.int64)
    for holding in merged.holdings:
        holders[holding.entries] += len(holding.ranks)
    empty = np.zeros(0, np.int64)
    parts: list[list[tuple[Column, Column]]] = [[(empty, empty)] for _ in range(size)]
    for holding in merged.holdings:
        many = holders[holding.entries] > 1
        mine = holding.ordinals[many], holding.entries[many]
        for rank in holding.ranks.tolist():
            parts[rank].append(mine)
    base = entries
    for boxes in merged.sharded.values():
        many = np.bincount(boxes.box)[boxes.box] > 1
        for rank in np.unique(boxes.ranks[many]).tolist():
            mine = many & (boxes.ranks == rank)
            parts[rank].append((boxes.ordinals[mine], base + boxes.box[mine]))
        base += int(boxes.box.max()) + 1
    return [
        (np.concatenate([p[0] for p in rank]), np.concatenate([p[1] for p in rank]))
        for rank in parts
    ]


def digests_of(
    held: Sequence[HeldArray], ordinals: Sequence[int]
) -> npt.NDArray[np.uint32]:
    """Return the CRC-32C of some arrays of this rank."""
    values = []
    for ordinal in ordinals:
        array, value = held[ordinal], 0
        with naming(array.name):
            for block in array.blocks(0, array.nbytes, _STAGED_NBYTES, _STAGED_NBYTES):
                value = crc32c(block, value)
        values.append(value)
    return np.array(values, np.uint32)


def check_equal(
    merged: Merged,
    sets: Sequence[Column],
    digests: Sequence[npt.NDArray[np.uint32]],
    hosts: Sequence[str],
) -> None:
    """Refuse replicas that differ.

    Parameters
    ----------
    merged : Merged
        What all ranks hold.
    sets, digests : sequence of ndarray, one a rank
        As `replicated` returns them, and the CRC-32C of each of these arrays.
    hosts : sequence of str, one a rank
        Named with ranks that are few.

    Raises
    ------
    StateDictError
        With the key, and which ranks have which bytes.
    """
    every = np.concatenate(list(sets)) if sets else np.zeros(0, np.int64)
    if not len(every):
        return
    values = np.concatenate(list(digests))
    ranks = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    first = np.full(int(every.max()) + 1, -1, np.int64)
    first[every[::-1]] = values[::-1]
    bad = np.unique(every[first[every] != values])
    if not len(bad):
        return
    lines = []
    for number in bad[:8].tolist():
        mine = every == number
        by_value: dict[int, list[int]] = {}
        for rank, value in zip(
            ranks[mine].tolist(), values[mine].tolist(), strict=True
        ):
            by_value.setdefault(value, []).append(rank)
        what = "; ".join(
            f"CRC-32C {value:#010x} on {_where(where, hosts)}"
            for value, where in by_value.items()
        )
        lines.append(f"\n  {_name(merged, number)}: {what}")
    more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
    raise StateDictError(
        f"{len(bad)} replica(s) differ between ranks: {''.join(lines)}{more}\n"
        f"Nothing was saved. Ranks that should hold the same values do not: look for "
        f"a missing broadcast, or bad memory; or save with replicas='first'."
    )


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks, if they are few with their hosts: it may be these that err."""
    found = sorted(set(ranks))
    if len(found) > _FEW:
        return show_ranks(found)
    return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in found)


def _name(merged: Merged, number: int) -> str:
    """Return the name of a set of replicas."""
    entries = merged.entries
    if number < len(entries):
        return show_key(entries[number].key)
    number -= len(entries)
    for entry, boxes in merged.sharded.items():
        count = int(boxes.box.max()) + 1
        if number < count:
            at = int(np.flatnonzero(boxes.box == number)[0])
            box = show_box(boxes.starts[at].tolist(), boxes.counts[at].tolist())
            return f"{show_key(entries[entry].key)}{box}"
        number -= count
    raise IndexError(number)
