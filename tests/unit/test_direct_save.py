"""Saving what one process holds in boxes, and for each rank; and plans kept."""

import io
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from boxes import made, noise, tilings, where
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_equal_states, files_in, small_blocks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import mpisave
from mpisave import PerRank, Shard, Shards, saving
from mpisave.comms import SoloComm
from mpisave.errors import StateDictError

PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]


def saved(state, **how):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, **how)
    return buffer


def read_stock(file, use_binary_format):
    """Return a flat state as other programs read it."""
    file.seek(0)
    if not use_binary_format:
        return pickle.load(file)
    with h5py.File(file) as opened:
        # Of no axes, h5py makes a number of the machine's byte order.
        return {
            key: np.asarray(dataset[()], dataset.dtype)
            for key, dataset in opened.items()
        }


def laid_out(array, layout):
    """Return an equal array in another layout of memory."""
    if layout == "fortran":
        return array.copy(order="F")
    if layout == "strided":
        around = np.repeat(array[..., None], 2, axis=-1)
        return around[..., 1]
    if layout == "negative":
        back = (..., *(slice(None, None, -1) for _ in array.shape))
        return array[back].copy()[back]
    if layout == "device":
        return FakeDeviceArray(array.copy())
    return array.copy()


LAYOUTS = st.sampled_from(["c", "fortran", "strided", "negative", "device"])


class TestShards:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @PROPERTY
    @given(
        case=tilings(0, 4),
        dtype=st.sampled_from(["u1", "<f4", ">i2", "c16"]),
        shortest=st.sampled_from([0, 8, 10**6]),
        cap=st.sampled_from([1, 7, 50, 10**9]),
        data=st.data(),
    )
    def test_boxes_are_saved_as_the_array_that_they_make(
        self, use_binary_format, case, dtype, shortest, cap, data
    ):
        shape, boxes = case
        array = made(shape, dtype)
        layout = data.draw(LAYOUTS)
        event(f"{layout}, {'in short runs' if shortest else 'straight'}")
        shards = Shards(
            *(
                Shard(laid_out(array[where(*box)], layout), shape, box[0])
                for box in boxes
            )
        )
        state = {"before": np.arange(3), "x": shards, "after": np.arange(2)}

        with pytest.MonkeyPatch.context() as patch, small_blocks(64):
            patch.setattr("mpisave.plan.SHORTEST_RUN_NBYTES", shortest)
            put_in_place(patch)
            file = saved(
                state, use_binary_format=use_binary_format, max_grouped_size=cap
            )
            loaded = mpisave.load(file)

        expected = {**state, "x": array}
        assert_equal_states(loaded, expected)
        found = read_stock(file, use_binary_format)
        assert set(found) == set(expected)
        np.testing.assert_array_equal(found["x"], array, strict=True)

    def test_file_is_that_of_the_array_held_whole(self):
        array = noise((64, 96), "<f4")
        boxes = [((n, m), (32, 48)) for n in (32, 0) for m in (0, 48)]
        shards = Shards(
            *(Shard(array[where(*box)], array.shape, box[0]) for box in boxes)
        )

        whole, parts = (saved({"x": value}).getvalue() for value in (array, shards))

        assert parts == whole

    def test_one_shard_may_be_all_of_an_array(self):
        array = np.arange(6.0).reshape(2, 3)

        found = mpisave.load(saved(Shard(array, (2, 3), (0, 0))))

        assert_equal_states(found, array)

    def test_boxes_of_several_mebibytes_are_saved(self, tmp_path):
        # Runs of 3 KiB, in chunks of 4 MiB; and rows in blocks of 1 MiB.
        array = noise((1024, 6 * 1024), "u1")
        half = 3 * 1024
        columns = [
            Shard(array[:, n : n + half], array.shape, (0, n)) for n in (half, 0)
        ]
        rows = [Shard(array[n : n + 300], array.shape, (n, 0)) for n in (0, 300, 600)]
        rows.append(Shard(array[900:], array.shape, (900, 0)))
        path = tmp_path / "x"

        mpisave.save({"c": Shards(*columns), "r": Shards(*rows)}, path)

        found = pickle.loads(path.read_bytes())
        assert (found["c"] == array).all()
        assert (found["r"] == array).all()
        assert_equal_states(mpisave.load(path), found)

    def test_box_that_is_there_twice_is_saved_once(self):
        array = np.arange(8.0)
        top, bottom = Shard(array[:4], (8,), (0,)), Shard(array[4:], (8,), (4,))

        for replicas in ("first", "check", "share"):
            found = mpisave.load(
                saved({"x": Shards(top, bottom, top)}, replicas=replicas)
            )
            assert_equal_states(found, {"x": array})

    def test_empty_box_is_no_part_of_the_array(self):
        array = np.arange(8.0).reshape(4, 2)
        shards = Shards(Shard(array[:0], (4, 2), (2, 0)), Shard(array, (4, 2), (0, 0)))

        assert_equal_states(mpisave.load(saved(shards)), array)

    def test_shards_are_not_modified(self):
        array = noise((4, 6), "<f4")
        shards = Shards(
            Shard(array[:, :3], (4, 6), (0, 0)), Shard(array[:, 3:], (4, 6), (0, 3))
        )
        before = array.tobytes()

        saved({"x": shards})

        assert array.tobytes() == before

    def test_array_in_boxes_is_one_of_the_arrays_that_params_hold(self, tmp_path):
        shard = Shard(np.zeros(3), (3,), (0,))

        mpisave.save(
            {"x": shard}, tmp_path / "x.params", state_type="params", gather_to=0
        )

        assert_equal_states(mpisave.load(tmp_path / "x.params"), {"x": np.zeros(3)})

    def test_report_counts_the_bytes_of_the_array_once(self, tmp_path):
        array = np.zeros((4, 6))
        shards = Shards(
            Shard(array[:, :3], (4, 6), (0, 0)), Shard(array[:, 3:], (4, 6), (0, 3))
        )

        report = mpisave.save({"x": shards}, tmp_path / "x")

        assert report.payload_nbytes == array.nbytes
        assert report.step_nbytes == {"gather": 0, "write": array.nbytes}
        assert report.nbytes == (tmp_path / "x").stat().st_size

    def test_nothing_moves_through_mpi_in_one_process(self, tmp_path):
        array = np.zeros((4, 6))
        shards = Shards(
            Shard(array[:, :3], (4, 6), (0, 0)), Shard(array[:, 3:], (4, 6), (0, 3))
        )

        report = mpisave.save({"x": shards}, tmp_path / "x")

        assert (report.transport, report.rounds) == ("none", 0)


