"""Where bytes go: owners, streams, rounds, cursor and buffers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.plan import (
    MAX_COUNT,
    ROUND_NBYTES,
    SCRATCH_NBYTES,
    Buffers,
    Cursor,
    Extent,
    buffers,
    displacements,
    owner,
    rounds,
    streams,
)

SIZES = st.lists(st.integers(0, 300), max_size=12)


def int64(values):
    return np.array(values, np.int64)


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=9), st.integers(1, 500))
def test_rounds_bring_every_byte_of_every_stream_once_and_in_order(sizes, cap):
    sent = [
        np.concatenate([np.full(n, item) for item, n in enumerate(stream)] or [[]])
        for stream in sizes
    ]
    totals = int64([sum(stream) for stream in sizes])
    arrived = [[] for _ in sizes]
    cursors = [Cursor(stream) for stream in sizes]

    for counts in rounds(totals, cap):
        displs = displacements(counts)
        assert counts.dtype == np.int64
        assert counts.min() >= 0
        assert 0 < counts.sum() <= cap
        assert (displs[1:] == displs[:-1] + counts[:-1]).all()
        assert displs[0] == 0
        for rank, count in enumerate(counts.tolist()):
            arrived[rank] += cursors[rank].take(count)

    for stream, windows, bytes_sent in zip(sizes, arrived, sent, strict=True):
        seen = [
            (item, at) for item, start, n in windows for at in range(start, start + n)
        ]
        assert [item for item, _ in seen] == bytes_sent.tolist()
        assert seen == [(i, at) for i, n in enumerate(stream) for at in range(n)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=40))
def test_counts_and_displacements_stay_below_the_limit_of_a_c_int(totals):
    cap = buffers(2**62).round_nbytes

    first = next(rounds(int64(totals), cap), int64([0]))

    assert first.sum() <= MAX_COUNT
    assert (displacements(first) + first).max() <= MAX_COUNT


def test_rounds_do_not_change_their_argument():
    totals = int64([5, 0, 9])

    list(rounds(totals, 4))

    assert totals.tolist() == [5, 0, 9]


def test_every_round_but_the_last_is_full():
    found = [int(counts.sum()) for counts in rounds(int64([1000, 1, 0, 333]), 64)]

    assert set(found[:-1]) == {64}
    assert sum(found) == 1334


def test_streams_share_a_round_evenly_until_they_run_dry():
    found = [counts.tolist() for counts in rounds(int64([8, 2, 0, 8]), 9)]

    assert found == [[4, 2, 0, 3], [4, 0, 0, 5]]


def test_more_streams_than_bytes_in_a_round_are_all_brought():
    found = [counts.tolist() for counts in rounds(int64([1] * 5), 2)]

    assert found == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("totals", [[0], [0, 0, 0]])
def test_nothing_to_bring_takes_no_round(totals):
    assert list(rounds(int64(totals), 100)) == []


def test_4096_ranks_are_planned():
    size = 4096
    owners = [(entry * 7) % size for entry in range(3 * size)]
    nbytes = [4096 + entry % 64 for entry in range(3 * size)]

    supplied = streams(owners, size)
    totals = int64([sum(nbytes[e] for e in entries) for entries in supplied])
    totals[0] = 0
    brought = np.zeros(size, np.int64)
    for counts in rounds(totals, buffers(2**20).round_nbytes):
        assert counts.sum() <= 2**20
        brought += counts

    assert sorted(entry for entries in supplied for entry in entries) == list(
        range(3 * size)
    )
    assert (brought == totals).all()


def test_streams_are_in_file_order():
    assert streams([2, 0, 2, 2, 0], 4) == [[1, 4], [], [0, 2, 3], []]
    assert streams([], 2) == [[], []]


def test_owner_is_the_root_if_it_holds_the_entry_and_else_the_lowest():
    assert owner({5: 0, 2: 1, 3: 0}, 3) == 3
    assert owner({5: 0, 2: 1, 3: 0}, 0) == 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**45))
def test_two_rounds_and_scratch_keep_within_the_cap(cap):
    found = buffers(cap)

    assert 2 * found.round_nbytes + found.scratch_nbytes <= max(cap, 4)
    assert 1 <= found.round_nbytes <= min(ROUND_NBYTES, MAX_COUNT)
    assert 1 <= found.scratch_nbytes <= SCRATCH_NBYTES


@pytest.mark.parametrize("cap", [1, 2, 3, 4])
def test_smallest_cap_is_four_bytes(cap):
    assert buffers(cap) == Buffers(round_nbytes=1, scratch_nbytes=1)


def test_round_is_no_larger_than_what_a_count_can_say(monkeypatch):
    monkeypatch.setattr("mpisave.plan.MAX_COUNT", 64)

    assert buffers(2**30).round_nbytes == 64


def test_cursor_passes_over_empty_items():
    cursor = Cursor([0, 3, 0, 0, 2, 0])

    assert cursor.take(2) == [(1, 0, 2)]
    assert cursor.take(0) == []
    assert cursor.take(3) == [(1, 2, 1), (4, 0, 2)]
    assert cursor.take(0) == []


def test_extent_ends_one_past_its_last_byte():
    assert Extent(64, 10).stop == 74
    assert Extent(64, 0).stop == 64


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 0), (0, -1)])
def test_negative_extent_cannot_be_built(offset, nbytes):
    with pytest.raises(ValueError, match="negative"):
        Extent(offset, nbytes)
