"""Boxes of global arrays: what a rank holds of one, and the geometry of it. Pure."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A point of a global array, or the number of elements along each axis.
Point = tuple[int, ...]
Points = npt.NDArray[np.int64]  # shape (n, ndim)

# The grid in which a gap is looked for, in cells.
_LARGEST_GRID = 10_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The box of a global array that this rank holds.

    Parameters
    ----------
    array : array of any kind that a state may hold
        The elements of the box; its shape is that of the box.
    global_shape : sequence of int
        Shape of the whole array.
    start : sequence of int
        Where the box begins: the index, in the whole array, of its first element.
    """

    array: Any
    global_shape: Point
    start: Point

    def __post_init__(self) -> None:
        for name in ("global_shape", "start"):
            numbers = tuple(operator.index(n) for n in getattr(self, name))
            object.__setattr__(self, name, numbers)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Shards:
    """Several boxes of one global array that this rank holds.

    Parameters
    ----------
    *boxes : Shard
        Of the same global shape and dtype; at least one.
    """

    boxes: tuple[Shard, ...]

    def __init__(self, *boxes: Shard) -> None:
        if not boxes or not all(isinstance(box, Shard) for box in boxes):
            raise TypeError("Shards are made of one Shard or more")
        object.__setattr__(self, "boxes", boxes)


def boxes_of(value: object) -> tuple[Shard, ...] | None:
    """Return the boxes of a leaf, or None if it is no shard."""
    if isinstance(value, Shard):
        return (value,)
    return value.boxes if isinstance(value, Shards) else None


def lies_within(shape: Point, start: Point, count: Point) -> bool:
    """Return whether a box lies in an array, and has as many axes."""
    return len(shape) == len(start) == len(count) and all(
        first >= 0 and first + n <= total
        for first, n, total in zip(start, count, shape, strict=True)
    )


def is_countable(shape: Point, itemsize: int) -> bool:
    """Return whether NumPy has arrays of a shape, which counts their bytes in 64 bits.

    Axes of no elements count as others do.
    """
    return math.prod(max(n, 1) for n in shape) * itemsize < 2**63


def show_box(start: Sequence[int], count: Sequence[int]) -> str:
    """Return a box as NumPy would index it: ``[0:2, 4:8]``."""
    sides = zip(start, count, strict=True)
    return f"[{', '.join(f'{first}:{first + n}' for first, n in sides)}]"


def run_elements(shape: Point, counts: Points) -> npt.NDArray[np.int64]:
    """Return how many elements of each box lie together in the array's C order.

    Parameters
    ----------
    shape : tuple of int, length ndim
        Of the global array.
    counts : ndarray of int64, shape (n, ndim)
        Elements of each box along each axis.

    Returns
    -------
    ndarray of int64, shape (n,)
        Elements of one run; a box is made of runs of one length.
    """
    run = np.ones(len(counts), np.int64)
    is_open = np.ones(len(counts), bool)  # all axes behind this one are whole
    for axis in reversed(range(len(shape))):
        run *= np.where(is_open, counts[:, axis], 1)
        is_open &= counts[:, axis] == shape[axis]
    return run


def run_starts(shape: Point, start: Point, count: Point) -> npt.NDArray[np.int64]:
    """Return the first element of each run of a box, ascending, in C order."""
    return spans(shape, start, count, 0)[0]


