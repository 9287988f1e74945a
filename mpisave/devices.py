"""The border to CuPy: arrays in device memory, and copies that are queued.

Only this module imports CuPy, and only when a state holds device arrays. A copy between
host and device is queued on a stream of the thread that asks for it, and has been done
when what `fence` returned was called: meanwhile the thread does something else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mpisave import device_checksum

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_log = logging.getLogger(__name__)

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

    def span(self, array: Any) -> tuple[int, int]:
        """Return the first address of an array, and the one after its last byte."""
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


class _Queues(threading.local):
    """The streams of one thread, by device; those with copies behind the last fence."""

    def __init__(self) -> None:
        self.streams: dict[int, Any] = {}
        self.dirty: set[int] = set()
        self.kept: list[Any] = []  # what these copies are from and to
        # To make an event takes longer than to queue a copy, and keeps others waiting.
        self.events: dict[int, list[Any]] = {}


class _CuPy:
    """Device arrays through CuPy, whichever library made them."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as exc:
            raise ImportError(
                f"arrays on a device are copied by CuPy, and that cannot be imported "
                f"({exc}): pip install 'mpisave[cuda12]' or 'mpisave[cuda13]', "
                f"whichever CUDA the machine has"
            ) from exc
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._queues = _Queues()

    def adopt(self, obj: Any) -> Any:
        cupy = self._cupy
        if isinstance(obj, cupy.ndarray):
            return obj
        interface = getattr(obj, "__cuda_array_interface__", None)
        # Dtypes of ml_dtypes are raw bytes there; DLPack knows bfloat16.
        if interface is not None and np.dtype(interface["typestr"]).kind != "V":
            return cupy.asarray(obj)
        if hasattr(obj, "__dlpack__"):
            return cupy.from_dlpack(obj)
        return cupy.asarray(obj)

    def is_writable(self, obj: Any) -> bool:
        if isinstance(obj, self._cupy.ndarray):
            return True
        # DLPack alone may be all that arrays have which nobody may change.
        interface = getattr(obj, "__cuda_array_interface__", None)
        return interface is not None and not interface["data"][1]

    def ordinal(self, array: Any) -> int:
        number: int = array.data.device_id
        return number

    def span(self, array: Any) -> tuple[int, int]:
        return span(array.data.ptr, array)

    def current(self, array: Any) -> contextlib.AbstractContextManager[Any]:
        return self._device(array.data.device_id)

    def use(self, array: Any) -> None:
        self._runtime.setDevice(array.device.id)

    def settle(self, arrays: Iterable[Any]) -> None:
        for number in {array.device.id for array in arrays}:
            with self._device(number):
                self._runtime.deviceSynchronize()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Any) -> Any:
        if not dtype.isnative:
            raise TypeError("devices have no swapped byte order")
        number = device.device.id if hasattr(device, "device") else device
        with self._device(number):
            try:
                return self._cupy.empty(shape, dtype)
            except ValueError as exc:  # what CuPy says to a dtype that it has not
                raise TypeError(str(exc)) from exc

    def pinned(self, nbytes: int) -> Bytes:
        # For all devices. Of CuPy's pool: it is used again, since pinning is slow.
        memory = self._cupy.cuda.alloc_pinned_memory(max(1, nbytes))
        return np.frombuffer(memory, np.uint8, max(1, nbytes))[:nbytes]

    def buffer(self, nbytes: int, like: Any) -> Any:
        with self._device(like.device.id):
            made = self._cupy.empty(nbytes, np.uint8)
            # The pool may give memory that work of other streams is not done with.
            self._runtime.deviceSynchronize()
        return made

    def copy(self, source: Any, target: Any) -> None:
        on_device = source if isinstance(source, self._cupy.ndarray) else target
        self._queues.kept += (source, target)
        self._queue(_address(target), _address(source), target.size, on_device)

    def view(self, array: Any, start: int, stop: int) -> Any | None:
        kind = self._runtime.pointerGetAttributes(array.data.ptr).type
        if kind != self._runtime.memoryTypeDevice:  # managed: not every MPI knows it
            return None
        return array.reshape(-1).view(self._cupy.uint8)[start:stop]

    def read(self, array: Any, start: int, target: Any) -> None:
        self._queues.kept.append(target)
        self._queue(_address(target), array.data.ptr + start, target.size, array)

    def write(self, array: Any, start: int, source: Bytes) -> None:
        self._queues.kept.append(source)
        self._queue(array.data.ptr + start, _address(source), source.size, array)

    def read_box(self, array: Any, skip: int, target: Any) -> None:
        with self._stream(array):
            # Of the pool of this stream: it is not given away before the copy is done.
            packed = self._cupy.ascontiguousarray(array)
            self._queues.kept.append(target)
            self._queue(_address(target), packed.data.ptr + skip, target.size, array)

    def write_box(self, array: Any, source: Bytes) -> None:
        with self._stream(array):
            packed = self._cupy.empty(array.shape, array.dtype)
            self._queues.kept.append(source)
            self._queue(packed.data.ptr, _address(source), source.size, array)
            array[...] = packed

    def lane(self, array: Any, nbytes: int) -> Lane:
        return _CuPyLane(self, array.data.device_id, nbytes)

    def fence(self) -> Callable[[], None]:
        queues = self._queues
        if not queues.dirty:
            return _nothing
        used, kept = [], queues.kept
        for number in queues.dirty:
            free = queues.events.setdefault(number, [])
            event = free.pop() if free else self.event(number)
            event.record(queues.streams[number])
            used.append((event, free))
        queues.dirty.clear()
        queues.kept = []

        def wait() -> None:
            for event, _ in tuple(used):
                event.synchronize()
            with contextlib.suppress(IndexError):  # another thread waits for it too
                while True:
                    event, free = used.pop()
                    free.append(event)
            kept.clear()

        return wait

    def event(self, number: int) -> Any:
        """Return a new event of a device."""
        with self._device(number):
            return self._cupy.cuda.Event(disable_timing=True)

    def summing(self, arrays: Iterable[Any], count: int) -> Summing | None:
        numbers = {array.data.device_id for array in arrays}
        try:
            return device_checksum.Summing(self._cupy, numbers, count)
        except Exception:  # noqa: BLE001 - of CuPy, CUDA's compiler, or the driver
            _log.info("the host computes checksums, the device cannot", exc_info=True)
            return None

    @property
    def memcpy(self) -> tuple[Callable[[int, int, int, int, int], None], int]:
        """What queues a copy, and the kind of one of which the addresses tell."""
        return self._runtime.memcpyAsync, self._runtime.memcpyDefault

    def _queue(self, target: int, source: int, nbytes: int, on_device: Any) -> None:
        if nbytes:
            # A copy goes to a stream of any device, whichever is the current one.
            stream = self._stream_of(on_device.data.device_id)
            self._runtime.memcpyAsync(
                target, source, nbytes, self._runtime.memcpyDefault, stream.ptr
            )

    def _stream_of(self, number: int) -> Any:
        """Return this thread's stream on a device, to which a copy is about to go."""
        self._queues.dirty.add(number)
        return self.stream(number)

    def stream(self, number: int) -> Any:
        """Return this thread's stream on a device."""
        queues = self._queues
        stream = queues.streams.get(number)
        if stream is None:
            with self._device(number):
                stream = self._cupy.cuda.Stream(non_blocking=True)
            queues.streams[number] = stream
        return stream

    def _device(self, number: int | None) -> contextlib.AbstractContextManager[Any]:
        """Make a device the current one, if it is not: leaving sets the one before."""
        if number is None or self._runtime.getDevice() == number:
            return contextlib.nullcontext()
        device: contextlib.AbstractContextManager[Any] = self._cupy.cuda.Device(number)
        return device

    @contextlib.contextmanager
    def _stream(self, array: Any) -> Iterator[None]:
        """Make the device of an array, and this thread's stream there, the current."""
        number = array.device.id
        with self._device(number), self._stream_of(number):
            yield


