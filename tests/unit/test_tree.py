"""Nested state to nodes, and back."""

from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import NamedTuple

import pytest
from helpers import assert_equal_states
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.errors import StateDictError
from mpisave.tree import MAX_DEPTH, Node, PerRank, flatten, rebuild

KEYS = st.text(max_size=4) | st.integers()
STATES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.dictionaries(KEYS, inner, max_size=4)
        | st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_rebuild_is_the_inverse_of_flatten(state):
    assert_equal_states(rebuild(flatten(state)), state)


def test_container_comes_before_what_it_holds():
    nodes = flatten({"a": [7, (8,)], "b": {}})

    assert nodes == [
        Node((), "dict", None),
        Node(("a",), "list", 2),
        Node(("a", 0), "leaf", 7),
        Node(("a", 1), "tuple", 1),
        Node(("a", 1, 0), "leaf", 8),
        Node(("b",), "dict", None),
    ]


def test_single_leaf_is_a_state():
    assert flatten(5) == [Node((), "leaf", 5)]
    assert rebuild([Node((), "leaf", 5)]) == 5


@pytest.mark.parametrize("empty", [{}, [], ()], ids=["dict", "list", "tuple"])
def test_empty_container_keeps_its_type(empty):
    assert_equal_states(rebuild(flatten(empty)), empty)
    assert_equal_states(rebuild(flatten({"x": empty})), {"x": empty})


class Pair(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("state", "plain"),
    [
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, b=1), {"b": 1}),
        (UserDict(b=1), {"b": 1}),
        (MappingProxyType({"b": 1}), {"b": 1}),
        (Pair(1, 2), (1, 2)),
        (type("MyList", (list,), {})([1]), [1]),
    ],
    ids=["OrderedDict", "defaultdict", "UserDict", "proxy", "namedtuple", "subclass"],
)
def test_subclass_counts_as_what_it_derives_from(state, plain):
    assert_equal_states(rebuild(flatten(state)), plain)


@pytest.mark.parametrize("key", [1.0, None, (1,), b"x", True])
def test_key_that_is_neither_str_nor_int_is_refused(key):
    with pytest.raises(StateDictError, match="keys are str or int") as caught:
        flatten({"top": {key: 1}})

    assert "'top'" in str(caught.value)
    assert repr(key) in str(caught.value)


def test_int_and_the_str_that_shows_it_are_different_keys():
    state = {1: "int", "1": "str"}

    assert_equal_states(rebuild(flatten(state)), state)


def test_container_that_holds_itself_is_refused():
    state = {"a": [1]}
    state["a"].append(state)

    with pytest.raises(StateDictError, match="itself"):
        flatten(state)


def test_container_that_two_keys_share_is_no_cycle():
    shared = [1, 2]

    found = rebuild(flatten({"a": shared, "b": shared}))

    assert found == {"a": [1, 2], "b": [1, 2]}


def test_state_as_deep_as_the_limit_is_flattened_and_a_deeper_one_refused():
    state = "leaf"
    for _ in range(MAX_DEPTH):
        state = {"x": state}

    assert_equal_states(rebuild(flatten(state)), state)
    with pytest.raises(StateDictError, match=f"deeper than {MAX_DEPTH} levels"):
        flatten({"x": state})


def test_flatten_does_not_change_the_state():
    state = {"a": [1, {"b": (2,)}]}

    flatten(state)

    assert state == {"a": [1, {"b": (2,)}]}


def test_keys_of_a_dict_come_in_the_order_of_the_nodes():
    nodes = [
        Node((), "dict", None),
        Node(("z",), "dict", None),
        Node(("a",), "leaf", 1),
        Node(("z", "k"), "leaf", 2),
    ]

    found = rebuild(nodes)

    assert_equal_states(found, {"z": {"k": 2}, "a": 1})


def test_tuples_within_tuples_are_rebuilt_from_the_inside():
    state = ((1, (2, [3, (4,)])), {"x": ((),)})

    assert_equal_states(rebuild(flatten(state)), state)


def test_value_of_a_rank_stands_under_its_number_beside_those_of_the_others():
    nodes = flatten({"rng": PerRank([5]), "n": 1}, 2, 4)

    assert nodes == [
        Node((), "dict", None),
        Node(("rng",), "per_rank", 4),
        Node(("rng", 2), "list", 1),
        Node(("rng", 2, 0), "leaf", 5),
        Node(("n",), "leaf", 1),
    ]
    assert rebuild(nodes) == {"rng": {2: [5]}, "n": 1}


@pytest.mark.parametrize(
    "value", [PerRank(1), {"b": PerRank(1)}, [({"c": [PerRank(1)]},)]], ids=repr
)
def test_value_of_a_rank_within_another_is_refused_by_key(value):
    with pytest.raises(StateDictError, match=r"^\['a'\]\[3\].* is a PerRank within"):
        flatten({"a": PerRank(value)}, 3, 4)


def test_values_of_a_rank_may_stand_side_by_side():
    flatten([PerRank(1), {"a": PerRank(2)}, PerRank([3])])
