"""Any number of ranks loads what it wants, and fails together or not at all."""

import contextlib
import errno
import io
import os
import pickle
import socket

import h5py
import numpy as np
import pytest
from boxes import noise, where
from helpers import assert_equal_states, assert_on_all_ranks, failing_on, small_blocks
from ranks import Counted, Numpy, assert_refused, first_ranks, grid, numbers, on_each

import mpisave
from mpisave import (
    PerRank,
    Shard,
    Shards,
    loading,
    opening,
    regrouping,
    sharing,
    skeleton,
)
from mpisave.source import Source
from mpisave.transport import exchange

pytestmark = pytest.mark.mpi

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
SKIPPED = "ignore:.* in the file, but in no rank's like"

WHOLE = {
    "x": numbers((24, 18), "f4"),
    "deep": {"y": numbers((4, 6, 10), ">i2", 1), "z": np.array(2.5), "lr": 0.25},
    "flags": np.arange(77) % 3 == 0,
    "empty": np.zeros((0, 3), np.int8),
    "step": 7,
}


@pytest.fixture(params=FORMATS)
def use_binary_format(request):
    return request.param


@pytest.fixture
def whole(comm, shared_dir, use_binary_format):
    """Return the path of a file that one process has saved."""
    return put(comm, shared_dir / "whole", use_binary_format=use_binary_format)


def put(comm, path, state=WHOLE, **how):
    if comm.rank == 0:
        from mpi4py import MPI

        mpisave.save(state, path, comm=MPI.COMM_SELF, **how)
    comm.Barrier()
    return path


def boxes_of(array, boxes, fill=None):
    """Return boxes of an array as shards in memory of their own, filled or not."""
    shards = []
    for start, count in boxes:
        part = array[where(start, count)].copy()
        if fill is not None:
            part[...] = fill
        shards.append(Shard(part, array.shape, start))
    return Shards(*shards) if len(shards) != 1 else shards[0]


def shards_in(value):
    return value.boxes if isinstance(value, Shards) else (value,)


def assert_boxes(found, array, boxes):
    """Fail unless shards are these boxes of an array, bit for bit."""
    assert isinstance(found, Shards if len(boxes) != 1 else Shard)
    for shard, (start, count) in zip(shards_in(found), boxes, strict=True):
        assert shard.global_shape == array.shape
        assert shard.start == start
        assert_equal_states(
            shard.array, np.ascontiguousarray(array[where(start, count)])
        )


