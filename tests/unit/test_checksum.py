"""CRC-32C of blocks: of bytes in any cuts, by any number of ranks."""

import itertools

import numpy as np
import pytest
from helpers import small_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.checksum import (
    BLOCK_NBYTES,
    BlockSums,
    block_count,
    blocks_of_parts,
    combine,
    crc32c,
)

PROPERTY = settings(max_examples=150, deadline=None)
SMALL_BLOCK = 16

RANDOM = np.random.default_rng(1).integers(0, 256, 3 * 2**20 + 5, np.uint8)


def sums_of_blocks(data, block):
    """Return the CRC-32C of each block, from its bytes."""
    return [crc32c(data[at : at + block]) for at in range(0, len(data), block)]


def int64(values):
    return np.array(values, np.int64)


def pieces_of(cuts, nbytes):
    """Return first byte and number of bytes between cuts."""
    edges = sorted({0, nbytes, *(cut for cut in cuts if cut < nbytes)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@st.composite
def cut_arrays(draw):
    """Draw arrays, and the pieces in which they are written, in any order."""
    arrays = draw(st.lists(st.binary(max_size=70), max_size=5))
    table = []
    for entry, data in enumerate(arrays):
        cuts = draw(st.lists(st.integers(1, 70), max_size=4))
        table += [(entry, *piece) for piece in pieces_of(cuts, len(data))]
    return arrays, draw(st.permutations(table))


def summed(arrays, table):
    """Feed pieces to BlockSums as one rank does; return its values."""
    sums = BlockSums()
    with small_blocks(SMALL_BLOCK):
        for item, (entry, within, nbytes) in enumerate(table):
            sums.add(item, within, memoryview(arrays[entry])[within : within + nbytes])
    return np.array(sums.values, np.uint32)


def blocks(arrays, table, values):
    columns = int64(table).reshape(-1, 3).T
    with small_blocks(SMALL_BLOCK):
        return blocks_of_parts(*columns, values, int64([len(a) for a in arrays]))


class TestCombine:
    def test_check_value_of_the_standard_is_combined(self):
        assert combine(crc32c(b"12345"), crc32c(b"6789"), 4) == 0xE3069283

    @PROPERTY
    @given(st.binary(max_size=300), st.binary(max_size=300))
    def test_checksum_of_two_runs_is_that_of_the_whole(self, first, second):
        found = combine(crc32c(first), crc32c(second), len(second))

        assert found == crc32c(first + second)

    @PROPERTY
    @given(st.binary(max_size=100), st.binary(max_size=100), st.binary(max_size=100))
    def test_order_in_which_runs_are_combined_does_not_matter(self, a, b, c):
        left = combine(combine(crc32c(a), crc32c(b), len(b)), crc32c(c), len(c))
        right = combine(crc32c(a), combine(crc32c(b), crc32c(c), len(c)), len(b + c))

        assert left == right == crc32c(a + b + c)

    @pytest.mark.parametrize("nbytes", [0, 1, 2**20 - 1, 2**20, 3 * 2**20])
    def test_long_runs_are_combined(self, nbytes):
        first, second = RANDOM[: len(RANDOM) - nbytes], RANDOM[len(RANDOM) - nbytes :]

        found = combine(crc32c(first), crc32c(second), nbytes)

        assert found == crc32c(RANDOM)


class TestBlockSums:
    @pytest.mark.parametrize(
        ("nbytes", "blocks"),
        [(0, 0), (1, 1), (2**20, 1), (2**20 + 1, 2), (2**40, 2**20)],
    )
    def test_last_block_may_be_short(self, nbytes, blocks):
        assert BLOCK_NBYTES == 2**20
        assert block_count(nbytes) == blocks

    @PROPERTY
    @given(data=st.binary(max_size=100), cuts=st.lists(st.integers(1, 99)))
    def test_array_that_comes_in_any_cuts_has_the_checksums_of_its_blocks(
        self, data, cuts
    ):
        sums = BlockSums()

        with small_blocks(SMALL_BLOCK):
            for within, nbytes in pieces_of(cuts, len(data)):
                sums.add("x", within, memoryview(data)[within : within + nbytes])

        assert list(sums.values) == sums_of_blocks(data, SMALL_BLOCK)

    def test_blocks_are_of_a_mebibyte(self):
        sums = BlockSums()

        for start in range(0, len(RANDOM), 300_000):
            sums.add(0, start, RANDOM[start : start + 300_000].data)

        assert list(sums.values) == sums_of_blocks(RANDOM, 2**20)

    def test_another_array_begins_a_block_of_its_own(self):
        sums = BlockSums()

        sums.add("x", 0, memoryview(b"ab"))
        sums.add("y", 2, memoryview(b"cd"))
        sums.add("y", 4, memoryview(b"e"))

        assert list(sums.values) == [crc32c(b"ab"), crc32c(b"cde")]

    def test_piece_that_does_not_follow_begins_anew(self):
        sums = BlockSums()

        sums.add("x", 0, memoryview(b"ab"))
        sums.add("x", 3, memoryview(b"d"))

        assert list(sums.values) == [crc32c(b"ab"), crc32c(b"d")]


class TestBlocksOfParts:
    @PROPERTY
    @given(case=cut_arrays(), ranks=st.integers(1, 3))
    def test_parts_of_several_ranks_give_the_checksums_of_all_blocks(self, case, ranks):
        arrays, table = case
        by_rank = [table[rank::ranks] for rank in range(ranks)]
        values = np.concatenate([summed(arrays, part) for part in by_rank])

        found = blocks(arrays, [piece for part in by_rank for piece in part], values)

        assert [sums.tolist() for sums in found] == [
            sums_of_blocks(data, SMALL_BLOCK) for data in arrays
        ]
        assert all(sums.dtype == np.uint32 for sums in found)

    def test_no_arrays_have_no_blocks(self):
        assert blocks([], [], np.zeros(0, np.uint32)) == []

    def test_empty_arrays_have_no_blocks(self):
        found = blocks([b"", b"ab", b""], [(1, 0, 2)], np.array([7], np.uint32))

        assert [sums.tolist() for sums in found] == [[], [7], []]

    @PROPERTY
    @given(case=cut_arrays(), data=st.data())
    def test_bytes_that_are_missing_are_refused(self, case, data):
        arrays, table = case
        if not table:
            return
        left = list(table)
        left.pop(data.draw(st.integers(0, len(table) - 1)))
        values = summed(arrays, left)

        with pytest.raises(RuntimeError, match="not once: a defect of mpisave"):
            blocks(arrays, left, values)

    @PROPERTY
    @given(case=cut_arrays(), data=st.data())
    def test_bytes_that_were_written_twice_are_refused(self, case, data):
        arrays, table = case
        if not table:
            return
        more = [*table, table[data.draw(st.integers(0, len(table) - 1))]]
        values = summed(arrays, more)

        with pytest.raises(RuntimeError, match="not once: a defect of mpisave"):
            blocks(arrays, more, values)

    @pytest.mark.parametrize("change", [[], [1], [1, 2, 3]])
    def test_more_or_fewer_checksums_than_parts_are_refused(self, change):
        table = [(0, 0, SMALL_BLOCK), (0, SMALL_BLOCK, 3)]

        with pytest.raises(RuntimeError, match=f"{len(change)} checksums came for 2"):
            blocks([bytes(SMALL_BLOCK + 3)], table, np.array(change, np.uint32))

    def test_lengths_beyond_2_to_the_31_do_not_wrap(self):
        # One part a terabyte long: a checksum for each of its blocks, made up.
        nbytes = 2**40 + 1
        values = np.arange(2**20 + 1, dtype=np.uint32)

        (found,) = blocks_of_parts(
            *(int64([n]) for n in (0, 0, nbytes)), values, int64([nbytes])
        )

        assert (found == values).all()
