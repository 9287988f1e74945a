"""What only a GPU shows: its libraries, its memory, and what MPI does with it.

All ranks share one device, where there is no more.
"""

import os
import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from boxes import noise
from crc32c import crc32c
from helpers import assert_equal_states, assert_on_all_ranks
from on_device import OnCuPy
from ranks import assert_nothing_lost, assert_refused, assert_stock, on_each, put_old

import mpisave
from mpisave.devices import device_library

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.gpu,
    # Of libraries that are used here alone.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MIB = 2**20


@pytest.fixture
def devices():
    return OnCuPy()


@pytest.fixture
def cupy(devices):
    return devices.cupy


@pytest.fixture
def pool(cupy):
    """Return CuPy's pool of device memory, with nothing in it that is free."""
    cupy.cuda.Device().synchronize()
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    yield pool
    pool.set_limit(size=0)
    pool.free_all_blocks()


def imported(name):
    """Import a library, or skip the test. What it deprecates is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def torch():
    torch = imported("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no device")
    return torch


@pytest.fixture
def jax():
    # It would take most of the memory for itself. Read when it starts, once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = imported("jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if jax.default_backend() != "gpu":
            pytest.skip("JAX finds no device")
    return jax


@pytest.fixture
def cuda():
    """Return Numba's CUDA."""
    cuda = imported("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba finds no device")
    return cuda


@pytest.fixture
def in_order_of_streams(cupy):
    """Have CuPy take its memory from the driver, in the order of streams."""
    attribute = cupy.cuda.runtime.cudaDevAttrMemoryPoolsSupported
    if not cupy.cuda.runtime.deviceGetAttribute(attribute, cupy.cuda.Device().id):
        pytest.skip("the device has no such pools")
    pool = cupy.cuda.MemoryAsyncPool()
    cupy.cuda.set_allocator(pool.malloc)
    yield pool
    cupy.cuda.Device().synchronize()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


WAYS = [
    pytest.param({}, id="direct"),
    pytest.param({"gather_to": 0}, id="gather"),
]


def save(comm, path, state, **how):
    return mpisave.save(state, path, comm=comm, state_type="opt", **how)


def assert_holds(comm, path, make):
    """Fail unless the file holds what `make` returns for each rank."""
    expected = {}
    for rank in range(comm.size):
        expected |= make(rank)
    on_each(comm, lambda: assert_stock(path, expected, use_binary_format=False))
    assert mpisave.verify(path, comm=comm).arrays == len(expected)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("transport", ["auto", "host"])
def test_what_mpi_was_found_to_take_it_takes(comm, shared_dir, devices, transport):
    def every(rank):
        return {
            f"x{rank}": noise((300, 500), "f4", rank),
            f"odd{rank}": noise((70, 9), "c16", rank)[:, 1::2].copy(),
        }

    state = {}
    for key, array in every(comm.rank).items():
        state[key] = devices.to_device(array)
    for cap in ("100K", "3G"):
        report = save(
            comm,
            shared_dir / "x.opt",
            state,
            gather_to=0,
            transport=transport,
            max_grouped_size=cap,
        )

        assert_holds(comm, shared_dir / "x.opt", every)
    print(f"{transport}: {report.transport}")
    ways = {"gather (host)", *(["gather (device)"] if transport == "auto" else [])}
    assert_on_all_ranks(comm, report.transport in ways, report.transport)


@pytest.mark.parametrize("how", WAYS)
def test_managed_memory_is_saved_and_filled(comm, shared_dir, cupy, how):
    def every(rank):
        return {f"x{rank}": noise(5000, "i4", rank)}

    def managed(host):
        memory = cupy.cuda.malloc_managed(host.nbytes)
        array = cupy.ndarray(host.shape, host.dtype, memory)
        array.set(host)
        return array

    (key, host), *_ = every(comm.rank).items()
    blank = managed(np.zeros_like(host))

    save(comm, shared_dir / "x.opt", {key: managed(host)}, **how)
    mpisave.load(
        shared_dir / "x.opt",
        like={key: blank},
        into="inplace",
        keys=(key,),
        comm=comm,
    )

    assert_holds(comm, shared_dir / "x.opt", every)
    found = cupy.asnumpy(blank)
    on_each(comm, lambda: assert_equal_states(found, host))