def targets(shape, dtype):
    """Yield arrays to read into, each with the memory that it is part of."""
    for kind in ("c", "fortran", "strided", "reversed", "inside"):
        around = np.zeros([2 * n + 2 for n in shape], dtype)
        if kind == "c":
            array = np.zeros(shape, dtype)
        elif kind == "fortran":
            array = np.zeros(shape, dtype, order="F")
        elif kind == "strided":
            array = around[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
        elif kind == "reversed":
            array = np.zeros(shape, dtype)[tuple(slice(None, None, -1) for _ in shape)]
        else:
            array = around[tuple(slice(1, n + 1) for n in shape)]
        yield kind, array, around


class TestOtherNumbersOfRanks:
    def test_any_number_of_ranks_loads_what_any_number_saved(
        self, comm, shared_dir, use_binary_format
    ):
        x, y = WHOLE["x"], WHOLE["deep"]["y"]
        for writers in range(1, comm.size + 1):
            path = shared_dir / f"{writers}"
            with first_ranks(comm, writers) as part:
                if part is not None:
                    state = {
                        "x": boxes_of(x, [grid(x.shape, (1, writers))[part.rank]]),
                        "deep": {
                            "y": boxes_of(
                                y, grid(y.shape, (2, writers, 2))[part.rank :: writers]
                            ),
                            "z": WHOLE["deep"]["z"],
                            "lr": 0.25,
                        },
                        "flags": WHOLE["flags"],
                        "empty": WHOLE["empty"],
                        "step": 7,
                        "rng": PerRank({"seed": part.rank, "w": np.full(3, part.rank)}),
                    }
                    mpisave.save(
                        state, path, use_binary_format=use_binary_format, comm=part
                    )
            for readers in range(1, comm.size + 1):
                with first_ranks(comm, readers) as part:
                    check = lambda: None  # noqa: E731
                    if part is not None:
                        check = self._read(part, path, writers)
                    on_each(comm, check)

    def _read(self, part, path, writers):
        """Load; return what checks it, and does not communicate."""
        rank, size = part.rank, part.size
        x, y = WHOLE["x"], WHOLE["deep"]["y"]
        rows = [grid(x.shape, (size, 1))[rank]]
        mine = grid(y.shape, (1, 2, size))[rank::size]
        like = {
            "flags": np.zeros(77, bool),
            "deep": {"y": boxes_of(y, mine, 0), "z": np.array(0.0), "lr": 0},
            "x": boxes_of(x, rows, 0),
            "rng": PerRank(None),
            "step": None,
            "empty": np.zeros((0, 3), np.int8),
        }
        found = mpisave.load(
            path, comm=part, like=like, per_rank=lambda r, saved: (r + 1) % saved
        )
        taken = (rank + 1) % writers

        def check():
            assert list(found) == list(like)
            assert_boxes(found["x"], x, rows)
            assert_boxes(found["deep"]["y"], y, mine)
            assert_equal_states(found["flags"], WHOLE["flags"])
            assert_equal_states(found["empty"], WHOLE["empty"])
            rest = {"z": found["deep"]["z"], "lr": found["deep"]["lr"]}
            assert_equal_states(rest, {"z": np.array(2.5), "lr": 0.25})
            assert found["step"] == 7
            value = found["rng"].value
            assert_equal_states(value, {"seed": taken, "w": np.full(3, taken)})
            assert not like["flags"].any()

        return check

    def test_without_like_every_rank_gets_all_of_it(self, comm, whole):
        found = mpisave.load(whole, comm=comm)

        on_each(comm, lambda: assert_equal_states(found, WHOLE))

    def test_without_a_communicator_a_rank_loads_alone(self, comm, whole):
        if comm.rank == 0:
            assert_equal_states(mpisave.load(whole), WHOLE)
        comm.Barrier()

    def test_file_object_of_each_rank_is_read(self, comm, whole):
        buffer = io.BytesIO(whole.read_bytes())
        rows = [grid((24, 18), (comm.size, 1))[comm.rank]]
        like = {"x": boxes_of(WHOLE["x"], rows, 0), "flags": np.zeros(77, bool)}

        found = mpisave.load(buffer, comm=comm, like=like, keys=["x", "flags"])

        on_each(comm, lambda: assert_boxes(found["x"], WHOLE["x"], rows))
        on_each(comm, lambda: assert_equal_states(found["flags"], WHOLE["flags"]))

    def test_boxes_may_be_any_and_overlap(self, comm, whole):
        x = WHOLE["x"]
        boxes = [
            ((comm.rank, 3), (5, 7)),
            ((0, 0), (24, 18)),
            ((2, comm.rank), (20, 1)),
            ((3, 3), (0, 4)),
        ]

        found = mpisave.load(
            whole, comm=comm, like={"x": boxes_of(x, boxes, 0)}, keys="x"
        )

        on_each(comm, lambda: assert_boxes(found["x"], x, boxes))

    @pytest.mark.mpi(min_size=2)
    def test_rank_that_wants_nothing_loads_with_the_others(self, comm, whole):
        is_last = comm.rank == comm.size - 1
        like = {} if is_last else {"x": np.zeros((24, 18), "f4")}

        found = mpisave.load(whole, comm=comm, like=like, keys="x")

        expected = {} if is_last else {"x": WHOLE["x"]}
        on_each(comm, lambda: assert_equal_states(found, expected))

    @pytest.mark.parametrize("verify", [True, False])
    def test_boxes_of_blocks_that_several_ranks_want(self, comm, shared_dir, verify):
        # Short and long runs of an array of many blocks, in chunks that end within one.
        x = noise((997, 1013), "u1")
        size, rank = comm.size, comm.rank
        path = put(comm, shared_dir / "x", {"x": x, "again": x[::-1]})
        columns = [grid(x.shape, (1, size))[rank], grid(x.shape, (size, 1))[rank]]
        with small_blocks(1000), pytest.MonkeyPatch.context() as patch:
            path = put(comm, shared_dir / "x", {"x": x, "again": x[::-1]})
            patch.setattr(regrouping, "BLOCK_NBYTES", 1000)
            patch.setattr(regrouping, "CHUNK_NBYTES", 70_001)
            like = {"x": boxes_of(x, columns, 0), "again": boxes_of(x, columns[:1], 0)}
            found = mpisave.load(path, comm=comm, like=like, verify=verify)

        on_each(comm, lambda: assert_boxes(found["x"], x, columns))
        on_each(comm, lambda: assert_boxes(found["again"], x[::-1], columns[:1]))


class TestInto:
    def test_new_arrays_leave_those_of_like_alone(self, comm, whole):
        x = np.full((24, 18), comm.rank, "f4")
        box = ((comm.rank, 0), (3, 18))
        shard = boxes_of(WHOLE["x"], [box], -1)
        like = {"x": shard if comm.rank else x}

        found = mpisave.load(whole, comm=comm, like=like, keys="x", into="new")

        def check():
            assert (x == comm.rank).all()
            assert (shard.array == -1).all()
            if comm.rank:
                assert found["x"] is not shard
                assert_boxes(found["x"], WHOLE["x"], [box])
            else:
                assert found["x"] is not x
                assert_equal_states(found, {"x": WHOLE["x"]})

        on_each(comm, check)

    def test_inplace_fills_the_arrays_of_like_whatever_their_memory(
        self, comm, shared_dir, use_binary_format
    ):
        x, rank, size = (
            numbers((3 * comm.size, 2 * comm.size), ">i4"),
            comm.rank,
            comm.size,
        )
        names = [kind for kind, *_ in targets(x.shape, x.dtype)]
        path = put(
            comm,
            shared_dir / "x",
            {f"{name}.{n}": x for name in names for n in range(3)},
            use_binary_format=use_binary_format,
        )
        boxes = [grid(x.shape, (1, size))[rank], grid(x.shape, (size, 1))[rank]]
        like, memory = {}, {}
        for n, (start, count) in enumerate([((0, 0), x.shape), *boxes]):
            for kind, array, around in targets(count, x.dtype):
                like[f"{kind}.{n}"] = Shard(array, x.shape, start) if n else array
                memory[f"{kind}.{n}"] = (array, around)

        found = mpisave.load(path, comm=comm, like=like, into="inplace")

        def check():
            for n, box in enumerate([((0, 0), x.shape), *boxes]):
                for name in names:
                    key = f"{name}.{n}"
                    array, around = memory[key]
                    assert (found[key].array if n else found[key]) is array, key
                    assert array.tobytes() == x[where(*box)].tobytes(), key
                    if name in ("strided", "inside"):
                        # Nothing beside the elements was written.
                        expected = np.count_nonzero(array)
                        assert np.count_nonzero(around) == expected, key

        on_each(comm, check)

    def test_values_that_are_no_arrays_are_those_of_the_file(self, comm, whole):
        like = {"step": 1, "deep": {"lr": None, "z": np.zeros(())}}

        found = mpisave.load(
            whole, comm=comm, like=like, into="inplace", keys=["step", "deep/[lz]*"]
        )

        expected = {"step": 7, "deep": {"lr": 0.25, "z": np.array(2.5)}}
        on_each(comm, lambda: assert_equal_states(found, expected))
        assert_on_all_ranks(comm, found["deep"]["z"] is like["deep"]["z"], "in place")

    def test_mapped_arrays_are_those_of_the_file(self, comm, whole):
        box = ((1, comm.rank), (2, 5))
        like = {"x": boxes_of(WHOLE["x"], [box], 0), "flags": np.zeros(77, bool)}

        found = mpisave.load(
            whole, comm=comm, like=like, keys=["x", "flags"], mmap=True
        )

        on_each(comm, lambda: assert_boxes(found["x"], WHOLE["x"], [box]))
        on_each(comm, lambda: assert_equal_states(found["flags"], WHOLE["flags"]))
        assert_on_all_ranks(comm, not found["flags"].flags.writeable, "read-only")
        assert_on_all_ranks(comm, not found["x"].array.flags.owndata, "mapped")


class TestKeys:
    @pytest.mark.parametrize("keys", ["deep/*", [("deep", "y"), "deep/z", "deep/lr"]])
    def test_part_of_the_file_is_loaded_alone(self, comm, whole, keys):
        found = mpisave.load(whole, comm=comm, keys=keys)

        on_each(comm, lambda: assert_equal_states(found, {"deep": WHOLE["deep"]}))

    def test_ranks_may_ask_for_different_keys(self, comm, whole):
        key = ["x", "flags", "step"][comm.rank % 3]

        found = mpisave.load(whole, comm=comm, keys=key)

        on_each(comm, lambda: assert_equal_states(found, {key: WHOLE[key]}))

    def test_what_was_not_asked_for_stays_as_it_is(self, comm, whole):
        mine = np.full((24, 18), -1, "f4")
        like = {"x": mine, "flags": np.zeros(77, bool), "own": 3}

        found = mpisave.load(whole, comm=comm, like=like, keys="flags", into="inplace")

        assert_on_all_ranks(comm, found["x"] is mine, "x")
        assert_on_all_ranks(comm, (mine == -1).all(), "x was not read")
        expected = {"x": mine, "flags": WHOLE["flags"], "own": 3}
        on_each(comm, lambda: assert_equal_states(found, expected))

    def test_key_that_nothing_matches_on_one_rank_is_refused_on_all(self, comm, whole):
        last = comm.size - 1

        caught = assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: mpisave.load(
                whole, comm=comm, keys="flogs" if comm.rank == last else "flags"
            ),
            "nothing in the file matches 'flogs'",
            [last],
        )

        assert "flags" in str(caught)


