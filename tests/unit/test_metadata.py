"""What each rank holds, and what all ranks hold together."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from boxes import boxes_in, described_by_rank, numbered, painted, tilings, where
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave import merging
from mpisave.errors import StateDictError
from mpisave.merging import Entry, merge
from mpisave.metadata import describe
from mpisave.shards import Shard, Shards
from mpisave.tree import PerRank, flatten

PROPERTY = settings(max_examples=100, deadline=None)


def described(state):
    return describe(flatten(state))[0]


def description(state):
    return describe(flatten(state))[2]


def merged(*states):
    return merge([one[2] for one in described_by_rank(states)])


def box(array, start, count):
    """Return the shard of an array that is a box of it."""
    return Shard(array[where(start, count)], array.shape, start)


def holders(found):
    """Return who holds each array whole: rank, and which array of its state it is."""
    held = {entry.key: [] for entry in found.entries}
    for holding in found.holdings:
        for entry, ordinal in zip(holding.entries, holding.ordinals, strict=True):
            key = found.entries[entry].key
            held[key] += [(rank, int(ordinal)) for rank in holding.ranks.tolist()]
    return {key: sorted(ranks) for key, ranks in held.items()}


class Refuses:
    """An object that cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("I stay here")


def test_arrays_are_told_from_small_objects_and_containers():
    nodes, held, _ = describe(flatten({"w": np.zeros((2, 3), np.float32), "lr": [0.5]}))

    assert [(node.key, node.kind) for node in nodes] == [
        ((), "dict"),
        (("w",), "array"),
        (("lr",), "list"),
        (("lr", 0), "object"),
    ]
    assert nodes[1].detail == ("<f4", (2, 3))
    assert nodes[2].detail == 1
    assert pickle.loads(nodes[3].detail) == 0.5
    assert nodes[3].type_name == "float"
    assert [(array.dtype.str, array.shape) for array in held] == [("<f4", (2, 3))]


def test_description_holds_no_payload():
    shard = Shard(np.zeros(10**6), (10**6,), (0,))

    _, _, found = describe(flatten({"w": np.zeros(10**6), "x": shard}))

    assert len(pickle.dumps(found)) < 3000


def test_numpy_scalar_is_a_small_object():
    (_, node), held, _ = describe(flatten({"x": np.float32(2.5)}))

    assert (node.kind, node.type_name, held) == ("object", "numpy.float32", [])
    assert type(pickle.loads(node.detail)) is np.float32


def test_equal_objects_have_equal_descriptions_whatever_they_share():
    part = "".join(["par", "t"])
    shared = frozenset([(part, part)])
    apart = frozenset([("".join(["pa", "rt"]), "".join(["p", "art"]))])

    assert described({"x": shared}) == described({"x": apart})
    assert description({"x": shared}).digest == description({"x": apart}).digest


@pytest.mark.parametrize("value", [lambda: 0, Refuses(), (i for i in ())])
def test_object_that_cannot_be_pickled_is_refused_by_key_and_type(value):
    with pytest.raises(StateDictError, match="cannot be pickled") as caught:
        described({"opt": {"hook": value}})

    assert "['opt']['hook']" in str(caught.value)
    assert type(value).__name__ in str(caught.value)


def test_dtype_that_cannot_be_saved_is_refused_by_key():
    with pytest.raises(StateDictError, match=r"'names': arrays of dtype object"):
        described({"names": np.array(["a", None], object)})


def test_union_has_the_keys_in_the_order_of_the_lowest_rank_that_has_them():
    found = merged(
        {"b": np.zeros(1), "shared": np.zeros(2)},
        {"shared": np.zeros(2), "a": np.zeros(3)},
    )

    assert [node.key for node in found.nodes] == [(), ("b",), ("shared",), ("a",)]
    assert [entry.key for entry in found.entries] == [("b",), ("shared",), ("a",)]


def test_holders_of_an_array_are_known_and_which_array_of_theirs_it_is():
    found = merged(
        {"x": np.zeros(1), "y": np.zeros(1)},
        {"note": 1},
        {"y": np.zeros(1), "z": np.zeros(1)},
    )

    assert holders(found) == {
        ("x",): [(0, 0)],
        ("y",): [(0, 1), (2, 0)],
        ("z",): [(2, 1)],
    }


