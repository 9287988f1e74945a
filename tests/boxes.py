"""Boxes of arrays, drawn by hypothesis, and what they are by painting them."""

import math

import numpy as np
from hypothesis import strategies as st

from mpisave.merging import merge
from mpisave.metadata import describe
from mpisave.shards import Shard, Shards
from mpisave.tree import flatten


def shapes(min_axes=1, max_axes=4, longest=6, shortest=1):
    """Draw a shape whose axes are short."""
    sides = st.integers(shortest, longest)
    return st.lists(sides, min_size=min_axes, max_size=max_axes).map(tuple)


@st.composite
def boxes_in(draw, shape):
    """Draw start and count of a box within `shape` that is not empty."""
    start = [draw(st.integers(0, n - 1)) for n in shape]
    count = [
        draw(st.integers(1, n - first)) for n, first in zip(shape, start, strict=True)
    ]
    return tuple(start), tuple(count)


@st.composite
def tilings(draw, min_axes=1, max_axes=4, longest=6, most=6):
    """Draw a shape, and boxes in any order that make it exactly."""
    shape = draw(shapes(min_axes, max_axes, longest))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, most)) if shape else 0):
        start, count = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, count[axis] - 1))
        # At zero, nothing is cut off.
        for first, n in ((0, at), (at, count[axis] - at)):
            if n:
                begin = start[axis] + first
                boxes.append(
                    (
                        (*start[:axis], begin, *start[axis + 1 :]),
                        (*count[:axis], n, *count[axis + 1 :]),
                    )
                )
    return shape, draw(st.permutations(boxes))


def where(start, count):
    """Return how NumPy indexes a box: an array also where there are no axes."""
    return (..., *(slice(a, a + n) for a, n in zip(start, count, strict=True)))


def painted(shape, boxes):
    """Return how many of the boxes each element of an array is in."""
    times = np.zeros(shape, np.int64)
    for start, count in boxes:
        times[where(start, count)] += 1
    return times


def points(boxes):
    """Return starts and counts of boxes as the library has them."""
    ndim = len(boxes[0][0]) if boxes else 0
    starts = np.array([start for start, _ in boxes], np.int64)
    counts = np.array([count for _, count in boxes], np.int64)
    return starts.reshape(len(boxes), ndim), counts.reshape(len(boxes), ndim)


def numbered(shape, dtype=np.int64):
    """Return an array whose elements are their own number in C order."""
    return np.arange(math.prod(shape)).astype(dtype).reshape(shape)


@st.composite
def held_by_ranks(draw, most_ranks=4, most_arrays=4, longest=5):
    """Draw the state of each rank, and the arrays that all of them hold together.

    Arrays are held whole by some ranks, or in boxes, each by one rank or more.
    """
    size = draw(st.integers(1, most_ranks))
    ranks = st.sets(st.integers(0, size - 1), min_size=1)
    states = [{} for _ in range(size)]
    arrays = {}
    for number in range(draw(st.integers(0, most_arrays))):
        key = f"x{number}"
        dtype = np.dtype(draw(st.sampled_from(["u1", "<f4", ">i2", "c16"])))
        if draw(st.booleans()):
            shape = draw(shapes(0, 3, longest, shortest=0))
            array = arrays[key] = noise(shape, dtype, number)
            for rank in draw(ranks):
                states[rank][key] = array
            continue
        shape, boxes = draw(tilings(0, 3, longest))
        array = arrays[key] = noise(shape, dtype, number)
        mine = [[] for _ in range(size)]
        for start, count in boxes:
            shard = Shard(array[where(start, count)], shape, start)
            for rank in draw(ranks):
                mine[rank].append(shard)
        for rank, held in enumerate(mine):
            if held:
                states[rank][key] = held[0] if len(held) == 1 else Shards(*held)
    for rank, state in enumerate(states):
        names = draw(st.permutations(sorted(state)))
        states[rank] = {key: state[key] for key in names}
    return states, arrays


def noise(shape, dtype, seed=0):
    """Return an array of any bytes."""
    shape = (shape,) if isinstance(shape, int) else shape
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return data.view(dtype).reshape(shape)


def made(shape, dtype, seed=0):
    """Return an array of any small numbers, as its dtype shows them."""
    return np.asarray(noise(shape, "u1", seed) % 101).astype(dtype).reshape(shape)


def described(states):
    """Return what all ranks hold together, and the arrays of each."""
    found = described_by_rank(states)
    return merge([one[2] for one in found]), [one[1] for one in found]


def described_by_rank(states):
    """Return what each rank makes of its state."""
    size = len(states)
    return [describe(flatten(state, rank, size)) for rank, state in enumerate(states)]
