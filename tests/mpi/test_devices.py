"""Arrays on a device are saved and loaded bit for bit, whatever way they travel."""

import dataclasses
import gc
import os
import threading

import numpy as np
import pytest
from boxes import noise, where
from helpers import assert_equal_states, assert_on_all_ranks, files_in, small_blocks
from on_device import make_devices, mpi_takes_device_memory, trust_mpi
from ranks import (
    Numpy,
    assert_nothing_lost,
    assert_refused,
    assert_stock,
    grid,
    numbers,
    on_each,
    put_old,
)

import mpisave
from mpisave import Shard, Shards
from mpisave.transport.root import Root

pytestmark = pytest.mark.mpi

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
# A format, a cap, and which arrays are on the device.
HOW = [
    (False, 100, "all"),
    (False, 100, "every other"),
    (False, "3G", "every other"),
    (False, "3G", "not on the root"),
    (False, "3G", "only on the root"),
    (True, "64K", "all"),
    (True, "64K", "odd ranks"),
    (True, "64K", "not on the root"),
]


@dataclasses.dataclass(frozen=True)
class Route:
    """Who gathers, and whether MPI is given memory of devices."""

    roots: str = ""
    by_device: bool = False

    def arguments(self, comm):
        many = {"": None, "one": 0, "two": sorted({0, comm.size - 1})}
        return {
            "gather_to": many[self.roots],
            "state_type": "opt",
            "transport": "device" if self.by_device else "host",
            "comm": comm,
        }

    def __str__(self):
        by = "device" if self.by_device else "host"
        return f"{self.roots} by {by}" if self.roots else "direct"


ROUTES = [
    Route(),
    *(Route(roots, by) for roots in ("one", "two") for by in (False, True)),
]


@pytest.fixture(params=["fake", pytest.param("cupy", marks=pytest.mark.gpu)])
def devices(request, monkeypatch):
    """Return what makes arrays on a device, of a stand-in and of CuPy."""
    # Checksums of what is loaded are the device's, of short arrays too.
    monkeypatch.setattr("mpisave.to_device._LEAST_NBYTES", 0)
    return make_devices(request.param, monkeypatch)


@pytest.fixture(scope="session")
def of_mpi():
    """Return whether MPI may be given memory of devices, and who says so."""
    from mpi4py import MPI

    return mpi_takes_device_memory(MPI.COMM_WORLD)


@pytest.fixture(params=ROUTES, ids=str)
def route(request, devices, monkeypatch):
    """Return a way to travel, which every save in this test takes."""
    route = request.param
    if route.by_device and devices.name == "cupy":
        may, how = request.getfixturevalue("of_mpi")
        if not may:
            pytest.skip(f"MPI is not given device memory: {how}")
    trust_mpi(monkeypatch)
    return route


LAYOUTS = {
    "row": lambda make: make(41),
    "matrix": lambda make: make((7, 9)),
    "0-d": lambda make: make(()),
    "empty": lambda make: make((0, 3)),
    "one": lambda make: make((1, 1)),
    "strided": lambda make: make((20, 15))[::2, 1:7],
    "rows": lambda make: make((20, 5))[1::3],
    "fortran": lambda make: make((5, 8)).copy("F"),
    "transposed": lambda make: make((3, 4, 5)).transpose(2, 0, 1),
    "negative": lambda make: make((6, 5))[::-1, ::-2],
    "broadcast": lambda make: np.broadcast_to(make((4, 1)), (3, 4, 2)),
}

# Which of a rank's arrays, by their number, are on its device.
PLACES = {
    "all": lambda rank, size, number: True,
    "every other": lambda rank, size, number: number % 2 == 0,
    "odd ranks": lambda rank, size, number: rank % 2 == 1,
    "not on the root": lambda rank, size, number: rank > 0,
    "only on the root": lambda rank, size, number: rank == 0,
}


def any_bits(shape, dtype, seed):
    data = noise(shape, "u1" if dtype == np.bool_ else dtype, seed)
    return np.asarray(data % 2 == 0) if dtype == np.bool_ else data