def test_ranks_that_hold_the_same_keys_are_one_holding():
    same = {"x": np.zeros(1), "y": [np.zeros(2), 5]}

    found = merged(same, {"x": np.zeros(1)}, same, same)

    assert [holding.ranks.tolist() for holding in found.holdings] == [[0, 2, 3], [1]]
    assert [holding.entries.tolist() for holding in found.holdings] == [[0, 1], [0]]


def test_nbytes_are_those_of_the_arrays_of_the_union_once():
    array = np.zeros((3, 5), np.complex64)

    found = merged({"x": array}, {"x": array, "n": 5, "y": np.zeros((), np.int16)})

    assert found.nbytes_of_entries().tolist() == [3 * 5 * 8, 2]
    assert found.entry_details() == [(8, (3, 5)), (2, ())]
    assert [entry.nbytes for entry in found.entries] == [3 * 5 * 8, 2]


def test_entry_of_an_empty_array_has_no_bytes_and_of_a_0d_one_an_items():
    assert Entry((), np.dtype("f8"), (0, 5)).nbytes == 0
    assert Entry((), np.dtype("f8"), ()).nbytes == 8


def test_entry_has_the_dtype_of_the_array_byte_order_included():
    state = {
        "big": np.zeros(1, ">i4"),
        "bfloat16": np.zeros(1, ml_dtypes.bfloat16),
    }

    big, bfloat16 = merged(state).entries

    assert big.dtype.str == ">i4"
    assert bfloat16.dtype == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (np.zeros(2, "f4"), np.zeros(2, "f8"), ["float32", "float64"]),
        (np.zeros(2, "<i4"), np.zeros(2, ">i4"), ["<i4", ">i4"]),
        (np.zeros((2, 3)), np.zeros((3, 2)), ["(2, 3)", "(3, 2)"]),
        (np.zeros(1), 0.0, ["an array", "0.0 (float)"]),
        ({"a": 1}, [1], ["a dict", "a list of 1 items"]),
        ([1], [1, 2], ["a list of 1 items", "a list of 2 items"]),
        ([1], (1,), ["a list", "a tuple"]),
        (1, 2, ["1 (int)", "2 (int)"]),
        (1, 1.0, ["1 (int)", "1.0 (float)"]),
        (True, 1, ["True (bool)", "1 (int)"]),
        ("a" * 500, "b", ["...", "'b' (str)"]),
    ],
)
def test_key_that_differs_between_ranks_is_refused_with_ranks_and_values(
    first, second, words
):
    states = [{"n": np.zeros(1)}, {"x": first}, {}, {"x": second}]

    with pytest.raises(StateDictError, match="'x' differs between ranks") as caught:
        merged(*states)

    message = str(caught.value)
    assert "on rank 1" in message
    assert "on rank 3" in message
    assert all(word in message for word in words), message
    assert len(message) < 400


def test_nan_is_the_same_on_every_rank():
    found = merged({"x": float("nan")}, {"x": float("nan")})

    assert len(found.nodes) == 2


def test_equal_sets_with_different_pickles_are_the_same():
    # Both hash to the same slot of a small table: order of insertion shows.
    assert list({8, 0}) != list({0, 8})

    found = merged({"x": {8, 0}}, {"x": {0, 8}})

    assert len(found.nodes) == 2


def test_merge_of_4096_ranks_looks_at_each_distinct_state_once(monkeypatch):
    # By count, not by time: ranks of one structure are told by its digest.
    every = [
        description({"shared": np.zeros(3, "f4"), f"own{r}": np.zeros(r, "f4")})
        for r in range(64)
    ]
    added = []
    add = merging._Table.add

    def counting(table, rank):
        added.append(rank)
        return add(table, rank)

    monkeypatch.setattr(merging._Table, "add", counting)

    found = merge(every * 64)

    assert added == list(range(64))
    assert len(found.entries) == 65
    assert [rank for rank, _ in holders(found)["shared",]] == list(range(4096))


