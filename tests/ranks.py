"""What tests on several ranks need: oracles, groups of ranks, grids of boxes."""

import contextlib
import itertools
import math
import pickle
import traceback
import weakref

import h5py
import numpy as np
from boxes import where
from helpers import assert_equal_states, assert_on_all_ranks, files_in

import mpisave
from mpisave import Shard, Shards
from mpisave.dtypes import stored_dtype


def assert_refused(comm, error, call, match, failures=None):
    """Check that `call` raises the same on every rank; return the exception."""
    caught = None
    try:
        call()
    except Exception as exc:
        caught = exc
    kinds = comm.allgather(type(caught).__name__)
    texts = comm.allgather(str(caught))
    assert set(kinds) == {error.__name__}, (kinds, texts)
    assert len(set(texts)) == 1, texts
    assert match in texts[0], texts[0]
    assert isinstance(caught, mpisave.MpisaveError)
    if failures is not None:
        assert sorted(caught.failures) == failures, texts
    return caught


def put_old(comm, path):
    """Have an old state at `path`; return the path."""
    if comm.rank == 0:
        path.write_bytes(pickle.dumps("the old state"))
    comm.Barrier()
    return path


def assert_nothing_lost(comm, old):
    """Fail unless the old state is there, and nothing beside it."""
    comm.Barrier()
    assert_on_all_ranks(comm, files_in(old.parent) == [old.name], "no staging file")
    assert pickle.loads(old.read_bytes()) == "the old state"


def on_each(comm, check):
    """Run `check` on every rank; fail on all of them, alike, if it fails on any."""
    error = None
    try:
        check()
    except Exception:
        error = f"rank {comm.rank}:\n{traceback.format_exc()}"
    errors = [text for text in comm.allgather(error) if text]
    assert not errors, "\n".join(errors)


@contextlib.contextmanager
def first_ranks(comm, size):
    """Yield a communicator of the first `size` ranks, and None to the others."""
    from mpi4py import MPI

    is_in = comm.rank < size
    part = comm.Split(0 if is_in else MPI.UNDEFINED, comm.rank)
    try:
        yield part if is_in else None
    finally:  # an error is alike on all ranks of the part
        if is_in:
            part.Free()
        comm.Barrier()


def stock(value):
    """Return a state as readers see it that do not know mpisave."""
    if isinstance(value, dict):
        return {key: stock(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.view(stored_dtype(value.dtype))
    return value


def assert_stock(path, expected, *, use_binary_format):
    """Fail unless pickle.load or h5py reads the nested dict `expected`."""
    if not use_binary_format:
        assert_equal_states(pickle.loads(path.read_bytes()), stock(expected))
        return
    with h5py.File(path) as file:
        _assert_group(file, stock(expected))


def _assert_group(group, expected):
    names = {*group, *(n for n in group.attrs if not n.startswith("mpisave."))}
    assert names == {str(key) for key in expected}, group.name
    for key, value in expected.items():
        if isinstance(value, dict):
            _assert_group(group[str(key)], value)
        elif isinstance(value, np.ndarray):
            dataset = group[str(key)]
            assert dataset.chunks is None, dataset.name
            # Of no axes, h5py makes a number of the machine's byte order.
            found = np.asarray(dataset[()], dataset.dtype.str)
            assert_equal_states(found, value, dataset.name)
        else:
            assert group.attrs[str(key)] == value, (group.name, key)


def grid(shape, parts):
    """Return the boxes, each start and count, of an array cut along each axis."""
    sides = []
    for n, many in zip(shape, parts, strict=True):
        edges = [n * i // many for i in range(many + 1)]
        sides.append(list(itertools.pairwise(edges)))
    return [
        (tuple(a for a, _ in box), tuple(b - a for a, b in box))
        for box in itertools.product(*sides)
    ]


def held_boxes(array, boxes):
    """Return the shard or shards that these boxes of an array are, or None."""
    shards = [Shard(array[where(*box)].copy(), array.shape, box[0]) for box in boxes]
    if len(shards) > 1:
        return Shards(*shards)
    return shards[0] if shards else None


def numbers(shape, dtype, seed=0):
    """Return an array of numbers that are all different, as far as they can be."""
    count = math.prod(shape)
    return ((np.arange(count) + 1000 * seed) % 32749).astype(dtype).reshape(shape)


class Numpy:
    """NumPy, as one module sees it, with another way to allocate."""

    def __init__(self, empty):
        self.empty = empty

    def __getattr__(self, name):
        return getattr(np, name)


class Counted:
    """`numpy.empty` that counts the bytes that are alive."""

    def __init__(self):
        self.now = self.most = 0

    def __call__(self, shape, dtype=float):
        array = np.empty(shape, dtype)
        self.now += array.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(array, self._freed, array.nbytes)
        return array

    def _freed(self, nbytes):
        self.now -= nbytes


class Watched:
    """A communicator of mpisave that tells of calls that move payload.

    Each watcher is called with the arguments of the MPI call that it is named after.
    """

    def __init__(self, inner, **watchers):
        self.inner = inner
        self.raw = _WatchedRaw(inner.raw, watchers)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class _WatchedRaw:
    def __init__(self, inner, watchers):
        self.inner = inner
        self.watchers = watchers

    def __getattr__(self, name):
        call = getattr(self.inner, name)
        watcher = self.watchers.get(name)
        if watcher is None:
            return call

        def watched(*args, **kwargs):
            watcher(*args, **kwargs)
            return call(*args, **kwargs)

        return watched