HALF = Shard(np.zeros((2, 4)), (4, 4), (0, 0))
REFUSED = {
    "gap": (
        Shards(HALF, Shard(np.zeros((2, 3)), (4, 4), (2, 0))),
        ["global shape (4, 4)", "gap", "nobody has [2:4, 3:4]", "[0:2, 0:4] (rank 0)"],
    ),
    "missing half": (HALF, ["gap", "nobody has [2:4, 0:4]"]),
    "overlap": (
        Shards(HALF, Shard(np.zeros((3, 4)), (4, 4), (1, 0))),
        ["[0:2, 0:4] of rank 0", "[1:4, 0:4] of rank 0", "overlap"],
    ),
    "overlap and gap": (
        Shards(HALF, Shard(np.zeros((2, 4)), (4, 4), (1, 0))),
        ["[0:2, 0:4] of rank 0", "[1:3, 0:4] of rank 0", "overlap"],
    ),
    "same corner": (
        Shards(HALF, Shard(np.zeros((4, 4)), (4, 4), (0, 0))),
        ["[0:2, 0:4] of rank 0", "[0:4, 0:4] of rank 0", "overlap"],
    ),
    "outside": (
        Shard(np.zeros((2, 4)), (4, 4), (3, 0)),
        ["shape (2, 4)", "starts at (3, 0)", "global shape (4, 4)"],
    ),
    "dtype": (
        Shards(HALF, Shard(np.zeros((2, 4), "f4"), (4, 4), (2, 0))),
        ["'<f4'", "'<f8'", "(4, 4)"],
    ),
    "global shape": (
        Shards(HALF, Shard(np.zeros((2, 4)), (6, 4), (2, 0))),
        ["(4, 4)", "(6, 4)"],
    ),
    "no array": (Shard("abc", (3,), (0,)), ["shard of type str"]),
    "no elements": (
        Shard(np.zeros((0, 4)), (4, 4), (2, 0)),
        ["no boxes that hold an element", "[0:4, 0:4]"],
    ),
}