class TestMissingAndUnexpected:
    @pytest.mark.mpi(min_size=2)
    def test_key_that_some_rank_wants_is_expected_by_all(self, comm, whole):
        every = ["x", "flags", "step", "empty", "deep"]
        mine = every[comm.rank :: comm.size]
        like = {
            key: value if key != "x" else np.zeros((24, 18), "f4")
            for key, value in WHOLE.items()
            if key in mine
        }

        found = mpisave.load(whole, comm=comm, like=like)

        expected = {key: WHOLE[key] for key in like}
        on_each(comm, lambda: assert_equal_states(found, expected))

    @pytest.mark.filterwarnings("error", "always:1 key")
    def test_key_that_no_rank_wants_is_unexpected_on_all(self, comm, whole, recwarn):
        like = {k: v for k, v in WHOLE.items() if k != "flags"}

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(whole, comm=comm, like=like),
            "1 key(s) are in the file, but in no rank's like: 'flags'",
        )
        assert "unexpected='skip'" in str(caught)

        found = mpisave.load(whole, comm=comm, like=like, unexpected="skip")

        on_each(comm, lambda: assert_equal_states(found, like))
        texts = [str(w.message) for w in recwarn if "no rank's like" in str(w.message)]
        assert_on_all_ranks(comm, len(texts) == (comm.rank == 0), "one warning")

    @pytest.mark.filterwarnings("error", "always:1 key")
    def test_key_that_the_file_lacks_is_missing_on_all(self, comm, whole, recwarn):
        last = comm.size - 1
        more = {"new": np.full(3, 5)} if comm.rank == last else {}
        like = {**WHOLE, "deep": WHOLE["deep"] | more}

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(whole, comm=comm, like=like),
            f"in like, but not in the file: ['deep']['new'] (rank {last})",
        )
        assert "missing='keep'" in str(caught)

        found = mpisave.load(whole, comm=comm, like=like, missing="keep")

        on_each(comm, lambda: assert_equal_states(found, like))
        if more:
            assert found["deep"]["new"] is more["new"]
        texts = [str(w.message) for w in recwarn if "not in the file" in str(w.message)]
        assert_on_all_ranks(comm, len(texts) == (comm.rank == 0), "one warning")

    @pytest.mark.parametrize("keys", ["deep/*", "deep", [("deep",), "step"]])
    def test_key_that_is_asked_for_by_a_pattern_is_missing(self, comm, whole, keys):
        like = {**WHOLE, "deep": WHOLE["deep"] | {"new": np.full(3, 5)}, "other": 1}

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(whole, comm=comm, like=like, keys=keys),
            "1 key(s) are in like, but not in the file: ['deep']['new'] (rank",
        )

        assert str(whole) in str(caught)

    def test_keys_on_both_sides_are_told_at_once(self, comm, whole):
        like = {key: value for key, value in WHOLE.items() if key != "flags"}

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(whole, comm=comm, like=like | {"flogs": 1}),
            "in like, but not in the file: 'flogs'",
        )

        assert "in the file, but in no rank's like: 'flags'" in str(caught)

    def test_keys_that_were_not_asked_for_are_not_unexpected(self, comm, whole):
        found = mpisave.load(whole, comm=comm, like={"step": 0}, keys="step")

        on_each(comm, lambda: assert_equal_states(found, {"step": 7}))


