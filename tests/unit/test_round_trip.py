"""Whatever a state holds comes back from both formats, by mpisave and by pickle."""

import io
import pickle

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_equal_states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mpisave

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="="),
    hnp.integer_dtypes(endianness=">"),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness=">", sizes=(16, 32, 64)),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="="),
)
ARRAYS = hnp.arrays(
    DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
)
LOW_PRECISION = st.sampled_from(
    [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
).map(lambda dtype: np.arange(6).reshape(2, 3).astype(dtype))
OBJECTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.integers(-5, 5).map(np.int16),
    st.floats(width=32).map(np.float32),
)
NAMES = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["/", ".", "..", "a/b", "", "%", "0", "-1", "mpisave.kind", "\0"]),
)
KEYS = st.one_of(st.integers(-3, 10**20), NAMES.filter(str.isascii), NAMES)
STATES = st.recursive(
    st.one_of(ARRAYS, LOW_PRECISION, OBJECTS),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)
FORMATS = [{"protocol": p} for p in (2, 3, 4, 5)] + [{"use_binary_format": True}]


def stored(value):
    """Return what a reader without ml_dtypes has: bits in place of its dtypes."""
    if isinstance(value, dict):
        return {key: stored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(stored, value))
    if isinstance(value, np.ndarray) and value.dtype.type.__module__ == "ml_dtypes":
        return value.view(f"u{value.dtype.itemsize}")
    return value


@pytest.mark.parametrize("how", FORMATS, ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=STATES)
def test_state_comes_back_equal(how, state):
    buffer = io.BytesIO()

    mpisave.save(state, buffer, **how)

    assert_equal_states(mpisave.load(buffer), state)
    if "protocol" in how:
        assert_equal_states(pickle.loads(buffer.getvalue()), stored(state))
