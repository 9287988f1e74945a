"""Device arrays by CuPy, whichever library made them: the one that `devices` asks.

Only this module imports CuPy, and only when a state holds device arrays.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisave.device_checksum import Summing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


class _Streams(dict[int, Any]):
    """The streams of one thread, by device: another has them when it has ended.

    CuPy keeps memory for each stream. What it has for one that is gone, nobody gets.
    """

    def __init__(self, idle: dict[int, list[Any]]) -> None:
        self._idle = idle

    def __del__(self) -> None:
        for number, stream in self.items():
            self._idle.setdefault(number, []).append(stream)


class _Queues(threading.local):
    """The streams of one thread, by device; those with copies behind the last fence."""

    def __init__(self, idle: dict[int, list[Any]]) -> None:
        self.streams = _Streams(idle)
        self.dirty: set[int] = set()
        self.kept: list[Any] = []  # what these copies are from and to
        # To make an event takes longer than to queue a copy, and keeps others waiting.
        self.events: dict[int, list[Any]] = {}


class _CuPy:
    """What `devices.DeviceLibrary` says."""

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
        self._idle: dict[int, list[Any]] = {}
        self._queues = _Queues(self._idle)

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

    def address(self, array: Any) -> int:
        return _address(array)

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

    def lane(self, array: Any, nbytes: int) -> _Lane:
        return _Lane(self, array.data.device_id, nbytes)

    def fence(self) -> Callable[[], None]:
        queues = self._queues
        if not queues.dirty:
            return nothing
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
            return Summing(self._cupy, numbers, count)
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
        stream = self.stream(number)
        self._queues.dirty.add(number)
        return stream

    def stream(self, number: int) -> Any:
        """Return this thread's stream on a device."""
        queues = self._queues
        stream = queues.streams.get(number)
        if stream is None:
            idle = self._idle.setdefault(number, [])
            try:
                stream = idle.pop()
            except IndexError:
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


class _Lane:
    """A lane to one device. Many threads share the GIL: there is little in between."""

    def __init__(self, library: _CuPy, number: int, nbytes: int) -> None:
        self._library, self._nbytes = library, nbytes
        self._copy, self._kind = library.memcpy
        self._stream = library.stream(number)
        self._pointer, self._all = self._stream.ptr, self._stream.synchronize
        self._events = [library.event(number) for _ in range(2)]
        self._parts: list[Bytes] = []
        self._at: list[int] = []
        self._waits: list[Callable[[], None]] = [nothing, nothing]
        self._turn = 1

    def take(self, nbytes: int) -> Bytes:
        turn = self._turn = 1 - self._turn
        if turn == len(self._parts):
            self._parts.append(self._library.pinned(self._nbytes))
            self._at.append(_address(self._parts[turn]))
        self._waits[turn]()
        self._waits[turn] = nothing
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


def _address(memory: Any) -> int:
    address: int = (
        memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data.ptr
    )
    return address


def nothing() -> None:
    """Wait for nothing."""


@functools.cache
def cupy_library() -> _CuPy:
    """Return the library of device arrays.

    Raises
    ------
    ImportError
        If CuPy cannot be imported.
    """
    return _CuPy()