def arrays_of(rank, dtypes):
    """Return arrays of every layout and dtype: not of each of both, on one rank."""
    arrays = {}
    for number, (layout, make) in enumerate(LAYOUTS.items()):
        for turn in range(4):
            seed = 4 * number + turn + rank
            dtype = dtypes[seed % len(dtypes)]
            arrays[f"{layout}{turn}.{rank}"] = make(
                lambda shape, dtype=dtype, seed=seed: any_bits(shape, dtype, seed)
            )
    return arrays


def put_on(devices, arrays, is_on):
    """Return arrays, those on the device for whose number `is_on` says so."""
    return {
        key: devices.to_device(array) if is_on(number) else array
        for number, (key, array) in enumerate(arrays.items())
    }


def file_of(array):
    """Return an array as a file holds it."""
    return np.ascontiguousarray(array).reshape(array.shape)


def assert_saved(comm, path, expected, *, use_binary_format):
    """Fail unless other readers find these bits, and verify the checksums of them."""
    whole = {key: file_of(array) for key, array in expected.items()}

    def check():
        if comm.rank == 0:
            assert_stock(path, whole, use_binary_format=use_binary_format)

    on_each(comm, check)
    report = mpisave.verify(path, comm=comm)
    assert_on_all_ranks(comm, report.arrays == len(expected), "arrays verified")


