"""What a format is: it lays a file out without seeing payload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from mpisave.checksum import crc32c

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

    from mpisave.merging import Merged
    from mpisave.metadata import Described
    from mpisave.plan import Extent

# Payload begins on a multiple of this many bytes: the longest vector load (AVX-512).
ALIGNMENT = 64

# Pieces of skeleton that are closer together than this are written as one.
_JOIN_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class Layout:
    """A file without its payload."""

    # The bytes outside of the extents: offset and bytes, ascending, apart.
    skeleton: tuple[tuple[int, bytes], ...]
    extents: tuple[Extent, ...]  # one an entry, in the order of the entries
    nbytes: int  # of skeleton and payload: where the index begins

    @property
    def skeleton_crc32c(self) -> int:
        """CRC-32C of the skeleton's bytes, one after another."""
        value = 0
        for _, data in self.skeleton:
            value = crc32c(data, value)
        return value

    def runs(
        self, without: Container[int] = (), *, fill: bool = True
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the skeleton in few large runs, to be written before any payload.

        Parameters
        ----------
        without : container of int
            Offsets of what others write.
        fill : bool
            Whether to fill small extents between with zeros. Not where other ranks
            write these: a network file system may send the zeros after the payload.
        """
        join = _JOIN_NBYTES if fill else 0
        start, run = 0, bytearray()
        for offset, data in self.skeleton:
            if offset in without:
                continue
            gap = offset - start - len(run)
            if run and gap > join:
                yield start, bytes(run)
                run.clear()
            if not run:
                start, gap = offset, 0
            run += bytes(gap) + data
        if run:
            yield start, bytes(run)


def gaps(
    extents: Iterable[Extent], nbytes: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where what lies outside of `extents`, up to `nbytes`, begins and ends."""
    table = np.array([(e.offset, e.nbytes) for e in extents], np.int64).reshape(-1, 2)
    table = table[table[:, 1] > 0]  # an empty array lies anywhere
    table = table[np.argsort(table[:, 0], kind="stable")]
    stops = np.maximum.accumulate(table.sum(axis=1))
    begins = np.concatenate([[0], stops]).astype(np.int64)
    ends = np.append(table[:, 0], nbytes)
    return begins[ends > begins], ends[ends > begins]


class Format(Protocol):
    """What a format offers. Pure: no payload, no files."""

    @property
    def name(self) -> str:
        """What the index calls it."""
        ...

    def check(self, described: Iterable[Described]) -> None:
        """Refuse what the format cannot hold.

        Raises
        ------
        StateDictError
            By key and type.
        """
        ...

    def layout(self, merged: Merged, facts: Mapping[str, str]) -> Layout:
        """Return skeleton and extents of `merged`.

        Parameters
        ----------
        merged : Merged
            What the file is to hold.
        facts : mapping of str to str
            What else the file says of itself: version, state type.
        """
        ...