class TestPerRank:
    @pytest.fixture
    def saved(self, comm, shared_dir, use_binary_format):
        """Return the path of what all ranks have saved, a value each."""
        path = shared_dir / "x"
        state = {
            "w": np.arange(5),
            "rng": PerRank({"seed": comm.rank, "words": np.full(comm.rank + 1, 3)}),
            "n": PerRank(comm.rank * 10),
        }
        mpisave.save(state, path, use_binary_format=use_binary_format, comm=comm)
        return path

    def expected(self, rank):
        return {
            "w": np.arange(5),
            "rng": {"seed": rank, "words": np.full(rank + 1, 3)},
            "n": rank * 10,
        }

    def plain(self, state):
        return {k: v.value if type(v) is PerRank else v for k, v in state.items()}

    @pytest.mark.parametrize("with_like", [False, True])
    def test_each_rank_gets_its_own_on_as_many_ranks(self, comm, saved, with_like):
        like = {"w": np.zeros(5, int), "rng": PerRank(None), "n": PerRank("any")}

        found = mpisave.load(saved, comm=comm, like=like if with_like else None)

        assert_on_all_ranks(comm, type(found["rng"]) is PerRank, "PerRank")
        on_each(
            comm,
            lambda: assert_equal_states(self.plain(found), self.expected(comm.rank)),
        )

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize(
        ("held", "others_have"),
        [
            ([PerRank("a"), (1, 2), 7], [None, (1, 2), 7]),
            ((PerRank(1), (5,), [6]), (None, (5,), [6])),
            ([[PerRank({"x": 1})], 5, ((6,),)], [[None], 5, ((6,),)]),
            ({"p": PerRank(1), "q": (2,)}, {"q": (2,)}),
        ],
        ids=str,
    )
    def test_items_of_a_list_keep_their_places_on_ranks_that_gave_no_value(
        self, comm, shared_dir, use_binary_format, held, others_have
    ):
        state = {"x": held} if comm.rank == 1 else {}
        mpisave.save(
            state, shared_dir / "x", use_binary_format=use_binary_format, comm=comm
        )

        found = mpisave.load(shared_dir / "x", comm=comm)["x"]

        if comm.rank == 1:
            on_each(comm, lambda: assert_equal_states(str(found), str(held)))
        else:
            on_each(comm, lambda: assert_equal_states(found, others_have))

    def test_alone_it_is_a_dict_by_rank(self, comm, saved):
        found = mpisave.load(saved)

        every = {rank: self.expected(rank)["rng"] for rank in range(comm.size)}
        on_each(comm, lambda: assert_equal_states(found["rng"], every))

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("with_like", [False, True])
    def test_on_another_number_of_ranks_the_caller_says_whose(
        self, comm, saved, with_like
    ):
        like = {"w": np.zeros(5, int), "rng": PerRank(None), "n": PerRank("any")}
        like = like if with_like else None
        asked = []

        def last_first(rank, saved_by):
            asked.append((rank, saved_by))
            return saved_by - 1 - rank

        with first_ranks(comm, comm.size - 1) as part:
            check = lambda: None  # noqa: E731
            if part is not None:
                caught = assert_refused(
                    part,
                    mpisave.ArgumentError,
                    lambda: mpisave.load(saved, comm=part, like=like),
                    f"has a value for each of {comm.size} ranks, and there are "
                    f"{part.size} now",
                )
                assert "per_rank=lambda rank, saved: rank % saved" in str(caught)
                found = mpisave.load(saved, comm=part, like=like, per_rank=last_first)

                def check():
                    expected = self.expected(comm.size - 1 - part.rank)
                    assert_equal_states(self.plain(found), expected)
                    assert asked == [(part.rank, comm.size)]

            on_each(comm, check)

    @pytest.mark.parametrize("chosen", [-1, 99, None, 1.0, True])
    def test_choice_that_is_no_rank_is_refused_on_all(self, comm, saved, chosen):
        last = comm.size - 1

        assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: mpisave.load(
                saved,
                comm=comm,
                per_rank=lambda rank, _: chosen if rank == last else rank,
            ),
            f"returned {chosen!r}",
            [last],
        )

    def test_choice_that_raises_is_refused_on_all(self, comm, saved):
        last = comm.size - 1

        def choose(rank, saved_by):
            if rank == last:
                raise ValueError("no idea")
            return rank

        assert_refused(
            comm,
            mpisave.CollectiveError,
            lambda: mpisave.load(saved, comm=comm, per_rank=choose),
            "no idea",
            [last],
        )

    def test_shards_within_a_value_are_those_of_each_rank(self, comm, shared_dir):
        path = shared_dir / "x"
        mine = np.arange(6) + comm.rank
        halves = [((0,), (3,)), ((3,), (3,))]
        state = {"own": PerRank({"w": boxes_of(mine, halves)})}

        mpisave.save(state, path, comm=comm)

        found = mpisave.load(path, comm=comm)["own"].value
        on_each(comm, lambda: assert_equal_states(found, {"w": mine}))


def bad_likes(good):
    yield np.zeros((24, 18), "f8"), ["float64", "float32", "does not convert"]
    yield np.zeros((24, 18), ">f4"), [">f4", "float32"]
    yield np.zeros((18, 24), "f4"), ["(18, 24)", "(24, 18)"]
    yield 3, ["'x' is 3 in like", "float32"]
    yield {"x": good}, ["'x' is a dict in like", "float32"]
    yield Shard(np.zeros((2, 18), "f4"), (25, 18), (0, 0)), ["(25, 18)", "(24, 18)"]
    yield Shard(np.zeros((2, 18), "f4"), (24, 18), (23, 0)), ["(2, 18)", "(23, 0)"]
    yield Shard(np.zeros((2, 18), "f8"), (24, 18), (0, 0)), ["float64", "float32"]
    yield Shard([1, 2], (24, 18), (0, 0)), ["shard of no array"]


class TestRefusals:
    @pytest.mark.parametrize("number", range(9))
    def test_like_that_does_not_fit_on_one_rank_is_refused_on_all(
        self, comm, whole, number
    ):
        last, good = comm.size - 1, np.zeros((24, 18), "f4")
        bad, matches = list(bad_likes(good))[number]
        like = {"x": bad if comm.rank == last else good}

        caught = assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(whole, comm=comm, like=like, unexpected="skip"),
            "'x'",
        )

        for text in matches:
            assert text in str(caught), caught
        assert caught.step == "compare with like"

    def test_array_that_cannot_be_written_to_is_refused_on_all(self, comm, whole):
        last, good = comm.size - 1, np.zeros((24, 18), "f4")
        good.flags.writeable = comm.rank != last

        assert_refused(
            comm,
            mpisave.StateDictError,
            lambda: mpisave.load(
                whole, comm=comm, like={"x": good}, keys="x", into="inplace"
            ),
            "read-only",
            [last],
        )

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize(
        ("name", "first", "other"),
        [
            ("into", "new", "inplace"),
            ("missing", "error", "keep"),
            ("unexpected", "error", "skip"),
            ("mmap", False, True),
            ("verify", True, False),
        ],
    )
    def test_argument_that_differs_is_refused_with_ranks_and_both_values(
        self, comm, whole, name, first, other
    ):
        last = comm.size - 1
        value = other if comm.rank == last else first

        assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: mpisave.load(whole, comm=comm, like={}, **{name: value}),
            f"{name} differs between ranks: {first!r} on rank 0, {other!r} on rank",
        )

    @pytest.mark.mpi(min_size=2)
    def test_path_that_differs_is_refused(self, comm, whole):
        assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: mpisave.load(f"{whole}{comm.rank}", comm=comm),
            "path differs between ranks",
        )

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("into", "old", "into is 'old'"),
            ("into", "inplace", "needs like="),
            ("missing", "skip", "missing is 'skip'"),
            ("unexpected", "keep", "unexpected is 'keep'"),
            ("mmap", 1, "mmap is 1"),
            ("verify", None, "verify is None"),
            ("per_rank", 3, "per_rank is 3"),
        ],
    )
    def test_argument_that_is_not_legal_on_one_rank_is_refused_on_all(
        self, comm, whole, name, value, match
    ):
        last = comm.size - 1
        changed = {name: value} if comm.rank == last else {}

        assert_refused(
            comm,
            mpisave.ArgumentError,
            lambda: mpisave.load(whole, comm=comm, **changed),
            match,
            [last],
        )

    def test_file_that_is_not_there_is_raised_everywhere(self, comm, shared_dir):
        path = shared_dir / "nothing"

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: mpisave.load(path, comm=comm),
            str(path),
            [0],
        )

        assert caught.errno == errno.ENOENT

    @pytest.mark.mpi(min_size=2)
    def test_rank_that_cannot_open_the_file_is_raised_everywhere(
        self, comm, whole, monkeypatch
    ):
        last, opened, open_source = comm.size - 1, [], opening.Source

        def open_or_fail(path):
            # The first rank opens the file before, to read the index.
            if comm.rank == last:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            opened.append(open_source(path))
            return opened[-1]

        with monkeypatch.context() as patch:
            patch.setattr(opening, "Source", open_or_fail)
            caught = assert_refused(
                comm,
                mpisave.StorageError,
                lambda: mpisave.load(whole, comm=comm),
                "on a file system that all nodes share",
                [last],
            )

        left = [source for source in opened if not source._file.closed]
        for source in left:
            source.close()
        assert_on_all_ranks(comm, not left, "every rank closes the file")
        assert caught.step == "open the file"
        assert caught.errno == errno.ENOENT
        assert caught.failures[last].host == comm.allgather(socket.gethostname())[last]
        assert str(whole) in str(caught)

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("victim", [0, -1])
    def test_rank_that_cannot_read_is_raised_everywhere(
        self, comm, whole, monkeypatch, victim
    ):
        victim %= comm.size
        rows = [grid((24, 18), (comm.size, 1))[comm.rank]]
        like = {"x": boxes_of(WHOLE["x"], rows, 0)}
        error = OSError(errno.EIO, "Input/output error")
        with failing_on(comm, victim, monkeypatch, loading, "read", error):
            caught = assert_refused(
                comm,
                mpisave.StorageError,
                lambda: mpisave.load(whole, comm=comm, like=like, keys="x"),
                "Input/output error",
                [victim],
            )

        assert caught.step == "read"
        assert caught.errno == errno.EIO

    def test_interrupt_on_one_rank_stays_one_and_ends_the_load_of_all(
        self, comm, whole, monkeypatch
    ):
        last, caught = comm.size - 1, None
        with failing_on(comm, last, monkeypatch, loading, "read", KeyboardInterrupt()):
            try:
                mpisave.load(whole, comm=comm)
            except BaseException as exc:
                caught = exc

        expected = KeyboardInterrupt if comm.rank == last else mpisave.CollectiveError
        assert_on_all_ranks(comm, type(caught) is expected, f"{caught!r}")