@pytest.mark.parametrize("how", WAYS)
def test_pool_that_goes_by_streams_is_saved_from_and_loaded_to(
    comm, shared_dir, devices, in_order_of_streams, how
):
    def every(rank):
        return {
            f"long{rank}": noise((40, 100_000), "f4", rank),
            f"apart{rank}": noise((3000, 90), "f8", rank)[::2, 1::3],
            f"short{rank}": noise(7, "i2", rank),
        }

    def check(found):
        on_host = {key: devices.to_host(array) for key, array in found.items()}
        on_each(comm, lambda: assert_equal_states(on_host, every(comm.rank)))

    path = shared_dir / "x.opt"
    state = {key: devices.to_device(host) for key, host in every(comm.rank).items()}

    save(comm, path, state, **how)
    keys = [(key,) for key in state]
    new = mpisave.load(path, device="cuda", like=state, keys=keys, comm=comm)
    for array in state.values():
        array.fill(0)
    mpisave.load(path, like=state, into="inplace", keys=keys, comm=comm)

    assert in_order_of_streams.used_bytes() > 0
    assert_holds(comm, path, every)
    check(new)
    check(state)


class TestNumba:
    DTYPES = ["f4", "f8", "i4", "u1", "c8"]

    def arrays(self, cuda, rank):
        """Return device arrays, and what they hold."""
        held, expected = {}, {}
        for name in self.DTYPES:
            whole = noise((30, 40), name, rank)
            managed = cuda.managed_array(whole.shape, whole.dtype)
            managed[...] = whole
            for layout, array, host in (
                ("whole", cuda.to_device(whole), whole),
                ("managed", managed, whole),
                ("part", cuda.to_device(whole)[3:20, 1::2], whole[3:20, 1::2]),
            ):
                held[f"{name} {layout} {rank}"] = array
                expected[f"{name} {layout} {rank}"] = host
        return held, expected

    @pytest.mark.parametrize("how", WAYS)
    def test_arrays_are_saved_and_filled(self, comm, shared_dir, devices, cuda, how):
        path = shared_dir / "x.opt"
        held, expected = self.arrays(cuda, comm.rank)
        blank, _ = self.arrays(cuda, comm.rank + 100)
        blank = dict(zip(held, blank.values(), strict=True))

        save(comm, path, held, **how)
        keys = [(key,) for key in held]
        found = mpisave.load(path, like=blank, into="inplace", keys=keys, comm=comm)

        assert_holds(comm, path, lambda rank: self.arrays(cuda, rank)[1])

        def check():
            for key, array in blank.items():
                assert found[key] is array
                on_host = devices.cupy.asnumpy(devices.cupy.asarray(array))
                assert_equal_states(on_host, expected[key])

        on_each(comm, check)