@pytest.mark.parametrize("gather_to", [None, 0])
@pytest.mark.parametrize("case", REFUSED)
def test_boxes_that_do_not_make_an_array_are_refused_by_key(tmp_path, case, gather_to):
    value, words = REFUSED[case]
    (tmp_path / "x").write_bytes(b"before")

    with pytest.raises(StateDictError, match=r"\['layer'\]\['w'\]") as caught:
        mpisave.save({"layer": {"w": value}}, tmp_path / "x", gather_to=gather_to)

    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], str(caught.value)
    assert files_in(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


class TestPerRank:
    STATES = {
        "array": np.arange(5),
        "number": 7,
        "nested": {"state": [np.arange(3.0), {"pos": 12}], "done": (True, None)},
        "empty": {},
    }

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("case", STATES)
    def test_value_of_this_rank_is_saved_under_its_number(
        self, case, use_binary_format
    ):
        value = self.STATES[case]
        state = {"w": np.zeros(2), "rng": PerRank(value)}

        file = saved(state, use_binary_format=use_binary_format)

        assert_equal_states(mpisave.load(file), {"w": np.zeros(2), "rng": {0: value}})
        like = {"w": np.ones(2), "rng": PerRank(None)}
        found = mpisave.load(file, like=like)
        assert isinstance(found["rng"], PerRank)
        assert_equal_states(found["rng"].value, value)
        if not use_binary_format:
            assert_equal_states(pickle.loads(file.getvalue())["rng"], {0: value})

    def test_state_may_itself_be_a_value_for_each_rank(self):
        file = saved(PerRank([1, np.arange(2)]))

        assert_equal_states(mpisave.load(file), {0: [1, np.arange(2)]})
        found = mpisave.load(file, like=PerRank(None))
        assert_equal_states(found.value, [1, np.arange(2)])

    def test_loaded_value_can_be_saved_again(self):
        state = {"rng": PerRank(np.arange(5))}
        first = saved(state)

        again = saved(mpisave.load(first, like=state))

        assert again.getvalue() == first.getvalue()

    def test_value_within_a_value_is_refused(self):
        with pytest.raises(StateDictError, match="is a PerRank within a PerRank"):
            saved({"a": PerRank({"b": PerRank(1)})})

    def test_shard_may_be_part_of_a_value(self):
        shard = Shard(np.arange(3), (3,), (0,))

        found = mpisave.load(saved({"a": PerRank({"b": shard})}))

        assert_equal_states(found, {"a": {0: {"b": np.arange(3)}}})


class TestDurable:
    @pytest.fixture
    def flushed(self, monkeypatch):
        """Return what was flushed: names of files and directories."""
        names = []
        fsync = os.fsync

        def recording(descriptor):
            names.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", recording)
        return names

    @pytest.mark.parametrize("gather_to", [None, 0])
    def test_file_is_flushed_and_then_its_directory(self, tmp_path, flushed, gather_to):
        mpisave.save({"w": np.zeros(3)}, tmp_path / "x", gather_to=gather_to)

        assert len(flushed) == 2
        assert flushed[0].endswith(".mpisave-staging")
        assert flushed[1] == str(tmp_path)

    @pytest.mark.parametrize("gather_to", [None, 0])
    def test_nothing_is_flushed_when_not_asked_for(self, tmp_path, flushed, gather_to):
        state = {"w": np.arange(3)}

        mpisave.save(state, tmp_path / "x", gather_to=gather_to, durable=False)

        assert flushed == []
        assert files_in(tmp_path) == ["x"]
        assert_equal_states(mpisave.load(tmp_path / "x"), state)

    def test_file_is_the_same_whether_flushed_or_not(self):
        state = {"w": np.arange(3)}

        files = [saved(state, durable=durable).getvalue() for durable in (True, False)]

        assert files[0] == files[1]


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_replicas_of_one_process_are_its_arrays(use_binary_format):
    state = {"w": np.arange(300), "n": 1, "x": Shard(np.zeros(2), (2,), (0,))}

    files = {
        saved(state, replicas=how, use_binary_format=use_binary_format).getvalue()
        for how in ("first", "check", "share")
    }

    assert len(files) == 1


class TestPlans:
    """A plan is worked out once for each structure, and kept with the communicator."""

    @pytest.fixture
    def planned(self, monkeypatch):
        """Return how often a plan was worked out, by appending to a list."""
        calls = []
        divide = saving.divide

        def counting(*args, **given):
            calls.append(args)
            return divide(*args, **given)

        monkeypatch.setattr(saving, "divide", counting)
        return calls

    @pytest.fixture
    def kept(self, monkeypatch, planned):
        """Have all saves go through one communicator, as under MPI."""
        comm = SoloComm()
        monkeypatch.setattr(saving, "communicator", lambda given: comm)
        return planned

    def test_single_process_keeps_none(self, planned):
        for _ in range(2):
            saved({"w": np.zeros(3)})

        assert len(planned) == 2

    def test_second_save_of_a_structure_uses_the_plan_of_the_first(self, kept):
        first, second = (
            {
                "w": np.full(30_000, n),
                "x": Shards(
                    *(Shard(np.full((4, 3), n + m), (4, 6), (0, m)) for m in (0, 3))
                ),
                "lr": 0.5,
            }
            for n in (1, 5)
        )

        saved(first)
        file = saved(second)

        assert len(kept) == 1
        found = mpisave.load(file)
        assert (found["w"] == 5).all()
        assert (found["x"][0] == [5, 5, 5, 8, 8, 8]).all()
        assert file.getvalue() == pickle_of(second)

    @pytest.mark.parametrize(
        ("state", "how"),
        [
            ({"w": np.zeros(4), "n": 1}, {}),
            ({"w": np.zeros(3, "f4"), "n": 1}, {}),
            ({"w": np.zeros(3), "n": 2}, {}),
            ({"n": 1, "w": np.zeros(3)}, {}),
            ({"w": Shard(np.zeros(3), (3,), (0,)), "n": 1}, {}),
            ({"w": np.zeros(3), "n": 1}, {"protocol": 5}),
            ({"w": np.zeros(3), "n": 1}, {"use_binary_format": True}),
            ({"w": np.zeros(3), "n": 1}, {"gather_to": 0}),
            ({"w": np.zeros(3), "n": 1}, {"state_type": "opt"}),
            ({"w": np.zeros(3), "n": 1}, {"replicas": "check"}),
            ({"w": np.zeros(3), "n": 1}, {"max_grouped_size": 100}),
        ],
        ids=str,
    )
    def test_other_structure_or_arguments_need_a_plan_of_their_own(
        self, kept, state, how
    ):
        saved({"w": np.zeros(3), "n": 1})

        file = saved(state, **how)

        assert len(kept) == 2
        assert list(mpisave.load(file)) == list(state)

    def test_other_boxes_need_a_plan_of_their_own(self, kept):
        def state(at):
            array = np.arange(8)
            return {
                "x": Shards(
                    Shard(array[:at], (8,), (0,)), Shard(array[at:], (8,), (at,))
                )
            }

        files = [saved(state(at)) for at in (4, 2, 4)]

        assert len(kept) == 2
        assert len({file.getvalue() for file in files}) == 1

    def test_four_plans_are_kept_and_the_oldest_is_given_up(self, kept):
        states = [{"w": np.zeros(n)} for n in range(5)]
        for state in (*states[:4], states[0]):
            saved(state)
        assert len(kept) == 4

        saved(states[4])  # in place of the second, used longest ago
        saved(states[0])
        assert len(kept) == 5

        saved(states[1])
        assert len(kept) == 6

    def test_plan_that_was_refused_is_not_kept(self, kept):
        bad = {"x": Shard(np.zeros(2), (4,), (0,))}

        for _ in range(2):
            with pytest.raises(StateDictError, match="gap"):
                saved(bad)

        assert len(kept) == 2


def pickle_of(state):
    """Return the file of a state that is saved by a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "communicator", lambda given: SoloComm())
        return saved(state).getvalue()
