"""Where bytes go: pieces, who supplies them, rounds, cursor and buffers."""

import numpy as np
import pytest
from boxes import described, held_by_ranks, noise
from helpers import small_blocks
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mpisave import plan
from mpisave.errors import show_key
from mpisave.merging import merge
from mpisave.metadata import describe
from mpisave.plan import (
    MAX_COUNT,
    ROUND_NBYTES,
    SCRATCH_NBYTES,
    Buffers,
    Cursor,
    Extent,
    Pieces,
    buffers,
    cut,
    displacements,
    rounds,
)
from mpisave.shards import Shard
from mpisave.tree import flatten

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


BLOCK = 16


def cut_small(merged, **given):
    """Cut with small blocks, and runs of few bytes counted as long."""
    with pytest.MonkeyPatch.context() as patch, small_blocks(BLOCK):
        patch.setattr(plan, "SHORTEST_RUN_NBYTES", 12)
        patch.setattr(plan, "_LARGE_NBYTES", 8)
        return cut(merged, **given)


def rows(pieces):
    """Return pieces as dicts."""
    names = Pieces.__slots__
    columns = [getattr(pieces, name).tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def supplied(rank, pieces):
    """Return how many bytes a rank supplies."""
    return int(pieces.nbytes[pieces.rank == rank].sum())


def state_of(*names, nbytes=1):
    return {name: np.zeros(nbytes, np.uint8) for name in names}


class TestCut:
    @settings(max_examples=200, deadline=None)
    @given(held_by_ranks(), st.booleans(), st.data())
    def test_each_byte_is_in_one_piece_of_a_rank_that_has_it_or_is_woven(
        self, case, share, data
    ):
        states, arrays = case
        merged, held = described(states)
        root = None
        if not share:
            every = st.one_of(st.none(), st.integers(0, len(states) - 1))
            root = data.draw(every)

        pieces, woven = cut_small(merged, root=root, share=share)

        event(f"woven: {len(woven)}")
        found = [np.zeros(entry.nbytes, np.uint8) for entry in merged.entries]
        times = [np.zeros(entry.nbytes, int) for entry in merged.entries]
        for piece in rows(pieces):
            part = np.empty(piece["nbytes"], np.uint8)
            held[piece["rank"]][piece["ordinal"]].stage(piece["start"], part)
            where = np.s_[piece["within"] : piece["within"] + piece["nbytes"]]
            found[piece["entry"]][where] = part
            times[piece["entry"]][where] += 1
        apart = {array.entry for array in woven}
        for number, entry in enumerate(merged.entries):
            if number in apart:
                assert not times[number].any()
            else:
                assert (times[number] == 1).all()
                assert found[number].tobytes() == arrays[entry.key[0]].tobytes()

    @settings(max_examples=100, deadline=None)
    @given(held_by_ranks(), st.booleans())
    def test_pieces_are_in_the_order_of_the_file_and_none_is_empty(self, case, share):
        merged, _ = described(case[0])

        pieces, _ = cut_small(merged, share=share)

        places = list(zip(pieces.entry.tolist(), pieces.within.tolist(), strict=True))
        assert places == sorted(set(places))
        assert (pieces.nbytes > 0).all()
        assert all(getattr(pieces, n).dtype == np.int64 for n in Pieces.__slots__)

    @settings(max_examples=100, deadline=None)
    @given(held_by_ranks(), st.data())
    def test_root_supplies_itself_what_it_has(self, case, data):
        states, _ = case
        merged, held = described(states)
        root = data.draw(st.integers(0, len(states) - 1))

        pieces, woven = cut_small(merged, root=root)

        apart = {show_key(merged.entries[array.entry].key) for array in woven}
        own = sum(a.nbytes for a in held[root] if a.name not in apart)
        assert supplied(root, pieces) == own

    def test_array_comes_from_the_root_if_it_has_it_and_else_from_the_lowest(self):
        merged, _ = described([{}, state_of("x"), state_of("y", "x"), state_of("y")])

        def ranks(root):
            pieces, _ = cut(merged, root=root)
            return {
                merged.entries[piece["entry"]].key[0]: piece["rank"]
                for piece in rows(pieces)
            }

        assert ranks(None) == {"x": 1, "y": 2}
        assert ranks(0) == {"x": 1, "y": 2}
        assert ranks(2) == {"x": 2, "y": 2}
        assert ranks(3) == {"x": 1, "y": 3}

    def test_box_comes_from_the_root_if_it_has_it_and_else_from_the_lowest(self):
        array = np.arange(2**20)
        top, bottom = (Shard(array[n : n + 2**19], (2**20,), (n,)) for n in (0, 2**19))
        merged, _ = described([{"x": top}, {"x": bottom}, {"x": bottom}, {"x": top}])

        def ranks(root):
            pieces, woven = cut(merged, root=root)
            assert woven == []
            return pieces.rank.tolist()

        assert ranks(None) == [0, 1]
        assert ranks(2) == [0, 2]
        assert ranks(3) == [3, 1]

    def test_array_of_which_boxes_lie_in_short_runs_is_woven(self):
        array = noise((64, 2**15), "u1")
        columns = [
            Shard(array[:, n::][:, : 2**14], (64, 2**15), (0, n)) for n in (0, 2**14)
        ]
        lines = [Shard(array[n : n + 32], (64, 2**15), (n, 0)) for n in (0, 32)]
        merged, _ = described(
            [{"c": columns[0], "r": lines[0]}, {"c": columns[1], "r": lines[1]}]
        )

        pieces, woven = cut(merged)

        assert [merged.entries[array.entry].key for array in woven] == [("c",)]
        assert (woven[0].itemsize, woven[0].shape) == (1, (64, 2**15))
        assert woven[0].ranks.tolist() == [0, 1]
        assert woven[0].starts.tolist() == [[0, 0], [0, 2**14]]
        assert woven[0].counts.tolist() == [[64, 2**14]] * 2
        assert pieces.nbytes.tolist() == [2**20, 2**20]

    def test_run_of_256_kib_is_long(self):
        array = np.broadcast_to(np.uint8(0), (2, 2**19))
        merged, _ = described(
            [{"x": Shard(array[:, :n], (2, 2**19), (0, f))} for f, n in HALVES]
        )

        pieces, woven = cut(merged)

        assert plan.SHORTEST_RUN_NBYTES == 2**18
        assert woven == []
        assert pieces.rank.tolist() == [0, 1, 0, 1]
        assert pieces.start.tolist() == [0, 0, 2**18, 2**18]
        assert pieces.within.tolist() == [0, 2**18, 2**19, 2**19 + 2**18]
        assert pieces.nbytes.tolist() == [2**18] * 4

    def test_box_of_short_runs_that_is_one_run_is_no_reason_to_weave(self):
        array = noise((4, 3), "u1")
        merged, _ = described(
            [{"x": Shard(array[n : n + 1], (4, 3), (n, 0))} for n in range(4)]
        )

        pieces, woven = cut(merged)

        assert woven == []
        assert pieces.nbytes.tolist() == [3, 3, 3, 3]

    def test_nothing_to_move_is_no_piece(self):
        merged, _ = described([{"n": 5}, {"empty": np.zeros((0, 3))}, {}])

        for given_ in ({}, {"root": 1}, {"share": True}):
            pieces, woven = cut(merged, **given_)

            assert (len(pieces), woven) == (0, [])


HALVES = [(0, 2**18), (2**18, 2**18)]


class TestShare:
    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.integers(0, 200), min_size=1, max_size=6),
        st.integers(1, 5),
        st.integers(0, 2),
    )
    def test_holders_of_the_same_arrays_supply_even_shares(
        self, sizes, holders, others
    ):
        state = {f"x{n}": np.zeros(nbytes, np.uint8) for n, nbytes in enumerate(sizes)}
        merged, _ = described([state] * holders + [{}] * others)

        pieces, _ = cut_small(merged, share=True)

        for rank in range(holders):
            share = supplied(rank, pieces)
            assert abs(share - sum(sizes) / holders) < BLOCK + 1
        assert supplied(holders, pieces) == 0
        # No block of the checksums is of two ranks.
        assert (pieces.within % BLOCK == 0).all()

    def test_shares_are_of_whole_blocks_of_a_mebibyte(self):
        array = np.broadcast_to(np.uint8(0), 5 * 2**20 + 7)
        merged, _ = described([{"x": array}, {"x": array}])

        pieces, _ = cut(merged, share=True)

        assert pieces.rank.tolist() == [0, 1]
        assert pieces.nbytes.tolist() == [2 * 2**20, 3 * 2**20 + 7]

    def test_arrays_that_different_ranks_hold_are_shared_among_these(self):
        merged, _ = described(
            [
                state_of("all", "a", nbytes=4 * BLOCK),
                state_of("b", "all", nbytes=4 * BLOCK),
                state_of("all", "b", "own", nbytes=4 * BLOCK),
            ]
        )

        pieces, _ = cut_small(merged, share=True)

        found = {}
        for piece in rows(pieces):
            key = merged.entries[piece["entry"]].key[0]
            found.setdefault(key, []).append((piece["rank"], piece["nbytes"]))
        assert found == {
            "all": [(0, BLOCK), (1, BLOCK), (2, 2 * BLOCK)],
            "a": [(0, 4 * BLOCK)],
            "b": [(1, 2 * BLOCK), (2, 2 * BLOCK)],
            "own": [(2, 4 * BLOCK)],
        }

    def test_large_box_is_supplied_in_even_parts(self):
        x = np.zeros((3, 2**23), np.uint8)
        part = Shard(x[1:], x.shape, (1, 0))
        states = [
            {"x": Shard(x[:1], x.shape, (0, 0)), "y": 0},
            {"x": part},
            {"x": part},
        ]
        merged, _ = described(states)

        pieces, _ = cut(merged, share=True)

        assert pieces.rank.tolist() == [0, 1, 2]
        assert pieces.within.tolist() == [0, 2**23, 2**24]
        assert pieces.start.tolist() == [0, 0, 2**23]
        assert pieces.nbytes.tolist() == [2**23] * 3

    def test_replicas_of_boxes_are_supplied_in_turn(self):
        array = np.zeros((8, 2**18), np.uint8)
        states = [
            {"x": Shard(array[n : n + 1], (8, 2**18), (n, 0))}
            for _ in range(2)
            for n in range(8)
        ]
        merged, _ = described(states)

        alone, _ = cut(merged)
        shared, _ = cut(merged, share=True)

        assert alone.rank.tolist() == list(range(8))
        assert sorted(rank % 8 for rank in shared.rank.tolist()) == list(range(8))
        assert sum(rank >= 8 for rank in shared.rank.tolist()) == 4


