"""A device without a device: arrays that the host cannot touch but by the border."""

import ctypes

import numpy as np


class FakeDeviceArray:
    """Shows host memory behind ``__cuda_array_interface__``; the host may not look.

    Anything that would read it as a host array fails: NumPy, the buffer protocol,
    iteration. Reading is for `FakeDeviceLibrary`.
    """

    def __init__(self, host):
        self._host = host

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "typestr": self._host.dtype.str,
            "shape": self._host.shape,
            "strides": self._host.strides,
            "data": (self._host.ctypes.data, False),
        }

    def __array__(self, *args, **kwargs):
        raise AssertionError("the host read a device array")

    __iter__ = __getitem__ = __len__ = __array__


class FakeDeviceLibrary:
    """What `mpisave.arrays` asks of CuPy, served from memory; calls are recorded."""

    def __init__(self):
        self.calls = []

    def describe(self, array):
        interface = array.__cuda_array_interface__
        return np.dtype(interface["typestr"]), tuple(interface["shape"])

    def stage(self, array, start, out):
        self.calls.append((start, out.size))
        out[:] = self._view(array).reshape(-1)[start : start + out.size]

    def stage_box(self, array, where, out):
        self.calls.append((where, out.size))
        out[...] = self._view(array)[where]

    def _view(self, array):
        interface = array.__cuda_array_interface__
        dtype = np.dtype(interface["typestr"])
        shape, strides = interface["shape"], interface["strides"]
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        memory = (ctypes.c_char * (last + dtype.itemsize)).from_address(
            interface["data"][0]
        )
        return np.ndarray(shape, dtype, memory, strides=strides)
