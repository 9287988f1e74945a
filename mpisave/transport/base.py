"""What transports share: they move payload of one call to the ranks that write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import HeldArray
    from mpisave.plan import Column, Pieces
    from mpisave.storage import Target

Sums = npt.NDArray[np.uint32]


@dataclass(slots=True)
class Stream:
    """The pieces that one rank supplies to one file, in file order."""

    ordinals: list[int]
    starts: list[int]  # bytes from the start of the array
    within: list[int]  # bytes from the start of the entry
    nbytes: list[int]
    offsets: list[int]  # bytes from the start of the file

    @staticmethod
    def of(pieces: Pieces, extents: Column) -> Stream:
        """Return the stream of one rank's pieces.

        Parameters
        ----------
        pieces : Pieces
            In the order of the file.
        extents : ndarray of int64, shape (entries,)
            Offset of the extent of each entry.
        """
        return Stream(
            pieces.ordinal.tolist(),
            pieces.start.tolist(),
            pieces.within.tolist(),
            pieces.nbytes.tolist(),
            (extents[pieces.entry] + pieces.within).tolist(),
        )

    def arrays(self, held: Sequence[HeldArray]) -> list[HeldArray]:
        """Return the array of each piece."""
        return [held[ordinal] for ordinal in self.ordinals]


@dataclass(slots=True)
class Incoming:
    """What a root receives, and what it writes itself."""

    target: Target
    streams: list[Stream]  # of each rank, in the order in which it sends them
    names: list[list[str]]  # the keys of their arrays, for errors


@dataclass(slots=True)
class Route:
    """All that moves to one root, as one rank sees it."""

    root: int
    totals: Column  # bytes of each rank's stream, shape (size,); the root's is zero
    stream: Stream  # this rank's; on the root what it writes itself
    incoming: Incoming | None  # on the root only


@dataclass(slots=True)
class Moved:
    """What a transport did on this rank."""

    # CRC-32C of blocks, see checksum.BlockSums, by the rank that computed them: of the
    # pieces of its stream, and of the chunks that it put together.
    of_streams: dict[int, Sums] = field(default_factory=dict)
    of_chunks: dict[int, Sums] = field(default_factory=dict)
    rounds: int = 0
    by_device: int = 0  # of these, with memory of a device
    nbytes: int = 0  # that arrived here through MPI
    waited_s: float = 0.0  # in MPI
    written_s: float = 0.0  # in writing payload