def test_thousands_of_keys_of_several_ranks_are_merged_in_order():
    states = [{f"{rank}.{n}": n for n in range(1500)} for rank in range(3)]
    states.append({**states[2], **states[0]})

    found = merged(*states)

    names = [f"{rank}.{n}" for rank in range(3) for n in range(1500)]
    assert [node.key for node in found.nodes] == [(), *((name,) for name in names)]
    assert all(pickle.loads(n.detail) == int(n.key[0][2:]) for n in found.nodes[1:])


def test_merged_survives_the_way_to_another_rank():
    one = Shard(np.zeros(2), (4,), (0,))
    other = Shard(np.zeros(2), (4,), (2,))
    found = merged({"x": one, "n": 1}, {"x": other, "n": 1, "y": np.zeros(1)})

    copy = pickle.loads(pickle.dumps(found))

    assert copy.nodes == found.nodes
    assert copy.sharded[0].starts.tolist() == found.sharded[0].starts.tolist()


class TestDescription:
    def test_equal_states_have_equal_digests_whatever_their_values(self):
        one, other = ({"x": array, "n": 1} for array in (np.zeros(3), np.ones(3)))

        assert description(one).digest == description(other).digest

    @pytest.mark.parametrize(
        "other",
        [
            {"x": np.zeros(3), "n": 2},
            {"x": np.zeros(3), "n": 1.0},
            {"x": np.zeros(3, "f4"), "n": 1},
            {"x": np.zeros(3, ">f8"), "n": 1},
            {"x": np.zeros((3, 1)), "n": 1},
            {"n": 1, "x": np.zeros(3)},
            {"y": np.zeros(3), "n": 1},
            {"x": np.zeros(3), "n": 1, "m": 1},
            {"x": Shard(np.zeros(3), (3,), (0,)), "n": 1},
            {"x": Shards(Shard(np.zeros(3), (3,), (0,))), "n": (1,)},
        ],
        ids=str,
    )
    def test_states_that_differ_in_more_than_values_have_other_digests(self, other):
        one = {"x": np.zeros(3), "n": 1}

        assert description(one).digest != description(other).digest
        assert description(one).structure != description(other).structure

    def test_state_with_other_boxes_has_the_same_structure(self):
        one, other = (
            description({"x": Shard(np.zeros(2), (4,), (start,))}) for start in (0, 2)
        )

        assert one.structure == other.structure
        assert one.digest != other.digest
        assert one.with_boxes(other.boxes).boxes.tolist() == [2, 2]

    def test_one_box_and_two_are_of_different_structure(self):
        shard = Shard(np.zeros(2), (4,), (0,))

        one, two = description({"x": shard}), description({"x": Shards(shard, shard)})

        assert one.structure != two.structure

    def test_value_of_each_rank_is_a_key_of_its_own(self):
        found = merged({"rng": PerRank(5)}, {"rng": PerRank(np.zeros(2))})

        assert [(node.key, node.kind) for node in found.nodes] == [
            ((), "dict"),
            (("rng",), "per_rank"),
            (("rng", 0), "object"),
            (("rng", 1), "array"),
        ]


