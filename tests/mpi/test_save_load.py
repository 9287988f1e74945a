"""What many ranks hold is in one file, for readers that are not mpisave."""

import hashlib
import io
import pickle

import h5py
import numpy as np
import pytest
from helpers import (
    assert_equal_states,
    assert_on_all_ranks,
    equal_on_rank,
    files_in,
)

import mpisave
from mpisave import plan

pytestmark = pytest.mark.mpi

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]


def arrays_of(rank):
    """Return what a rank holds alone: every kind of array."""
    rng = np.random.default_rng(rank)
    return {
        f"weight_{rank}": rng.standard_normal((50, 30 + rank)).astype(np.float32),
        f"fortran_{rank}": np.asfortranarray(rng.standard_normal((7, 11))),
        f"strided_{rank}": rng.integers(0, 99, (40, 6))[::3, ::2],
        f"big_endian_{rank}": np.arange(9, dtype=">i4") + rank,
        f"bool_{rank}": np.arange(5) % 2 == rank % 2,
        f"half_{rank}": rng.standard_normal(33).astype(np.float16),
        f"complex_{rank}": rng.standard_normal(4) + 1j,
        f"scalar_{rank}": np.array(rank + 0.5),
        f"empty_{rank}": np.zeros((0, 3), np.int8),
    }


def read_stock(path, use_binary_format):
    """Return a flat state as stock readers see it."""
    if not use_binary_format:
        with path.open("rb") as file:
            return pickle.load(file)
    with h5py.File(path) as file:
        return {key: dataset[()] for key, dataset in file.items()}


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("cap", [64, 1000, "1M", "3G"])
@pytest.mark.parametrize("root", [0, -1])
def test_union_of_all_ranks_is_read_by_stock_readers(
    comm, shared_dir, use_binary_format, cap, root
):
    path = shared_dir / "state.params"
    root %= comm.size

    report = mpisave.save(
        arrays_of(comm.rank),
        path,
        gather_to=root,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size=cap,
        comm=comm,
    )

    expected = {}
    for rank in range(comm.size):
        expected |= arrays_of(rank)

    def check():
        found = read_stock(path, use_binary_format)
        assert set(found) == set(expected)
        for key, array in expected.items():
            assert np.asarray(found[key]).dtype == array.dtype, key
            np.testing.assert_array_equal(found[key], array)
        assert_equal_states(mpisave.load(path), expected)

    equal_on_rank(comm, root, check)
    equal_on_rank(comm, 0, lambda: None)
    assert_on_all_ranks(comm, files_in(shared_dir) == ["state.params"], "one file")
    assert_on_all_ranks(comm, report.path == str(path), "report.path")
    assert_on_all_ranks(comm, report.nbytes == path.stat().st_size, "report.nbytes")
    assert_on_all_ranks(comm, (report.rounds > 0) == (comm.size > 1), "rounds")


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_nested_optimizer_state_keeps_keys_types_and_order(
    comm, shared_dir, use_binary_format
):
    path = shared_dir / "state.opt"
    mine = {
        "state": {comm.rank: {"exp_avg": np.full(3, comm.rank, np.float32), "step": 7}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1, 2]}],
        "master_weights": {f"w{comm.rank}": np.ones(2, np.float32)},
        "LR_Scheduler": {"last_epoch": 3, "last_lr": float("nan"), "name": None},
    }

    mpisave.save(
        mine,
        path,
        gather_to=0,
        state_type="opt",
        use_binary_format=use_binary_format,
        comm=comm,
    )

    every = range(comm.size)
    expected = {
        "state": {r: {"exp_avg": np.full(3, r, np.float32), "step": 7} for r in every},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1, 2]}],
        "master_weights": {f"w{r}": np.ones(2, np.float32) for r in every},
        "LR_Scheduler": {"last_epoch": 3, "last_lr": float("nan"), "name": None},
    }

    def check():
        assert_equal_states(mpisave.load(path), expected)
        if not use_binary_format:
            with path.open("rb") as file:
                assert_equal_states(pickle.load(file), expected)
        else:
            with h5py.File(path) as file:
                assert list(file["state"]) == [str(r) for r in every]
                assert file["state/0"].attrs["step"] == 7
                assert file["state/0/exp_avg"].chunks is None

    equal_on_rank(comm, 0, check)


