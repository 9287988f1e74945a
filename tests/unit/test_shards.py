"""Geometry of boxes, against NumPy and against painting every element."""

import math

import numpy as np
import pytest
from boxes import boxes_in, numbered, painted, points, shapes, tilings, where
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mpisave
from mpisave import shards
from mpisave.shards import (
    boxes_of,
    boxes_of_range,
    common,
    gap,
    is_tiling,
    overlap,
    run_elements,
    run_starts,
    show_box,
    slices,
)

PROPERTY = settings(max_examples=100, deadline=None)


@st.composite
def ranges(draw):
    shape = draw(shapes(0, 5, longest=5))
    total = math.prod(shape)
    first = draw(st.integers(0, total))
    return shape, first, draw(st.integers(first, total))


@st.composite
def box_and_shape(draw, min_axes=1):
    shape = draw(shapes(min_axes, 5, longest=5))
    return shape, *draw(boxes_in(shape))


@st.composite
def several_boxes(draw, most=6):
    """Draw distinct boxes that need not make their array."""
    shape = draw(shapes(1, 4, longest=4))
    found = draw(st.lists(boxes_in(shape), max_size=most, unique=True))
    return shape, found


class TestRange:
    @PROPERTY
    @given(ranges())
    @example(((), 0, 1))
    @example(((), 0, 0))
    @example(((3, 4, 5), 0, 60))
    @example(((3, 4, 5), 19, 41))
    def test_boxes_of_a_range_are_its_elements_in_order(self, case):
        shape, first, stop = case

        found = list(boxes_of_range(shape, first, stop))

        array = numbered(shape)
        parts = [array[where(start, count)].reshape(-1) for start, count in found]
        taken = np.concatenate([np.zeros(0, np.int64), *parts])
        assert taken.tolist() == list(range(first, stop))

    @PROPERTY
    @given(ranges())
    def test_boxes_of_a_range_are_few_runs_and_none_is_empty(self, case):
        shape, first, stop = case

        found = list(boxes_of_range(shape, first, stop))

        assert len(found) <= max(1, 2 * len(shape) - 1)
        for start, count in found:
            runs = run_elements(shape, np.array([count], np.int64).reshape(1, -1))
            assert math.prod(count) == runs[0] > 0
            assert len(start) == len(count) == len(shape)

    def test_range_of_a_huge_array_is_found_without_its_elements(self):
        shape = (2**20, 2**20, 2**20)

        found = list(boxes_of_range(shape, 5, 2**60 - 7))

        assert len(found) == 5
        assert sum(math.prod(count) for _, count in found) == 2**60 - 12


class TestRuns:
    @PROPERTY
    @given(box_and_shape(min_axes=0))
    def test_runs_of_a_box_are_its_elements_in_order(self, case):
        shape, start, count = case
        length = int(run_elements(shape, np.array([count]).reshape(1, -1))[0])

        found = run_starts(shape, start, count)

        taken = (found[:, None] + np.arange(length)).reshape(-1)
        expected = numbered(shape)[where(start, count)].reshape(-1)
        assert found.dtype == np.int64
        assert taken.tolist() == expected.tolist()

    @PROPERTY
    @given(box_and_shape())
    def test_runs_are_of_the_elements_that_are_sure_to_lie_together(self, case):
        shape, start, count = case
        whole = 1  # what is behind the last axis that is cut, and that axis
        for n, total in zip(count[::-1], shape[::-1], strict=True):
            whole *= n
            if n != total:
                break

        found = run_elements(shape, np.array([count, shape], np.int64))

        assert found.tolist() == [whole, math.prod(shape)]
        assert len(run_starts(shape, start, count)) == math.prod(count) // whole

    def test_rows_are_one_run_and_columns_as_many_as_there_are_rows(self):
        counts = np.array([[2, 8], [10, 2], [1, 3], [10, 8]], np.int64)

        assert run_elements((10, 8), counts).tolist() == [16, 2, 3, 80]
        assert run_starts((10, 8), (4, 0), (2, 8)).tolist() == [32]
        assert run_starts((10, 8), (0, 6), (10, 2)).tolist() == list(range(6, 80, 8))

    def test_starts_beyond_2_to_the_31_do_not_wrap(self):
        shape, start = (2**40, 3), (2**40 - 2, 1)

        found = run_starts(shape, start, (2, 1))

        assert found.tolist() == [3 * (2**40 - 2) + 1, 3 * (2**40 - 1) + 1]


class TestTwoBoxes:
    @PROPERTY
    @given(st.data())
    def test_common_box_is_what_is_painted_twice(self, data):
        shape = data.draw(shapes(1, 4))
        one, other = (data.draw(boxes_in(shape)) for _ in range(2))

        found = common(*one, *other)

        twice = painted(shape, [one, other]) == 2
        if found is None:
            assert not twice.any()
        else:
            assert (painted(shape, [found]).astype(bool) == twice).all()
            assert all(type(n) is int for point in found for n in point)

    def test_boxes_of_no_axes_share_their_element(self):
        assert common((), (), (), ()) == ((), ())

    def test_boxes_that_touch_share_nothing(self):
        assert common((0, 0), (2, 4), (2, 0), (2, 4)) is None
        assert common((0, 0), (2, 4), (1, 4), (2, 4)) is None
        assert common((0, 0), (2, 4), (1, 3), (2, 4)) == ((1, 3), (1, 1))

    @PROPERTY
    @given(st.data())
    def test_slices_index_a_box_within_an_array_that_begins_elsewhere(self, data):
        shape = data.draw(shapes(0, 4))
        start, count = data.draw(boxes_in(shape))
        inner, n = data.draw(boxes_in(count))
        first = tuple(a + b for a, b in zip(start, inner, strict=True))
        array = numbered(shape)

        found = array[where(start, count)][slices(first, n, start)]

        assert (found == array[where(first, n)]).all()
        assert found.shape == n


