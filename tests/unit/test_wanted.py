"""What is wanted of a file: by key, by a state like it, by rank."""

import array
import io
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from boxes import described
from fakes import FakeDeviceArray, put_in_place
from helpers import assert_equal_states

import mpisave
from mpisave import PerRank, Shard, Shards, selection
from mpisave.errors import (
    ArgumentError,
    FileFormatError,
    StateDictError,
)
from mpisave.formats.index import Index, Opaque, Stored
from mpisave.plan import Extent
from mpisave.tree import Node
from mpisave.wanted import All, Match, rank_of, saved_ranks


def select(index, keys):
    return selection.select(index, None if keys is None else selection.Asked(keys))


def index_of(*states):
    """Return the index of a file that holds the states of all ranks."""
    merged, _ = described(states)
    nodes, offset = [], 0
    for node in merged.nodes:
        kind, value = node.kind, node.detail
        if kind == "array":
            extent = Extent(offset, value.nbytes)
            offset = extent.stop
            sums = (0,) * (value.nbytes > 0)
            kind, value = (
                "leaf",
                Stored(node.key, value.dtype, value.shape, extent, sums),
            )
        elif kind == "object":
            kind, value = "leaf", node.type_name
        nodes.append(Node(node.key, kind, value))
    return Index("pickle", {}, offset, 0, tuple(nodes))


def keys_of(nodes):
    return [node.key for node in nodes]


def match(like, *states, rank=0, in_place=False, asks=lambda _: True):
    nodes = index_of(*states).nodes
    return Match(like, nodes, rank, None, in_place=in_place, asks=asks)


def saved(state, **how):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, **how)
    return buffer


def opaque(key):
    """Return the nodes of a state with an object that pickle alone gives back."""
    return (Node((), "dict", None), Node((key,), "leaf", Opaque("mod.Hook")))


