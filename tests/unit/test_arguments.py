"""Every argument of save: what is legal, and what the refusal says."""

import io
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from mpisave.arguments import (
    DEFAULT_TIMEOUT_S,
    check_alike,
    deadline,
    parse,
    parse_gather_to,
    parse_max_grouped_size,
    parse_timeout,
)
from mpisave.errors import ArgumentError, UnknownArgumentError

DEFAULTS = {
    "protocol": 4,
    "use_binary_format": False,
    "gather_to": None,
    "state_type": None,
    "max_grouped_size": "3G",
    "replicas": "first",
    "transport": "auto",
    "durable": True,
    "overwrite": True,
    "timeout": 600.0,
    "comm": None,
}


def parsed(path="x.params", size=4, **given):
    return parse(path, size, {**DEFAULTS, **given})


def test_defaults_are_legal():
    found = parsed()

    assert found.protocol == 4
    assert found.use_binary_format is False
    assert found.roots is None
    assert found.state_type is None
    assert found.max_nbytes == 3 * 1024**3
    assert found.replicas == "first"
    assert found.durable is True
    assert found.path == "x.params"
    assert not found.has_file


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocol_is_2_to_5(protocol):
    assert parsed(protocol=protocol).protocol == protocol


@pytest.mark.parametrize("protocol", [0, 1, 6, -1, None, True, 4.0, "4"])
def test_other_protocol_is_refused(protocol):
    with pytest.raises(ArgumentError, match=r"one of \(2, 3, 4, 5\)") as caught:
        parsed(protocol=protocol)

    assert f"protocol is {protocol!r}" in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, None, "hdf5", np.True_])
def test_use_binary_format_is_a_bool(value):
    with pytest.raises(ArgumentError, match="use_binary_format is"):
        parsed(use_binary_format=value)


@pytest.mark.parametrize(
    ("gather_to", "roots"),
    [
        (None, None),
        (0, (0,)),
        (3, (3,)),
        (np.int64(2), (2,)),
        ([1], (1,)),
        ((3, 0), (0, 3)),
        ([np.int32(2), 1], (1, 2)),
        ([0, 1, 2, 3], (0, 1, 2, 3)),
    ],
)
def test_gather_to_is_a_rank_or_ranks(gather_to, roots):
    assert parse_gather_to(gather_to, 4) == roots


@pytest.mark.parametrize(
    ("gather_to", "words"),
    [
        ([], "empty"),
        ((), "empty"),
        (4, "4 rank(s), 0 to 3"),
        (-1, "0 to 3"),
        ([0, 9], "0 to 3"),
        ([1, 1], "twice"),
        (True, "bool"),
        ([0, False], "bool"),
        (1.0, "float"),
        ("0", "str"),
        ({0}, "set"),
        (range(2), "range"),
        ([None], "NoneType"),
        ([[0]], "list"),
    ],
)
def test_other_gather_to_is_refused(gather_to, words):
    with pytest.raises(ArgumentError, match="gather_to is") as caught:
        parse_gather_to(gather_to, 4)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1, 1),
        (3 * 2**30, 3 * 2**30),
        ("1K", 1024),
        ("512M", 512 * 2**20),
        ("3G", 3 * 2**30),
        ("007K", 7 * 1024),
        ("1000000G", 1000000 * 2**30),
    ],
)
def test_max_grouped_size_is_bytes_or_a_number_with_a_unit(value, nbytes):
    assert parse_max_grouped_size(value) == nbytes


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, 1.5, None, b"3G", [3], np.int64(5)),
        *("", "G", "3", "3g", "3GB", "3GiB", "1.5G", "-1G", "+1G", "0K", "000M"),
        *(" 3G", "3G ", "3 G", "3G\n", "\N{ARABIC-INDIC DIGIT THREE}G", "1e3K", "3T"),
    ],
)
def test_other_max_grouped_size_is_refused(value):
    with pytest.raises(ArgumentError, match="positive") as caught:
        parse_max_grouped_size(value)

    assert f"max_grouped_size is {value!r}" in str(caught.value)


@pytest.mark.parametrize("replicas", ["first", "check", "share"])
def test_replicas_are_written_by_the_first_or_checked_or_shared(replicas):
    assert parsed(replicas=replicas).replicas == replicas


