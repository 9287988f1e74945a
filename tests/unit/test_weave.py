"""Arrays put together from boxes in short runs: who writes what, and from whom."""

import math

import numpy as np
import pytest
from boxes import noise, tilings, where
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.plan import Woven
from mpisave.shards import slices
from mpisave.weave import (
    CHUNK_NBYTES,
    Chunk,
    as_pieces,
    budget,
    chunks,
    moves,
    rounds,
)

PROPERTY = settings(max_examples=200, deadline=None)


@st.composite
def woven_arrays(draw, most=3):
    """Draw arrays, what is woven of them, and the boxes of each rank by ordinal."""
    arrays, woven, held = [], [], {}
    for entry in range(draw(st.integers(1, most))):
        shape, boxes = draw(tilings(0, 4))
        array = noise(shape, draw(st.sampled_from(["u1", "<f4", "c16"])), entry)
        ranks = [draw(st.integers(0, 3)) for _ in boxes]
        ordinals = []
        for rank, box in zip(ranks, boxes, strict=True):
            mine = held.setdefault(rank, [])
            ordinals.append(len(mine))
            mine.append(array[where(*box)])
        arrays.append(array)
        woven.append(woven_of(2 * entry + 1, array, ranks, ordinals, boxes))
    return arrays, woven, held


def woven_of(entry, array, ranks, ordinals, boxes):
    starts, counts = (
        np.array(column, np.int64).reshape(len(boxes), array.ndim)
        for column in zip(*boxes, strict=True)
    )
    ranks, ordinals = (np.array(column, np.int64) for column in (ranks, ordinals))
    return Woven(entry, array.itemsize, array.shape, ranks, ordinals, starts, counts)


def halves(shape=(4, 8), dtype="u1", ranks=(0, 1)):
    """Return an array whose columns two ranks hold in halves."""
    array = noise(shape, dtype)
    half = shape[1] // 2
    boxes = [((0, 0), (shape[0], half)), ((0, half), (shape[0], half))]
    return array, woven_of(0, array, ranks, (0, 0), boxes)


class TestChunks:
    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100))
    def test_chunks_cover_every_element_once_and_in_order(self, case, chunk_nbytes):
        arrays, woven, _ = case

        found = chunks(woven, chunk_nbytes)

        elements = [
            (chunk.array, at)
            for chunk in found
            for at in range(chunk.first, chunk.stop)
        ]
        assert elements == [
            (n, at) for n, a in enumerate(arrays) for at in range(a.size)
        ]
        assert all(chunk.first < chunk.stop for chunk in found)

    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100))
    def test_chunk_is_no_longer_than_allowed_but_for_one_element(
        self, case, chunk_nbytes
    ):
        _, woven, _ = case

        for chunk in chunks(woven, chunk_nbytes):
            n = chunk.stop - chunk.first
            assert n == 1 or n * woven[chunk.array].itemsize <= chunk_nbytes

    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100))
    def test_holders_write_in_turn(self, case, chunk_nbytes):
        _, woven, _ = case

        found = chunks(woven, chunk_nbytes)

        for number, array in enumerate(woven):
            writers = [chunk.writer for chunk in found if chunk.array == number]
            times = [writers.count(rank) for rank in set(array.ranks.tolist())]
            assert set(writers) <= set(array.ranks.tolist())
            assert max(times) - min(times) <= 1

    def test_root_writes_all_where_it_gathers(self):
        _, woven = halves()

        found = chunks([woven], 8, writer=5)

        assert {chunk.writer for chunk in found} == {5}

    def test_chunk_is_of_whole_rows_where_one_fits(self):
        _, woven = halves((4, 8))

        found = [(c.first, c.stop) for c in chunks([woven], 20)]

        assert found == [(0, 16), (16, 32)]

    def test_row_that_does_not_fit_is_cut(self):
        _, woven = halves((2, 8))

        found = [(c.first, c.stop) for c in chunks([woven], 5)]

        assert found == [(0, 5), (5, 10), (10, 15), (15, 16)]

    def test_writers_of_many_arrays_of_one_chunk_each_take_turns(self):
        woven = [halves()[1] for _ in range(4)]

        found = chunks(woven, 1000)

        assert [chunk.writer for chunk in found] == [0, 1, 0, 1]