@contextlib.contextmanager
def hosts(monkeypatch, comm, many=None):
    """Have ranks run on hosts of their own, or on `many`."""
    host = comm.rank if many is None else comm.rank % many
    with monkeypatch.context() as patch:
        patch.setattr(loading, "where_this_runs", lambda: (f"host{host}", 1, 0))
        yield patch


def flip(comm, path, data):
    """Flip a bit in the middle of some bytes of a file."""
    if comm.rank == 0:
        content = bytearray(path.read_bytes())
        content[content.index(data) + len(data) // 2] ^= 4
        path.write_bytes(content)
    comm.Barrier()


# How ranks come to read: alone, each a part; together; regrouped; passed on.
LIKES = ["all", "whole", "rows", "columns", "shared"]


def like_of(name, comm):
    x = WHOLE["x"]
    if name in ("all", "shared"):
        return None
    if name == "whole":
        return {"x": np.zeros(x.shape, x.dtype)}
    many = (comm.size, 1) if name == "rows" else (1, comm.size)
    return {"x": boxes_of(x, [grid(x.shape, many)[comm.rank]], 0)}


class TestAltered:
    @pytest.mark.parametrize("name", LIKES)
    def test_flipped_bit_is_found_by_every_rank(self, comm, whole, monkeypatch, name):
        flip(comm, whole, WHOLE["x"].tobytes())
        like = like_of(name, comm)
        how = {"comm": comm, "like": like, "keys": "x"}

        with hosts(monkeypatch, comm, comm.size if name == "shared" else 1):
            caught = assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda: mpisave.load(whole, **how),
                "'x' is altered: the CRC-32C of block 0",
            )
            assert str(whole) in str(caught)
            found = mpisave.load(whole, **how, verify=False)

        assert_on_all_ranks(comm, list(found) == ["x"], "not verified")

    @pytest.mark.mpi(min_size=2)
    def test_block_that_no_rank_wants_is_not_read(self, comm, shared_dir):
        x = np.random.default_rng(0).integers(0, 256, (64, 32), np.uint8)
        with small_blocks(64):
            path = put(comm, shared_dir / "x", {"x": x})
            flip(comm, path, x[60].tobytes())
            rows = grid((60, 32), (comm.size, 1))[comm.rank]
            found = mpisave.load(path, comm=comm, like={"x": boxes_of(x, [rows], 0)})
            bad = ((0 if comm.rank else 59, 0), (2, 32))
            caught = assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda: mpisave.load(
                    path, comm=comm, like={"x": boxes_of(x, [bad], 0)}
                ),
                "'x' is altered: the CRC-32C of block 30",
                [0],
            )

        on_each(comm, lambda: assert_boxes(found["x"], x, [rows]))
        assert caught.step == "read"

    @pytest.mark.parametrize("with_like", [False, True])
    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (lambda data: b"", "the file is empty"),
            (lambda data: data[:-1], None),
            (lambda data: data[: len(data) // 2], None),
            (lambda data: data + b"\0", None),
            (lambda data: data[:-50] + b"\0" + data[-49:], "index is altered"),
            (lambda data: data[:64] + data[128:], "bytes were lost or added"),
            (lambda data: b"some text" + data, "neither an HDF5 file nor a pickle"),
        ],
    )
    def test_torn_and_foreign_files_are_refused_by_every_rank(
        self, comm, whole, content, match, with_like
    ):
        if comm.rank == 0:
            whole.write_bytes(content(whole.read_bytes()))
        comm.Barrier()
        like = {"x": np.zeros((24, 18), "f4")} if with_like else None

        caught = assert_refused(
            comm,
            mpisave.FileFormatError,
            lambda: mpisave.load(whole, comm=comm, like=like),
            match or str(whole),
        )

        assert str(whole) in str(caught)

    def test_hdf5_of_another_program_is_read_by_every_rank(self, comm, shared_dir):
        path = shared_dir / "x.h5"
        state = {"deep": {"y": np.array(2.5)}, "x": np.arange(1000.0).reshape(100, 10)}
        if comm.rank == 0:
            with h5py.File(path, "w") as file:
                file["x"], file["deep/y"] = state["x"], 2.5
        comm.Barrier()
        row = Shard(np.empty((1, 10)), (100, 10), (comm.rank, 0))
        column = Shard(np.empty((100, 1)), (100, 10), (0, comm.rank))

        whole = mpisave.load(path, comm=comm)
        rows = mpisave.load(path, comm=comm, keys="x", like={"x": row})
        columns = mpisave.load(path, comm=comm, keys="x", like={"x": column})

        on_each(comm, lambda: assert_equal_states(whole, state))
        has_row = np.array_equal(rows["x"].array, state["x"][[comm.rank]])
        assert_on_all_ranks(comm, has_row, "row")
        has_column = np.array_equal(columns["x"].array, state["x"][:, [comm.rank]])
        assert_on_all_ranks(comm, has_column, "column")

    def test_hdf5_that_is_refused_is_refused_by_every_rank(self, comm, shared_dir):
        path = shared_dir / "x.h5"
        if comm.rank == 0:
            with h5py.File(path, "w") as file:
                file["deep/x"] = h5py.ExternalLink("/etc/hostname", "/")
        comm.Barrier()

        assert_refused(
            comm,
            mpisave.FileFormatError,
            lambda: mpisave.load(path, comm=comm),
            "'/deep/x': it is an external link",
            [0],
        )

    def test_pickle_of_another_program_is_read_by_every_rank(self, comm, shared_dir):
        path = shared_dir / "x.pkl"
        state = {"x": np.arange(5.0), "deep": [1, (2, "y")]}
        if comm.rank == 0:
            path.write_bytes(pickle.dumps(state))
        comm.Barrier()

        found = mpisave.load(path, comm=comm)

        on_each(comm, lambda: assert_equal_states(found, state))
        for more in ({"like": state}, {"keys": "x"}, {"mmap": True}):
            assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda how=more: mpisave.load(path, comm=comm, **how),
                "need a file of mpisave",
            )

    def test_pickle_that_would_run_code_is_refused_by_every_rank(
        self, comm, shared_dir
    ):
        path = shared_dir / "x.pkl"
        if comm.rank == 0:
            path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/harm'\ntR.")
        comm.Barrier()

        assert_refused(
            comm,
            mpisave.FileFormatError,
            lambda: mpisave.load(path, comm=comm),
            str(path),
        )

    def test_object_that_only_pickle_gives_back_is_refused_by_every_rank(
        self, comm, shared_dir
    ):
        path = shared_dir / "x.pkl"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mpisave.saving.warn_caller", lambda text: None)
            put(comm, path, {"odd": {1, 2}, "x": np.arange(3)})

        for like in (None, {"odd": 0}):
            caught = assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda want=like: mpisave.load(
                    path, comm=comm, like=want, unexpected="skip"
                ),
                "'odd' is an object of type set",
            )
        assert str(path) in str(caught)
        found = mpisave.load(path, comm=comm, keys="x")
        on_each(comm, lambda: assert_equal_states(found, {"x": np.arange(3)}))