@pytest.mark.parametrize("transport", ["auto", "device", "host"])
def test_transport_is_chosen_or_given_when_gathering(transport):
    found = parsed(transport=transport, gather_to=0, state_type="params")

    assert found.transport == transport


@pytest.mark.parametrize("transport", ["", "cuda", b"host", None, True, []])
def test_other_transport_is_refused(transport):
    with pytest.raises(ArgumentError) as caught:
        parsed(transport=transport)

    assert f"transport is {transport!r}" in str(caught.value)


def test_transport_by_device_is_refused_where_nobody_gathers():
    with pytest.raises(ArgumentError, match="gather_to"):
        parsed(transport="device", gather_to=None)


@pytest.mark.parametrize("replicas", ["", "First", "last", b"first", None, True, 1, []])
def test_other_replicas_are_refused(replicas):
    with pytest.raises(ArgumentError, match="it is one of") as caught:
        parsed(replicas=replicas)

    assert f"replicas is {replicas!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["durable", "overwrite"])
@pytest.mark.parametrize("value", [True, False])
def test_flag_is_a_bool(name, value):
    assert getattr(parsed(**{name: value}), name) is value


@pytest.mark.parametrize("name", ["durable", "overwrite"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", np.True_])
def test_other_flag_is_refused(name, value):
    with pytest.raises(ArgumentError, match="it is True or False") as caught:
        parsed(**{name: value})

    assert f"{name} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(("value", "seconds"), [(3, 3.0), (0.5, 0.5), (None, None)])
def test_timeout_is_in_seconds(value, seconds):
    assert parse_timeout(value) == seconds
    assert deadline(value) == seconds


@pytest.mark.parametrize("value", [0, -1, True, "60", float("nan"), float("inf")])
def test_other_timeout_is_refused_and_until_then_the_default_holds(value):
    with pytest.raises(ArgumentError, match="it is a positive number of seconds"):
        parsed(timeout=value)

    assert deadline(value) == DEFAULT_TIMEOUT_S


class Text(str):
    """A str that other ranks may not know."""

    __slots__ = ()


def test_text_of_a_subclass_travels_as_plain_str():
    found = parsed(Text("x"), state_type=Text("opt"), replicas=Text("check"))

    texts = (found.path, found.state_type, found.replicas)
    assert [type(text) for text in texts] == [str, str, str]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gather", "gather_to"),
        ("gatherto", "gather_to"),
        ("use_binary", "use_binary_format"),
        ("max_group_size", "max_grouped_size"),
        ("statetype", "state_type"),
        ("protocal", "protocol"),
        ("replica", "replicas"),
        ("durability", "durable"),
        ("overwrites", "overwrite"),
        ("com", "comm"),
    ],
)
def test_unknown_argument_is_a_type_error_that_says_which_was_meant(name, meant):
    with pytest.raises(TypeError, match=f"did you mean '{meant}'") as caught:
        parsed(**{name: 1})

    assert type(caught.value) is UnknownArgumentError
    assert repr(name) in str(caught.value)


def test_unknown_argument_like_no_other_is_told_all_names():
    with pytest.raises(TypeError, match="it takes") as caught:
        parsed(zzz=1)

    assert all(name in str(caught.value) for name in DEFAULTS)


@pytest.mark.parametrize("state_type", ["params", "opt", None])
def test_state_type_is_registered_or_none(state_type):
    assert parsed(state_type=state_type).state_type == state_type


@pytest.mark.parametrize("state_type", ["", "Params", 1, ["opt"]])
def test_unregistered_state_type_is_refused(state_type):
    with pytest.raises(ArgumentError, match="registered are: 'params', 'opt'"):
        parsed(state_type=state_type)


def test_state_type_is_required_when_gathering_from_more_than_one_rank():
    with pytest.raises(ArgumentError, match="gathering from 4 ranks"):
        parsed(gather_to=0)

    assert parsed(gather_to=0, size=1).roots == (0,)
    assert parsed(gather_to=0, state_type="opt").roots == (0,)


@pytest.mark.parametrize("path", ["x", Path("x"), PurePosixPath("x")])
def test_path_is_a_str_or_path_like(path):
    found = parsed(path)

    assert (found.path, found.has_file) == ("x", False)