class TestTiling:
    @PROPERTY
    @given(tilings())
    def test_boxes_that_make_the_array_are_a_tiling(self, case):
        shape, boxes = case

        assert is_tiling(shape, *points(boxes))
        assert overlap(*points(boxes)) is None
        assert gap(shape, *points(boxes)) is None

    @PROPERTY
    @given(several_boxes())
    def test_boxes_are_a_tiling_if_each_element_is_painted_once(self, case):
        shape, boxes = case
        if not boxes:
            return

        assert is_tiling(shape, *points(boxes)) == (painted(shape, boxes) == 1).all()

    @PROPERTY
    @given(tilings(), st.data())
    def test_tiling_of_which_one_box_is_changed_is_none(self, case, data):
        shape, boxes = case
        at = data.draw(st.integers(0, len(boxes) - 1))
        other = data.draw(boxes_in(shape))
        if other in boxes:
            return
        changed = [*boxes[:at], other, *boxes[at + 1 :]]

        assert (
            is_tiling(shape, *points(changed)) == (painted(shape, changed) == 1).all()
        )

    @PROPERTY
    @given(tilings(), st.data())
    def test_tiling_without_one_of_its_boxes_is_none(self, case, data):
        shape, boxes = case
        at = data.draw(st.integers(0, len(boxes) - 1))
        fewer = [*boxes[:at], *boxes[at + 1 :]]
        starts, counts = points(fewer) if fewer else points([boxes[0]])
        starts, counts = starts[: len(fewer)], counts[: len(fewer)]

        assert not is_tiling(shape, starts, counts)

    def test_array_without_axes_is_made_by_its_one_element(self):
        assert is_tiling((), *points([((), ())]))
        assert not is_tiling((), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))

    def test_gap_and_overlap_of_the_same_number_of_elements_are_not_mistaken(self):
        # Four boxes of the four quarters' size, one of them moved over another.
        starts, counts = points(
            [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((1, 2), (2, 2))]
        )

        assert counts.prod(axis=1).sum() == 16
        assert not is_tiling((4, 4), starts, counts)

    @pytest.mark.parametrize("n", [2**31, 2**40, 2**61])
    def test_long_axes_do_not_wrap(self, n):
        halves = [((0,), (n // 2,)), ((n // 2,), (n // 2,))]

        assert is_tiling((n,), *points(halves))
        assert not is_tiling((n + 1,), *points(halves))

    def test_two_long_axes_do_not_wrap(self):
        n = 2**31 - 2
        quarters = [
            ((a, b), (n // 2, n // 2)) for a in (0, n // 2) for b in (0, n // 2)
        ]

        assert is_tiling((n, n), *points(quarters))
        assert not is_tiling((n, n), *points(quarters[1:]))

    def test_4096_boxes_are_checked_without_comparing_each_with_each(self, monkeypatch):
        # By count: corners are sorted once for all boxes.
        calls = []
        unique = np.unique

        def counting(array, **given):
            calls.append(array.size)
            return unique(array, **given)

        monkeypatch.setattr(shards.np, "unique", counting)
        boxes = [((a, b), (1, 1)) for a in range(64) for b in range(64)]

        assert is_tiling((64, 64), *points(boxes))
        assert calls == [4 * 4096 + 4]


class TestErrors:
    @PROPERTY
    @given(several_boxes())
    def test_overlap_names_two_boxes_that_share_an_element(self, case):
        shape, boxes = case

        found = overlap(*points(boxes)) if boxes else None

        if found is None:
            assert (painted(shape, boxes) <= 1).all()
        else:
            one, other = (boxes[number] for number in found)
            assert found[0] < found[1]
            assert common(*one, *other) is not None

    @PROPERTY
    @given(several_boxes())
    def test_gap_names_a_box_that_nobody_has(self, case):
        shape, boxes = case
        starts, counts = points(boxes)
        starts, counts = (a.reshape(-1, len(shape)) for a in (starts, counts))

        found = gap(shape, starts, counts)

        times = painted(shape, boxes)
        if found is None:
            assert (times > 0).all()
        else:
            assert (times[where(*found)] == 0).all()
            assert times[where(*found)].size > 0

    def test_gap_that_takes_too_much_to_find_is_not_looked_for(self, monkeypatch):
        monkeypatch.setattr("mpisave.shards._LARGEST_GRID", 3)
        starts, counts = points([((0, 0), (1, 1))])

        assert gap((2, 2), starts, counts) is None
        assert gap((2, 1), starts, counts) == ((1, 0), (1, 1))

    def test_box_is_shown_as_numpy_would_index_it(self):
        assert show_box((0, 4), (2, 4)) == "[0:2, 4:8]"
        assert show_box((3,), (0,)) == "[3:3]"
        assert show_box((), ()) == "[]"


def test_leaf_that_is_no_shard_has_no_boxes():
    one = mpisave.Shard(np.zeros(1), (2,), (0,))
    other = mpisave.Shard(np.zeros(1), (2,), (1,))

    assert boxes_of(one) == (one,)
    assert boxes_of(mpisave.Shards(one, other)) == (one, other)
    assert boxes_of(np.zeros(1)) is None
    assert boxes_of((one, other)) is None
