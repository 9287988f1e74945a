"""The GPU as the measurements see it: CuPy without mpisave, and PyTorch on its memory.

Tests put a stand-in with the same methods in its place.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Bytes = npt.NDArray[np.uint8]


def missing() -> str:
    """Return why there is no GPU to measure on, or nothing. Starts no context."""
    try:
        import cupy
    except ImportError as exc:
        return f"CuPy cannot be imported ({exc})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as exc:  # noqa: BLE001 - of the driver: its text says which
        return str(exc)
    return "" if count else "CUDA shows no device"


class Gpu:
    """One device, and one stream of this process on it.

    Parameters
    ----------
    rank : int
        Ranks share the devices that there are, in turn.
    """

    torch_device = "cuda"

    def __init__(self, rank: int) -> None:
        import cupy

        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._number = rank % self._runtime.getDeviceCount()
        cupy.cuda.Device(self._number).use()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # A pool as the default one, but that it counts what it takes.
        self._taken: list[int] = []
        self._pinned = cupy.cuda.PinnedMemoryPool(self._take)
        cupy.cuda.set_pinned_memory_allocator(self._pinned.malloc)

    def _take(self, nbytes: int) -> Any:
        memory = self._cupy.cuda.PinnedMemory(nbytes)
        self._taken.append(nbytes)
        return self._cupy.cuda.PinnedMemoryPointer(memory, 0)

    @property
    def name(self) -> str:
        """What the device is called."""
        name = self._runtime.getDeviceProperties(self._number)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def version(self) -> str:
        """The version of CuPy."""
        return f"CuPy {self._cupy.__version__}"

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        self._runtime.deviceSynchronize()

    # Memory

    def array(self, host: Any) -> Any:
        """Return a new array of the device with what `host` holds."""
        made = self._cupy.array(host)
        self.synchronize()
        return made

    def asarray(self, host: Any) -> Any:
        """Begin to copy an array of the host to the device as CuPy does."""
        return self._cupy.asarray(host)

    def host(self, array: Any) -> Any:
        """Return a copy of an array in host memory that is not pinned."""
        return self._cupy.asnumpy(array)

    def bytes_of(self, array: Any) -> Any:
        """Return the bytes of a contiguous array of the device, or tensor, in place."""
        return self._cupy.asarray(array).reshape(-1).view(self._cupy.uint8)

    def buffer(self, nbytes: int) -> Any:
        """Return bytes of the device."""
        made = self._cupy.empty(nbytes, self._cupy.uint8)
        self.spoil(made)
        return made

    def pinned(self, nbytes: int) -> Bytes:
        """Return bytes of the host that the device copies by itself."""
        memory = self._cupy.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def spoil(self, array: Any) -> None:
        """Overwrite all bytes of a contiguous array of the device."""
        if array.nbytes:
            array.data.memset(0x5A, array.nbytes)
        self.synchronize()

    def queue(self, target: Any, source: Any) -> Callable[[], None]:
        """Begin to copy bytes, one way or the other; return what waits for it."""
        event = self._cupy.cuda.Event(disable_timing=True)
        self._runtime.memcpyAsync(
            *(_address(target), _address(source), target.size),
            *(self._runtime.memcpyDefault, self._stream.ptr),
        )
        event.record(self._stream)
        wait: Callable[[], None] = event.synchronize
        return wait

    def free(self) -> None:
        """Give back what CuPy and PyTorch keep for later."""
        gc.collect()
        self.synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._pinned.free_all_blocks()
        self._taken.clear()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def used_nbytes(self) -> int:
        """Return what is in use on the device, by whichever process."""
        with self._cupy.cuda.Device(self._number):  # each thread has its own
            free, total = self._runtime.memGetInfo()
        return int(total - free)

    def pinned_nbytes(self) -> int:
        """Return what was pinned since `free`, and is kept."""
        return sum(self._taken)

    # What others do

    def save(self, path: Path, array: Any) -> None:
        """Save one array as CuPy does."""
        self._cupy.save(path, array)

    def load(self, path: Path) -> Any:
        """Load one array as CuPy does."""
        return self._cupy.load(path)

    def tensor(self, array: Any) -> Any:
        """Return a tensor that shares the memory of an array."""
        import torch

        return torch.as_tensor(array, device=f"cuda:{self._number}")


def _address(memory: Any) -> int:
    address: int = (
        memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data.ptr
    )
    return address
