"""What a state of a given type is made of."""

import numpy as np
import pytest

from mpisave import register_state_type, state_types
from mpisave.errors import ArgumentError, StateDictError
from mpisave.metadata import describe
from mpisave.state_types import handler_of
from mpisave.tree import flatten

ARRAY = np.zeros(2)


def check(name, state):
    for node in describe(flatten(state))[0]:
        handler_of(name).check(node.key, node.kind, node.type_name)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(state_types, "_REGISTRY", dict(state_types._REGISTRY))


@pytest.mark.parametrize("state", [{}, {"w": ARRAY}, {"w": ARRAY, 0: ARRAY}])
def test_params_are_a_flat_dict_of_arrays(state):
    check("params", state)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (ARRAY, "array"),
        ([ARRAY], "list"),
        (5, "object int"),
        ({"w": {"x": ARRAY}}, "'w' is a dict"),
        ({"w": [ARRAY]}, "'w' is a list"),
        ({"w": ()}, "'w' is a tuple"),
        ({"w": 1.5}, "'w' is an object of type float"),
        ({"w": np.float32(1)}, "'w' is an object of type numpy.float32"),
        ({"w": None}, "'w' is an object of type NoneType"),
    ],
)
def test_params_refuse_all_else(state, word):
    with pytest.raises(StateDictError, match="'params'") as caught:
        check("params", state)

    assert word in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"w_moment1_0": ARRAY, "w_beta1_pow_acc_0": ARRAY},
        {"master_weights": {"w": ARRAY}},
        {"LR_Scheduler": {"last_epoch": 3, "last_lr": 0.1, "by": [1, (2, None)]}},
        {"state": {0: {"step": 1, "exp_avg": ARRAY}}, "param_groups": [{"lr": 0.1}]},
        {"deep": {"master_weights": 1, "LR_Scheduler": ARRAY}},
    ],
)
def test_optimizer_state_may_be_nested_and_hold_small_objects(state):
    check("opt", state)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (ARRAY, "'opt' is a dict"),
        (7, "'opt' is a dict"),
        ({"master_weights": {"w": 1.5}}, "['master_weights']['w']"),
        ({"master_weights": 2}, "'master_weights'"),
        ({"LR_Scheduler": {"last_lr": ARRAY}}, "['LR_Scheduler']['last_lr']"),
        ({"LR_Scheduler": ARRAY}, "'LR_Scheduler'"),
    ],
)
def test_optimizer_state_refuses_what_is_in_the_wrong_place(state, word):
    with pytest.raises(StateDictError) as caught:
        check("opt", state)

    assert word in str(caught.value)


def test_registered_handler_is_asked_about_every_node(registry, tmp_path):
    asked = []

    class Everything:
        def check(self, key, kind, type_name):
            asked.append((key, kind, type_name))

    register_state_type("everything", Everything())
    check("everything", {"a": [1], "w": ARRAY})

    assert asked == [
        ((), "dict", ""),
        (("a",), "list", ""),
        (("a", 0), "object", "int"),
        (("w",), "array", ""),
    ]


def test_name_that_is_taken_is_refused_unless_by_the_same_handler(registry):
    handler = state_types.Params()
    register_state_type("mine", handler)

    register_state_type("mine", handler)

    assert handler_of("mine") is handler
    with pytest.raises(ArgumentError, match="'mine' is registered already"):
        register_state_type("mine", state_types.Params())
    with pytest.raises(ArgumentError, match="'params' is registered already"):
        register_state_type("params", state_types.Params())


def test_handler_that_cannot_check_is_refused(registry):
    with pytest.raises(ArgumentError, match="'mine' has no method check"):
        register_state_type("mine", object())


@pytest.mark.parametrize("name", ["", "a b", "1x", "a.b", "a/b", 5])
def test_name_that_is_no_identifier_is_refused(registry, name):
    with pytest.raises(ArgumentError, match="identifier"):
        register_state_type(name, state_types.Params())


@pytest.mark.parametrize("name", ["param", "", None, 5, ["params"]])
def test_unknown_state_type_is_refused_with_those_that_are_known(name):
    with pytest.raises(ArgumentError, match="'params', 'opt'") as caught:
        handler_of(name)

    assert repr(name) in str(caught.value)
