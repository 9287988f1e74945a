"""The part of each rank: all ranks of a save, one after another in one process."""

import math
import pickle

import numpy as np
import pytest
from boxes import described_by_rank, held_by_ranks
from helpers import assert_equal_states, small_blocks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import mpisave
from mpisave.checksum import BlockSums
from mpisave.errors import StateDictError
from mpisave.formats import index
from mpisave.formats.hdf5 import HDF5Format
from mpisave.formats.pkl import PickleFormat
from mpisave.parts import divide
from mpisave.shards import slices
from mpisave.transport.base import Moved
from mpisave.transport.direct import Direct
from mpisave.tree import PerRank
from mpisave.weave import chunks, moves

PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FORMATS = [
    pytest.param(PickleFormat(4), id="pickle"),
    pytest.param(HDF5Format(), id="hdf5"),
]
CHUNK = 24


class Memory:
    """A target that remembers what was written to it."""

    name = "<memory>"

    def __init__(self):
        self.data = bytearray()
        self.writes = []

    def write(self, offset, data):
        stop = offset + data.nbytes
        self.data += bytes(max(0, stop - len(self.data)))
        self.data[offset:stop] = data
        self.writes.append((offset, stop))


def write_chunk(array, chunk, held, offset, target):
    """Do what `Exchange` does for one chunk: put it together and write it."""
    kind = np.dtype(f"V{array.itemsize}")
    elements = np.zeros(chunk.stop - chunk.first, kind)
    for move in moves(array, chunk, chunk.writer):
        part = np.empty(math.prod(move.count) * array.itemsize, np.uint8)
        source = held[move.rank][move.ordinal]
        source.stage_box(slices(move.start, move.count, move.origin), part)
        there = slice(move.at, move.at + math.prod(move.around_count))
        box = elements[there].reshape(move.around_count)
        inside = (..., *slices(move.start, move.count, move.around))
        box[inside] = part.view(kind).reshape(move.count)
    data = elements.view(np.uint8).data
    target.write(offset + chunk.first * array.itemsize, data)
    return data


def write_together(states, format_, replicas, *, threads=1, cap=10**9):
    """Write what all ranks hold to one file, as they would; return it and the parts."""
    found = described_by_rank(states)
    held = [one[1] for one in found]
    parts = divide(
        [one[2] for one in found],
        format_,
        {"format": "1"},
        roots=None,
        replicas=replicas,
        chunk_nbytes=CHUNK,
    )
    parts = [pickle.loads(pickle.dumps(part)) for part in parts]  # they travel
    whole, target, moved = parts[0].whole, Memory(), Moved()
    for offset, data in whole.layout.runs(whole.handed_out):
        target.write(offset, memoryview(data))
    target.writes.clear()
    for rank, part in enumerate(parts):
        stream, between = part.files[0].stream, part.files[0].between
        arrays = stream.arrays(held[rank])
        direct = Direct(
            target, stream, arrays, between, max_nbytes=cap, threads=threads
        )
        direct.move(moved, rank)
    file = parts[0].files[0]
    sums = {}
    for chunk in chunks(file.woven, CHUNK):
        array, offset = file.woven[chunk.array], file.offsets[chunk.array]
        data = write_chunk(array, chunk, held, offset, target)
        own = sums.setdefault(chunk.writer, BlockSums())
        own.add(chunk, chunk.first * array.itemsize, data)
    moved.of_chunks = {r: np.array(s.values, np.uint32) for r, s in sums.items()}
    content = index.encode(
        whole.merged,
        whole.layout,
        whole.checksums(moved, len(states)),
        container=format_.name,
        facts={},
    )
    target.write(whole.layout.nbytes, memoryview(content))
    return target, parts


@pytest.mark.parametrize("format_", FORMATS)
@PROPERTY
@given(
    case=held_by_ranks(),
    replicas=st.sampled_from(["first", "check", "share"]),
    small_nbytes=st.sampled_from([0, 20, 10**6]),
    cap=st.sampled_from([1, 10, 100, 10**9]),
    threads=st.sampled_from([1, 3]),
)
def test_ranks_write_together_what_one_would_write_alone(
    format_, case, replicas, small_nbytes, cap, threads, tmp_path_factory
):
    states, arrays = case
    event(f"{len(states)} ranks")
    with pytest.MonkeyPatch.context() as patch, small_blocks(32):
        patch.setattr("mpisave.plan.SHORTEST_RUN_NBYTES", 12)
        patch.setattr("mpisave.parts.SMALL_NBYTES", small_nbytes)
        patch.setattr("mpisave.transport.direct.SMALL_NBYTES", small_nbytes)
        target, parts = write_together(
            states, format_, replicas, threads=threads, cap=cap
        )
        order = [entry.key[0] for entry in parts[0].whole.merged.entries]
        alone, _ = write_together(
            [{key: arrays[key] for key in order}], format_, "first"
        )
        path = tmp_path_factory.mktemp("together") / "state"
        path.write_bytes(target.data)
        found = mpisave.load(path)

    assert bytes(target.data) == bytes(alone.data)
    assert_equal_states(found, {key: arrays[key] for key in order})
    # No byte is written by two.
    stop = 0
    for first, last in sorted(target.writes):
        assert first >= stop
        stop = last
    assert [part.whole is not None for part in parts] == [True] + [False] * (
        len(states) - 1
    )