def watch_reads(patch):
    """Return how many bytes each call of this rank reads, as they come.

    But not of the skeleton.
    """
    found = []
    read_into = Source.read_into

    def watched(self, offset, out):
        found.append(out.nbytes)
        return read_into(self, offset, out)

    def not_watched(source, *arguments):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(Source, "read_into", read_into)
            return skeleton.read_part(source, *arguments)

    patch.setattr(Source, "read_into", watched)
    patch.setattr(loading, "read_part", not_watched)
    return found


def watch_shared(patch):
    """Return a list of the keys that are read once for all ranks, as it comes to be."""
    shared, read_shared = [], loading.read_shared

    def watched(own, source, wants, **how):
        shared.extend(want.stored.key for want in wants)
        read_shared(own, source, wants, **how)

    patch.setattr(loading, "read_shared", watched)
    return shared


class TestShared:
    """What all ranks of several hosts want: read once and passed on."""

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("window", [1000, None])
    @pytest.mark.parametrize("many_hosts", [2, None])
    def test_each_byte_is_read_once_and_all_ranks_have_it(
        self, comm, shared_dir, monkeypatch, use_binary_format, window, many_hosts
    ):
        state = {f"x{i}": noise((i, 7), "<f4", i) for i in range(60)}
        state |= {"n": 3, "big": noise(100_000, "u1")}
        path = put(comm, shared_dir / "x", state, use_binary_format=use_binary_format)
        calls = []
        with hosts(monkeypatch, comm, many_hosts) as patch:
            read_shared = loading.read_shared
            patch.setattr(
                loading,
                "read_shared",
                lambda *args, **how: calls.append(args) or read_shared(*args, **how),
            )
            if window:
                patch.setattr(sharing, "WINDOW_NBYTES", window)
                patch.setattr(sharing, "_GAP_NBYTES", 50)
            reads = watch_reads(patch)
            found = mpisave.load(path, comm=comm)

        on_each(comm, lambda: assert_equal_states(found, state))
        assert_on_all_ranks(comm, len(calls) == 1, "shared")
        index_nbytes = 20_000 if comm.rank == 0 else 0
        most = path.stat().st_size / comm.size + 1000 + index_nbytes
        assert_on_all_ranks(comm, sum(reads) < most, f"{sum(reads)} bytes read")

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("altered", [None, "a", "b"])
    def test_arrays_that_share_memory_are_read_by_each_rank(
        self, comm, shared_dir, monkeypatch, altered
    ):
        """Tied weights, of a file in which they were not: the last is what is there."""
        state = {key: noise(5000, "u1", n) for n, key in enumerate(("a", "b", "c"))}
        path = put(comm, shared_dir / "x", state, use_binary_format=False)
        if altered and comm.rank == 0:
            data = bytearray(path.read_bytes())
            data[data.find(state[altered][:100].tobytes())] ^= 1
            path.write_bytes(data)
        comm.Barrier()
        memory = np.zeros(6000, np.uint8)
        like = {"a": memory[:5000], "b": memory[1000:], "c": np.zeros(5000, np.uint8)}
        shared = []

        def load():
            with hosts(monkeypatch, comm) as patch:
                shared.append(watch_shared(patch))
                mpisave.load(path, like=like, into="inplace", comm=comm)

        if altered:
            text = f"'{altered}' is altered"
            assert_refused(comm, mpisave.FileFormatError, load, text)
            return
        load()

        assert_on_all_ranks(comm, shared == [[("c",)]], shared)
        on_each(comm, lambda: np.testing.assert_array_equal(like["c"], state["c"]))
        on_each(comm, lambda: np.testing.assert_array_equal(like["b"], state["b"]))

    @pytest.mark.mpi(min_size=2)
    def test_short_runs_of_memory_that_is_shared_come_in_the_order_of_the_file(
        self, comm, shared_dir
    ):
        state = {"a": np.full((200, 200), 1.0), "b": np.full((200, 200), 2.0)}
        path = put(comm, shared_dir / "x", state, use_binary_format=False)
        memory = np.zeros((200, 200))
        column = Shard(memory[:, :3], (200, 200), (0, 0))
        apart = np.zeros((200, 9))  # of its own: put together by all ranks
        like = {"a": memory, "b": Shards(column, Shard(apart, (200, 200), (0, 9)))}

        mpisave.load(path, like=like, into="inplace", comm=comm)

        def check():
            assert memory[0].tolist() == 3 * [2.0] + 197 * [1.0]
            assert (apart == 2).all()

        on_each(comm, check)

    @pytest.mark.mpi(min_size=2)
    def test_only_what_all_ranks_want_whole_is_shared(self, comm, whole, monkeypatch):
        x, y = WHOLE["x"], WHOLE["deep"]["y"]
        is_last = comm.rank == comm.size - 1
        columns = [grid(x.shape, (1, comm.size))[comm.rank]]
        like = {
            "x": boxes_of(x, columns, 0),
            # Not contiguous on one rank: read by itself everywhere.
            "deep": {"y": np.zeros(y.shape, y.dtype, order="F" if is_last else "C")},
            "empty": np.zeros((0, 3), np.int8),
        }
        like["flags"] = np.ones(77, bool)
        if is_last:
            like["step"] = 0
        with hosts(monkeypatch, comm) as patch:
            shared = watch_shared(patch)
            found = mpisave.load(
                whole,
                comm=comm,
                like=like,
                into="inplace",
                keys=["x", "deep/y", "flags", "empty", "step"],
            )

        on_each(comm, lambda: assert_boxes(found["x"], x, columns))
        assert_on_all_ranks(comm, found["deep"]["y"] is like["deep"]["y"], "in place")
        assert_on_all_ranks(comm, (found["deep"]["y"] == y).all(), "y")
        on_each(comm, lambda: assert_equal_states(found["flags"], WHOLE["flags"]))
        assert_on_all_ranks(comm, shared == [("flags",)], f"{shared} were shared")
        assert_on_all_ranks(comm, found.get("step", 7) == 7, "step")

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("victim", [0, -1])
    @pytest.mark.parametrize("calls", [0, 2])
    def test_failure_on_one_rank_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch, victim, calls
    ):
        victim %= comm.size
        path = put(comm, shared_dir / "x", {"x": noise(10_000, "u1")})
        read_into, left = Source.read_into, [calls]

        def fail(self, offset, out):
            if out.nbytes > 100 and offset < 10_000:  # no part of the index
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.EIO, "Input/output error")
            return read_into(self, offset, out)

        with hosts(monkeypatch, comm) as patch:
            patch.setattr(sharing, "WINDOW_NBYTES", 1000)
            if comm.rank == victim:
                patch.setattr(Source, "read_into", fail)
            caught = assert_refused(
                comm,
                mpisave.StorageError,
                lambda: mpisave.load(path, comm=comm),
                "Input/output error",
                [victim],
            )

        assert caught.step == "read"
        assert caught.errno == errno.EIO

    @pytest.mark.mpi(min_size=2)
    def test_file_that_shrinks_while_it_is_read_is_refused_by_every_rank(
        self, comm, shared_dir, monkeypatch
    ):
        path = put(comm, shared_dir / "x", {"x": noise(10_000, "u1")})
        last, opened = comm.size - 1, opening.Source

        class Shrunk(opened):
            def read_into(self, offset, out):
                done = super().read_into(offset, out)
                is_payload = comm.rank == last and offset < 10_000
                return min(done, 9000 - offset) if is_payload else done

        with hosts(monkeypatch, comm) as patch:
            patch.setattr(opening, "Source", Shrunk)
            assert_refused(
                comm,
                mpisave.FileFormatError,
                lambda: mpisave.load(path, comm=comm),
                "is torn",
                [last],
            )