def spans(
    shape: Point, start: Point, count: Point, most_gap: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Return runs of elements that hold a box, with gaps of few elements in them.

    Parameters
    ----------
    shape : tuple of int
        Of the global array.
    start, count : tuple of int
        The box, which is not empty.
    most_gap : int
        Elements that are not of the box, and yet are taken along. Zero: none.

    Returns
    -------
    firsts : ndarray of int64, shape (n,)
        The first element of each run, ascending, in C order.
    length : int
        Elements of each of them.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    length, outer = 1, len(shape)
    for axis in reversed(range(len(shape))):
        if count[axis] > 1 and strides[axis] - length > most_gap:
            break
        length += (count[axis] - 1) * strides[axis]
        outer = axis
    first = np.zeros(1, np.int64)
    for axis, stride in enumerate(strides):
        n = count[axis] if axis < outer else 1
        along = (start[axis] + np.arange(n, dtype=np.int64)) * stride
        first = np.add.outer(first, along).reshape(-1)
    return first, length


def boxes_of_range(
    shape: Point, first: int, stop: int
) -> Iterator[tuple[Point, Point]]:
    """Yield the boxes that elements `first` to `stop` of the C order are made of.

    In order, each as start and count, each one run; at most ``2 * ndim - 1`` of them.
    """
    if first >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    top, bottom = -(-first // row), stop // row
    whole = (0,) * (len(shape) - 1)

    def within(at: int, begin: int, end: int) -> Iterator[tuple[Point, Point]]:
        for start, count in boxes_of_range(shape[1:], begin, end):
            yield (at, *start), (1, *count)

    if top > bottom:  # all within one row
        yield from within(bottom, first - bottom * row, stop - bottom * row)
        return
    yield from within(top - 1, first - (top - 1) * row, row) if first % row else ()
    if bottom > top:
        yield (top, *whole), (bottom - top, *shape[1:])
    yield from within(bottom, 0, stop - bottom * row) if stop % row else ()


def common(
    start: Point, count: Point, other_start: Point, other_count: Point
) -> tuple[Point, Point] | None:
    """Return the box that two boxes share, or None if there is none."""
    first = tuple(map(max, start, other_start))
    n = tuple(
        min(a + m, b + k) - f
        for a, m, b, k, f in zip(
            start, count, other_start, other_count, first, strict=True
        )
    )
    return (first, n) if all(m > 0 for m in n) else None


def slices(start: Point, count: Point, origin: Point) -> tuple[slice, ...]:
    """Return how to index a box within an array that begins at `origin`."""
    return tuple(
        slice(first - zero, first - zero + n)
        for first, n, zero in zip(start, count, origin, strict=True)
    )


def is_tiling(shape: Point, starts: Points, counts: Points) -> bool:
    """Return whether distinct boxes that are not empty make the array exactly.

    Notes
    -----
    O(n log n) in the number of boxes, for each set of axes along which they are cut.
    The mixed difference of the sum of the boxes' indicator functions is a sum of signed
    corners; it has to be that of the array.
    """
    cut = [
        axis
        for axis, n in enumerate(shape)
        if (starts[:, axis] != 0).any() or (counts[:, axis] != n).any()
    ]
    if not cut:
        return len(starts) == 1
    starts, stops = starts[:, cut], starts[:, cut] + counts[:, cut]
    ends = np.array([shape[axis] for axis in cut], np.int64)
    if len(cut) == 1:
        order = np.argsort(starts[:, 0])
        first, last = starts[order, 0], stops[order, 0]
        whole = first[0] == 0 and last[-1] == ends[0]
        return bool(whole and (first[1:] == last[:-1]).all())
    strides = np.array(
        [math.prod(int(n) + 1 for n in ends[axis + 1 :]) for axis in range(len(cut))],
        np.int64,
    )
    corners, signs = _corners(starts, stops, strides)
    outer, outer_signs = _corners(
        np.zeros((1, len(cut)), np.int64), ends[None], strides
    )
    places, where = np.unique(np.append(corners, outer), return_inverse=True)
    left = np.zeros(len(places), np.int64)
    np.add.at(left, where, np.append(signs, -outer_signs))
    return not left.any()


def _corners(
    starts: Points, stops: Points, strides: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the corners of boxes, as numbers, and their signs."""
    corners = np.zeros((1, len(starts)), np.int64)
    signs = np.ones((1, len(starts)), np.int64)
    for axis, stride in enumerate(strides):
        low, high = starts[:, axis] * stride, stops[:, axis] * stride
        corners = np.concatenate([corners + low, corners + high])
        signs = np.concatenate([signs, -signs])
    return corners.reshape(-1), signs.reshape(-1)


def overlap(starts: Points, counts: Points) -> tuple[int, int] | None:
    """Return two boxes that share an element, or None. O(n^2): for errors."""
    stops = starts + counts
    for box in range(len(starts)):
        later = slice(box + 1, None)
        share = np.minimum(stops[box], stops[later]) > np.maximum(
            starts[box], starts[later]
        )
        found = np.flatnonzero(share.all(axis=1))
        if found.size:
            return box, box + 1 + int(found[0])
    return None


def gap(shape: Point, starts: Points, counts: Points) -> tuple[Point, Point] | None:
    """Return a box that no box covers, or None where that takes too much to find."""
    edges = [
        np.unique(np.concatenate([[0, n], starts[:, axis], (starts + counts)[:, axis]]))
        for axis, n in enumerate(shape)
    ]
    cells = [len(along) - 1 for along in edges]
    if math.prod(cells) > _LARGEST_GRID:
        return None
    is_covered = np.zeros(cells, bool)
    for start, count in zip(starts, counts, strict=True):
        box = tuple(
            slice(*np.searchsorted(along, [first, first + n]))
            for along, first, n in zip(edges, start, count, strict=True)
        )
        is_covered[box] = True
    missing = np.argwhere(~is_covered)
    if not len(missing):
        return None
    start = tuple(int(along[i]) for along, i in zip(edges, missing[0], strict=True))
    stop = tuple(int(along[i + 1]) for along, i in zip(edges, missing[0], strict=True))
    return start, tuple(b - a for a, b in zip(start, stop, strict=True))
