"""What a save tells of itself. Pure, but for the clock."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Alike on every rank, but for the last two of `seconds`, and `metadata_nbytes`.

    Where each rank saved alone, each reports on its own file.

    Attributes
    ----------
    paths : tuple of str
        The files that were written, in the order of the ranks that wrote them.
    nbytes : int
        Bytes of one file.
    payload_nbytes : int
        Bytes of the arrays in it.
    seconds : dict of str to float
        Wall time of each step on the first rank that wrote. ``"gather"`` (in MPI) and
        ``"write"`` overlap within ``"move"``. ``"publish"`` and ``"total"`` are of
        this rank.
    step_nbytes : dict of str to int
        Bytes that came to that rank by ``"gather"``, and that all ranks together put
        into the file by ``"write"``.
    rounds : int
        Calls of Gatherv, and of Alltoallv for shards in short runs, for one file.
    transport : str
        ``"gather (device)"`` where Gatherv was given memory of devices, ``"gather
        (host)"`` where not, ``"direct (host)"`` where all ranks write, or ``"none"``
        where nothing had to move.
    metadata_nbytes : int
        Bytes of all small messages that this rank sent: what is not payload.
    """

    paths: tuple[str, ...]
    nbytes: int
    payload_nbytes: int
    seconds: dict[str, float]
    step_nbytes: dict[str, int]
    rounds: int
    transport: str
    metadata_nbytes: int = 0

    @property
    def path(self) -> str:
        """The first file that was written."""
        return self.paths[0]

    def __str__(self) -> str:
        total = self.seconds["total"]
        steps = ", ".join(
            f"{name} {seconds:.3f} s"
            for name, seconds in self.seconds.items()
            if name != "total"
        )
        return (
            f"{', '.join(self.paths)}: {self.nbytes} bytes in {total:.3f} s "
            f"({self.nbytes / 1e9 / max(total, 1e-9):.2f} GB/s), transport "
            f"{self.transport}, {self.rounds} rounds ({steps})"
        )


@dataclass(slots=True)
class Clock:
    """Wall time of the steps on this rank."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what runs within."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - began
