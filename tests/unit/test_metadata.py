"""What each rank holds, and what all ranks hold together."""

import pickle

import ml_dtypes
import numpy as np
import pytest

from mpisave.errors import StateDictError
from mpisave.metadata import Described, Entry, describe, merge
from mpisave.tree import flatten


def described(state):
    return describe(flatten(state))[0]


def merged(*states):
    return merge([described(state) for state in states])


class Refuses:
    """An object that cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("I stay here")


def test_arrays_are_told_from_small_objects_and_containers():
    nodes, held = describe(flatten({"w": np.zeros((2, 3), np.float32), "lr": [0.5]}))

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
    nodes, _ = describe(flatten({"w": np.zeros(10**6)}))

    assert len(pickle.dumps(nodes)) < 1000


def test_numpy_scalar_is_a_small_object():
    (_, node), held = describe(flatten({"x": np.float32(2.5)}))

    assert (node.kind, node.type_name, held) == ("object", "numpy.float32", [])
    assert type(pickle.loads(node.detail)) is np.float32


def test_equal_objects_have_equal_descriptions_whatever_they_share():
    part = "".join(["par", "t"])
    shared = frozenset([(part, part)])
    apart = frozenset([("".join(["pa", "rt"]), "".join(["p", "art"]))])

    assert described({"x": shared}) == described({"x": apart})


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


def test_entry_knows_its_holders_and_which_array_of_theirs_it_is():
    found = merged(
        {"x": np.zeros(1), "y": np.zeros(1)},
        {"note": 1},
        {"y": np.zeros(1), "z": np.zeros(1)},
    )

    assert {entry.key: entry.holders for entry in found.entries} == {
        ("x",): ((0, 0),),
        ("y",): ((0, 1), (2, 0)),
        ("z",): ((2, 1),),
    }


def test_nbytes_counts_the_arrays_of_the_union_once():
    array = np.zeros((3, 5), np.complex64)

    found = merged({"x": array}, {"x": array, "y": np.zeros((), np.int16)})

    assert found.nbytes == 3 * 5 * 8 + 2


def test_entry_of_an_empty_array_has_no_bytes_and_of_a_0d_one_an_items():
    assert Entry((), np.dtype("f8"), (0, 5), ((0, 0),)).nbytes == 0
    assert Entry((), np.dtype("f8"), (), ((0, 0),)).nbytes == 8


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


def test_merge_of_4096_ranks_is_linear():
    one = [
        Described((), "dict", None),
        Described(("shared",), "array", ("<f4", (3,))),
    ]
    every = [[*one, Described((f"own{r}",), "array", ("<f4", (r,)))] for r in range(64)]

    found = merge(every * 64)

    shared = found.entries[0]
    assert len(found.entries) == 65
    assert [rank for rank, _ in shared.holders] == list(range(4096))
