"""A device without a device: arrays that the host cannot touch but by the border."""

import collections
import contextlib
import threading
import weakref

import numpy as np
from crc32c import crc32c


class FakeDeviceArray:
    """Shows host memory behind ``__cuda_array_interface__``; the host may not look.

    Anything that would read it as a host array fails: NumPy, the buffer protocol,
    iteration. Reading and writing is for `FakeDeviceLibrary`. MPI, which takes it for
    device memory, may be given it.
    """

    def __init__(self, host, *, read_only=False):
        self._host = host
        self._read_only = read_only

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "typestr": self._host.dtype.str,
            "shape": self._host.shape,
            "strides": self._host.strides,
            "data": (self._host.ctypes.data, self._read_only),
        }

    def __array__(self, *args, **kwargs):
        raise AssertionError("the host read a device array")

    __iter__ = __getitem__ = __len__ = __array__


class FakeAdopted(FakeDeviceArray):
    """What the library makes of a device array: it has views, and no values."""

    def __init__(self, host, owner=None, number=0):
        super().__init__(host)
        self.owner = owner
        self.number = number  # of its device
        self.shape, self.ndim, self.dtype = host.shape, host.ndim, host.dtype
        self.size, self.nbytes, self.flags = host.size, host.nbytes, host.flags
        self.strides = host.strides
        self.device = "fake"

    def __getitem__(self, where):
        # A view also of a single element, as CuPy gives.
        where = where if isinstance(where, tuple) else (where,)
        if Ellipsis not in where:
            where = (*where, Ellipsis)
        return type(self)(self._host[where], self.owner, self.number)


class FakeDeviceLibrary:
    """What `mpisave.devices` asks of CuPy, served from memory; calls are recorded.

    A copy is done when what `fence` returned is called, and not before: until then its
    target holds other bytes. Each thread has a queue of its own, as it has a stream.
    A fence that nobody waits for is an error, told in the next call: memory that takes
    part in copies is given back with it, and may be in use again too soon.
    """

    def __init__(self):
        self.calls = []
        self.settled = 0
        self.pinned_nbytes = []
        self.buffer_nbytes = []
        self.viewed = []  # devices of what MPI may have been given as it lies
        self.can_sum = True
        self.summed_nbytes = 0
        # Those that know the device; others would take memory on the first one.
        self._threads = {threading.main_thread().ident}
        self._current = threading.local()
        self.alive = Alive()
        self._work = []
        self._queues = collections.defaultdict(collections.deque)
        self._lock = threading.RLock()

    def begin(self, work):
        """Have the device work for others: done when the device was waited for."""
        self._work.append(work)

    def adopt(self, obj):
        if isinstance(obj, FakeAdopted):
            return obj
        return FakeAdopted(obj._host, obj)

    def is_writable(self, obj):
        return not obj.__cuda_array_interface__["data"][1]

    def ordinal(self, array):
        return array.number

    def address(self, array):
        return array._host.ctypes.data

    @contextlib.contextmanager
    def current(self, array):
        before = self.current_number
        self._current.number = array.number
        yield
        self._current.number = before

    @property
    def current_number(self):
        return getattr(self._current, "number", 0)

    def use(self, array):
        self._current.number = array.number
        self._threads.add(threading.get_ident())

    def settle(self, arrays):
        assert all(isinstance(array, FakeAdopted) for array in arrays)
        self.settled += 1
        for thread, queue in self._queues.items():
            are_safe = thread.is_alive() and not any(copy.is_fenced for copy in queue)
            assert are_safe or not queue, "nobody has waited for a copy"
            queue.clear()
        while self._work:
            self._work.pop(0)()

    def empty(self, shape, dtype, device):
        if not dtype.isnative:
            raise TypeError("a device has no swapped byte order")
        number = getattr(device, "number", device)
        number = self.current_number if number is None else number
        return FakeAdopted(np.full(shape, 0, dtype), number=number)

    def pinned(self, nbytes):
        assert threading.get_ident() in self._threads
        # As CuPy's pool takes it: the next power of two.
        self.pinned_nbytes.append(1 << max(0, nbytes - 1).bit_length())
        return self.alive(np.full(nbytes, 0xA5, np.uint8))

    def buffer(self, nbytes, like):
        assert isinstance(like, FakeAdopted)
        self.buffer_nbytes.append(nbytes)
        memory = self.alive(np.full(nbytes, 0xA5, np.uint8))
        return FakeAdopted(memory, number=like.number)

    def view(self, array, start, stop):
        self.viewed.append(array.number)
        memory = array._host.reshape(-1).view(np.uint8)[start:stop]
        return FakeAdopted(memory, number=array.number)

    def copy(self, source, target):
        name = "write" if isinstance(source, np.ndarray) else "read"
        self._queue(f"{name} buffer", _memory(source), _memory(target))

    def read(self, array, start, target):
        assert array.flags.c_contiguous
        flat = array._host.reshape(-1).view(np.uint8)
        self._queue("read", flat[start : start + target.size], _memory(target))

    def write(self, array, start, source):
        assert array.flags.c_contiguous
        flat = array._host.reshape(-1).view(np.uint8)
        self._queue("write", source, flat[start : start + source.size])

    def read_box(self, array, skip, target):
        packed = self._packed(array).reshape(-1).view(np.uint8)
        self._queue("read box", packed[skip : skip + target.size], _memory(target))

    def write_box(self, array, source):
        self._packed(array)
        self._queue("write box", source, array._host)

    def _packed(self, array):
        """Return a copy: memory of the device that the next copy may have again."""
        self.alive.add(array.nbytes)
        self.alive.add(-array.nbytes)
        return np.ascontiguousarray(array._host)

    def lane(self, array, nbytes):
        assert isinstance(array, FakeAdopted)
        return _FakeLane(self, nbytes)

    def fence(self):
        queue = self._queues[threading.current_thread()]
        with self._lock:
            for copy in queue:
                copy.is_fenced = True
            last = queue[-1] if queue else None

        def wait():
            with self._lock:
                while last is not None and last in queue:
                    queue.popleft().run()

        return wait

    def summing(self, arrays, count):
        assert all(array.flags.c_contiguous for array in arrays)
        if not self.can_sum:
            return None

        def sums(runs, block_nbytes):
            assert not any(self._queues.values()), "a copy is not done"
            found = []
            for array, start, nbytes in runs:
                flat = array._host.reshape(-1).view(np.uint8)[start : start + nbytes]
                blocks = range(0, nbytes, block_nbytes)
                found += [crc32c(flat[at : at + block_nbytes].data) for at in blocks]
                self.summed_nbytes += flat.size
            assert len(found) <= count
            return found

        return sums

    def _queue(self, name, source, target):
        assert source.nbytes == target.nbytes
        assert threading.get_ident() in self._threads
        with self._lock:
            self.calls.append((name, target.nbytes))
            if target.dtype == np.uint8:
                target[...] = 0x5A
            self._queues[threading.current_thread()].append(_Copy(source, target))