class TestRegrouped:
    """Boxes in short runs that several ranks want: read once and exchanged."""

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("verify", [True, False])
    def test_each_byte_is_read_once(
        self, comm, shared_dir, monkeypatch, use_binary_format, verify
    ):
        x = noise((500, 40 * comm.size), "<f4")
        path = put(
            comm, shared_dir / "x", {"x": x}, use_binary_format=use_binary_format
        )
        columns = [grid(x.shape, (1, comm.size))[comm.rank]]
        with monkeypatch.context() as patch, small_blocks(4096):
            path = put(
                comm, shared_dir / "x", {"x": x}, use_binary_format=use_binary_format
            )
            patch.setattr(regrouping, "BLOCK_NBYTES", 4096)
            patch.setattr(regrouping, "CHUNK_NBYTES", 8192)
            reads = watch_reads(patch)
            found = mpisave.load(
                path, comm=comm, like={"x": boxes_of(x, columns, 0)}, verify=verify
            )

        on_each(comm, lambda: assert_boxes(found["x"], x, columns))
        # A block that two chunks share is read twice.
        most = 2.2 * x.nbytes / comm.size + 16_000
        assert_on_all_ranks(comm, sum(reads) < most, f"{sum(reads)} of {x.nbytes}")

    @pytest.mark.mpi(min_size=2)
    @pytest.mark.parametrize("victim", [0, -1])
    @pytest.mark.parametrize("calls", [0, 2])
    @pytest.mark.parametrize("name", ["_read", "_place"])
    def test_failure_on_one_rank_is_raised_everywhere(
        self, comm, shared_dir, monkeypatch, name, calls, victim
    ):
        victim %= comm.size
        x = numbers((60, 8 * comm.size), "i8")
        path = put(comm, shared_dir / "x", {"x": x})
        columns = [grid(x.shape, (1, comm.size))[comm.rank]]
        function, left = getattr(regrouping._Regrouping, name), [calls]

        def fail(*args):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
            return function(*args)

        monkeypatch.setattr(regrouping, "CHUNK_NBYTES", 512)
        if comm.rank == victim:
            monkeypatch.setattr(regrouping._Regrouping, name, fail)

        caught = assert_refused(
            comm,
            mpisave.StorageError,
            lambda: mpisave.load(path, comm=comm, like={"x": boxes_of(x, columns, 0)}),
            "Input/output error",
            [victim],
        )

        assert caught.step == "read and exchange"

    @pytest.mark.mpi(min_size=2)
    def test_boxes_go_to_where_they_are_wanted_whatever_the_memory(
        self, comm, shared_dir
    ):
        x = numbers((12, 6 * comm.size), ">u2")
        start, count = grid(x.shape, (1, comm.size))[comm.rank]
        kinds = list(targets(count, x.dtype))
        path = put(comm, shared_dir / "x", {kind: x for kind, *_ in kinds})
        like = {kind: Shard(array, x.shape, start) for kind, array, _ in kinds}

        mpisave.load(path, comm=comm, like=like, into="inplace")

        for kind, array, _ in kinds:
            same = array.tobytes() == x[where(start, count)].tobytes()
            assert_on_all_ranks(comm, same, kind)

    @pytest.mark.mpi(min_size=2)
    def test_one_part_that_all_ranks_want_comes_in_bounded_rounds(
        self, comm, shared_dir, monkeypatch
    ):
        # Every rank wants the same columns: they are sent once to each.
        x = noise((400, 512), "u1")
        path = put(comm, shared_dir / "x", {"x": x})
        counted = Counted()
        monkeypatch.setattr(regrouping, "np", Numpy(counted))
        monkeypatch.setattr(regrouping, "CHUNK_NBYTES", 10_000)
        monkeypatch.setattr(regrouping, "_ROUND_NBYTES", 20_000)
        box = [((0, 0), (400, 511))]

        found = mpisave.load(path, comm=comm, like={"x": boxes_of(x, box, 0)})

        on_each(comm, lambda: assert_boxes(found["x"], x, box))
        # What is read is a block, here all of the array; what is sent and what is
        # received are a round.
        most = x.nbytes + 3 * 20_000
        assert_on_all_ranks(comm, counted.most <= most, f"{counted.most} bytes")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("module", [exchange, regrouping, sharing], ids=str)