class TestPieces:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 4), max_size=20))
    def test_pieces_of_each_rank_stay_in_order(self, ranks):
        number = int64(range(len(ranks)))
        pieces = Pieces(number, int64(ranks), *[number] * 4)

        found = pieces.by_rank(6)

        assert [part.entry.tolist() for part in found] == [
            [n for n, rank in enumerate(ranks) if rank == wanted] for wanted in range(6)
        ]
        assert [set(part.rank.tolist()) - {r} for r, part in enumerate(found)] == [
            set()
        ] * 6

    def test_pieces_are_joined_one_table_after_the_other(self):
        one, two = (Pieces(*[int64(values)] * 6) for values in ([1, 2], [3]))

        assert rows(Pieces.join([one, two])) == rows(one) + rows(two)
        assert len(Pieces.join([])) == 0
        assert rows(Pieces.join([one, two]).take(int64([2, 0]))) == [
            rows(two)[0],
            rows(one)[0],
        ]


def test_4096_ranks_are_planned_without_a_step_for_each_pair():
    # By count: what ranks of one structure hold is one table, however many they are.
    size = 4096
    one = describe(flatten(state_of("shared")))[2]
    own = [describe(flatten(state_of("shared", f"own{r}")))[2] for r in range(8)]
    merged = merge([own[rank] if rank < 8 else one for rank in range(size)])

    pieces, woven = cut(merged, root=0)
    shared, _ = cut(merged, share=True)
    totals = np.bincount(pieces.rank, weights=pieces.nbytes, minlength=size)
    totals = totals.astype(np.int64)
    totals[0] = 0
    brought = np.zeros(size, np.int64)
    for counts in rounds(totals, buffers(2**20).round_nbytes):
        brought += counts

    assert woven == []
    assert len(pieces) == 9
    assert len(merged.holdings) == 9
    assert (brought == totals).all()
    assert shared.nbytes.sum() == pieces.nbytes.sum()


def test_4096_boxes_are_planned_together():
    size, row = 4096, 2**18
    array = np.broadcast_to(np.uint8(0), (1, row))
    first = describe(flatten({"x": Shard(array, (size, row), (0, 0))}))[2]
    every = [
        first.with_boxes(np.array([rank, 0, 1, row], np.int64)) for rank in range(size)
    ]

    pieces, _ = cut(merge(every))

    assert pieces.rank.tolist() == list(range(size))
    assert (pieces.within == np.arange(size) * row).all()


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


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("roots", [1, 2, 5])
@pytest.mark.parametrize("cap", [100, 10 * 2**10, 2**20, 2**40])
def test_buffers_of_devices_keep_within_the_cap(cap, roots, by_device):
    found = buffers(cap, roots, has_device=True, by_device=by_device)

    # Beside what travels, one round is packed, by whoever packs.
    n, as_root = found.round_nbytes, 4 if by_device else 2
    assert n.bit_count() == 1, "CuPy pins a power of two"
    is_sender_too = roots > 1
    of_root = (as_root + 2 * (roots - 1) + is_sender_too) * n + found.scratch_nbytes
    assert max(of_root, (2 * roots + 1) * n) <= cap