class KnownByDLPack:
    """An array of another library, such as torch: no NumPy array, no buffer."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **given):
        return self.array.__dlpack__(**given)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


STATE = {
    "encoder": {"w": np.zeros(2), "b": np.zeros(3), "odd/name": np.zeros(1)},
    "head": [np.zeros(4), {"lr": 0.5, 7: None}],
    "step": 3,
}


class TestSelect:
    def test_without_keys_all_is_taken(self):
        index = index_of(STATE)

        assert select(index, None) == index.nodes

    @pytest.mark.parametrize(
        ("keys", "taken"),
        [
            ("step", [("step",)]),
            ("encoder/w", [("encoder",), ("encoder", "w")]),
            (("encoder", "w"), [("encoder",), ("encoder", "w")]),
            ("encoder/?", [("encoder",), ("encoder", "w"), ("encoder", "b")]),
            ("*/[bw]", [("encoder",), ("encoder", "w"), ("encoder", "b")]),
            (["encoder/b", "step"], [("encoder",), ("encoder", "b"), ("step",)]),
            (("encoder", "odd/name"), [("encoder",), ("encoder", "odd/name")]),
            ("encoder/odd/name", [("encoder",), ("encoder", "odd/name")]),
            (iter(["step"]), [("step",)]),
            ([("encoder", "w"), "step"], [("encoder",), ("encoder", "w"), ("step",)]),
        ],
    )
    def test_keys_are_globs_or_keys(self, keys, taken):
        found = select(index_of(STATE), keys)

        assert keys_of(found) == [(), *taken]

    def test_container_is_taken_with_all_that_it_holds(self):
        found = select(index_of(STATE), ["encoder", "head"])

        assert keys_of(found) == [
            (),
            ("encoder",),
            *(("encoder", name) for name in STATE["encoder"]),
            ("head",),
            ("head", 0),
            ("head", 1),
            ("head", 1, "lr"),
            ("head", 1, 7),
        ]

    def test_star_takes_everything(self):
        index = index_of(STATE)

        assert select(index, "*") == index.nodes

    def test_case_matters(self):
        with pytest.raises(ArgumentError, match="nothing in the file matches 'STEP'"):
            select(index_of(STATE), "STEP")

    @pytest.mark.parametrize(
        "keys", ["missing", "encoder/w/x", ("w",), ("head", "0"), ("head", 2), (), ""]
    )
    def test_key_that_is_not_there_is_refused_by_name(self, keys):
        with pytest.raises(ArgumentError, match="keys: nothing in the file") as caught:
            select(index_of(STATE), [keys])

        assert repr(keys) in str(caught.value)

    def test_refusal_says_which_key_may_be_meant(self):
        with pytest.raises(ArgumentError, match="did you mean encoder/w"):
            select(index_of(STATE), "encodr/w")

    @pytest.mark.parametrize("key", [5, None, ["step"], b"step"], ids=repr)
    def test_key_of_another_type_is_refused(self, key):
        with pytest.raises(ArgumentError, match="neither a str nor a tuple") as caught:
            select(index_of(STATE), ["step", key])

        assert repr(key) in str(caught.value)

    @pytest.mark.parametrize(
        ("keys", "name"),
        [
            ("head/0", "'head' is a list"),
            (("head", 1, "lr"), "'head' is a list"),
            ("deep/t/1", r"\['deep'\]\['t'\] is a tuple"),
        ],
    )
    def test_part_of_a_list_is_refused(self, keys, name):
        state = {**STATE, "deep": {"t": (1, 2), "u": 3}}

        with pytest.raises(ArgumentError, match=f"{name} of which only a part"):
            select(index_of(state), keys)

    def test_part_of_a_dict_in_a_list_of_one_is_taken(self):
        found = select(index_of({"x": [{"a": 1, "b": 2}]}), "x/0/a")

        assert keys_of(found) == [(), ("x",), ("x", 0), ("x", 0, "a")]

    def test_key_with_an_array_in_it_is_refused(self):
        with pytest.raises(ArgumentError, match=r"keys: \(array\(.* is no key"):
            select(index_of(STATE), [(np.arange(3),)])

    def test_keys_that_are_none_are_refused(self):
        with pytest.raises(ArgumentError, match="keys"):
            select(index_of(STATE), 5)


class TestMatch:
    def test_arrays_are_new_and_of_what_is_in_the_file(self):
        like = {"x": np.ones((2, 3), ">i4"), "y": [np.zeros((), "f4")]}

        found = match(like, {"x": np.zeros((2, 3), ">i4"), "y": [np.zeros((), "f4")]})

        state = found.state()
        assert [(w.stored.key, w.start) for w in found.wants] == [
            (("x",), (0, 0)),
            (("y", 0), ()),
        ]
        assert found.wants[0].held.source is state["x"] is not like["x"]
        assert (state["x"].shape, state["x"].dtype.str) == ((2, 3), ">i4")
        assert found.wanted == {(), ("x",), ("y",), ("y", 0)}
        assert found.missing == []

    def test_arrays_are_those_of_like_when_filled_in_place(self):
        like = {"x": np.ones(3), "part": Shard(np.ones(2), (5,), (1,))}

        found = match(like, {"x": np.zeros(3), "part": np.zeros(5)}, in_place=True)

        state = found.state()
        assert state["x"] is like["x"]
        assert np.shares_memory(found.wants[0].held.source, like["x"])
        assert state["part"].array is like["part"].array
        assert np.shares_memory(found.wants[1].held.source, like["part"].array)

    def test_box_of_an_array_is_wanted_alone(self):
        like = {"x": Shard(np.zeros((2, 1)), (4, 3), (1, 2))}

        found = match(like, {"x": np.zeros((4, 3))})

        state = found.state()
        assert [(w.start, w.held.shape) for w in found.wants] == [((1, 2), (2, 1))]
        assert (state["x"].global_shape, state["x"].start) == ((4, 3), (1, 2))
        assert state["x"].array is found.wants[0].held.source

    def test_several_boxes_stay_several(self):
        boxes = [Shard(np.zeros(2), (6,), (n,)) for n in (4, 0)]

        found = match({"x": Shards(*boxes)}, {"x": np.zeros(6)}).state()

        assert isinstance(found["x"], Shards)
        assert [box.start for box in found["x"].boxes] == [(4,), (0,)]

    def test_small_objects_are_those_of_the_file_whatever_like_holds(self):
        found = match({"a": 1, "b": "x", "c": None}, {"a": 2.5, "b": None, "c": 1})

        assert found.state() == {"a": "float", "b": "NoneType", "c": "int"}

    def test_state_has_the_form_of_like_and_its_order(self):
        like = {"b": (np.zeros(1), [2]), "a": 1}

        found = match(like, {"a": 1, "b": (np.zeros(1), [3])}).state()

        assert list(found) == ["b", "a"]
        assert type(found["b"]) is tuple
        assert type(found["b"][1]) is list

    def test_keys_on_one_side_only_are_told_apart(self):
        found = match({"x": np.zeros(1), "new": {"y": 5}}, {"x": np.zeros(1), "z": [1]})

        assert found.missing == [("new", "y")]
        assert found.wanted == {(), ("x",)}
        assert found.state()["new"] == {"y": 5}

    def test_what_was_not_asked_for_stays_as_it_is(self):
        like = {"x": np.zeros(1), "other": np.ones(2), "n": 5}

        found = match(like, {"x": np.zeros(1)}, asks=lambda key: key == ("x",))

        assert found.missing == []
        assert found.state()["other"] is like["other"]
        assert found.state()["n"] == 5

    @pytest.mark.parametrize(
        ("like", "there", "words"),
        [
            (np.zeros(3), np.zeros(3, "f4"), ["float64", "float32", "convert"]),
            (np.zeros(3, "<f8"), np.zeros(3, ">f8"), ["float64", ">f8"]),
            (np.zeros(3), np.zeros((3, 1)), ["(3,)", "(3, 1)"]),
            (np.zeros(3), np.zeros(4), ["(3,)", "(4,)"]),
            (np.zeros(0), np.zeros((0, 2)), ["(0,)", "(0, 2)"]),
            (
                np.zeros(2, ml_dtypes.bfloat16),
                np.zeros(2, "u2"),
                ["bfloat16", "uint16"],
            ),
            (np.zeros(3), 5, ["an array in like", "'int' in the file"]),
            (np.zeros(3), {"y": 1}, ["an array in like", "a dict in the file"]),
            (np.zeros(3), [1], ["an array in like", "a list in the file"]),
            (5, np.zeros(3, "f4"), ["5 in like", "dtype float32 and shape (3,)"]),
            ("a", {"y": 1}, ["'a' in like", "a dict in the file"]),
            (None, (1,), ["None in like", "a tuple in the file"]),
        ],
    )
    def test_what_does_not_fit_is_refused_by_key_with_both_sides(
        self, like, there, words
    ):
        with pytest.raises(StateDictError, match=r"\['layer'\]\['x'\]") as caught:
            match({"layer": {"x": like}}, {"layer": {"x": there}})

        missing = [word for word in words if word not in str(caught.value)]
        assert missing == [], str(caught.value)

    @pytest.mark.parametrize("like", [{}, []], ids=repr)
    @pytest.mark.parametrize("there", [np.zeros(3), 5], ids=["array", "object"])
    def test_container_in_like_for_a_leaf_of_the_file_is_refused(self, like, there):
        with pytest.raises(StateDictError, match="'x'"):
            match({"x": like}, {"x": there})

    @pytest.mark.parametrize(
        ("like", "words"),
        [
            (Shard(np.zeros(2), (5,), (0,)), ["(5,) in like", "shape (6,)"]),
            (Shard(np.zeros((2, 1)), (6, 1), (0, 0)), ["(6, 1) in like", "shape (6,)"]),
            (Shard(np.zeros(2, "f4"), (6,), (0,)), ["float32", "float64"]),
            (Shard(np.zeros(2), (6,), (5,)), ["starts at (5,)", "shape (6,)"]),
            (Shard(np.zeros(2), (6,), (-1,)), ["starts at (-1,)", "shape (6,)"]),
            (Shard(np.zeros((2, 1)), (6,), (0,)), ["(2, 1)", "shape (6,)"]),
            (Shard(np.zeros(2), (6,), (0, 0)), ["(0, 0)", "shape (6,)"]),
            (Shard([0.0], (6,), (0,)), ["shard of no array"]),
            (
                Shards(
                    Shard(np.zeros(2), (6,), (0,)), Shard(np.zeros(2, int), (6,), (2,))
                ),
                ["int64", "float64"],
            ),
        ],
    )
    def test_shard_that_does_not_fit_is_refused_by_key_with_both_sides(
        self, like, words
    ):
        with pytest.raises(StateDictError, match="'x'") as caught:
            match({"x": like}, {"x": np.zeros(6)})

        missing = [word for word in words if word not in str(caught.value)]
        assert missing == [], str(caught.value)

    def test_shard_of_what_is_no_array_in_the_file_is_refused(self):
        like = {"x": Shard(np.zeros(2), (6,), (0,))}

        with pytest.raises(StateDictError, match="'x' is an array in like, and 'int'"):
            match(like, {"x": 5})

    def test_object_that_pickle_alone_gives_back_is_refused(self):
        with pytest.raises(
            FileFormatError, match=r"'x' is an object of type mod\.Hook"
        ):
            Match({"x": 5}, opaque("x"), 0, None, in_place=False)
        with pytest.raises(StateDictError, match=r"'x' .* type mod\.Hook in the file"):
            Match({"x": np.zeros(1)}, opaque("x"), 0, None, in_place=False)

    def test_new_array_is_made_on_the_device_of_the_one_in_like(self, monkeypatch):
        library = put_in_place(monkeypatch)
        like = {"x": FakeDeviceArray(np.zeros(2)), "y": np.zeros(2)}

        found = match(like, {"x": np.zeros(2), "y": np.zeros(2)})

        held = [want.held for want in found.wants]
        assert [array.library for array in held] == [library, None]
        assert found.state()["x"] is held[0].source

    def test_read_only_device_array_cannot_be_filled_in_place(self, monkeypatch):
        put_in_place(monkeypatch)
        like = {"x": FakeDeviceArray(np.zeros(2), read_only=True)}

        with pytest.raises(StateDictError, match="'x' cannot be filled in place"):
            match(like, {"x": np.zeros(2)}, in_place=True)

    def test_dtype_that_no_file_holds_is_refused_by_key(self):
        with pytest.raises(StateDictError, match="'x': arrays of dtype object"):
            match({"x": np.array([None])}, {"x": np.zeros(1)})

    def test_read_only_array_cannot_be_filled_in_place(self):
        like = {"x": np.broadcast_to(0.0, 3)}
        there = {"x": np.zeros(3)}

        with pytest.raises(StateDictError, match=r"'x' cannot be filled .* read-only"):
            match(like, there, in_place=True)
        assert match(like, there).state()["x"].flags.writeable

    def test_array_that_is_known_by_dlpack_is_filled_in_place(self):
        like = {"x": KnownByDLPack(np.zeros(2))}

        found = match(like, {"x": np.zeros(2)}, in_place=True)
        found.wants[0].held.source[...] = 5

        assert found.state()["x"] is like["x"]
        assert like["x"].array.tolist() == [5, 5]

    def test_buffer_is_filled_in_place(self):
        like = {"x": array.array("d", [0, 0])}

        found = match(like, {"x": np.zeros(2)}, in_place=True)
        found.wants[0].held.source[...] = 5

        assert found.state()["x"] is like["x"]
        assert like["x"].tolist() == [5, 5]

    def test_long_object_is_cut_in_the_message(self):
        with pytest.raises(StateDictError) as caught:
            match({"x": "a" * 1000}, {"x": np.zeros(1)})

        assert len(str(caught.value)) < 300


class TestPerRank:
    FILE = ({"rng": PerRank(np.zeros(2)), "n": 1}, {"rng": PerRank(np.ones(3)), "n": 1})

    @pytest.mark.parametrize("rank", [0, 1])
    def test_rank_takes_its_own_value_whatever_like_holds(self, rank):
        like = {"rng": PerRank({"any": "thing"}), "n": 5}

        found = match(like, *self.FILE, rank=rank)

        assert isinstance(found.state()["rng"], PerRank)
        assert found.state()["rng"].value.shape == (2 + rank,)
        assert [want.stored.key for want in found.wants] == [("rng", rank)]
        assert found.wanted == set(keys_of(index_of(*self.FILE).nodes))

    def test_value_may_be_nested(self):
        states = [{"rng": PerRank({"a": [np.zeros(1), r]})} for r in range(2)]

        value = match({"rng": PerRank(None)}, *states, rank=1).state()["rng"].value

        assert list(value) == ["a"]
        assert value["a"][1] == "int"

    def test_value_that_the_file_does_not_have_is_missing(self):
        like = {"rng": PerRank(7)}

        found = match(like, {}, {"rng": PerRank(1)})

        assert found.missing == [("rng",)]
        assert found.state()["rng"] is like["rng"]

    def test_arrays_in_a_value_are_filled_in_place(self):
        states = [{"rng": PerRank({"a": np.zeros(3), "n": r})} for r in range(2)]
        mine = {"a": np.ones(3), "n": 7, "more": 8}

        found = match({"rng": PerRank(mine)}, *states, rank=1, in_place=True)

        assert [want.stored.key for want in found.wants] == [("rng", 1, "a")]
        assert np.shares_memory(found.wants[0].held.source, mine["a"])
        value = found.state()["rng"].value
        assert value["a"] is mine["a"]
        assert list(value) == ["a", "n"]

    def test_array_in_a_value_that_does_not_fit_is_a_new_one(self):
        frozen = np.zeros(3)
        frozen.flags.writeable = False
        for mine in (np.zeros(4), np.zeros(3, "f4"), frozen):
            state = {"rng": PerRank(np.ones(3))}

            found = match({"rng": PerRank(mine)}, state, in_place=True)

            value = found.state()["rng"].value
            assert value is not mine
            assert (value.dtype, value.shape) == (np.dtype(float), (3,))

    def test_value_that_was_not_asked_for_stays_as_it_is(self):
        like = {"x": np.zeros(1), "rng": PerRank(7)}

        found = match(like, {"x": np.zeros(1)}, asks=lambda key: key == ("x",))

        assert found.missing == []
        assert found.state()["rng"] is like["rng"]

    def test_state_may_itself_be_a_value_for_each_rank(self):
        found = match(PerRank(None), PerRank(1), PerRank("a"), rank=1)

        assert found.state().value == "str"

    def test_all_of_a_file_has_the_value_of_one_rank(self):
        nodes = index_of(*self.FILE).nodes

        found = All(nodes, 1, None)

        assert list(found.state()) == ["rng", "n"]
        assert found.state()["rng"].value.shape == (3,)
        assert [want.stored.key for want in found.wants] == [("rng", 1)]

    def test_all_of_a_file_is_a_dict_of_all_ranks_for_one_that_is_alone(self):
        found = All(index_of(*self.FILE).nodes, None, None).state()

        assert {rank: array.shape for rank, array in found["rng"].items()} == {
            0: (2,),
            1: (3,),
        }

    def test_all_of_a_file_with_an_opaque_object_is_refused(self):
        with pytest.raises(
            FileFormatError, match=r"'x' .* mod\.Hook: mpisave runs no code"
        ):
            All(opaque("x"), None, None)

    def test_as_many_ranks_saved_as_there_were_whoever_has_a_value(self):
        nodes = index_of({"a": PerRank(1)}, {}, {"b": PerRank([1])}, {}).nodes

        assert saved_ranks(nodes) == {("a",): 4, ("b",): 4}

    def test_as_many_ranks_as_saved_take_their_own(self):
        assert [rank_of({("a",): 3}, rank, 3, None) for rank in range(3)] == [
            *(0, 1, 2)
        ]
        assert rank_of({}, 5, 9, None) == 5

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_other_number_of_ranks_is_refused_by_key_with_both_numbers(self, size):
        with pytest.raises(ArgumentError, match=r"\['opt'\]\['rng'\] has") as caught:
            rank_of({("opt", "rng"): 3}, 0, size, None)

        assert "each of 3 ranks" in str(caught.value)
        assert f"there are {size} now" in str(caught.value)
        assert "per_rank=lambda rank, saved: rank % saved" in str(caught.value)

    def test_caller_chooses_whose_value_a_rank_takes(self):
        asked = []

        def choose(rank, saved):
            asked.append((rank, saved))
            return rank % saved

        assert rank_of({("a",): 2}, 3, 4, choose) == 1
        assert asked == [(3, 2)]
        assert rank_of({}, 3, 4, choose) == 3

    @pytest.mark.parametrize("chosen", [-1, 2, None, 1.0, True, "0"])
    def test_choice_of_what_is_no_saved_rank_is_refused(self, chosen):
        assert rank_of({("rng",): 2}, 3, 4, lambda *_: np.int64(1)) == 1
        with pytest.raises(ArgumentError, match=r"per_rank\(3, 2\) returned") as caught:
            rank_of({("a",): 2}, 3, 4, lambda rank, saved: chosen)

        assert repr(chosen) in str(caught.value)
        assert "the 2 that saved" in str(caught.value)


class TestLoad:
    """The same through `mpisave.load`."""

    FILE = {"w": np.arange(6.0).reshape(2, 3), "opt": {"m": np.arange(3), "lr": 0.5}}

    def test_state_like_the_file_is_loaded(self):
        like = {"w": np.zeros((2, 3)), "opt": {"m": np.zeros(3, int), "lr": None}}

        assert_equal_states(mpisave.load(saved(self.FILE), like=like), self.FILE)
        assert not like["w"].any()

    def test_key_that_the_file_does_not_have_is_refused_or_kept(self):
        like = {**self.FILE, "new": np.ones(2), "list": [1, 2]}
        file = saved(self.FILE)

        with pytest.raises(
            StateDictError, match=r"3 key.* in like, but not in"
        ) as caught:
            mpisave.load(file, like=like)
        assert "'new' (rank 0), ['list'][0] (rank 0)" in str(caught.value)
        assert "missing='keep' goes on" in str(caught.value)

        with pytest.warns(UserWarning, match=r"3 key.* in like, but not in") as warned:
            found = mpisave.load(file, like=like, missing="keep")
        assert warned[0].filename == __file__
        assert found["new"] is like["new"]
        assert found["list"] == [1, 2]

    def test_key_that_like_does_not_have_is_refused_or_skipped(self):
        like = {"w": np.zeros((2, 3))}
        file = saved(self.FILE)

        with pytest.raises(StateDictError, match=r"2 key.* but in no rank's like") as e:
            mpisave.load(file, like=like)
        assert "['opt']['m'], ['opt']['lr']" in str(e.value)
        assert "unexpected='skip' goes on" in str(e.value)

        with pytest.warns(UserWarning, match="2 key.* but in no rank's") as warned:
            found = mpisave.load(file, like=like, unexpected="skip")
        assert warned[0].filename == __file__
        assert_equal_states(found, {"w": self.FILE["w"]})

    def test_refusal_names_twenty_keys_at_most(self):
        like = {f"x{n}": n for n in range(25)}

        with pytest.raises(StateDictError, match=r"25 key.* and 5 more") as caught:
            mpisave.load(saved({}), like=like)

        assert "'x19'" in str(caught.value)
        assert "'x20'" not in str(caught.value)

    def test_nothing_is_read_when_a_key_does_not_fit(self):
        like = {"w": np.full((2, 3), 9.0), "opt": {"m": np.zeros(4, int), "lr": 0}}

        with pytest.raises(StateDictError, match=r"\['opt'\]\['m'\]"):
            mpisave.load(saved(self.FILE), like=like, into="inplace")

        assert (like["w"] == 9).all()

    def test_keys_select_what_is_loaded(self):
        file = saved(self.FILE)

        assert_equal_states(
            mpisave.load(file, keys="opt/m"), {"opt": {"m": np.arange(3)}}
        )
        assert_equal_states(mpisave.load(file, keys=("w",)), {"w": self.FILE["w"]})
        assert mpisave.load(file, keys=[]) == {}

    def test_keys_leave_the_rest_of_like_as_it_is(self):
        like = {"w": np.zeros((2, 3)), "opt": {"m": np.full(3, 9), "lr": 0}, "n": 1}

        found = mpisave.load(saved(self.FILE), like=like, keys=["w", "opt/lr"])

        assert_equal_states(found["w"], self.FILE["w"])
        assert found["opt"] == {"m": like["opt"]["m"], "lr": 0.5}
        assert found["opt"]["m"] is like["opt"]["m"]
        assert found["n"] == 1

    def test_keys_that_were_asked_for_are_to_be_in_like(self):
        like = {"w": np.zeros((2, 3))}

        with pytest.raises(StateDictError, match=r"1 key.*\['opt'\]\['lr'\]\."):
            mpisave.load(saved(self.FILE), like=like, keys=["w", "opt/lr"])

    def test_value_of_each_rank_is_taken_by_one_that_is_alone(self):
        file = saved({"rng": PerRank(np.arange(3)), "w": 1})

        assert_equal_states(mpisave.load(file), {"rng": {0: np.arange(3)}, "w": 1})
        found = mpisave.load(file, like={"rng": PerRank(None), "w": 0})
        assert_equal_states(found["rng"].value, np.arange(3))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("into", "place"),
            ("into", True),
            ("missing", "skip"),
            ("missing", None),
            ("unexpected", "keep"),
            ("mmap", 1),
            ("mmap", "r"),
            ("verify", None),
            ("verify", 0),
            ("per_rank", 0),
        ],
    )
    def test_argument_that_is_not_legal_is_refused_by_name(self, name, value):
        with pytest.raises(ArgumentError, match=re.escape(f"{name} is {value!r}: ")):
            mpisave.load(saved(self.FILE), like=self.FILE, **{name: value})

    def test_in_place_needs_like_and_no_map(self, tmp_path):
        with pytest.raises(ArgumentError, match="needs like="):
            mpisave.load(saved(self.FILE), into="inplace")
        with pytest.raises(ArgumentError, match="cannot be filled in place"):
            mpisave.load(saved(self.FILE), like=self.FILE, into="inplace", mmap=True)

    @pytest.mark.parametrize("name", ["like", "keys", "mmap"])
    def test_pickle_of_another_program_is_loaded_whole_or_not_at_all(self, name):
        foreign = io.BytesIO(pickle.dumps({"w": np.arange(3)}))
        given = {"like": {"w": np.zeros(3)}, "keys": "w", "mmap": True}

        with pytest.raises(FileFormatError, match="this pickle has no index"):
            mpisave.load(foreign, **{name: given[name]})