def test_rank_without_memory_for_an_exchange_is_raised_everywhere(
    comm, shared_dir, monkeypatch, module
):
    x = numbers((60, 8 * comm.size), "i8")
    columns = {"x": boxes_of(x, [grid(x.shape, (1, comm.size))[comm.rank]], 0)}
    path = put(comm, shared_dir / "x", {"x": x})

    def full(*_args):
        raise MemoryError("no buffer")

    def act():
        if module is exchange:
            return mpisave.save(columns, shared_dir / "y", comm=comm)
        like = None if module is sharing else columns
        return mpisave.load(path, comm=comm, like=like)

    last = comm.size - 1
    with hosts(monkeypatch, comm) as patch:
        if comm.rank == last:
            patch.setattr(module, "np", Numpy(full))
        caught = assert_refused(comm, mpisave.CollectiveError, act, "no buffer", [last])

    assert caught.step == "allocate buffers"
    comm.Barrier()
    assert_on_all_ranks(comm, os.listdir(shared_dir) == ["x"], "nothing left")


@pytest.mark.parametrize("times", [1, 3])
def test_file_that_is_replaced_while_ranks_open_it_is_one_state_on_all_of_them(
    comm, shared_dir, monkeypatch, use_binary_format, times
):
    def state(tag):
        return {"a": np.arange(5 + tag), "b": np.full(20_000, tag, np.int32)}

    how = {"use_binary_format": use_binary_format}
    path = put(comm, shared_dir / "state", state(0), **how)
    others = [
        put(comm, shared_dir / f"other{tag}", state(tag), **how)
        for tag in range(1, times + 1)
    ]
    find = opening.find_index

    def find_and_replace(source):
        found = find(source)
        if others:
            others.pop(0).replace(path)
        return found

    monkeypatch.setattr(opening, "find_index", find_and_replace)

    found = mpisave.load(path, comm=comm)

    tag = times if comm.size > 1 else 0
    on_each(comm, lambda: assert_equal_states(found, state(tag)))


@pytest.mark.mpi(min_size=2)
def test_file_that_is_replaced_again_and_again_is_refused_on_all_ranks(
    comm, shared_dir, monkeypatch
):
    from mpi4py import MPI

    path = put(comm, shared_dir / "state", {"a": np.zeros(1)})
    find, many = opening.find_index, iter(range(2, 1000))

    def find_and_replace(source):
        found = find(source)
        other = shared_dir / "other"
        mpisave.save({"a": np.zeros(next(many))}, other, comm=MPI.COMM_SELF)
        other.replace(path)
        return found

    monkeypatch.setattr(opening, "find_index", find_and_replace)

    assert_refused(
        comm,
        mpisave.FileFormatError,
        lambda: mpisave.load(path, comm=comm),
        "replaced too often",
    )


@pytest.mark.parametrize("kind", ["pickle", "hdf5"])
def test_file_of_another_program_that_is_replaced_is_one_state_on_all_of_them(
    comm, shared_dir, monkeypatch, kind
):
    def put_foreign(path, tag):
        state = {"w": np.full(50_000, tag)}
        if comm.rank == 0 and kind == "hdf5":
            with h5py.File(path, "w") as file:
                file["w"] = state["w"]
        elif comm.rank == 0:
            path.write_bytes(pickle.dumps(state))
        comm.Barrier()
        return path

    path = put_foreign(shared_dir / "state", 0)
    others = [put_foreign(shared_dir / "other", 1)]
    find = opening.find_index

    def find_and_replace(source):
        found = find(source)
        if others:
            others.pop().replace(path)
        return found

    monkeypatch.setattr(opening, "find_index", find_and_replace)

    found = mpisave.load(path, comm=comm)

    tag = int(comm.size > 1)
    on_each(comm, lambda: assert_equal_states(found, {"w": np.full(50_000, tag)}))


@pytest.mark.mpi(min_size=2)
def test_like_on_some_ranks_only_is_refused_on_all(comm, shared_dir):
    mpisave.save({"x": np.arange(6.0)}, shared_dir / "x", comm=comm)
    like = {"x": np.zeros(6)} if comm.rank == 0 else None

    with pytest.raises(mpisave.ArgumentError, match="like given differs between ranks"):
        mpisave.load(shared_dir / "x", comm=comm, like=like, timeout=20)
