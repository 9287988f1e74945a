"""Random states from any number of writers are what any number of readers get."""

import pickle

import h5py
import numpy as np
import pytest
from helpers import assert_on_all_ranks, equal_on_rank

import mpisave
from mpisave import PerRank, Shard, Shards

pytestmark = pytest.mark.mpi

DTYPES = ["<f4", "<f8", ">i4", "u1", "?", "<c8", "<f2", "<i8"]


def random_array(rng, shape):
    dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    # Any bits: NaN, subnormal, negative zero.
    data = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return data.view(dtype).reshape(shape)


def random_shape(rng):
    axes = rng.integers(0, 4)
    longest = [0, 3000, 90, 20][axes]
    if rng.random() < 0.05:
        return (0,) * int(axes)
    return tuple(int(n) for n in rng.integers(1, longest + 1, axes))


def random_tiling(rng, shape):
    """Return boxes, as start and count, that make an array exactly."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.integers(0, 6)):
        start, count = boxes.pop(rng.integers(len(boxes)))
        axis = rng.integers(len(shape))
        at = int(rng.integers(0, count[axis] + 1))
        for first, n in ((0, at), (at, count[axis] - at)):
            begin, sides = list(start), list(count)
            begin[axis], sides[axis] = begin[axis] + first, n
            boxes.append((tuple(begin), tuple(sides)))
    return boxes


def box_of(array, start, count):
    return array[tuple(slice(a, a + n) for a, n in zip(start, count, strict=True))]


def memory_of(rng, array):
    """Return the same elements, in memory of some other order."""
    kind = rng.integers(3)
    if kind == 0 or array.ndim == 0:
        return array.copy()
    if kind == 1:
        return np.asfortranarray(array)
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


class Example:
    """A random state: what is to be in the file, and what each rank holds of it."""

    def __init__(self, seed, writers):
        rng = np.random.default_rng(seed)
        self.whole = {}
        self.held = [{} for _ in range(writers)]
        for number in range(rng.integers(1, 9)):
            key = f"key{number}"
            array = random_array(rng, random_shape(rng))
            self.whole[key] = array
            kind = rng.integers(3)
            if kind == 0 and array.ndim and array.size:
                self._shard(rng, key, array)
            elif kind == 1:
                for rank in rng.permutation(writers)[: rng.integers(1, writers + 1)]:
                    self.held[rank][key] = memory_of(rng, array)
            else:
                self.held[rng.integers(writers)][key] = memory_of(rng, array)
        for rank, held in enumerate(self.held):
            held["small"] = {"lr": 0.5, 3: [1, "x", None]}
            held["random"] = PerRank({"seed": rank, "words": np.full(5, rank)})

    def _shard(self, rng, key, array):
        boxes = [[] for _ in self.held]
        for start, count in random_tiling(rng, array.shape):
            holders = {int(rng.integers(len(self.held)))}
            if rng.random() < 0.3:
                holders.add(int(rng.integers(len(self.held))))
            for rank in holders:
                part = memory_of(rng, box_of(array, start, count))
                boxes[rank].append(Shard(part, array.shape, start))
        for held, mine in zip(self.held, boxes, strict=True):
            if mine:
                held[key] = mine[0] if len(mine) == 1 else Shards(*mine)


def same(found, expected):
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


def random_like(rng, whole):
    """Return some boxes of some arrays, and what is to be in them."""
    like, expected = {}, {}
    for key, array in whole.items():
        kind = rng.integers(3)
        if kind == 0:
            continue
        if kind == 1 or not array.ndim:
            like[key] = memory_of(rng, np.zeros_like(array))
            expected[key] = array
            continue
        start = tuple(int(rng.integers(0, n + 1)) for n in array.shape)
        count = tuple(
            int(rng.integers(0, n - first + 1))
            for n, first in zip(array.shape, start, strict=True)
        )
        part = box_of(array, start, count)
        like[key] = Shard(memory_of(rng, np.zeros_like(part)), array.shape, start)
        expected[key] = part
    return like, expected


def run(comm, folder, seed):
    rng = np.random.default_rng(seed)
    writers, readers = (int(n) for n in rng.integers(1, comm.size + 1, 2))
    use_binary_format, gathers = rng.random() < 0.5, rng.random() < 0.5
    cap = ["3G", "1M", "10K", 777][rng.integers(4)]
    replicas = ["first", "check", "share"][rng.integers(3)]
    protocol = [2, 3, 4, 5][rng.integers(4)]
    verify, into = bool(rng.random() < 0.7), ["new", "inplace"][rng.integers(2)]
    example = Example(seed, writers)
    path = folder / f"{seed}.opt"

    writing = comm.Split(comm.rank < writers, comm.rank)
    if comm.rank < writers:
        mpisave.save(
            example.held[comm.rank],
            path,
            state_type="opt",
            use_binary_format=bool(use_binary_format),
            gather_to=int(rng.integers(writers)) if gathers else None,
            max_grouped_size=cap,
            replicas=replicas,
            protocol=protocol,
            durable=False,
            comm=writing,
        )
    writing.Free()
    comm.Barrier()

    def check_with_stock_readers():
        if use_binary_format:
            with h5py.File(path) as file:
                stored = {key: file[key][...] for key in example.whole}
        else:
            with path.open("rb") as file:
                stored = pickle.load(file)
        for key, array in example.whole.items():
            assert same(np.asarray(stored[key]), array), key

    equal_on_rank(comm, 0, check_with_stock_readers)
    reading = comm.Split(comm.rank < readers, comm.rank)
    bad = []
    if comm.rank < readers:
        own = np.random.default_rng([seed, comm.rank])
        like, expected = random_like(own, example.whole)
        like["random"] = PerRank(None)
        found = mpisave.load(
            path,
            comm=reading,
            like=like,
            into=into,
            verify=verify,
            unexpected="skip",
            per_rank=lambda rank, saved: rank % saved,
        )
        for key, array in expected.items():
            part = found[key].array if isinstance(found[key], Shard) else found[key]
            if not same(part, array):
                bad.append(key)
        if found["random"].value["seed"] != comm.rank % writers:
            bad.append("random")
        every = mpisave.load(path, comm=reading, per_rank=lambda rank, saved: 0)
        bad += [k for k, array in example.whole.items() if not same(every[k], array)]
    reading.Free()
    assert_on_all_ranks(comm, not bad, f"seed {seed}, {writers} to {readers}: {bad}")


@pytest.mark.filterwarnings("ignore:.* in the file, but in no rank's like")
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_states_survive_bit_for_bit(comm, shared_dir, first):
    for seed in range(first, first + 10):
        run(comm, shared_dir, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* in the file, but in no rank's like")
@pytest.mark.parametrize("first", range(1000, 3000, 50))
def test_many_random_states_survive_bit_for_bit(comm, shared_dir, first):
    for seed in range(first, first + 50):
        run(comm, shared_dir, seed)
