"""Memory of the rounds: of a device, or of the host, pinned where a device copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.arrays import library_of
from mpisave.choosing import DeviceMemory
from mpisave.devices import host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import Bytes, HeldArray


class Memory:
    """Where a rank puts what it sends and receives."""

    def __init__(self, held: Sequence[HeldArray], *, by_device: bool) -> None:
        self.library = library_of(held)
        self.by_device = by_device
        self._like = next((a.source for a in held if a.library is not None), None)
        self._packed: Bytes = np.zeros(0, np.uint8)

    @property
    def is_device(self) -> bool:
        """Whether MPI is given memory of this rank's device."""
        return self.by_device and self.library is not None

    def host(self, nbytes: int) -> Bytes:
        """Return host memory that is copied to or from."""
        return host_memory(nbytes, self.library)

    def for_mpi(self, nbytes: int) -> Any:
        """Return memory that MPI is given."""
        if self.library is not None and self.by_device:
            return self.library.buffer(nbytes, self._like)
        return self.host(nbytes)

    def packed(self, nbytes: int) -> list[Any]:
        """Return what a sender fills: from a device, while another one travels."""
        if self.library is not None:
            return [self.for_mpi(nbytes) for _ in range(2)]
        if self._packed.size < nbytes:
            self._packed = self.host(nbytes)
        return [self._packed]  # for one root after the other


def memory_of(held: Sequence[HeldArray]) -> DeviceMemory | None:
    """Return memory of the device on which arrays lie, to try what MPI does with it."""
    found = next(((a.source, a.library) for a in held if a.library is not None), None)
    if found is None:
        return None
    like, library = found

    def copy(source: Any, target: Any) -> None:
        library.copy(source, target)
        library.fence()()

    return DeviceMemory(
        lambda nbytes: library.buffer(nbytes, like), copy, library.ordinal(like)
    )