class TestSave:
    @pytest.mark.half
    @pytest.mark.parametrize(("use_binary_format", "cap", "place"), HOW)
    def test_bits_in_the_file_are_those_on_the_device(
        self, comm, shared_dir, devices, route, use_binary_format, cap, place
    ):
        own = arrays_of(comm.rank, devices.dtypes)
        state = put_on(
            devices, own, lambda number: PLACES[place](comm.rank, comm.size, number)
        )
        how = {"use_binary_format": use_binary_format, "max_grouped_size": cap}
        how |= route.arguments(comm)

        report = mpisave.save(state, shared_dir / "x.opt", **how)
        mpisave.save(own, shared_dir / "of the host.opt", **how)

        expected = {
            key: array
            for rank in range(comm.size)
            for key, array in arrays_of(rank, devices.dtypes).items()
        }
        assert_saved(
            comm, shared_dir / "x.opt", expected, use_binary_format=use_binary_format
        )
        of_host = (shared_dir / "of the host.opt").read_bytes()
        same = (shared_dir / "x.opt").read_bytes() == of_host
        assert_on_all_ranks(comm, same, "the file of the host's arrays")
        assert_on_all_ranks(comm, len(files_in(shared_dir)) == 2, "no staging file")
        if route.roots and comm.size > 1:  # some rank has a device in each place
            by = "device" if route.by_device else "host"
            assert_on_all_ranks(comm, report.transport == f"gather ({by})", by)
        if devices.library is not None:
            touched = any(state[key] is not own[key] for key in own)
            used = len(devices.library.calls) > 0
            assert_on_all_ranks(comm, used or not touched, "copied by the border")
            for_mpi = devices.library.buffer_nbytes + devices.library.viewed
            no_more = route.by_device or not for_mpi
            assert_on_all_ranks(comm, no_more, "MPI was given memory of the host")

    @pytest.mark.parametrize("cap", ["10K", "3G"])
    def test_arrays_may_lie_on_several_devices(
        self, comm, shared_dir, devices, route, cap
    ):
        places = {"long": 0, "other": devices.second, "strided": devices.second}

        def of(rank):
            found = {f"{key}{rank}": noise((70, 90), "f4", rank) for key in places}
            found[f"strided{rank}"] = found[f"strided{rank}"][:, ::3]
            return found

        state = {
            key: devices.to_device(array, place)
            for (key, array), place in zip(
                of(comm.rank).items(), places.values(), strict=True
            )
        }

        how = route.arguments(comm)
        mpisave.save(state, shared_dir / "x.opt", max_grouped_size=cap, **how)

        expected = {k: a for rank in range(comm.size) for k, a in of(rank).items()}
        assert_saved(comm, shared_dir / "x.opt", expected, use_binary_format=False)
        if devices.library is not None:
            near = set(devices.library.viewed) <= {0}
            assert_on_all_ranks(comm, near, "MPI knows the device that was tried")

        # Into arrays where they lie, new ones beside those, and on a named device.
        blank = {
            key: devices.to_device(np.zeros_like(array), place)
            for (key, array), place in zip(
                of(comm.rank).items(), places.values(), strict=True
            )
        }
        ask = {"keys": [(key,) for key in blank], "comm": comm}
        path = shared_dir / "x.opt"
        for found, where_to in [
            (mpisave.load(path, like=blank, into="inplace", **ask), places.values()),
            (mpisave.load(path, like=blank, **ask), places.values()),
            (mpisave.load(path, device="cuda:1", **ask), [1, 1, 1]),
        ]:
            numbers_of = [devices.ordinal(array) for array in found.values()]
            assert_on_all_ranks(comm, numbers_of == list(where_to), numbers_of)
            same = bits(devices, found)
            mine = {key: file_of(array) for key, array in of(comm.rank).items()}
            on_each(comm, lambda mine=mine, same=same: assert_equal_states(same, mine))

    @pytest.mark.mpi(min_size=2)
    def test_report_names_the_memory_that_gatherv_was_given(
        self, comm, shared_dir, devices, route
    ):
        if not route.roots:
            pytest.skip("nothing is gathered")
        columns = numbers((300, 4 * comm.size), "f4")
        start = (0, 4 * comm.rank)
        part = devices.to_device(columns[:, start[1] : start[1] + 4].copy())
        state = {"x": Shard(part, columns.shape, start)}

        report = mpisave.save(state, shared_dir / "x.opt", **route.arguments(comm))

        # What lies in short runs is exchanged in memory of the host.
        same = report.transport == "gather (host)"
        assert_on_all_ranks(comm, same, report.transport)
        assert_saved(
            comm, shared_dir / "x.opt", {"x": columns}, use_binary_format=False
        )

    def test_objects_of_which_the_interface_is_all_that_is_known_are_saved(
        self, comm, shared_dir, devices, route
    ):
        host = numbers((6, 5), "f4", comm.rank)
        state = {
            f"x{comm.rank}": devices.raw(host),
            f"frozen{comm.rank}": devices.raw(host[::2], read_only=True),
        }

        mpisave.save(state, shared_dir / "x.opt", **route.arguments(comm))

        expected = {}
        for rank in range(comm.size):
            expected[f"x{rank}"] = numbers((6, 5), "f4", rank)
            expected[f"frozen{rank}"] = numbers((6, 5), "f4", rank)[::2]
        assert_saved(comm, shared_dir / "x.opt", expected, use_binary_format=False)

    @pytest.mark.parametrize(
        ("use_binary_format", "cap"),
        [(False, 100), (True, "10K"), (False, "3G"), (True, "3G")],
    )
    def test_shards_of_a_device_make_the_array(
        self, comm, shared_dir, devices, route, use_binary_format, cap
    ):
        size = comm.size
        whole = {
            "rows": numbers((4 * size, 6), "f8"),
            "columns": numbers((5, 3 * size), "i2"),
            "turns": numbers((4 * size, 3, 2), "c8"),
        }
        many = {"rows": (size, 1), "columns": (1, size), "turns": (2 * size, 1, 2)}
        state = {}
        for key, array in whole.items():
            mine = grid(array.shape, many[key])[comm.rank :: size]
            parts = [array[where(*box)].copy("F") for box in mine]
            # Every second of them on the device.
            parts = [
                part if (number + comm.rank) % 2 else devices.to_device(part)
                for number, part in enumerate(parts)
            ]
            state[key] = Shards(
                *(
                    Shard(part, array.shape, start)
                    for part, (start, _) in zip(parts, mine, strict=True)
                )
            )

        mpisave.save(
            state,
            shared_dir / "x.opt",
            use_binary_format=use_binary_format,
            max_grouped_size=cap,
            **route.arguments(comm),
        )

        assert_saved(
            comm, shared_dir / "x.opt", whole, use_binary_format=use_binary_format
        )

    @pytest.mark.parametrize("replicas", ["check", "share"])
    def test_replicas_on_devices_are_saved_once(
        self, comm, shared_dir, devices, route, replicas
    ):
        whole = {"x": noise((90, 40), "f8"), "y": noise((64, 30), "i2")[::2].T}
        # On the host here, on the device there.
        state = put_on(devices, whole, lambda number: (number + comm.rank) % 3 > 0)

        with small_blocks(1024):
            mpisave.save(
                state, shared_dir / "x.opt", replicas=replicas, **route.arguments(comm)
            )
            assert_saved(comm, shared_dir / "x.opt", whole, use_binary_format=False)

    @pytest.mark.mpi(min_size=2)
    def test_replica_on_a_device_that_differs_is_found(
        self, comm, shared_dir, devices, route
    ):
        old = put_old(comm, shared_dir / "x.opt")
        host = noise((300, 7), "u1")
        if comm.rank == comm.size - 1:
            host[200, 3] ^= 1
        state = {
            "x": devices.to_device(host),
            "same": devices.to_device(noise(9, "u1")),
        }

        assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.save(state, old, replicas="check", **route.arguments(comm)),
            "1 replica(s) differ between ranks",
        )

        assert_nothing_lost(comm, old)

    @pytest.mark.half
    @pytest.mark.parametrize("cap", ["64K", "3G"])
    def test_many_small_arrays_are_saved(self, comm, shared_dir, devices, route, cap):
        many = 400 if devices.library else 2000  # the stand-in takes its time

        def every(rank):
            return {f"{rank}.{n}": noise(100, "u1", n + rank) for n in range(many)}

        data = devices.to_device(np.concatenate([*every(comm.rank).values()]))
        views = [data[100 * n : 100 * (n + 1)] for n in range(many)]
        state = dict(zip(every(comm.rank), views, strict=True))

        mpisave.save(
            state,
            shared_dir / "x.opt",
            max_grouped_size=cap,
            **route.arguments(comm),
        )

        expected = {k: a for rank in range(comm.size) for k, a in every(rank).items()}
        assert_saved(comm, shared_dir / "x.opt", expected, use_binary_format=False)

    def test_array_that_is_longer_than_a_round_is_saved(
        self, comm, shared_dir, devices, route
    ):
        def every(rank):
            whole = noise((500, 130), "f4", rank)
            return {
                f"rows{rank}": whole,
                f"odd{rank}": whole.view("u1")[:, 1::2],
                f"end{rank}": whole[:3, :1],
            }

        state = put_on(devices, every(comm.rank), lambda _: True)

        report = mpisave.save(
            state,
            shared_dir / "x.opt",
            max_grouped_size="64K",
            **route.arguments(comm),
        )

        expected = {k: a for rank in range(comm.size) for k, a in every(rank).items()}
        assert_saved(comm, shared_dir / "x.opt", expected, use_binary_format=False)
        is_alone = comm.size == 1 or not route.roots
        assert_on_all_ranks(comm, is_alone or report.rounds > 5, f"{report.rounds}")

    def test_work_that_still_runs_is_waited_for(self, comm, shared_dir, devices, route):
        host = noise((300, 40), "f4", comm.rank)

        state = {f"x{comm.rank}": devices.late(host)}
        mpisave.save(state, shared_dir / "x.opt", **route.arguments(comm))

        expected = {f"x{r}": noise((300, 40), "f4", r) for r in range(comm.size)}
        assert_saved(comm, shared_dir / "x.opt", expected, use_binary_format=False)