class _CuPyLane:
    """A lane to one device. Many threads share the GIL: there is little in between."""

    def __init__(self, library: _CuPy, number: int, nbytes: int) -> None:
        self._library, self._nbytes = library, nbytes
        self._copy, self._kind = library.memcpy
        self._stream = library.stream(number)
        self._pointer, self._all = self._stream.ptr, self._stream.synchronize
        self._events = [library.event(number) for _ in range(2)]
        self._parts: list[Bytes] = []
        self._at: list[int] = []
        self._waits: list[Callable[[], None]] = [_nothing, _nothing]
        self._turn = 1

    def take(self, nbytes: int) -> Bytes:
        turn = self._turn = 1 - self._turn
        if turn == len(self._parts):
            self._parts.append(self._library.pinned(self._nbytes))
            self._at.append(_address(self._parts[turn]))
        self._waits[turn]()
        self._waits[turn] = _nothing
        return self._parts[turn][:nbytes]

    def send(self, array: Any, start: int, nbytes: int) -> None:
        turn = self._turn
        event = self._events[turn]
        at = array.data.ptr + start
        self._waits[turn] = self._all  # if this is interrupted
        self._copy(at, self._at[turn], nbytes, self._kind, self._pointer)
        event.record(self._stream)
        self._waits[turn] = event.synchronize

    def begun(self) -> None:
        self._waits[self._turn] = self._library.fence()

    def wait(self) -> None:
        first, second = self._waits
        try:
            first()
        finally:
            second()


def span(at: int, array: Any) -> tuple[int, int]:
    """Return the addresses between which the bytes of an array lie.

    Parameters
    ----------
    at : int
        The address of its first element.
    array : array
        Of any strides.
    """
    if not array.nbytes:
        return at, at
    reach = [
        (n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)
    ]
    low = sum(far for far in reach if far < 0)
    high = sum(far for far in reach if far > 0)
    return at + low, at + high + array.dtype.itemsize


def _address(memory: Any) -> int:
    address: int = (
        memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data.ptr
    )
    return address


def _nothing() -> None:
    """Wait for nothing."""


@functools.cache
def _cupy() -> _CuPy:
    return _CuPy()


def device_library() -> DeviceLibrary:
    """Return the library of device arrays. Tests put a fake in its place.

    Raises
    ------
    ImportError
        If there is none.
    """
    return _cupy()


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


def fence(library: DeviceLibrary | None) -> Callable[[], None]:
    """Return what waits for the copies that this thread has queued so far."""
    return _nothing if library is None else library.fence()


@contextlib.contextmanager
def fenced(library: DeviceLibrary | None) -> Iterator[None]:
    """Wait for the copies that are queued within, also where an error is raised."""
    try:
        yield
    finally:
        fence(library)()
