"""What trials and the bench ask of CuPy, in host memory, for a process with no device.

FAKE_CUPY says what befalls it: "fault" once MPI has had memory, "wrong" bytes, "hang",
"no device".
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import types

import numpy as np

__version__ = "0 (fake)"

BEFALLS = os.environ.get("FAKE_CUPY", "")


class ndarray:  # noqa: N801 - as CuPy has it
    def __init__(self, host):
        self._host = host
        self.size = host.size
        self.data = types.SimpleNamespace(ptr=host.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "typestr": self._host.dtype.str,
            "shape": self._host.shape,
            "strides": None,
            "data": (self._host.ctypes.data, False),
        }

    def __getitem__(self, where):
        return type(self)(self._host[where])

    def set(self, data):
        self._host[...] = data

    def get(self):
        found = self._host.copy()
        if BEFALLS == "wrong" and self.size > 64:
            found[-3:] ^= 1
        return found


def empty(size, dtype):
    return ndarray(np.full(size, 0xA5, dtype))


class runtime:  # noqa: N801
    @staticmethod
    def deviceSynchronize():
        if BEFALLS == "no device":
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device")
        if "mpi4py.MPI" in sys.modules and cuda.ready:
            if BEFALLS == "fault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if BEFALLS == "hang":
                time.sleep(600)
        cuda.ready = True

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3  # noqa: N815

    @staticmethod
    def memcpy(target, source, nbytes, kind):
        assert kind in (1, 2, 3)
        ctypes.memmove(target, source, nbytes)

    @staticmethod
    def runtimeGetVersion():
        return 13020

    @staticmethod
    def getDeviceCount():
        if BEFALLS == "no device":
            raise RuntimeError("cudaErrorNoDevice:\n no CUDA-capable device")
        return 2


class cuda:  # noqa: N801
    ready = False
    runtime = runtime

    alloc_pinned_memory = bytearray

    class Device(contextlib.nullcontext):
        current = 0

        def __init__(self, number=None):
            super().__init__()
            self.id = cuda.Device.current if number is None else number

        def use(self):
            cuda.Device.current = self.id


class _Pool:
    def free_all_blocks(self):
        pass


get_default_memory_pool = get_default_pinned_memory_pool = _Pool