class TestShards:
    @PROPERTY
    @given(tilings(min_axes=0), st.integers(1, 5), st.data())
    def test_boxes_of_all_ranks_make_the_array(self, case, size, data):
        shape, boxes = case
        array = numbered(shape)
        mine = [[] for _ in range(size)]
        for start, count in boxes:
            mine[data.draw(st.integers(0, size - 1))].append(box(array, start, count))
        # A rank that holds nothing has the key with an empty box, or not at all.
        states = [{"x": Shards(*held)} if held else {} for held in mine]

        found = merged(*states)

        assert [(e.key, e.shape) for e in found.entries] == [(("x",), shape)]
        assert holders(found) == {("x",): []}
        table = found.sharded[0]
        columns = (table.ranks, table.ordinals, table.starts, table.counts)
        for rank, ordinal, start, count in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            held = mine[rank][ordinal]
            assert held.start == tuple(start)
            assert held.array.shape == tuple(count)
        assert len(table.ranks) == len(boxes) == len(np.unique(table.box))
        assert (np.diff(table.ranks) >= 0).all()

    @PROPERTY
    @given(st.lists(boxes_in((4, 3)), min_size=1, max_size=6))
    def test_boxes_that_do_not_make_the_array_are_refused(self, boxes):
        array = numbered((4, 3))
        states = [{"x": box(array, *one)} for one in boxes]
        times = painted((4, 3), set(boxes))
        if (times == 1).all():
            assert merged(*states).sharded
            return

        with pytest.raises(StateDictError, match=r"'x' of global shape \(4, 3\)") as e:
            merged(*states)

        assert ("overlap" in str(e.value)) == (times > 1).any()
        assert ("has a gap" in str(e.value)) == (times <= 1).all()

    def test_replicas_of_one_box_have_one_number(self):
        array = numbered((4,))
        top, bottom = box(array, (0,), (2,)), box(array, (2,), (2,))

        found = merged({"x": top}, {"x": bottom}, {"x": top}, {"x": bottom}).sharded[0]

        assert found.ranks.tolist() == [0, 1, 2, 3]
        assert found.box[0] == found.box[2] != found.box[1] == found.box[3]

    def test_rank_that_holds_all_of_it_is_one_box(self):
        array = numbered((2, 2))

        found = merged(
            {"a": np.zeros(1), "x": array}, {"x": box(array, (0, 0), (2, 2))}
        )

        assert holders(found) == {("a",): [(0, 0)], ("x",): []}
        table = found.sharded[1]
        assert table.ranks.tolist() == [0, 1]
        assert table.ordinals.tolist() == [1, 0]
        assert table.box.tolist() == [0, 0]

    def test_rank_that_holds_all_of_what_others_hold_in_parts_is_refused(self):
        array = numbered((4,))
        states = [{"x": array}, {"x": box(array, (0,), (2,))}]

        with pytest.raises(
            StateDictError, match=r"\[0:4\] of rank 0 and \[0:2\] of ra"
        ):
            merged(*states)

    def test_empty_boxes_are_left_out(self):
        array = numbered((4, 2))
        states = [
            {"x": box(array, (0, 0), (4, 2))},
            {"x": box(array, (4, 0), (0, 2))},
            {"x": box(array, (2, 1), (2, 0))},
        ]

        found = merged(*states).sharded[0]

        assert found.ranks.tolist() == [0]

    def test_array_without_elements_needs_no_boxes(self):
        empty = Shard(np.zeros((0, 3)), (0, 3), (0, 0))

        found = merged({"x": empty}, {"x": empty})

        assert found.sharded == {}
        assert [entry.shape for entry in found.entries] == [(0, 3)]

    def test_array_of_which_nobody_has_an_element_is_refused(self):
        empty = Shard(np.zeros((0, 3)), (2, 3), (1, 0))

        with pytest.raises(StateDictError, match="no boxes that hold an element"):
            merged({"x": empty}, {"x": empty})

    def test_refusal_names_four_boxes_at_most(self):
        array = numbered((10,))
        states = [{"x": box(array, (n,), (1,))} for n in range(9)]

        with pytest.raises(StateDictError, match="and 5 more") as caught:
            merged(*states)

        assert "nobody has [9:10]" in str(caught.value)
        assert "[0:1] (rank 0), [1:2] (rank 1)" in str(caught.value)

    @pytest.mark.parametrize(
        ("shape", "global_shape", "start"),
        [
            ((2,), (4,), (3,)),
            ((2,), (4,), (-1,)),
            ((2,), (4, 4), (0, 0)),
            ((2, 2), (4, 4), (0,)),
            ((2, 2), (4,), (0, 0)),
            ((), (4,), (0,)),
            ((1,), (), ()),
            ((0,), (-1,), (0,)),
            ((0,), (4,), (5,)),
        ],
    )
    def test_shard_outside_of_its_array_is_refused_by_key(
        self, shape, global_shape, start
    ):
        shard = Shard(np.zeros(shape), global_shape, start)

        with pytest.raises(StateDictError, match="does not lie within") as caught:
            description({"layer": [shard]})

        assert "['layer'][0]" in str(caught.value)
        for numbers in (shape, start, global_shape):
            assert str(numbers) in str(caught.value)

    @pytest.mark.parametrize(
        "shape",
        [(2**70,), (2**70, 0), (2**62, 2**62, 0), (2**60,), (2**31, 2**31, 0, 2)],
        ids=str,
    )
    def test_shape_that_no_array_has_is_refused_by_key(self, shape):
        n = 0 if 0 in shape else 1
        shard = Shard(np.zeros((n,) * len(shape)), shape, (0,) * len(shape))

        with pytest.raises(StateDictError, match=r"'x': an array of the global shape"):
            description({"x": shard})

    def test_largest_shape_is_one_of_an_array(self):
        for shape in [(2**60 - 1,), (2**60 - 1, 0), (0, 2**59)]:
            array = np.zeros((0,) * len(shape))
            described = description({"x": Shard(array, shape, (0,) * len(shape))})

            assert ("array", ("<f8", shape), "") in described.what

    def test_more_bytes_in_all_than_a_file_has_are_refused(self):
        long = np.broadcast_to(np.zeros(1), (2**58,))
        few = description({f"x{n}": long for n in range(3)})
        many = description({f"x{n}": long for n in range(5)})

        merge([few, few])
        with pytest.raises(StateDictError, match=r"have 1\.153e\+19 bytes in all"):
            merge([few, many])

    @pytest.mark.parametrize("value", [5, None, [np.zeros(2)], "ab"], ids=repr)
    def test_shard_of_no_array_is_refused_by_key_and_type(self, value):
        with pytest.raises(StateDictError, match=r"'x' is a shard of type") as caught:
            description({"x": Shard(value, (2,), (0,))})

        assert type(value).__name__ in str(caught.value)

    @pytest.mark.parametrize(
        "other",
        [
            Shard(np.zeros(2, "f4"), (4,), (2,)),
            Shard(np.zeros(2, ">f8"), (4,), (2,)),
            Shard(np.zeros(2), (5,), (2,)),
        ],
        ids=["dtype", "byte order", "global shape"],
    )
    def test_boxes_of_a_rank_that_differ_in_kind_are_refused(self, other):
        shard = Shard(np.zeros(2), (4,), (0,))

        with pytest.raises(StateDictError, match="'x': boxes of one array differ"):
            description({"x": Shards(shard, other)})

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (
                Shard(np.zeros(2, "f4"), (4,), (2,)),
                "an array of dtype float32 (<f4) and shape (4,), box [2:4], on rank 1",
            ),
            (
                Shard(np.zeros(2), (5,), (2,)),
                "an array of dtype float64 (<f8) and shape (5,), box [2:4], on rank 1",
            ),
            (
                Shards(*(Shard(np.zeros(1), (5,), (i,)) for i in range(5))),
                "box [0:1], box [1:2], box [2:3], box [3:4] and 1 more, on rank 1",
            ),
            (np.zeros(2), "an array of dtype float64 (<f8) and shape (2,) on rank 1"),
        ],
    )
    def test_boxes_of_two_ranks_that_differ_in_kind_are_refused(self, other, words):
        shard = Shard(np.zeros(2), (4,), (0,))
        before = {"a": Shard(np.zeros((1, 2)), (1, 2), (0, 0)), "b": np.zeros(3)}

        with pytest.raises(StateDictError, match="'x' differs between ranks") as caught:
            merged({**before, "x": shard}, {"n": 1, "x": other, **before})

        assert words in str(caught.value)
        assert (
            "an array of dtype float64 (<f8) and shape (4,), box [0:2], on rank 0"
            in str(caught.value)
        )

    def test_boxes_of_4096_ranks_are_collected_in_one_go(self, monkeypatch):
        # By count: one table of boxes for each structure, not one a rank.
        collected = []
        collect = merging._collect_boxes

        def counting(descriptions, ranks, *rest):
            collected.append(len(ranks))
            return collect(descriptions, ranks, *rest)

        monkeypatch.setattr(merging, "_collect_boxes", counting)
        first = description({"x": Shard(np.zeros((1, 2)), (4096, 2), (0, 0))})
        every = [
            first.with_boxes(np.array([rank, 0, 1, 2], np.int64))
            for rank in range(4096)
        ]

        found = merge(every).sharded[0]

        assert collected == [4096]
        assert found.starts[:, 0].tolist() == list(range(4096))