class _FakeLane:
    """Two parts of pinned memory, of one thread."""

    def __init__(self, library, nbytes):
        self._library, self._nbytes = library, nbytes
        self._parts, self._waits, self._turn = [], [None, None], 1

    def take(self, nbytes):
        turn = self._turn = 1 - self._turn
        if turn == len(self._parts):
            self._parts.append(self._library.pinned(self._nbytes))
        if self._waits[turn] is not None:
            self._waits[turn]()
        self._waits[turn] = None
        self._parts[turn][:] = 0xA5
        return self._parts[turn][:nbytes]

    def send(self, array, start, nbytes):
        self._library.write(array, start, self._parts[self._turn][:nbytes])
        self.begun()

    def begun(self):
        self._waits[self._turn] = self._library.fence()

    def wait(self):
        with contextlib.ExitStack() as every:
            for wait in self._waits:
                if wait is not None:
                    every.callback(wait)


class _Copy:
    """A copy that was queued; it keeps the memory that takes part."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.is_fenced = False

    def run(self):
        source, target = self.source, self.target
        if source.shape != target.shape:
            source = source.view(target.dtype).reshape(target.shape)
        target[...] = source


class Alive:
    """Counts bytes that are alive, here and wherever else it is told of them."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.RLock()  # finalizers may run anywhere

    def __call__(self, array):
        self.add(array.nbytes)
        weakref.finalize(array, self.add, -array.nbytes)
        return array

    def empty(self, shape, dtype=float):
        """Stand in for `numpy.empty`."""
        return self(np.empty(shape, dtype))

    def add(self, nbytes):
        with self._lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


class FakeGpu:
    """What the bench of devices asks of `mpisave.bench.gpu`, served from memory.

    A copy is done when what `queue` returned is called, and not before.
    """

    name, version, torch_device = "a fake GPU", "fake 1", "cpu"

    def __init__(self):
        self.used = 0
        self.queued = []

    def synchronize(self):
        pass

    def array(self, host):
        return FakeAdopted(np.array(host))

    asarray = array

    def host(self, array):
        return array._host.copy()

    def bytes_of(self, array):
        host = array._host if isinstance(array, FakeAdopted) else array.numpy()
        return FakeAdopted(host.reshape(-1).view(np.uint8))

    def buffer(self, nbytes):
        return FakeAdopted(np.full(nbytes, 0xA5, np.uint8))

    def pinned(self, nbytes):
        return np.full(nbytes, 0xA5, np.uint8)

    def spoil(self, array):
        array._host.reshape(-1).view(np.uint8)[:] = 0x5A

    def queue(self, target, source):
        to_host = isinstance(target, np.ndarray)
        assert to_host != isinstance(source, np.ndarray)
        target, source = _memory(target), _memory(source)
        assert target.shape == source.shape
        self.queued.append(("to host" if to_host else "to device", target.nbytes))
        target[...] = 0xDD

        def wait():
            target[...] = source

        return wait

    def free(self):
        pass

    def used_nbytes(self):
        return self.used

    def pinned_nbytes(self):
        return 3 * 2**20

    def save(self, path, array):
        np.save(path, array._host)

    def load(self, path):
        return FakeAdopted(np.load(path))

    def tensor(self, array):
        import torch

        return torch.from_numpy(array._host)


def _memory(buffer):
    return buffer._host if isinstance(buffer, FakeAdopted) else buffer


def put_in_place(monkeypatch):
    """Have mpisave take the fake for CuPy; return it."""
    library = FakeDeviceLibrary()
    monkeypatch.setattr("mpisave.devices.cupy_library", lambda: library)
    return library
