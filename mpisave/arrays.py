"""The border between host and device: what an array is, and how its bytes are had.

Only this module imports CuPy, and only when a state holds device arrays.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# What a file may hold: booleans, integers, floats and complex numbers.
_KINDS = frozenset("biufc")
# All that `dtype_name` gives. NumPy would parse more, with Python's own parser:
# records, subarrays, and what makes it raise SyntaxError.
_PLAIN_NAME = re.compile(r"[<>|=][biufc][0-9]{1,2}")
# DLPack's code of memory that the CPU reads (dlpack.h, kDLCPU).
_DLPACK_CPU = 1


class DeviceLibrary(Protocol):
    """What this module asks of the library that owns device arrays."""

    def describe(self, array: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Return dtype and shape."""
        ...

    def stage(self, array: Any, start: int, out: npt.NDArray[Any]) -> None:
        """Copy ``array.ravel()[start:start + out.size]`` to `out` in host memory."""
        ...

    def stage_box(
        self, array: Any, where: tuple[slice, ...], out: npt.NDArray[Any]
    ) -> None:
        """Copy ``array[where]`` to `out`, of the box's shape, in host memory."""
        ...


class _CuPy:
    """Device arrays through CuPy, whichever library made them."""

    def describe(self, array: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
        interface = array.__cuda_array_interface__
        return np.dtype(interface["typestr"]), tuple(interface["shape"])

    def stage(self, array: Any, start: int, out: npt.NDArray[Any]) -> None:
        import cupy

        on_device = cupy.asarray(array)
        with on_device.device:
            # The stream of the producer is unknown: wait for all of them, once a piece.
            cupy.cuda.runtime.deviceSynchronize()
            if on_device.flags.c_contiguous:
                on_device.ravel()[start : start + out.size].get(out=out)
            else:
                _copy_elements(on_device, start, out, copy=lambda a, o: a.get(out=o))

    def stage_box(
        self, array: Any, where: tuple[slice, ...], out: npt.NDArray[Any]
    ) -> None:
        import cupy

        on_device = cupy.asarray(array)
        with on_device.device:
            cupy.cuda.runtime.deviceSynchronize()  # as above
            cupy.ascontiguousarray(on_device[where]).get(out=out)


def device_library() -> DeviceLibrary:
    """Return the library that reads device arrays. Tests put a fake in its place."""
    return _CuPy()


@dataclass(slots=True)
class HeldArray:
    """An array of the caller's, and how to read its bytes. Never modified.

    The bytes of an array are those of its elements in C order, in its own byte order.
    """

    source: Any  # NumPy array, or device array
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    on_device: bool
    name: str = ""  # its key, for errors

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, start: int, stop: int) -> Bytes | None:
        """Return bytes `start` to `stop` without a copy, or None if that cannot be."""
        if self.on_device or not self.source.flags.c_contiguous:
            return None
        flat: Bytes = self.source.reshape(-1).view(np.uint8)
        return flat[start:stop]

    def stage(self, start: int, out: Bytes) -> None:
        """Copy ``out.size`` bytes from byte `start` to `out`, a host buffer."""
        view = self.view(start, start + out.size)
        if view is not None:
            out[:] = view
            return
        itemsize = self.dtype.itemsize
        skip, stop = start % itemsize, start + out.size
        if skip or stop % itemsize:  # a small cap cut through an element
            first, last = start // itemsize, -(-stop // itemsize)
            elements = np.empty(last - first, self.dtype)
            self._stage_elements(first, elements)
            out[:] = elements.view(np.uint8)[skip : skip + out.size]
        else:
            self._stage_elements(start // itemsize, out.view(self.dtype))

    def _stage_elements(self, start: int, out: npt.NDArray[Any]) -> None:
        if self.on_device:
            device_library().stage(self.source, start, out)
        else:
            _copy_elements(self.source, start, out, copy=lambda a, o: np.copyto(o, a))

    def stage_box(self, where: tuple[slice, ...], out: Bytes) -> None:
        """Copy the elements ``[where]``, in C order, to `out`, a host buffer."""
        shape = tuple(side.stop - side.start for side in where)
        box = out.view(self.dtype).reshape(shape)
        if self.on_device:
            device_library().stage_box(self.source, where, box)
        else:
            np.copyto(box, self.source[where])


def _copy_elements(array: Any, start: int, out: npt.NDArray[Any], *, copy: Any) -> None:
    """Copy ``array.ravel()[start:start + out.size]`` to `out` without ravelling.

    Whole rows go in one strided copy, the cut ones at both ends by recursion.
    """
    if out.size == 0:
        return
    if array.ndim == 0:
        copy(array, out.reshape(()))
        return
    row = math.prod(array.shape[1:])
    first, last = -(-start // row), (start + out.size) // row
    if first > last:  # all within one row
        _copy_elements(array[start // row], start % row, out, copy=copy)
        return
    head = first * row - start
    tail = head + (last - first) * row
    if head:
        _copy_elements(array[first - 1], row - head, out[:head], copy=copy)
    if last > first:
        copy(array[first:last], out[head:tail].reshape(last - first, *array.shape[1:]))
    if tail < out.size:
        _copy_elements(array[last], 0, out[tail:], copy=copy)


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
    if isinstance(obj, np.ndarray):
        return _on_host(obj, name)
    if obj is None or isinstance(
        obj, (bool, int, float, complex, str, bytes, bytearray, np.generic)
    ):
        return None
    if hasattr(obj, "__cuda_array_interface__"):
        dtype, shape = device_library().describe(obj)
        return HeldArray(obj, savable(dtype), shape, on_device=True, name=name)
    if hasattr(obj, "__dlpack_device__") and hasattr(obj, "__dlpack__"):
        if obj.__dlpack_device__()[0] == _DLPACK_CPU:
            return _on_host(np.from_dlpack(obj), name)
        raise TypeError(
            f"{type(obj).__name__} lies on a device that cannot be read by DLPack: "
            "it must serve __cuda_array_interface__"
        )
    try:
        buffer = memoryview(obj)  # type: ignore[arg-type]
    except TypeError:
        return None
    return _on_host(np.asarray(buffer), name)


def _on_host(array: npt.NDArray[Any], name: str) -> HeldArray:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array cannot be saved: save its data and its mask")
    plain = array.view(np.ndarray)  # np.matrix would not index as arrays do
    return HeldArray(
        plain, savable(plain.dtype), plain.shape, on_device=False, name=name
    )


def savable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return `dtype` if a file may hold it.

    Raises
    ------
    TypeError
        If it is none of bool, int, uint, float, complex and those of ml_dtypes.
    """
    if is_ml_dtype(dtype):
        if dtype.isnative:
            return dtype
        raise TypeError(f"arrays of {dtype.name} in swapped byte order cannot be saved")
    if dtype.kind in _KINDS:
        return dtype
    advice = (
        "take the objects out into lists of small objects"
        if dtype.hasobject
        else "view it as integers, or take its fields apart"
    )
    raise TypeError(f"arrays of dtype {dtype} cannot be saved: {advice}")


@functools.lru_cache(maxsize=1024)
def is_ml_dtype(dtype: np.dtype[Any]) -> bool:
    """Return whether `dtype` is one that ml_dtypes adds, such as bfloat16."""
    return dtype.type.__module__.partition(".")[0] == "ml_dtypes"


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype under which every reader knows the bytes of `dtype`.

    That of ml_dtypes are stored as their bits, in unsigned integers.
    """
    if is_ml_dtype(dtype):
        return np.dtype(f"<u{dtype.itemsize}" if dtype.itemsize > 1 else "u1")
    return dtype


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return a name that `dtype_from_name` turns back into `dtype`."""
    return dtype.name if is_ml_dtype(dtype) else dtype.str


def dtype_from_name(name: str) -> np.dtype[Any]:
    """Return the dtype that `dtype_name` gave `name`.

    Raises
    ------
    ValueError
        If there is none.
    ImportError
        If it needs ml_dtypes, and that is not installed.
    """
    if name[:1] in "<>|=":
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no dtype that a file may hold")
        try:
            return np.dtype(name)
        except TypeError as exc:
            raise ValueError(f"{name!r} is no dtype") from exc
    try:
        import ml_dtypes
    except ImportError as exc:
        raise ImportError(
            f"dtype {name!r} needs ml_dtypes: pip install 'mpisave[bfloat16]'"
        ) from exc
    scalar = getattr(ml_dtypes, name, None)
    if not (isinstance(scalar, type) and issubclass(scalar, np.generic)):
        raise ValueError(  # noqa: TRY004 - the name is at fault
            f"{name!r} is no dtype of ml_dtypes {ml_dtypes.__version__}"
        )
    return np.dtype(scalar)
