"""Small objects to JSON and back."""

import datetime as dt
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.formats.objects import from_json, stored_scalar, to_json

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.binary().map(bytearray)
)


def through_json(value):
    text = json.dumps(to_json(value), allow_nan=False)
    return from_json(json.loads(text))


def same(found, value):
    """Compare type and value, to the sign of zero and the kind of infinity."""
    return type(found) is type(value) and repr(found) == repr(value)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_value_comes_back_with_its_type(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, complex(math.nan, -0.0)]
)
def test_float_that_json_lacks_comes_back(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "\N{GRINNING FACE}", '"\\'])
def test_text_comes_back(text):
    assert through_json(text) == text


@pytest.mark.parametrize(
    "value",
    [
        np.bool_(True),
        np.int8(-5),
        np.uint64(2**64 - 1),
        np.float16(0.1),
        np.float32(math.nan),
        np.longdouble(1) / 3,
        np.complex64(1 - 2j),
        ml_dtypes.bfloat16(1.5),
        ml_dtypes.float8_e4m3fn(0.25),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numpy_scalar_comes_back_with_its_bits(value):
    found = through_json(value)

    assert type(found) is type(value)
    assert found.tobytes() == value.tobytes()


def test_string_of_numpy_comes_back_as_one_of_python():
    assert same(through_json(np.str_("x")), "x")
    assert same(through_json(np.bytes_(b"x")), b"x")


def test_int_of_any_length_comes_back():
    assert through_json(-(10**5000)) == -(10**5000)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        *(object(), {1, 2}, frozenset(), [1], (1,), {"a": 1}, range(3), ...),
        *(dt.timedelta(1), int, Text("x")),
        *(np.datetime64("2020-01-01"), np.void(b"ab"), np.dtype("f4")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_object_that_needs_code_is_refused_by_its_type(value):
    with pytest.raises(TypeError):
        to_json(value)


@pytest.mark.parametrize(
    "data",
    [
        *([], [1], {}, {"a": 1}, {"float": "nan", "x": 1}, {"float": "one"}),
        *({"float": None}, {"complex": [1]}, {"complex": 5}, {"complex": ["a", "b"]}),
        *({"bytes": "a"}, {"bytes": "&&&&"}, {"bytes": 5}, {"bytearray": None}),
        *({"scalar": []}, {"scalar": ["<f4"]}, {"scalar": ["<f4", "zz"]}),
        *({"scalar": ["<f4", "00"]}, {"scalar": ["|O", "0" * 16]}),
        *({"scalar": ["os", "00"]}, {"scalar": 5}, {"scalar": [5, "00"]}),
        {"scalar": ["<f4", 5]},
    ],
    ids=repr,
)
def test_data_that_is_no_value_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        from_json(data)


def test_scalar_that_only_ml_dtypes_knows_is_stored_as_its_bits():
    value = ml_dtypes.bfloat16(1.0)

    assert stored_scalar(value) == np.uint16(0x3F80)
    assert type(stored_scalar(value)) is np.uint16
    assert type(stored_scalar(np.float16(1))) is np.float16