class TestMoves:
    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100), st.data())
    def test_moves_of_a_chunk_put_together_are_its_bytes(self, case, nbytes, data):
        arrays, woven, held = case
        found = chunks(woven, nbytes)
        chunk = found[data.draw(st.integers(0, len(found) - 1))]
        array = arrays[chunk.array]

        elements = np.zeros(chunk.stop - chunk.first, array.dtype)
        times = np.zeros(elements.shape, int)
        for move in moves(woven[chunk.array], chunk, chunk.writer):
            box = held[move.rank][move.ordinal]
            part = box[(..., *slices(move.start, move.count, move.origin))]
            there = slice(move.at, move.at + math.prod(move.around_count))
            inside = (..., *slices(move.start, move.count, move.around))
            elements[there].reshape(move.around_count)[inside] = part
            times[there].reshape(move.around_count)[inside] += 1

        assert (times == 1).all()
        expected = array.reshape(-1)[chunk.first : chunk.stop]
        assert elements.tobytes() == expected.tobytes()

    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100))
    def test_moves_of_all_chunks_bring_every_element_once(self, case, nbytes):
        arrays, woven, _ = case

        brought = [
            math.prod(move.count)
            for chunk in chunks(woven, nbytes)
            for move in moves(woven[chunk.array], chunk, chunk.writer)
        ]

        assert all(n > 0 for n in brought)
        assert sum(brought) == sum(array.size for array in arrays)

    def test_moves_of_whole_rows_are_one_for_each_box(self):
        _, woven = halves((4, 8))

        found = list(moves(woven, Chunk(0, 0, 8, 24), 0))

        assert [(m.rank, m.start, m.count) for m in found] == [
            (0, (1, 0), (2, 4)),
            (1, (1, 4), (2, 4)),
        ]
        assert {(m.around, m.around_count, m.at) for m in found} == {
            ((1, 0), (2, 8), 0)
        }

    def test_box_that_is_outside_of_a_chunk_does_not_move(self):
        array = noise((4, 4), "u1")
        boxes = [((0, 0), (2, 4)), ((2, 0), (2, 4))]
        woven = woven_of(0, array, (3, 2), (0, 7), boxes)

        found = list(moves(woven, Chunk(0, 0, 9, 11), 0))

        assert [(m.rank, m.ordinal, m.origin) for m in found] == [(2, 7, (2, 0))]

    @PROPERTY
    @given(woven_arrays(), st.integers(1, 100))
    def test_rank_that_does_not_write_a_chunk_is_told_of_what_it_supplies(
        self, case, nbytes
    ):
        _, woven, _ = case
        for chunk in chunks(woven, nbytes):
            every = list(moves(woven[chunk.array], chunk, chunk.writer))
            for rank in {move.rank for move in every} - {chunk.writer}:
                found = list(moves(woven[chunk.array], chunk, rank))
                assert found == [move for move in every if move.rank == rank]


class TestRounds:
    @PROPERTY
    @given(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9))),
        *(st.integers(1, 12), st.integers(1, 40)),
    )
    def test_round_keeps_within_its_limits_or_has_a_single_chunk(
        self, drawn, of_one, of_all
    ):
        found = [Chunk(number, who, 0, 1) for number, (who, _) in enumerate(drawn)]
        sizes = [nbytes for _, nbytes in drawn]

        together = list(rounds(found, sizes, of_one=of_one, of_all=of_all))

        assert [chunk for part in together for chunk in part] == found
        for part in together:
            assert part
            assert len(part) == 1 or sum(sizes[c.array] for c in part) <= of_all
            for writer in {chunk.writer for chunk in part}:
                own = [sizes[c.array] for c in part if c.writer == writer]
                assert len(own) == 1 or sum(own) <= of_one

    def test_round_is_as_full_as_it_can_be(self):
        found = [Chunk(0, writer, 0, 1) for writer in (0, 1, 2, 0, 1, 2, 2)]

        def many(of_one, of_all):
            every = rounds(found, [4] * 7, of_one=of_one, of_all=of_all)
            return [len(part) for part in every]

        assert many(4, 32) == [3, 3, 1]
        assert many(4, 8) == [2, 2, 2, 1]
        assert many(8, 32) == [6, 1]
        assert many(12, 28) == [7]
        assert many(1, 32) == [3, 3, 1]
        assert list(rounds([], [], of_one=4, of_all=8)) == []


class TestBudget:
    @PROPERTY
    @given(st.integers(4, 2**45), st.booleans())
    def test_what_is_received_put_together_and_sent_keeps_within_the_cap(
        self, cap, has_device
    ):
        found = budget(cap, has_device=has_device)

        copies = 3 if has_device else 2  # one more on the way, on the device
        assert copies * found.chunk_nbytes + found.sent_nbytes <= cap
        assert 1 <= found.chunk_nbytes <= CHUNK_NBYTES
        assert not has_device or found.sent_nbytes.bit_count() == 1
        # At least one chunk can be sent in a round.
        assert found.sent_nbytes >= found.chunk_nbytes

    @pytest.mark.parametrize("cap", [1, 2, 3])
    def test_smallest_chunk_is_a_byte(self, cap):
        found = budget(cap)

        assert (found.chunk_nbytes, found.sent_nbytes) == (1, 1)

    def test_what_travels_in_a_round_stays_below_the_limit_of_a_c_int(self):
        # A rank gets one chunk and sends so many; an element may be longer than these.
        found = budget(2**62)

        assert found.sent_nbytes < 2**31 - found.chunk_nbytes


@PROPERTY
@given(woven_arrays(), st.integers(1, 100))
def test_chunks_as_pieces_are_the_bytes_of_their_entries(case, nbytes):
    arrays, woven, _ = case

    entry, within, count = as_pieces(woven, chunks(woven, nbytes))

    found = [
        (e, at)
        for e, first, n in zip(
            *(c.tolist() for c in (entry, within, count)), strict=True
        )
        for at in range(first, first + n)
    ]
    assert found == [
        (w.entry, at)
        for w, array in zip(woven, arrays, strict=True)
        for at in range(array.nbytes)
    ]
    assert {column.dtype for column in (entry, within, count)} == {np.dtype("i8")}


def test_no_chunks_are_no_pieces():
    entry, within, count = as_pieces([], [])

    assert [column.size for column in (entry, within, count)] == [0, 0, 0]
