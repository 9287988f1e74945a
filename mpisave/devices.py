"""The border to devices: arrays in their memory, and copies that are queued.

What is asked of the library that does it, which is CuPy. A copy between host and device
is queued on a stream of the thread that asks for it, and has been done when what
`fence` returned was called: meanwhile the thread does something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mpisave.cupy_devices import cupy_library, nothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Bytes = npt.NDArray[np.uint8]
Summing = Callable[[Sequence[tuple[Any, int, int]], int], list[int]]


class Lane(Protocol):
    """Pinned memory in two parts: one is filled while a device copies from the other.

    Each is of the bytes that were asked for, and there when it is first needed.
    """

    def take(self, nbytes: int) -> Bytes:
        """Return the start of the other part, when the copy from it is done."""
        ...

    def send(self, array: Any, start: int, nbytes: int) -> None:
        """Queue the copy of this part's first bytes to a contiguous array."""
        ...

    def begun(self) -> None:
        """Say that other copies from this part are queued, by this thread."""
        ...

    def wait(self) -> None:
        """Wait for the copies from both."""
        ...


class DeviceLibrary(Protocol):
    """What mpisave asks of the library that reads and writes device memory.

    An `array` is what `adopt` or `empty` returned; a `buffer` what `buffer` did, or a
    slice of it. Copies are queued, in the order in which a thread asks for them. Memory
    that takes part in one is kept until it was waited for: let each fence be.
    """

    def adopt(self, obj: Any) -> Any:
        """Return `obj` as an array with ``dtype``, ``shape`` and ``flags``; no copy."""
        ...

    def is_writable(self, obj: Any) -> bool:
        """Return whether `obj` says that it may be written to."""
        ...

    def ordinal(self, array: Any) -> int:
        """Return the number of the device of an array, as CUDA counts."""
        ...

    def address(self, array: Any) -> int:
        """Return the address of the first element of an array."""
        ...

    def current(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        """Return what makes the device of `array` the current one meanwhile."""
        ...

    def use(self, array: Any) -> None:
        """Make the device of `array` the current one of this thread, which is new.

        A thread begins on device 0, and would take memory there for nothing.
        """
        ...

    def settle(self, arrays: Iterable[Any]) -> None:
        """Wait for all work on the devices of `arrays`, whoever has queued it."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        """Return a new array on `device`: a number, an array there, or None.

        Raises
        ------
        TypeError
            If there are no arrays of that dtype.
        """
        ...

    def pinned(self, nbytes: int) -> Bytes:
        """Return host memory that the device copies from and to by itself."""
        ...

    def buffer(self, nbytes: int, like: Any) -> Any:
        """Return device memory on the device of array `like`: MPI is given it."""
        ...

    def copy(self, source: Any, target: Any) -> None:
        """Copy all bytes; each is a buffer, or contiguous bytes of the host."""
        ...

    def view(self, array: Any, start: int, stop: int) -> Any | None:
        """Return bytes of a contiguous array as a buffer, if MPI may be given them."""
        ...

    def read(self, array: Any, start: int, target: Any) -> None:
        """Copy bytes from byte `start` of a contiguous array to a buffer or host."""
        ...

    def write(self, array: Any, start: int, source: Bytes) -> None:
        """Copy bytes of the host to a contiguous array, from its byte `start` on."""
        ...

    def read_box(self, array: Any, skip: int, target: Any) -> None:
        """As `read`, of an array that need not be contiguous, in C order."""
        ...

    def write_box(self, array: Any, source: Bytes) -> None:
        """Copy bytes of the host, in C order, to an array of any strides."""
        ...

    def lane(self, array: Any, nbytes: int) -> Lane:
        """Return what brings bytes to the device of an array, for one thread."""
        ...

    def fence(self) -> Callable[[], None]:
        """Return what waits for all that this thread has queued so far."""
        ...

    def summing(self, arrays: Iterable[Any], count: int) -> Summing | None:
        """Return what computes the CRC-32C of blocks of such arrays, by their devices.

        Parameters
        ----------
        arrays : iterable of array
            Contiguous.
        count : int
            How many blocks there are at most.

        Returns
        -------
        callable or None
            Takes runs of bytes, each an array, start and length, and the bytes of a
            block, of which the last of a run may have less; returns the sum of each.
            What was queued is to be done. None where it cannot be: CUDA's compiler is
            missing, or memory.
        """
        ...


def device_library() -> DeviceLibrary:
    """Return the library of device arrays. Tests put a fake in its place.

    Raises
    ------
    ImportError
        If there is none.
    """
    return cupy_library()


def host_memory(
    nbytes: int, library: DeviceLibrary | None, most: int | None = None
) -> Bytes:
    """Return memory for bytes that a device copies, or that none does.

    Parameters
    ----------
    nbytes : int
        How many.
    library : DeviceLibrary or None
        Of the device.
    most : int, optional
        How many they may be, where that varies: pinned memory that was let go is used
        again by whoever wants as much, and never given back to the system.
    """
    if library is None:
        return np.empty(nbytes, np.uint8)
    return library.pinned(max(nbytes, most or 0))[:nbytes]


def pinnable(nbytes: int) -> int:
    """Return how much memory, at most `nbytes`, is pinned as it is asked for.

    CuPy's pool gives the next power of two.
    """
    return 1 << max(nbytes, 1).bit_length() - 1


def fence(library: DeviceLibrary | None) -> Callable[[], None]:
    """Return what waits for the copies that this thread has queued so far."""
    return nothing if library is None else library.fence()


@contextlib.contextmanager
def fenced(library: DeviceLibrary | None) -> Iterator[None]:
    """Wait for the copies that are queued within, also where an error is raised."""
    try:
        yield
    finally:
        fence(library)()
