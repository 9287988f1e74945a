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
        interface = array.__cuda_array_interface__
        dtype = np.dtype(interface["typestr"])
        shape, strides = interface["shape"], interface["strides"]
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        memory = (ctypes.c_char * (last + dtype.itemsize)).from_address(
            interface["data"][0]
        )
        view = np.ndarray(shape, dtype, memory, strides=strides)
        out[:] = view.reshape(-1)[start : start + out.size]
