"""What an array is, and how its bytes are had, wherever it lies."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisave.devices import (
    DeviceLibrary,
    device_library,
    fence,
    host_memory,
    pinnable,
)
from mpisave.dtypes import dtype_from_name, savable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Bytes = npt.NDArray[np.uint8]

# DLPack's codes of memory that the CPU reads (dlpack.h): its own, and pinned.
_DLPACK_CPU = (1, 3)
# Its codes of memory of CUDA: of a device, and managed.
_DLPACK_CUDA = (2, 13)
# Dtypes of torch that NumPy does not take by DLPack, and integers as wide.
_TORCH_BITS = {
    "torch.bfloat16": "int16",
    "torch.float8_e4m3fn": "int8",
    "torch.float8_e5m2": "int8",
}


@dataclass(slots=True)
class HeldArray:
    """An array of the caller's, and how its bytes are had or filled.

    The bytes of an array are those of its elements in C order, in its own byte order.
    """

    source: Any  # NumPy array, or array of the library
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    library: DeviceLibrary | None = None  # where it lies on a device
    name: str = ""  # its key, for errors

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the bytes lie in memory as they are counted."""
        contiguous: bool = self.source.flags.c_contiguous
        return contiguous

    @property
    def span(self) -> tuple[int, int]:
        """The lowest address of the array, and the one after its last byte."""
        array, library = self.source, self.library
        at: int = array.ctypes.data if library is None else library.address(array)
        if not self.nbytes:
            return at, at
        strides: tuple[int, ...] = array.strides
        reach = [(n - 1) * far for n, far in zip(self.shape, strides, strict=True)]
        low, high = (sum(f for f in reach if f * sign > 0) for sign in (-1, 1))
        return at + low, at + high + self.dtype.itemsize

    def view(self, start: int, stop: int) -> Bytes | None:
        """Return bytes `start` to `stop` without a copy, or None if that cannot be."""
        if self.library is not None or not self.is_contiguous:
            return None
        flat: Bytes = self.source.reshape(-1).view(np.uint8)
        return flat[start:stop]

    def buffer(self, start: int, stop: int) -> Any | None:
        """Return bytes `start` to `stop` of a device without a copy, or None."""
        if self.library is None or not self.is_contiguous:
            return None
        return self.library.view(self.source, start, stop)

    def stage(self, start: int, out: Any) -> None:
        """Copy ``out.size`` bytes from byte `start` to `out`, of the host or a device.

        What a device takes part in is queued: see `devices`.
        """
        view = self.view(start, start + out.size)
        if view is not None:
            _put(view, out)
            return
        if self.library is not None and self.is_contiguous:
            self.library.read(self.source, start, out)
            return
        # A small cap cuts through elements: these are taken alone, so that no more is
        # packed on the way than is copied.
        n, end = self.dtype.itemsize, start + out.size
        edges = {start, min(-(-start // n) * n, end), max(end // n * n, start), end}
        at = start
        for first, stop in itertools.pairwise(sorted(edges)):
            number = first // n
            for part, count in _runs(self.source, number, -(-stop // n) - number):
                skip = at % n
                nbytes = min(count * n - skip, stop - at)
                done = at - start
                self._stage_part(part, skip, out[done : done + nbytes])
                at += nbytes

    def stage_box(self, where: tuple[slice, ...], out: Bytes) -> None:
        """Copy the elements ``[where]``, in C order, to `out`, a host buffer."""
        self._stage_part(self.source[(..., *where)], 0, out)

    def _stage_part(self, part: Any, skip: int, out: Any) -> None:
        if self.library is not None:
            self.library.read_box(part, skip, out)
        elif isinstance(out, np.ndarray) and out.size == part.nbytes:
            np.copyto(out.view(self.dtype).reshape(part.shape), part)
        else:
            packed = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            _put(packed[skip : skip + out.size], out)

    def fill(self, start: int, data: Bytes) -> None:
        """Copy `data` to where byte `start` is, and on: queued, if on a device.

        Only where the array is contiguous.
        """
        view = self.view(start, start + data.size)
        if view is not None:
            view[:] = data
        elif self.library is not None:
            self.library.write(self.source, start, data)

    def fill_box(self, where: tuple[slice, ...], part: npt.NDArray[Any]) -> None:
        """Copy `part`, of the box's shape, to ``[where]``: queued, if on a device."""
        box = self.source[(..., *where)]
        if self.library is not None:
            packed = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            self.library.write_box(box, packed)
        else:
            box[...] = part

    def blocks(
        self, start: int, stop: int, nbytes: int, scratch_nbytes: int
    ) -> Iterator[Bytes]:
        """Yield bytes `start` to `stop`, up to `nbytes` at a time, in host memory.

        What cannot be viewed is copied, through at most `scratch_nbytes`, those of the
        device among them: from a device while the block before it is in use.
        """
        view = self.view(start, stop)
        if view is not None:
            for at in range(0, view.size, nbytes):
                yield view[at : at + nbytes]
            return
        # What does not lie together is packed by the device first.
        copies = 2 if self.library is None or self.is_contiguous else 3
        most = max(1, min(nbytes, scratch_nbytes // copies))
        if self.library is not None:
            most = pinnable(most)
        length = min(most, stop - start)
        turns = itertools.cycle(
            [host_memory(length, self.library, most) for _ in range(2)]
        )

        def begin(at: int) -> tuple[Bytes, Callable[[], None]]:
            out = next(turns)[: stop - at]
            try:
                self.stage(at, out)
            except BaseException:  # some of its copies may be queued
                fence(self.library)()
                raise
            return out, fence(self.library)

        ahead = [begin(start)] if start < stop else []
        try:
            while ahead:
                out, wait = ahead.pop()
                wait()
                start += out.size
                if start < stop:
                    ahead.append(begin(start))
                yield out
        finally:  # where the caller failed
            for _, wait in ahead:
                wait()


def _put(view: Bytes, out: Any) -> None:
    if isinstance(out, np.ndarray):
        out[:] = view
    else:
        device_library().copy(view, out)


def _runs(array: Any, start: int, count: int) -> Iterator[tuple[Any, int]]:
    """Yield ``array.ravel()[start:start + count]`` in boxes, and the elements of each.

    Whole rows are one box, the cut ones at both ends are taken apart.
    """
    if count == 0:
        return
    if array.ndim == 0:
        yield array, 1
        return
    row = math.prod(array.shape[1:])
    first, last = -(-start // row), (start + count) // row
    if first > last:  # all within one row
        yield from _runs(array[start // row], start % row, count)
        return
    head = first * row - start
    if head:
        yield from _runs(array[first - 1], row - head, head)
    if last > first:
        yield array[first:last], (last - first) * row
    tail = count - head - (last - first) * row
    if tail:
        yield from _runs(array[last], 0, tail)


def held_array(obj: object, name: str = "") -> HeldArray | None:
    """Return how to read `obj` if it is an array, or None.

    Arrays are what NumPy, or ``__cuda_array_interface__``, DLPack or the buffer
    protocol say is one; bytes, strings and NumPy scalars are small objects. Errors call
    it by `name`.

    Raises
    ------
    TypeError
        If the array's dtype cannot be saved.
    """
    if type(obj) is np.ndarray:
        return _on_host(obj, name)
    if obj is None or isinstance(
        obj, (bool, int, float, complex, str, bytes, bytearray, np.generic)
    ):
        return None
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(obj, torch.Tensor)
    if is_tensor:
        obj = _as_it_lies(obj)
    # Numba has subclasses of NumPy's arrays that a device writes to.
    if hasattr(obj, "__cuda_array_interface__"):
        return _on_device(obj, name)
    if isinstance(obj, np.ndarray):
        return _on_host(obj, name)
    if hasattr(obj, "__dlpack_device__") and hasattr(obj, "__dlpack__"):
        kind = int(obj.__dlpack_device__()[0])
        if kind in _DLPACK_CPU:
            array = _of_tensor(obj, torch) if is_tensor else np.from_dlpack(obj)
            return _on_host(array, name)
        if kind in _DLPACK_CUDA:
            return _on_device(obj, name)
        raise TypeError(
            f"{type(obj).__name__} lies on a device of DLPack's kind {kind}: arrays "
            f"are read from the host and from CUDA devices"
        )
    try:
        buffer = memoryview(obj)  # type: ignore[arg-type]
    except TypeError:
        return None
    return _on_host(np.asarray(buffer), name)


def is_writable(obj: Any, held: HeldArray) -> bool:
    """Return whether `obj` may be written to, which is read as `held`."""
    if held.library is None:
        writeable: bool = held.source.flags.writeable
        return writeable
    # A tensor that requires a gradient shows its memory only without it.
    is_tensor = (torch := sys.modules.get("torch")) and isinstance(obj, torch.Tensor)
    return held.library.is_writable(obj.detach() if is_tensor else obj)


def _as_it_lies(tensor: Any) -> Any:
    """Return a tensor without its gradient, if its memory holds its values."""
    if tensor.is_conj() or tensor.is_neg():
        raise TypeError(
            "a tensor that is a view of conjugate or negative values, as imag and conj "
            "make them, holds others in memory: give what its resolve_conj() and "
            "resolve_neg() return"
        )
    return tensor.detach()


def _of_tensor(tensor: Any, torch: Any) -> npt.NDArray[Any]:
    """Return the memory of a tensor as an array: of the dtype that ml_dtypes has."""
    kind = str(tensor.dtype)
    if kind not in _TORCH_BITS:
        return np.from_dlpack(tensor)
    bits: npt.NDArray[Any]
    bits = np.from_dlpack(tensor.view(getattr(torch, _TORCH_BITS[kind])))
    return bits.view(dtype_from_name(kind.removeprefix("torch.")))


def _on_device(obj: Any, name: str) -> HeldArray:
    library = device_library()
    array = library.adopt(obj)
    return HeldArray(array, savable(array.dtype), tuple(array.shape), library, name)


def _on_host(array: npt.NDArray[Any], name: str) -> HeldArray:
    # np.ma would import it, and a handler of signals may come while that is done.
    if isinstance(array, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise TypeError("a masked array cannot be saved: save its data and its mask")
    plain = array.view(np.ndarray)  # np.matrix would not index as arrays do
    return HeldArray(plain, savable(plain.dtype), plain.shape, name=name)


def library_of(held: Iterable[HeldArray]) -> DeviceLibrary | None:
    """Return the library of the arrays that lie on a device, if any does."""
    return next((array.library for array in held if array.library is not None), None)


def alone(held: Iterable[HeldArray]) -> list[HeldArray]:
    """Return the arrays that share no memory with others of them.

    Of those that do, what is there in the end is that of one.
    """
    every = list(held)
    # Those of NumPy, each with memory of its own: addresses take longer to find out.
    owners = {id(owner) for owner in map(_owner, every) if owner is not None}
    if len(owners) == len(every):
        return every
    spans = np.array([array.span for array in every], np.uint64).reshape(-1, 2)
    order = np.argsort(spans[:, 0], kind="stable")
    starts, stops = spans[order, 0], np.maximum.accumulate(spans[order, 1])
    is_first = np.append(True, starts[1:] >= stops[:-1])[: len(every)]
    group = np.cumsum(is_first)
    is_alone = np.bincount(group)[group] == 1
    return [every[i] for i in order[is_alone].tolist()]


def _owner(held: HeldArray) -> Any:
    """Return the array of NumPy that has taken the memory of an array, or None."""
    if held.library is not None:
        return None
    base = held.source if held.source.base is None else held.source.base
    return base if isinstance(base, np.ndarray) and base.flags.owndata else None


def in_new_thread(held: Iterable[HeldArray]) -> Callable[[], None]:
    """Return what a thread calls first that is to work on arrays."""
    for array in held:
        if array.library is not None:
            return functools.partial(array.library.use, array.source)
    return lambda: None


def settle(held: Iterable[HeldArray]) -> None:
    """Wait for all work on the devices of arrays, whichever stream it is on.

    The stream of an array's producer is unknown. Once for all arrays of a call: they
    are not to be changed while it goes on.
    """
    on_device = [array for array in held if array.library is not None]
    library = library_of(on_device)
    if library is not None:
        library.settle(array.source for array in on_device)
