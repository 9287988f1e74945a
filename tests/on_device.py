"""Arrays on a device, as tests make and read them: a stand-in's, or CuPy's.

Both have one interface, so that a test runs with either.
"""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from fakes import FakeAdopted, FakeDeviceArray, put_in_place

from mpisave import choosing
from mpisave.arrays import held_array
from mpisave.choosing import Choice
from mpisave.comms import private_comm
from mpisave.transport.memory import memory_of

DTYPES = [
    np.dtype(name)
    for name in "? i1 u1 <i2 <u4 <i8 <f2 <f4 <f8 <c8 <c16".split()  # noqa: SIM905
]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _memory(host):
    """Return the bytes that an array lies in, and at which of them it begins."""
    reach = [
        (n - 1) * stride for n, stride in zip(host.shape, host.strides, strict=True)
    ]
    low = sum(min(0, far) for far in reach)
    nbytes = sum(max(0, far) for far in reach) + host.itemsize - low
    first = host.ctypes.data + low
    return np.frombuffer(ctypes.string_at(first, nbytes), np.uint8).copy(), -low


class OnFake:
    """Arrays of a stand-in, in memory of their own: the host may not look."""

    name = "fake"
    dtypes = [*DTYPES, BFLOAT16]

    def __init__(self, monkeypatch):
        self.library = put_in_place(monkeypatch)

    second = 1  # the number of another device

    def to_device(self, host, number=0):
        """Return an array on a device of the same bytes and strides."""
        return FakeAdopted(self._copy(host), number=number)

    def ordinal(self, array):
        """Return the number of the device of an array."""
        return array.number

    def raw(self, host, *, read_only=False):
        """Return the same as an object of which only the interface is known."""
        return FakeDeviceArray(self._copy(host), read_only=read_only)

    @staticmethod
    def _copy(host):
        if not host.size:
            return host.copy()
        data, first = _memory(host)
        return np.ndarray(host.shape, host.dtype, data, first, host.strides)

    def is_device(self, array):
        """Return whether an array is what load makes on a device."""
        return isinstance(array, FakeAdopted)

    def to_host(self, array):
        """Return a copy of an array as NumPy has it."""
        return array._host.copy()

    def late(self, host):
        """Return an array that work which still runs on the device will have made."""
        array = self.to_device(np.zeros_like(host))
        self.library.begin(lambda: np.copyto(array._host, host))
        return array

    def read_late(self, array):
        """Have work that still runs read an array; return what gives what it saw."""
        seen = []
        self.library.begin(lambda: seen.append(array._host.copy()))
        return lambda: seen[0]


_SPIN = """
extern "C" __global__ void spin(long long ns) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); }
    while (now - began < ns);
}
"""
_LATE_NS = 300_000_000


class OnCuPy:
    """Arrays of CuPy, on the current device."""

    name = "cupy"
    library = None

    def __init__(self):
        self.cupy = pytest.importorskip("cupy", exc_type=ImportError)
        if not self.cupy.is_available():
            pytest.skip("CuPy finds no device")
        knows = int(self.cupy.__version__.partition(".")[0]) >= 14
        self.dtypes = [*DTYPES, BFLOAT16] if knows else DTYPES

    @property
    def second(self):
        if self.cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("there is one device")
        return 1

    def to_device(self, host, number=None):
        with self.cupy.cuda.Device(number):
            if not host.size:
                return self.cupy.empty(host.shape, host.dtype)
            data, first = _memory(host)
            memory = self.cupy.asarray(data).data + first
            return self.cupy.ndarray(host.shape, host.dtype, memory, host.strides)

    def ordinal(self, array):
        return array.device.id

    def raw(self, host, *, read_only=False):
        return Interface(self.to_device(host), read_only)

    def is_device(self, array):
        return isinstance(array, self.cupy.ndarray)

    def to_host(self, array):
        array = array.array if isinstance(array, Interface) else array
        return self.cupy.asnumpy(array)

    def late(self, host):
        source, array = self.to_device(host), self.to_device(np.zeros_like(host))
        with self.busy():
            array[...] = source
        return array

    def read_late(self, array):
        seen = self.cupy.zeros_like(array)
        with self.busy():
            seen[...] = array
        return lambda: self.cupy.asnumpy(seen)

    def busy(self):
        """Return a stream as the current one, with a kernel that runs for long."""
        spin = self.cupy.RawKernel(_SPIN, "spin")
        stream = self.cupy.cuda.Stream(non_blocking=True)
        self.cupy.cuda.Device().synchronize()
        spin((1,), (1,), (np.int64(0),))  # compiled, and loaded
        self.cupy.cuda.Device().synchronize()
        with stream:
            spin((1,), (1,), (np.int64(_LATE_NS),))
        return stream


class Interface:
    """An array of which only ``__cuda_array_interface__`` is known."""

    def __init__(self, array, read_only=False):
        self.array = array
        interface = dict(array.__cuda_array_interface__)
        interface["data"] = (interface["data"][0], read_only)
        self.__cuda_array_interface__ = interface


def make_devices(name, monkeypatch):
    """Return what makes device arrays of one kind, or skip the test."""
    return OnFake(monkeypatch) if name == "fake" else OnCuPy()


def trust_mpi(monkeypatch):
    """Have "device" be what it says, whatever MPI it is, with no trial of seconds.

    Memory of the stand-in is of the host, and MPI may be given it.
    """

    def choose(own, wanted, memory, **how):
        return Choice(wanted, "as this test has it")

    monkeypatch.setattr("mpisave.saving.choose", choose)


def mpi_takes_device_memory(comm):
    """Return whether MPI may be given memory of devices, and who says so."""
    held = [held_array(OnCuPy().to_device(np.arange(100)))]
    with private_comm(comm, "choose", 120.0) as own:
        choice = choosing.choose(own, "auto", memory_of(held), timeout_s=120.0)
    return choice.transport == "device", choice.how
