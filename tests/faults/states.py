"""The states that are saved, and which of them a file holds."""

import pickle
from dataclasses import dataclass

import h5py
import numpy as np

import mpisave

FORMATS = ("pickle", "hdf5")
ROADS = ("gather", "direct")
OLD, NEW = 1, 2

# Elements of float64 in all, divided among the ranks: 2 MB, and small ones.
_MANY = 240_000


@dataclass(frozen=True, slots=True)
class Case:
    """How a state is saved."""

    format: str
    road: str
    size: int

    def __str__(self):
        return f"{self.format}, {self.road}, {self.size} rank(s)"


def cases(sizes, formats=FORMATS, roads=ROADS):
    return [Case(f, r, n) for f in formats for r in roads for n in sizes]


def _whole(size, tag):
    columns = np.arange(24 * 8 * size, dtype=np.int32).reshape(24, 8 * size)
    return columns + np.int32(1000 * tag)


def held_by(rank, size, tag):
    """Return what a rank holds: arrays of its own, a replica, and part of an array."""
    whole = _whole(size, tag)
    start = 8 * rank
    return {
        f"large{rank}": np.arange(_MANY // size) * 0.5 + rank + 100 * tag,
        f"small{rank}": np.full(7, (10 * rank + tag) % 256, np.uint8),
        f"table{rank}": np.full((100, 13), rank + tag / 8, np.float32),
        "replica": np.full(300, tag, np.int32),
        # In short runs of the file: these are exchanged before they are written.
        "columns": mpisave.Shard(
            whole[:, start : start + 8].copy(), whole.shape, (0, start)
        ),
    }


def whole_state(size, tag):
    """Return what the file of all ranks holds, without asking mpisave."""
    state = {}
    for rank in range(size):
        state |= held_by(rank, size, tag)
    return state | {"columns": _whole(size, tag)}


def arguments(case):
    gather_to = 0 if case.road == "gather" else None
    return {
        "use_binary_format": case.format == "hdf5",
        "gather_to": gather_to,
        "state_type": "params",
        # Several rounds of gathering.
        "max_grouped_size": 512 * 1024,
    }


def file_name(case):
    return "state.params" if case.format == "pickle" else "state-h5.params"


def put_old(case, path):
    """Put a file of the old state at `path`, and return its bytes."""
    mpisave.save(
        whole_state(case.size, OLD), path, use_binary_format=case.format == "hdf5"
    )
    assert which(case, path) == "old"
    return path.read_bytes()


def stock_load(case, path):
    if case.format == "pickle":
        with path.open("rb") as file:
            return pickle.load(file)
    with h5py.File(path, "r") as file:
        return {key: file[key][()] for key in file}


def which(case, path, tags=None):
    """Return "old", "new" or what is wrong, as mpisave and a stock reader see it."""
    tags = tags or {"old": OLD, "new": NEW}
    found = []
    for load in (lambda: mpisave.load(path), lambda: stock_load(case, path)):
        try:
            found.append(_tag_of(load(), case.size, tags))
        except Exception as exc:
            found.append(f"{type(exc).__name__}: {exc}")
    if found[0] == found[1]:
        return found[0]
    return f"mpisave.load: {found[0]}; stock reader: {found[1]}"


def _tag_of(state, size, tags):
    for name, tag in tags.items():
        if is_equal(state, whole_state(size, tag)):
            return name
    return "neither: a mixture"


def is_equal(found, expected):
    return set(found) == set(expected) and all(
        np.asarray(found[k]).dtype == v.dtype
        and np.asarray(found[k]).shape == v.shape
        and np.array_equal(found[k], v)
        for k, v in expected.items()
    )


def is_one_of_many(state, size, tags):
    """Return whether a state is whole, and of one of these tags."""
    tag = int(np.asarray(state["replica"])[0])
    return tag in tags and is_equal(state, whole_state(size, tag))