class TestChecksums:
    """CRC-32C as the device computes it."""

    LENGTHS = [1, 3, 4, 5, 4095, 4096, 4100, 100_003, MIB - 1, MIB, MIB + 1]

    @pytest.mark.parametrize("skip", [0, 1, 2, 3, 4, 8])
    def test_sums_are_those_of_the_host(self, comm, cupy, skip):
        host = noise(3 * MIB, "u1", 5 + comm.rank)
        array = cupy.asarray(host)
        sums = device_library().summing([array], 3 * len(self.LENGTHS))
        starts = [skip + number * 1000 for number in range(len(self.LENGTHS))]

        runs = zip(starts, self.LENGTHS, strict=True)
        found = sums([(array, start, nbytes) for start, nbytes in runs], MIB // 2)

        expected = [
            crc32c(host[at : min(at + MIB // 2, start + nbytes)])
            for start, nbytes in zip(starts, self.LENGTHS, strict=True)
            for at in range(start, start + nbytes, MIB // 2)
        ]
        assert_on_all_ranks(comm, found == expected, found)

    def test_sums_are_of_memory_of_any_kind(self, comm, cupy):
        host = noise(100_000, "u1", comm.rank)
        memory = cupy.cuda.malloc_managed(host.nbytes)
        managed = cupy.ndarray(host.shape, host.dtype, memory)
        managed.set(host)
        arrays = [managed, cupy.asarray(host)]

        sums = device_library().summing(arrays, 2)
        found = sums([(array, 0, host.nbytes) for array in arrays], MIB)

        assert_on_all_ranks(comm, found == 2 * [crc32c(host)], found)

    @pytest.mark.parametrize("block", [0, 150, 299])
    def test_flipped_bit_of_a_long_array_is_found(
        self, comm, shared_dir, cupy, block, monkeypatch
    ):
        path, where = shared_dir / "x.opt", block * MIB + 12_345
        array = cupy.arange(300 * MIB // 4, dtype=cupy.int32) * (1 + 4 * comm.rank)
        state = {f"x{comm.rank}": array}
        save(comm, path, state, durable=False)
        last = comm.size - 1
        if comm.rank == last:
            part = cupy.asnumpy(array[where // 4 :][:64]).tobytes()
            data = np.memmap(path, np.uint8, "r+")
            found = data.tobytes().find(part)
            data[found] ^= 1
            data.flush()
        comm.Barrier()
        asked = []
        with monkeypatch.context() as patch:
            library = type(device_library())
            summing = library.summing
            patch.setattr(
                library,
                "summing",
                lambda *args: asked.append(True) or summing(*args),
            )
            caught = assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda: mpisave.load(
                    path, like=state, keys=[(key,) for key in state], comm=comm
                ),
                f"'x{last}' is altered: the CRC-32C of block {block} ",
            )
        print(caught)
        assert_on_all_ranks(comm, bool(asked), "it was the device that found it")


class TestTorch:
    DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"]

    def tensors(self, torch, rank):
        """Return tensors, and what NumPy makes of their bits."""
        held, expected = {}, {}
        for number, name in enumerate(self.DTYPES):
            first = rank + number
            whole = torch.arange(first, first + 600, device="cuda") % 97
            whole = whole.to(getattr(torch, name)).reshape(20, 30)
            for layout, tensor in {
                "whole": whole,
                "turned": whole.T,
                "part": whole[3::2, 5:25:3],
                "0-d": whole[2, 3],
            }.items():
                key = f"{name} {layout} {rank}"
                held[key] = tensor
                host = tensor.cpu().contiguous()
                if name == "bfloat16":  # which NumPy has from ml_dtypes
                    expected[key] = (
                        host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                    )
                else:
                    expected[key] = host.numpy()
        return held, expected

    @pytest.mark.parametrize("how", WAYS)
    def test_tensors_are_saved(self, comm, shared_dir, devices, torch, how):
        held, _ = self.tensors(torch, comm.rank)

        save(comm, shared_dir / "x.opt", held, **how)

        assert_holds(
            comm, shared_dir / "x.opt", lambda rank: self.tensors(torch, rank)[1]
        )

    @pytest.mark.parametrize("has_gradient", [False, True])
    def test_tensors_are_filled_in_place(
        self, comm, shared_dir, devices, torch, has_gradient
    ):
        held, _ = self.tensors(torch, comm.rank)
        save(comm, shared_dir / "x.opt", held)
        blank = {key: torch.zeros_like(tensor) for key, tensor in held.items()}
        for tensor in blank.values():
            tensor.requires_grad_(has_gradient and tensor.is_floating_point())

        found = mpisave.load(
            shared_dir / "x.opt",
            like=blank,
            into="inplace",
            keys=[(key,) for key in blank],
            comm=comm,
        )

        def check():
            for key, tensor in held.items():
                assert found[key] is blank[key]
                assert torch.equal(blank[key], tensor), key

        on_each(comm, check)

    def test_new_arrays_are_of_cupy(self, comm, shared_dir, cupy, torch):
        held, expected = self.tensors(torch, comm.rank)
        save(comm, shared_dir / "x.opt", held)

        found = mpisave.load(
            shared_dir / "x.opt",
            like=held,
            keys=[(key,) for key in held],
            comm=comm,
        )

        def check():
            assert all(isinstance(array, cupy.ndarray) for array in found.values())
            on_host = {key: cupy.asnumpy(array) for key, array in found.items()}
            assert_equal_states(on_host, expected)

        on_each(comm, check)

    def test_stream_of_the_producer_is_waited_for(
        self, comm, shared_dir, devices, torch
    ):
        def every(rank):
            return {f"x{rank}": np.arange(50_000.0) + rank}

        stream = torch.cuda.Stream()
        tensor = torch.zeros(50_000, dtype=torch.float64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)  # clock cycles
            more = torch.arange(50_000, dtype=torch.float64, device="cuda")
            tensor += more + comm.rank

        save(comm, shared_dir / "x.opt", {f"x{comm.rank}": tensor})

        assert_holds(comm, shared_dir / "x.opt", every)


class TestJax:
    DTYPES = ["float32", "bfloat16", "int32", "float16", "uint8"]

    def arrays(self, jax, rank):
        held = {}
        for number, name in enumerate(self.DTYPES):
            first, dtype = rank + number, getattr(jax.numpy, name)
            whole = jax.numpy.arange(first, first + 200) % 97
            held[f"{name} {rank}"] = whole.astype(dtype).reshape(10, 20)
        return held, {key: np.asarray(array) for key, array in held.items()}

    @pytest.mark.parametrize("how", WAYS)
    def test_arrays_are_saved(self, comm, shared_dir, devices, jax, how):
        held, _ = self.arrays(jax, comm.rank)

        save(comm, shared_dir / "x.opt", held, **how)

        assert_holds(comm, shared_dir / "x.opt", lambda rank: self.arrays(jax, rank)[1])

    def test_new_arrays_are_made_and_none_is_filled_in_place(
        self, comm, shared_dir, cupy, jax
    ):
        held, expected = self.arrays(jax, comm.rank)
        save(comm, shared_dir / "x.opt", held)

        def load(into):
            return mpisave.load(
                shared_dir / "x.opt",
                like=held,
                into=into,
                keys=[(key,) for key in held],
                comm=comm,
            )

        found = load("new")
        assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: load("inplace"),
            "cannot be filled in place",
        )

        on_host = {key: cupy.asnumpy(array) for key, array in found.items()}
        on_each(comm, lambda: assert_equal_states(on_host, expected))


class TestMemory:
    NBYTES = 1024 * MIB  # of all ranks together
    CAP_NBYTES = 64 * MIB

    def arrays(self, cupy, rank, size):
        """Return long arrays, half of them in pieces that lie apart."""
        n = self.NBYTES // size // 8
        one = cupy.arange(n, dtype=cupy.int32) + rank
        apart = (cupy.arange(2 * n, dtype=cupy.int32) - rank).reshape(-1, 8)[:, ::2]
        return {f"one{rank}": one, f"apart{rank}": apart}

    @staticmethod
    def peak_of_host(action):
        """Return how many bytes of the host were taken at most, above what was."""

        def resident(field):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
            raise AssertionError(field)

        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        before = resident("VmRSS")
        action()
        return resident("VmHWM") - before

    @staticmethod
    def peak_of_device(cupy, action):
        """Return how many bytes of the device were taken at most, by whomever."""
        free, ended = [cupy.cuda.runtime.memGetInfo()[0]], threading.Event()
        device = cupy.cuda.Device().id

        def sample():
            with cupy.cuda.Device(device):
                while not ended.wait(0.001):
                    free.append(cupy.cuda.runtime.memGetInfo()[0])

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            action()
        finally:
            ended.set()
            thread.join()
        return free[0] - min(free)

    @pytest.mark.parametrize("how", WAYS)
    def test_save_keeps_within_the_cap(self, comm, shared_dir, cupy, pool, how):
        state = self.arrays(cupy, comm.rank, comm.size)
        path = shared_dir / "x.opt"

        def act():
            limit = self.CAP_NBYTES
            save(comm, path, state, max_grouped_size=limit, durable=False, **how)

        small = {key: array[:1000] for key, array in state.items()}
        save(comm, path, small, **how)  # loads kernels, makes streams
        cupy.cuda.Device().synchronize()
        pool.free_all_blocks()
        before = pool.total_bytes()
        comm.Barrier()  # what all take from now on is of this call
        extra = []
        of_device = self.peak_of_device(
            cupy, lambda: extra.append(self.peak_of_host(act))
        )
        of_pool = pool.total_bytes() - before  # it gives nothing back by itself

        print(f"host {extra[0] / MIB:.1f} MiB, pool {of_pool / MIB:.1f} MiB, device")
        print(f"{of_device / MIB:.1f} MiB above a state of {self.NBYTES / MIB} MiB")
        limit = self.CAP_NBYTES
        assert_on_all_ranks(comm, of_pool <= limit, f"pool {of_pool}")
        assert_on_all_ranks(comm, extra[0] <= limit + 64 * MIB, f"host {extra[0]}")
        of_all = limit * comm.size + 64 * MIB
        assert_on_all_ranks(comm, of_device <= of_all, f"device {of_device}")
        report = mpisave.verify(path, comm=comm)
        assert_on_all_ranks(comm, report.payload_nbytes == self.NBYTES, "payload")

    @pytest.mark.parametrize("into", ["new", "inplace"])
    def test_load_takes_little_more_than_the_state(
        self, comm, shared_dir, cupy, pool, into
    ):
        state = self.arrays(cupy, comm.rank, comm.size)
        path = shared_dir / "x.opt"
        save(comm, path, state, durable=False)
        expected = {key: array.copy() for key, array in state.items()}
        for array in state.values():
            array[...] = 0

        def load(like=state):
            found = mpisave.load(
                path, like=like, into=into, keys=[(k,) for k in like], comm=comm
            )
            loaded.update(found)

        loaded = {}
        load({"one0": cupy.zeros_like(state[f"one{comm.rank}"])})  # makes streams
        loaded.clear()
        cupy.cuda.Device().synchronize()
        pool.free_all_blocks()
        before = pool.total_bytes()
        extra = self.peak_of_host(load)
        of_pool = pool.total_bytes() - before

        print(f"host {extra / MIB:.1f} MiB, pool {of_pool / MIB:.1f} MiB")
        of_state = self.NBYTES // comm.size if into == "new" else 0
        assert_on_all_ranks(comm, of_pool <= of_state + 64 * MIB, f"pool {of_pool}")
        assert_on_all_ranks(comm, extra <= 128 * MIB, f"host {extra}")
        for key, array in expected.items():
            assert_on_all_ranks(comm, bool((loaded[key] == array).all()), key)

    def test_loads_into_strided_arrays_use_the_same_memory_again(
        self, comm, shared_dir, cupy, pool
    ):
        whole = cupy.arange(64 * MIB // comm.size // 2, dtype=cupy.int32)
        apart = whole.reshape(-1, 8)[:, ::2]
        state = {f"x{comm.rank}": apart}
        save(comm, shared_dir / "x.opt", state, durable=False)
        before = pool.total_bytes()

        for _ in range(12):
            apart[...] = 0
            mpisave.load(
                shared_dir / "x.opt",
                like=state,
                into="inplace",
                keys=[(key,) for key in state],
                comm=comm,
            )

        taken = pool.total_bytes() - before
        print(f"{taken / MIB:.1f} MiB of the pool")
        assert_on_all_ranks(comm, taken <= 13 * 4 * MIB, f"{taken} bytes of the pool")
        right = cupy.arange(apart.size * 2, dtype=cupy.int32).reshape(-1, 8)[:, ::2]
        assert_on_all_ranks(comm, bool((apart == right).all()), "what was saved")

    def test_device_that_is_full_on_one_rank_is_raised_on_all(
        self, comm, shared_dir, cupy, pool
    ):
        old, last = put_old(comm, shared_dir / "x.opt"), comm.size - 1
        apart = cupy.zeros((2 * MIB, 8), cupy.uint8)[:, ::2]
        state = {f"x{comm.rank}": apart}
        save(comm, shared_dir / "sound.opt", state)
        pool.free_all_blocks()

        if comm.rank == last:
            pool.set_limit(size=pool.total_bytes() + 1000)
        for act, what in [
            (lambda: save(comm, old, state), "write"),
            (
                lambda: mpisave.load(
                    shared_dir / "sound.opt", device="cuda", comm=comm
                ),
                "load",
            ),
        ]:
            caught = assert_refused(
                comm, mpisave.CollectiveError, act, "Out of memory", [last]
            )
            print(f"{what}: {caught}")
        pool.set_limit(size=0)

        if comm.rank == 0:
            (shared_dir / "sound.opt").unlink()
        assert_nothing_lost(comm, old)
        save(comm, old, state)