@pytest.mark.parametrize("format_", FORMATS)
def test_values_of_each_rank_are_written_side_by_side(format_, tmp_path):
    states = [{"rng": PerRank(np.arange(rank + 2)), "n": 1} for rank in range(3)]

    target, _ = write_together(states, format_, "first")

    (tmp_path / "x").write_bytes(target.data)
    expected = {"rng": {rank: np.arange(rank + 2) for rank in range(3)}, "n": 1}
    assert_equal_states(mpisave.load(tmp_path / "x"), expected)


class TestDivide:
    def parts(self, states, **given):
        settings_ = {"roots": None, "replicas": "first", "chunk_nbytes": CHUNK}
        descriptions = [one[2] for one in described_by_rank(states)]
        return divide(descriptions, PickleFormat(4), {}, **{**settings_, **given})

    def test_each_root_gets_a_file_of_its_own(self):
        states = [{f"x{rank}": np.zeros(4 + rank, "u1")} for rank in range(3)]

        parts = self.parts(states, roots=(0, 2))

        assert [part.whole is not None for part in parts] == [True, False, True]
        totals = [[file.totals.tolist() for file in part.files] for part in parts]
        assert totals == [[[0, 5, 6], [4, 5, 0]]] * 3
        assert [file.stream.nbytes for file in parts[1].files] == [[5], [5]]
        assert parts[0].whole.layout == parts[2].whole.layout

    def test_without_a_root_nobody_sends(self):
        states = [{f"x{rank}": np.zeros(4, "u1")} for rank in range(2)]

        parts = self.parts(states)

        assert all(not part.files[0].totals.any() for part in parts)

    def test_streams_are_in_the_order_of_the_file(self):
        states = [{f"x{n}": np.zeros(5, "u1") for n in (2, 0, 1)}, {"y": np.zeros(1)}]

        parts = self.parts(states)

        for part in parts:
            offsets = part.files[0].stream.offsets
            assert offsets == sorted(offsets)
            assert all(offset % 64 == 0 for offset in offsets)

    def test_skeleton_between_small_arrays_of_a_rank_is_handed_out(self):
        states = [{"a": np.zeros(5, "u1"), "b": np.zeros(5, "u1")}, {"c": np.zeros(5)}]

        first, second = self.parts(states)

        between = first.files[0].between
        stream, layout = first.files[0].stream, first.whole.layout
        gap = (stream.offsets[0] + 5, stream.offsets[1])
        assert between[0] is None
        assert (gap[0], between[1]) in layout.skeleton
        assert len(between[1]) == gap[1] - gap[0]
        assert second.files[0].between == [None]
        assert first.whole.handed_out == {gap[0]}

    def test_skeleton_before_large_arrays_is_not_handed_out(self):
        states = [{"a": np.zeros(2**16, "u1"), "b": np.zeros(2**16, "u1")}]

        (part,) = self.parts(states)

        assert part.files[0].between == [None, None]
        assert part.whole.handed_out == frozenset()

    @pytest.mark.parametrize(
        ("replicas", "expected"),
        [("first", [[], []]), ("share", [[], []]), ("check", [[0, 1], [0, 1]])],
    )
    def test_digests_are_asked_for_where_replicas_are_checked(self, replicas, expected):
        states = [
            {"x": np.zeros(2), "y": np.ones(3)},
            {"y": np.ones(3), "x": np.zeros(2)},
        ]

        parts = self.parts(states, replicas=replicas)

        assert [sorted(part.replicas) for part in parts] == expected

    def test_replicas_that_differ_are_refused_by_the_rank_that_seals(self):
        states = [{"x": np.zeros(2)}, {"x": np.zeros(2)}]
        whole = self.parts(states, replicas="check")[0].whole

        whole.check_replicas([np.array([5], np.uint32)] * 2, ["a", "b"])
        with pytest.raises(StateDictError, match=r"0x00000005 on rank 0 \(a\); "):
            whole.check_replicas([np.array([n], np.uint32) for n in (5, 6)], ["a", "b"])

    def test_checksums_that_did_not_come_are_a_defect(self):
        whole = self.parts([{"x": np.zeros(2)}, {"y": np.zeros(2)}])[0].whole
        moved = Moved(of_streams={0: np.array([1], np.uint32)})

        with pytest.raises(RuntimeError, match="a defect of mpisave"):
            whole.checksums(moved, 2)

    def test_states_that_do_not_fit_are_refused(self):
        with pytest.raises(StateDictError, match="'x' differs between ranks"):
            self.parts([{"x": np.zeros(2)}, {"x": np.zeros(3)}])

    def test_root_is_told_where_what_it_receives_goes(self):
        states = [{f"x{rank}": np.zeros(4 + rank, "u1")} for rank in range(3)]
        whole = self.parts(states, roots=(1,))[1].whole

        incoming = whole.incoming(Memory(), 3)

        assert [stream.nbytes for stream in incoming.streams] == [[4], [5], [6]]
        assert incoming.names == [["'x0'"], ["'x1'"], ["'x2'"]]
        assert [stream.offsets for stream in incoming.streams] == [
            [extent.offset] for extent in whole.layout.extents
        ]
