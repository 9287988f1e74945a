"""Memory of the rounds: of a device, or of the host, pinned where a device copies."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from mpisave.arrays import library_of
from mpisave.choosing import DeviceMemory
from mpisave.devices import host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpisave.arrays import Bytes, HeldArray


class Memory:
    """Where a rank puts what it sends and receives.

    Parameters
    ----------
    held : sequence of HeldArray
        The arrays of this rank.
    largest : int
        Bytes that this rank sends to one root in a round, at most.
    by_device : bool
        Whether MPI is given memory of devices.
    """

    def __init__(
        self, held: Sequence[HeldArray], largest: int, *, by_device: bool
    ) -> None:
        self.library = library_of(held)
        self.by_device = by_device
        self._like = next((a.source for a in held if a.library is not None), None)
        self._largest = largest
        self._shared: Bytes | None = None

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
        if self._shared is None:  # for one root after the other
            self._shared = self.host(self._largest)
        return [self._shared]

    def is_near(self, array: HeldArray) -> bool:
        """Return whether an array lies on the device that MPI was tried with."""
        library = array.library
        return library is not None and (
            library.ordinal(array.source) == library.ordinal(self._like)
        )

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Return what makes that device the current one: some MPI goes by it."""
        if self.library is None or not self.by_device:
            return contextlib.nullcontext()
        return self.library.current(self._like)


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
        lambda nbytes: library.buffer(nbytes, like),
        copy,
        lambda: library.current(like),
        library.ordinal(like),
    )