@pytest.mark.mpi(min_size=2)
def test_replica_has_the_value_of_the_root_or_of_the_lowest_holder(comm, shared_dir):
    last = comm.size - 1
    mine = {"everywhere": np.full(4, comm.rank)}
    if comm.rank != last:
        mine["not on the root"] = np.full(5, comm.rank)

    mpisave.save(
        mine, shared_dir / "x.params", gather_to=last, state_type="params", comm=comm
    )

    def check():
        found = read_stock(shared_dir / "x.params", use_binary_format=False)
        np.testing.assert_array_equal(found["everywhere"], np.full(4, last))
        np.testing.assert_array_equal(found["not on the root"], np.zeros(5))

    equal_on_rank(comm, 0, check)


@pytest.mark.mpi(min_size=2)
def test_keys_come_in_the_order_of_the_lowest_rank_that_has_them(comm, shared_dir):
    names = [f"k{comm.rank}", "shared", f"z{comm.rank}"]
    mine = {name: np.zeros(1) for name in names}

    mpisave.save(
        mine, shared_dir / "x.params", gather_to=0, state_type="params", comm=comm
    )

    def check():
        found = list(read_stock(shared_dir / "x.params", use_binary_format=False))
        rest = [f"{c}{r}" for r in range(1, comm.size) for c in "kz"]
        assert found == ["k0", "shared", "z0", *rest]

    equal_on_rank(comm, 0, check)


@pytest.mark.mpi(min_size=2)
def test_roots_that_see_one_directory_write_one_file(comm, shared_dir):
    path = shared_dir / "x.params"

    report = mpisave.save(
        arrays_of(comm.rank),
        path,
        gather_to=list(range(comm.size)),
        state_type="params",
        comm=comm,
    )

    assert_on_all_ranks(comm, report.paths == (str(path),), "one path")
    assert_on_all_ranks(comm, files_in(shared_dir) == ["x.params"], "one file")
    expected = {k: v for r in range(comm.size) for k, v in arrays_of(r).items()}
    assert_on_all_ranks(comm, list(mpisave.load(path)) == list(expected), "keys")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_roots_with_directories_of_their_own_write_a_whole_file_each(
    comm, shared_dir, use_binary_format, monkeypatch
):
    # Node-local directories of one name: relative to where each rank works.
    local = shared_dir / f"node{comm.rank}"
    local.mkdir()
    monkeypatch.chdir(local)
    comm.Barrier()
    roots = [0, comm.size - 1]

    report = mpisave.save(
        arrays_of(comm.rank),
        "x.params",
        gather_to=roots,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size=4096,
        comm=comm,
    )

    comm.Barrier()
    expected = {k: v for r in range(comm.size) for k, v in arrays_of(r).items()}
    assert_on_all_ranks(comm, report.paths == ("x.params", "x.params"), "two files")
    for rank in range(comm.size):
        there = ["x.params"] if rank in roots else []
        assert files_in(shared_dir / f"node{rank}") == there
    for rank in roots:
        found = mpisave.load(shared_dir / f"node{rank}" / "x.params")
        assert_equal_states(found, expected)


@pytest.mark.mpi(min_size=2)
def test_rank_in_the_path_gives_each_root_a_file(comm, shared_dir):
    report = mpisave.save(
        arrays_of(comm.rank),
        shared_dir / "{rank}.params",
        gather_to=[0, 1],
        state_type="params",
        comm=comm,
    )

    names = ["0.params", "1.params"]
    assert_on_all_ranks(comm, files_in(shared_dir) == names, "two files")
    assert_on_all_ranks(comm, len(report.paths) == 2, "two paths")


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_file_object_on_the_root_receives_the_file(comm, use_binary_format):
    buffer = io.BytesIO() if comm.rank == 0 else None

    mpisave.save(
        arrays_of(comm.rank),
        buffer,
        gather_to=0,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size=1000,
        comm=comm,
    )

    expected = {k: v for r in range(comm.size) for k, v in arrays_of(r).items()}
    equal_on_rank(comm, 0, lambda: assert_equal_states(mpisave.load(buffer), expected))


