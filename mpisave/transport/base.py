"""What a transport is: it moves payload of one call to the ranks that write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mpisave.arrays import HeldArray
    from mpisave.plan import Extent
    from mpisave.storage import Target


@dataclass(slots=True)
class Incoming:
    """What a root receives, and what it writes itself."""

    target: Target
    # For each rank, the extents of its stream, in the order in which it sends them,
    # and the keys of their arrays, for errors.
    extents: list[list[Extent]]
    names: list[list[str]]
    own: list[tuple[HeldArray, Extent]]


@dataclass(slots=True)
class Route:
    """All that moves to one root, as one rank sees it."""

    root: int
    totals: npt.NDArray[np.int64]  # bytes of each rank's stream, shape (size,)
    outgoing: list[HeldArray]  # this rank's stream; empty on the root
    incoming: Incoming | None  # on the root only


@dataclass(slots=True)
class Moved:
    """What a transport did, on a root; elsewhere nothing is told."""

    # CRC-32C of each extent, by rank and place in its stream.
    checksums: list[list[int]] = field(default_factory=list)
    rounds: int = 0
    nbytes: int = 0  # that arrived here through MPI
    waited_s: float = 0.0  # in Gatherv
    written_s: float = 0.0  # in writing payload