only_fake = pytest.mark.parametrize("devices", ["fake"], indirect=True)

# What a rank holds: of so many bytes, about.
KINDS = {
    "long": lambda n, rank, size: {f"x{rank}": noise(n, "u1")},
    "strided": lambda n, rank, size: {f"x{rank}": noise((n // 16, 4), "f8")[:, 1:3]},
    "fortran": lambda n, rank, size: {f"x{rank}": noise((n // 40, 10), "f4").T},
    "small": lambda n, rank, size: {
        f"{rank}.{i}": noise((n // 300, 2), "u1")[:, i % 2] for i in range(300)
    },
    "columns": lambda n, rank, size: {"x": columns_of(n, rank, size)},
}


def columns_of(nbytes, rank, size):
    whole = np.zeros((nbytes // 80, 10 * size), "f8")
    box = grid(whole.shape, (1, size))[rank]
    return Shard(whole[where(*box)].copy("F"), whole.shape, box[0])


@only_fake
@pytest.mark.half
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap_nbytes", [2**20, 10 * 2**10])
def test_memory_of_host_and_device_keeps_within_the_cap(
    comm, shared_dir, devices, route, monkeypatch, kind, cap_nbytes
):
    alive = devices.library.alive
    for module in ("devices", "transport.exchange"):
        monkeypatch.setattr(f"mpisave.{module}.np", Numpy(alive.empty))
    state = {
        key: Shard(devices.to_device(value.array), value.global_shape, value.start)
        if isinstance(value, Shard)
        else devices.to_device(value)
        for key, value in KINDS[kind](4 * cap_nbytes, comm.rank, comm.size).items()
    }

    for threads in [1] if route.roots else [1, 4]:
        monkeypatch.setattr("mpisave.saving.threads_of", lambda *_, n=threads: n)
        mpisave.save(
            state,
            shared_dir / "x.opt",
            max_grouped_size=cap_nbytes,
            **route.arguments(comm),
        )

    most = alive.most
    print(f"{kind}, {route}: {most} of {cap_nbytes}")
    assert_on_all_ranks(comm, 0 < most <= cap_nbytes, f"{most} of {cap_nbytes}")
    assert_on_all_ranks(comm, alive.now == 0, f"{alive.now} bytes are kept")


@pytest.mark.mpi(min_size=2)
@only_fake
def test_device_is_waited_for_once_and_before_anything_is_read(
    comm, shared_dir, devices, route, monkeypatch
):
    library = devices.library
    settle, when = library.settle, []

    def watched(arrays):
        when.append(len(library.calls))
        settle(arrays)

    monkeypatch.setattr(library, "settle", watched)
    own = arrays_of(comm.rank, devices.dtypes)
    state = put_on(devices, own, lambda number: comm.rank > 0)

    mpisave.save(state, shared_dir / "x.opt", **route.arguments(comm))

    assert_on_all_ranks(comm, when == ([0] if comm.rank else []), f"{when}")


LOST = "an illegal memory access was encountered"


def lose_device(devices, monkeypatch, name):
    """Have a call of the library fail; "wait": what its fences return."""
    fence = devices.library.fence

    def fail(*args):
        raise RuntimeError(LOST)

    def fail_late():
        # A device that is lost copies nothing any more.
        wait = fence()
        wait()
        return fail if name == "wait" else fail()

    if name in ("fence", "wait"):
        monkeypatch.setattr(devices.library, "fence", fail_late)
    else:
        monkeypatch.setattr(devices.library, name, fail)


COPIES = ["read", "read_box", "fence", "wait"]


@only_fake
@pytest.mark.half
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), -1])
@pytest.mark.parametrize(
    "name", ["settle", "pinned", "buffer", "copy", *COPIES], ids=str
)
def test_call_of_the_device_that_fails_on_one_rank_is_raised_on_all(
    comm, shared_dir, devices, route, name, victim
):
    victim %= comm.size
    if (name == "buffer" and not route.by_device) or (
        # Only what arrives on the device of a rank that writes is copied to its host.
        name == "copy" and not (route.by_device and comm.size > 1 and victim == 0)
    ):
        pytest.skip(f"{name} is not called here")
    if name == "buffer" and comm.size == 1:
        pytest.skip("nothing travels")
    if name == "pinned" and route.by_device and victim > 0:
        pytest.skip("who sends from a device has no memory of the host")
    old = put_old(comm, shared_dir / "x.opt")
    host = noise((70, 30), "f4", comm.rank)
    state = {
        f"long{comm.rank}": devices.to_device(host),
        f"strided{comm.rank}": devices.to_device(host[:, ::2]),
        f"small{comm.rank}": devices.to_device(host[:1]),
    }
    how = {"max_grouped_size": 5000, **route.arguments(comm)}
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            lose_device(devices, patch, name)
        text = str(
            assert_refused(
                comm,
                mpisave.CollectiveError,
                lambda: mpisave.save(state, old, **how),
                LOST,
                [victim],
            )
        )

    if name in ("read", "read_box"):
        assert f"{victim}'" in text, "which array"
    assert_nothing_lost(comm, old)
    # Nothing of it is in the way of what comes next.
    mpisave.save(state, old, **how)
    report = mpisave.verify(old, comm=comm)
    assert_on_all_ranks(comm, report.arrays == 3 * comm.size, "the next save")
    gc.collect()  # errors, and the frames that they came through
    now = devices.library.alive.now
    assert_on_all_ranks(comm, now == 0, f"no memory is kept, of {now} bytes,")


def bits(devices, value):
    """Return what was loaded with arrays as NumPy has them, and which were not."""
    if isinstance(value, dict):
        return {key: bits(devices, item) for key, item in value.items()}
    if isinstance(value, Shards):
        return [bits(devices, box.array) for box in value.boxes]
    if isinstance(value, Shard):
        return bits(devices, value.array)
    return devices.to_host(value) if devices.is_device(value) else value


def are_on_device(devices, state):
    """Return the keys of a flat state whose arrays are on a device."""
    arrays = {
        key: value.array if isinstance(value, Shard) else value
        for key, value in state.items()
    }
    return {key for key, array in arrays.items() if devices.is_device(array)}


@pytest.fixture(params=FORMATS)
def saved(request, comm, shared_dir, devices):
    """Return a file of the arrays of two ranks, and what is in it."""
    whole = arrays_of(0, devices.dtypes) | arrays_of(1, devices.dtypes)
    whole |= {"long": noise((3000, 500), "f4", 5), "columns": noise((600, 90), "f8")}
    whole = {key: file_of(array) for key, array in whole.items()}
    path = shared_dir / "saved.opt"
    if comm.rank == 0:
        state = {**whole, "step": 7, "deep": {"lr": 0.5}}
        mpisave.save(state, path, use_binary_format=request.param, comm=mpi().COMM_SELF)
    comm.Barrier()
    return path, whole


def mpi():
    from mpi4py import MPI

    return MPI


def blank_of(array, layout):
    """Return an array of zeros in memory of some order."""
    if layout == "fortran":
        return np.zeros(array.shape, array.dtype, order="F")
    if layout == "strided":
        return np.zeros((*array.shape, 2), array.dtype)[..., 0]
    if layout == "reversed":
        back = (..., *(slice(None, None, -1) for _ in array.shape))
        return np.zeros(array.shape, array.dtype)[back]
    return np.zeros(array.shape, array.dtype)


BLANKS = ["C", "fortran", "strided", "reversed"]


@only_fake
@pytest.mark.mpi(min_size=2)
def test_round_arrives_while_one_is_copied_and_one_written(
    comm, shared_dir, devices, monkeypatch
):
    trust_mpi(monkeypatch)
    third_began, waited = threading.Event(), []
    pwrite, gatherv = os.pwrite, Root._gatherv

    def watched(self, *args):
        watched.calls += 1
        if watched.calls == 3:
            third_began.set()
        gatherv(self, *args)

    def slow(descriptor, data, offset):
        # The first round on disk waits for the third Gatherv.
        if watched.calls and not waited:
            waited.append(third_began.wait(timeout=20))
        return pwrite(descriptor, data, offset)

    watched.calls = 0
    monkeypatch.setattr(Root, "_gatherv", watched)
    monkeypatch.setattr(os, "pwrite", slow)
    state = {f"x{comm.rank}": devices.to_device(numbers((4000,), "f8", comm.rank))}
    state = {} if comm.rank == 0 else state
    blank = {"mine": devices.to_device(np.zeros(0))} if comm.rank == 0 else {}

    mpisave.save(
        state | blank,
        shared_dir / "x.opt",
        max_grouped_size=20_000,
        **Route("one", by_device=True).arguments(comm),
    )

    assert_on_all_ranks(comm, comm.rank or waited == [True], "three at a time")


class TestLoad:
    @pytest.mark.parametrize("verify", [True, False])
    @pytest.mark.parametrize("together", [True, False])
    def test_whole_state_comes_to_the_device_of_every_rank(
        self, comm, devices, saved, verify, together
    ):
        path, whole = saved

        found = mpisave.load(
            path, device="cuda", verify=verify, comm=comm if together else None
        )

        def check():
            assert (found.pop("step"), found.pop("deep")) == (7, {"lr": 0.5})
            assert are_on_device(devices, found) == {*whole}
            assert_equal_states(bits(devices, found), whole)

        on_each(comm, check)

    @pytest.mark.parametrize("into", ["new", "inplace"])
    @pytest.mark.parametrize("verify", [True, False])
    def test_like_says_which_arrays_are_on_the_device(
        self, comm, devices, saved, into, verify
    ):
        path, whole = saved
        like = {}
        for number, (key, array) in enumerate(whole.items()):
            blank = blank_of(array, BLANKS[(number // 3 + comm.rank) % 4])
            is_host = (number + comm.rank) % 3 == 0
            like[key] = blank if is_host else devices.to_device(blank)
        on_device = are_on_device(devices, like)

        found = mpisave.load(
            path,
            like=like,
            into=into,
            keys=[(key,) for key in whole],
            verify=verify,
            comm=comm,
        )

        def check():
            assert are_on_device(devices, found) == on_device
            assert_equal_states(bits(devices, found), whole)
            for key, array in like.items():
                is_same = found[key] is array
                assert is_same == (into == "inplace"), key

        on_each(comm, check)

    @pytest.mark.parametrize(
        ("way", "into", "verify"),
        [
            ("rows", "new", True),
            ("rows", "inplace", False),
            ("columns", "new", False),
            ("columns", "inplace", True),
            ("boxes", "new", True),
            ("boxes", "inplace", False),
        ],
    )
    def test_shards_of_the_device_are_filled(
        self, comm, devices, saved, into, verify, way
    ):
        path, whole = saved
        many = {
            "rows": (comm.size, 1),
            "columns": (1, comm.size),
            "boxes": (2, 2 * comm.size),
        }[way]
        like, expected = {}, {}
        for key in ("long", "columns"):
            array = whole[key]
            mine = grid(array.shape, many)[comm.rank :: comm.size]
            parts = [array[where(*box)] for box in mine]
            blanks = [
                blank_of(part, BLANKS[(n + comm.rank) % 4])
                for n, part in enumerate(parts)
            ]
            shards = [
                Shard(devices.to_device(blank), array.shape, box[0])
                for blank, box in zip(blanks, mine, strict=True)
            ]
            like[key] = Shards(*shards)
            expected[key] = [part.copy() for part in parts]

        found = mpisave.load(
            path,
            like=like,
            into=into,
            keys=[("long",), ("columns",)],
            verify=verify,
            comm=comm,
        )

        def check():
            assert_equal_states(bits(devices, found), expected)
            every = [box.array for value in found.values() for box in value.boxes]
            assert all(map(devices.is_device, every))

        on_each(comm, check)

    def test_device_may_be_another_than_that_of_like(self, comm, devices, saved):
        path, whole = saved
        keys = ["long", "strided1.0", "0-d2.1"]
        blanks = {key: np.zeros_like(whole[key]) for key in keys}
        to_device = {key: devices.to_device(blank) for key, blank in blanks.items()}
        how = {"keys": [(key,) for key in keys], "comm": comm}

        up = mpisave.load(path, like=blanks, device="cuda", **how)
        down = mpisave.load(path, like=to_device, device="cpu", **how)

        def check():
            expected = {key: whole[key] for key in keys}
            assert are_on_device(devices, up) == {*keys}
            assert are_on_device(devices, down) == set()
            assert_equal_states(bits(devices, up), expected)
            assert_equal_states(down, expected)

        on_each(comm, check)

    @pytest.mark.filterwarnings("ignore:.* in (the file|like)")
    def test_what_the_file_lacks_is_kept_where_it_is(self, comm, devices, saved):
        path, whole = saved
        kept = devices.to_device(np.arange(5.0))
        like = {"long": devices.to_device(np.zeros_like(whole["long"])), "more": kept}

        found = mpisave.load(
            path, like=like, missing="keep", unexpected="skip", comm=comm
        )

        def check():
            assert found["more"] is kept
            assert devices.to_host(kept).tolist() == [0, 1, 2, 3, 4]
            assert_equal_states(bits(devices, found["long"]), whole["long"])

        on_each(comm, check)

    def test_array_of_another_library_is_filled_in_place(self, comm, devices, saved):
        path, whole = saved
        like = {"long": devices.raw(np.zeros_like(whole["long"]))}

        found = mpisave.load(path, like=like, keys=("long",), into="inplace", comm=comm)

        assert_on_all_ranks(comm, found["long"] is like["long"], "the same object")
        array = devices.to_host(like["long"])
        on_each(comm, lambda: assert_equal_states(array, whole["long"]))

    def test_read_only_array_on_one_rank_is_refused_on_all(self, comm, devices, saved):
        path, whole = saved
        is_last = comm.rank == comm.size - 1
        array = devices.raw(np.zeros_like(whole["long"]), read_only=is_last)

        assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(
                path, like={"long": array}, keys=("long",), into="inplace", comm=comm
            ),
            "'long' cannot be filled in place: the array is read-only",
            [comm.size - 1],
        )

        untouched = not devices.to_host(array).any()
        assert_on_all_ranks(comm, untouched, "what was refused is as it was")

    def test_flipped_bit_is_found_on_the_way_to_the_device(self, comm, devices, saved):
        path, whole = saved
        if comm.rank == 0:
            data = bytearray(path.read_bytes())
            data[data.find(whole["long"].tobytes()[10_000:10_100])] ^= 4
            path.write_bytes(data)
        comm.Barrier()

        assert_refused(
            comm,
            mpisave.FileFormatError,
            lambda: mpisave.load(path, device="cuda", comm=comm),
            "'long' is altered",
        )
        # What came before it is on its way no more.
        mpisave.load(path, device="cuda", keys=("columns",), comm=comm)

    def test_work_that_still_reads_an_array_sees_what_was_there(
        self, comm, devices, saved
    ):
        path, whole = saved
        before = noise(whole["long"].shape, "f4", 77)
        like = {"long": devices.to_device(before)}
        seen = devices.read_late(like["long"])

        mpisave.load(path, like=like, keys=("long",), into="inplace", comm=comm)

        on_each(comm, lambda: assert_equal_states(seen(), before))
        found = bits(devices, like)["long"]
        on_each(comm, lambda: assert_equal_states(found, whole["long"]))

    @only_fake
    @pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), -1])
    @pytest.mark.parametrize(
        "name", ["settle", "pinned", "write", "write_box", "fence", "wait"]
    )
    def test_call_of_the_device_that_fails_on_one_rank_is_raised_on_all(
        self, comm, devices, saved, name, victim
    ):
        path, whole = saved
        victim %= comm.size
        like = {
            "long": devices.to_device(np.zeros_like(whole["long"])),
            "columns": devices.to_device(np.zeros_like(whole["columns"]).copy("F")),
            "row0.0": devices.to_device(np.zeros_like(whole["row0.0"])),
        }
        keys = [(key,) for key in like]

        def load():
            mpisave.load(path, like=like, keys=keys, into="inplace", comm=comm)

        with pytest.MonkeyPatch.context() as patch:
            if comm.rank == victim:
                lose_device(devices, patch, name)
            assert_refused(comm, mpisave.CollectiveError, load, LOST, [victim])

        load()
        found = bits(devices, like)
        expected = {key: whole[key] for key in like}
        on_each(comm, lambda: assert_equal_states(found, expected))