def test_path_may_be_a_file_object_or_none():
    assert parsed(io.BytesIO()).has_file
    assert parsed(io.BytesIO()).path is None
    assert parsed(None).path is None
    assert not parsed(None).has_file


class BytesPath:
    def __fspath__(self):
        return b"x"


@pytest.mark.parametrize("path", ["", b"x", 5, ["x"], BytesPath(), object()])
def test_other_path_is_refused(path):
    with pytest.raises(ArgumentError, match="path is"):
        parsed(path)


def test_rank_is_filled_into_the_path():
    assert parsed("r{rank}/{rank}.pkl").filled_path(12) == "r12/12.pkl"
    assert parsed("x{rank:05d}.pkl").filled_path(12) == "x00012.pkl"
    assert parsed("x{rank:d}.pkl").filled_path(12) == "x12.pkl"
    assert parsed("{other}.pkl").filled_path(12) == "{other}.pkl"
    assert parsed(None).filled_path(0) is None


def test_ranks_that_agree_pass():
    one = parsed(gather_to=[0, 1], state_type="opt")
    other = parsed(gather_to=(1, 0), state_type="opt")

    check_alike([one, other])
    check_alike([parsed("a"), parsed("b"), parsed(io.BytesIO())])


@pytest.mark.parametrize(
    ("name", "first", "second", "words"),
    [
        ("protocol", 4, 5, "4 on rank 0, 5 on rank 2"),
        ("use_binary_format", True, False, "True on rank 0, False on rank 2"),
        ("gather_to", 0, [0, 1], "[0] on rank 0, [0, 1] on rank 2"),
        ("gather_to", None, 1, "None on rank 0, [1] on rank 2"),
        ("state_type", "opt", "params", "'opt' on rank 0, 'params' on rank 2"),
        ("max_grouped_size", "1K", 5, "1024 bytes on rank 0, 5 bytes on rank 2"),
        ("replicas", "first", "share", "'first' on rank 0, 'share' on rank 2"),
        ("transport", "auto", "host", "'auto' on rank 0, 'host' on rank 2"),
        ("durable", True, False, "True on rank 0, False on rank 2"),
        ("overwrite", False, True, "False on rank 0, True on rank 2"),
    ],
)
def test_argument_that_differs_between_ranks_is_refused(name, first, second, words):
    one = {"state_type": "opt", name: first}
    other = {"state_type": "opt", name: second}

    with pytest.raises(ArgumentError, match=f"{name} differs") as caught:
        check_alike([parsed(**one), parsed(**one), parsed(**other)])

    assert words in str(caught.value)


def test_refusal_names_at_most_three_of_the_ranks_that_differ():
    one, other = parsed(protocol=4), parsed(protocol=5)

    with pytest.raises(ArgumentError, match="on rank 1, 2, 3 and 2 more"):
        check_alike([one, *[other] * 5])


def test_paths_that_differ_when_gathering_are_refused():
    one = parsed("a", gather_to=0, state_type="opt")
    other = parsed("b", gather_to=0, state_type="opt")

    with pytest.raises(ArgumentError, match="path differs between ranks"):
        check_alike([one, other])


def test_file_object_is_needed_on_the_ranks_that_write_only():
    given = {"gather_to": 1, "state_type": "opt"}
    root, rest = parsed(io.BytesIO(), **given), parsed(None, **given)

    check_alike([rest, root, rest])

    with pytest.raises(ArgumentError, match="path on rank 0 is None"):
        check_alike(
            [
                parsed(None, gather_to=[0, 1], state_type="opt"),
                parsed(io.BytesIO(), gather_to=[0, 1], state_type="opt"),
            ]
        )


@pytest.mark.parametrize("gather_to", [None, 0])
def test_no_path_at_all_is_refused(gather_to):
    nothing = parsed(None, gather_to=gather_to, state_type="opt")

    with pytest.raises(ArgumentError, match="path on rank 0 is None"):
        check_alike([nothing, nothing])


@pytest.mark.parametrize("path", ["{rank:3}", "x{rank:10d}", "{rank!r}", "{rank"])
def test_rank_that_would_not_be_filled_in_is_refused(path):
    with pytest.raises(ArgumentError, match=r"or \{rank:05d\} with zeros"):
        parsed(path)