def test_without_gathering_each_rank_saves_to_a_path_of_its_own(comm, shared_dir):
    report = mpisave.save(arrays_of(comm.rank), shared_dir / "r{rank}.pkl", comm=comm)

    path = shared_dir / f"r{comm.rank}.pkl"
    found = read_stock(path, use_binary_format=False)
    assert_on_all_ranks(comm, report.path == str(path), "path")
    assert_on_all_ranks(comm, list(found) == list(arrays_of(comm.rank)), "keys")


@pytest.mark.mpi(min_size=2)
def test_halves_of_a_job_save_at_the_same_time(comm, shared_dir):
    half = comm.Split(comm.rank % 2, comm.rank)
    path = shared_dir / f"half{comm.rank % 2}.params"

    for _ in range(3):
        mpisave.save(
            arrays_of(comm.rank),
            path,
            gather_to=half.size - 1,
            state_type="params",
            comm=half,
        )

    mine = range(comm.rank % 2, comm.size, 2)
    expected = {k: v for rank in mine for k, v in arrays_of(rank).items()}
    assert_equal_states(mpisave.load(path), expected)
    half.Free()


def test_counts_stay_below_the_limit_of_a_c_int(comm, shared_dir, monkeypatch):
    monkeypatch.setattr(plan, "MAX_COUNT", 64)
    largest = [0]

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def Igatherv(self, send, received, root):
            if received is not None:
                largest[0] = max(
                    [largest[0], *received[1], *received[2], sum(received[1])]
                )
            return self.inner.Igatherv(send, received, root=root)

    import mpisave.moving as steps

    gather = steps.Gather

    def spied(comm, *rest, **how):
        own = Spy(comm)
        own.raw = Spy(comm.raw)
        return gather(own, *rest, **how)

    monkeypatch.setattr(steps, "Gather", spied)

    mpisave.save(
        arrays_of(comm.rank),
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        comm=comm,
    )

    assert_on_all_ranks(comm, largest[0] <= 64, "counts and displacements")
    assert_on_all_ranks(comm, comm.size == 1 or comm.rank or largest[0], "rounds")
    expected = {k: v for r in range(comm.size) for k, v in arrays_of(r).items()}
    assert_equal_states(mpisave.load(shared_dir / "x.params"), expected)


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_ten_thousand_tiny_arrays_from_all_ranks(comm, shared_dir, use_binary_format):
    mine = {f"{comm.rank}.{i}": np.array([i, comm.rank]) for i in range(10_000)}
    mine = dict(list(mine.items())[:: comm.size])

    mpisave.save(
        mine,
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        use_binary_format=use_binary_format,
        max_grouped_size="1M",
        comm=comm,
    )

    def check():
        found = read_stock(shared_dir / "x.params", use_binary_format)
        assert len(found) == comm.size * len(range(0, 10_000, comm.size))
        for key, array in found.items():
            rank, number = map(int, key.split("."))
            assert array.tolist() == [number, rank]

    equal_on_rank(comm, 0, check)


@pytest.mark.slow
@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_five_gib_on_two_ranks_with_an_array_beyond_2_gib(
    comm, shared_dir, use_binary_format
):
    if comm.size != 2:
        pytest.skip("five GiB on two ranks")
    rng = np.random.default_rng(comm.rank)
    sizes = [2560 * 2**20] if comm.rank else [2**29] * 5
    mine = {
        f"{comm.rank}.{i}": rng.integers(0, 256, n, np.uint8)
        for i, n in enumerate(sizes)
    }
    digests = {key: hashlib.blake2b(value).hexdigest() for key, value in mine.items()}
    expected = {k: v for part in comm.allgather(digests) for k, v in part.items()}

    mpisave.save(
        mine,
        shared_dir / "x.params",
        gather_to=0,
        state_type="params",
        use_binary_format=use_binary_format,
        comm=comm,
    )
    del mine

    def check():
        found = read_stock(shared_dir / "x.params", use_binary_format)
        assert {k: hashlib.blake2b(v).hexdigest() for k, v in found.items()} == expected

    equal_on_rank(comm, 0, check)
