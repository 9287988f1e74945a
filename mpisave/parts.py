"""What the coordinator makes of all descriptions: the part of each rank. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpisave.checksum import blocks_of_parts
from mpisave.errors import show_key
from mpisave.merging import merge
from mpisave.plan import cut
from mpisave.replicas import check_equal, replicated
from mpisave.transport.base import Incoming, Moved, Stream
from mpisave.transport.direct import SMALL_NBYTES
from mpisave.weave import as_pieces, chunks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from mpisave.formats.base import Format, Layout
    from mpisave.merging import Merged
    from mpisave.metadata import Description
    from mpisave.plan import Column, Pieces, Woven
    from mpisave.storage import Target


@dataclass(slots=True)
class Whole:
    """All of one file, for the rank that lays it out and seals it."""

    merged: Merged
    layout: Layout
    pieces: Pieces  # in file order
    extents: Column  # offset of each entry
    woven: list[Woven]
    chunk_nbytes: int
    writer: int | None  # of all chunks; None: their holders in turn
    handed_out: frozenset[int]  # offsets of the skeleton that other ranks write
    replicas: list[Column]  # of each rank, the sets of replicas whose digests it sends

    def incoming(self, target: Target, size: int) -> Incoming:
        """Return what a root receives."""
        entries = self.merged.entries
        names = [show_key(entry.key) for entry in entries]
        of_ranks = self.pieces.by_rank(size)
        return Incoming(
            target,
            [Stream.of(pieces, self.extents) for pieces in of_ranks],
            [[names[e] for e in pieces.entry.tolist()] for pieces in of_ranks],
        )

    def checksums(self, moved: Moved, size: int) -> list[npt.NDArray[np.uint32]]:
        """Return the checksums of the blocks of each entry.

        Raises
        ------
        RuntimeError
            If not every byte was written once.
        """
        tables = [(p.entry, p.within, p.nbytes) for p in self.pieces.by_rank(size)]
        found = chunks(self.woven, self.chunk_nbytes, writer=self.writer)
        values = [moved.of_streams.get(rank, _NOTHING) for rank in range(size)]
        for rank in sorted(moved.of_chunks):
            mine = [chunk for chunk in found if chunk.writer == rank]
            tables.append(as_pieces(self.woven, mine))
            values.append(moved.of_chunks[rank])
        entry, within, nbytes = (np.concatenate(c) for c in zip(*tables, strict=True))
        every = self.merged.nbytes_of_entries()
        return blocks_of_parts(entry, within, nbytes, np.concatenate(values), every)

    def check_replicas(
        self, digests: Sequence[npt.NDArray[np.uint32]], hosts: Sequence[str]
    ) -> None:
        """Refuse replicas whose digests differ."""
        check_equal(self.merged, self.replicas, digests, hosts)


_NOTHING = np.zeros(0, np.uint32)


@dataclass(slots=True)
class FilePart:
    """What one rank has to do for one file."""

    stream: Stream
    totals: Column  # bytes that each rank sends to the root; zero without one
    between: list[bytes | None]  # skeleton before each piece, to be written with it
    woven: list[Woven]
    offsets: list[int]  # of the woven arrays in the file


@dataclass(slots=True)
class Part:
    """What one rank has to do for all files."""

    files: list[FilePart]
    whole: Whole | None  # where this rank seals a file
    replicas: list[int]  # ordinals of arrays whose digests are wanted


def divide(
    descriptions: Sequence[Description],
    format_: Format,
    facts: Mapping[str, str],
    *,
    roots: tuple[int, ...] | None,
    replicas: str,
    chunk_nbytes: int,
) -> list[Part]:
    """Merge, lay out and plan; return the part of each rank.

    Parameters
    ----------
    descriptions : sequence of Description, one a rank
        What all ranks hold.
    format_ : Format
        Of the file.
    facts : mapping of str to str
        What else the file says of itself.
    roots : tuple of int or None
        Who gathers, ascending; None: every rank writes, and rank 0 seals.
    replicas : {"first", "check", "share"}
        Whose bytes are written where several ranks have them.
    chunk_nbytes : int
        Length of a chunk of shards that are exchanged.

    Raises
    ------
    StateDictError
        If the states do not fit together.
    """
    size = len(descriptions)
    merged = merge(descriptions)
    layout = format_.layout(merged, facts)
    extents = np.array([extent.offset for extent in layout.extents], np.int64)
    checked = [(np.zeros(0, np.int64),) * 2] * size
    if replicas == "check":
        checked = replicated(merged, size)
    parts = [Part([], None, ordinals.tolist()) for ordinals, _ in checked]
    for sealer in roots or (0,):
        root = None if roots is None else sealer
        share = roots is None and replicas != "first"
        pieces, woven = cut(merged, root=root, share=share)
        order = np.argsort(extents[pieces.entry] + pieces.within, kind="stable")
        pieces = pieces.take(order)
        offsets = [int(extents[array.entry]) for array in woven]
        between: list[bytes | None] = [None] * len(pieces)
        if roots is None:
            between = _between(pieces, extents, layout)
        totals = np.zeros(size, np.int64)
        if roots is not None:
            totals += np.bincount(
                pieces.rank, weights=pieces.nbytes, minlength=size
            ).astype(np.int64)
            totals[sealer] = 0
        ordered = np.argsort(pieces.rank, kind="stable").tolist()
        done = 0
        for part, mine in zip(parts, pieces.by_rank(size), strict=True):
            before = [between[at] for at in ordered[done : done + len(mine)]]
            done += len(mine)
            stream = Stream.of(mine, extents)
            part.files.append(FilePart(stream, totals, before, woven, offsets))
        parts[sealer].whole = Whole(
            merged,
            layout,
            pieces,
            extents,
            woven,
            chunk_nbytes,
            root,
            _handed_out(pieces, extents, between),
            [sets for _, sets in checked],
        )
    return parts


def _between(pieces: Pieces, extents: Column, layout: Layout) -> list[bytes | None]:
    """Return the skeleton before each small piece that follows another of its rank."""
    offsets = extents[pieces.entry] + pieces.within
    stops = offsets + pieces.nbytes
    small = pieces.nbytes < SMALL_NBYTES
    joins = np.zeros(len(pieces), bool)
    joins[1:] = (pieces.rank[1:] == pieces.rank[:-1]) & small[1:] & small[:-1]
    skeleton = dict(layout.skeleton)
    between: list[bytes | None] = [None] * len(pieces)
    for at in np.flatnonzero(joins).tolist():
        stop, gap = int(stops[at - 1]), int(offsets[at] - stops[at - 1])
        data = skeleton.get(stop, b"") if gap else b""
        if len(data) == gap and gap < SMALL_NBYTES:
            between[at] = data
    return between


def _handed_out(
    pieces: Pieces, extents: Column, between: Sequence[bytes | None]
) -> frozenset[int]:
    offsets = (extents[pieces.entry] + pieces.within).tolist()
    return frozenset(
        offset - len(data)
        for offset, data in zip(offsets, between, strict=True)
        if data
    )
