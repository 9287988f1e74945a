"""States that are legal and odd: loaded as they were, or refused with a reason.

Each is saved in both formats, and read by `mpisave.load`, by `pickle.load` and by h5py.
"""

import collections
import datetime as dt
import enum
import io
import math
import pickle
import types
import typing

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_equal_states, unescape

import mpisave
from mpisave.errors import FileFormatError, StateDictError

X = np.arange(6.0).reshape(2, 3)
SAME = np.arange(4)
IN_ITSELF = {"a": {}}
IN_ITSELF["a"]["up"] = IN_ITSELF


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Point(typing.NamedTuple):
    x: object
    y: object


def nested(levels, leaf):
    for _ in range(levels):
        leaf = {"d": leaf}
    return leaf


# Come back as they are, in both formats.
STATES = {
    # Keys.
    "slash and nested": {"a/b": X, "a": {"b": X + 1}},
    "escaped slash beside it": {"a%2Fb": X, "a/b": X + 1, "a%252Fb": X + 2},
    "int and its digits": {1: X, "1": X + 1, "%31": X + 2},
    "negative ints": {-1: X, "-1": X + 1, 0: X + 2, "-0": X + 3, "00": X + 4},
    "huge int key": {2**70: X, -(2**70): X + 1},
    "empty key": {"": X, "%": X + 1, "n": {"": {"": 5}}},
    "dots": {".": X, "..": X + 1, "...": X + 2, "a.b": X + 3, ".a": {"..": 1}},
    "key with NUL": {"a\0b": X, "a": X + 1, "\0": 1},
    "key that looks like ours": {"mpisave.kind": "list", "mpisave.format": X},
    "key of a single array": {"%itself": X, "itself": X + 1},
    "spaces and newlines": {" ": X, "\n": X + 1, "a b": 1, "\t": None},
    "quotes and brackets": {"']['": X, '"': X + 1, "{}": {"[]": 1}},
    "unicode": {"\N{GREEK SMALL LETTER ALPHA}": X, "\N{GRINNING FACE}": X + 1},
    "two forms of one letter": {"\u00e9": X, "e\u0301": X + 1},
    "capitals": {"w": X, "W": X + 1},
    "long key": {"k" * 10_000: X, "k" * 9_999: 1},
    "many keys": {f"k{i}": np.full(1, i) for i in range(3000)},
    "order of keys": {"z": X, "a": 1, "m": X + 1, "b": {"y": 1, "x": X}},
    "one letter and its path": {"a": {"a": {"a": X}}, "a/a": X + 1, "a/a/a": X + 2},
    # Containers.
    "empty dict": {},
    "empty dicts within": {"a": {}, "b": {"c": {}}},
    "empty lists and tuples": {"l": [], "t": (), "n": [[], (), {}]},
    "empty ones beside arrays": {"l": [X, [], (), {}], "t": ((), X)},
    "nested tuples": {"t": (1, (2, (3, (X, [4, (5,)]))))},
    "list of one": [X],
    "tuple at the top": (X, 1),
    "single array": X,
    "single object": 5,
    "single None": None,
    "63 levels": nested(63, X),
    "list of dicts of lists": [{"a": [X, {"b": (X, None)}]}],
    "dict of int keys in a list": [{0: X, 1: 1}, {0: None}],
    # Arrays.
    "array under two keys": {"a": SAME, "b": SAME, "n": [SAME, SAME]},
    "view under two keys": {"a": X, "row": X[0], "all": X[:]},
    "0-d": {"a": np.array(5), "b": np.array(True), "c": np.array(1j)},
    "0-d beside scalars": {"a": np.array(5), "b": np.int64(5), "c": 5},
    "no elements": {"a": np.zeros(0), "b": np.zeros((0, 3)), "c": np.zeros((3, 0, 2))},
    "32 axes": {"a": np.ones((1,) * 32)},
    "bool": {"a": np.array([True, False]), "b": np.zeros(0, bool)},
    "float16": {"a": np.float16([1, -0.0, np.inf, np.nan, 6e-8])},
    "complex": {"a": np.array([1 - 2j]), "b": np.complex64([complex(np.nan, -0.0)])},
    "big-endian": {"a": np.arange(3, dtype=">i2"), "b": np.array([1.5], ">f8")},
    "big-endian complex": {"a": np.array([1 - 2j], ">c16")},
    "all integers": {
        d: np.array([np.iinfo(d).min, np.iinfo(d).max], d)
        for d in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    },
    "nan with its bits": {"a": np.array([0x7FF8DEADBEEF0001], "u8").view("f8")},
    "signalling nan": {"a": np.array([0x7FA00001], "u4").view("f4")},
    "minus zero": {"a": np.array([-0.0, 0.0]), "b": -0.0},
    "subnormal": {"a": np.array([5e-324]), "b": 5e-324},
    "bfloat16": {"a": np.array([1.5, np.nan, -0.0], ml_dtypes.bfloat16)},
    "float8": {"a": np.array([1.5, -2], ml_dtypes.float8_e4m3fn)},
    "long double": {"a": np.array([1.5, np.pi], np.longdouble)},
    # Small objects.
    "scalars": {"a": 1, "b": True, "c": 1.0, "d": 1j, "e": None, "f": False},
    "NumPy scalars": {
        "a": np.int8(1),
        "b": np.float16(0.5),
        "c": np.bool_(True),
        "d": np.complex64(1j),
        "e": np.uint64(2**64 - 1),
    },
    "scalar of bfloat16": {"a": ml_dtypes.bfloat16(1.5)},
    "scalar of two bytes, swapped": {"a": np.array([1], ">i2")[0]},
    "huge ints": {"a": 2**63, "b": -(2**63) - 1, "c": 2**20_000, "d": 2**63 - 1},
    "special floats": {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e308},
    "special complex": {"a": complex(math.nan, -0.0), "b": complex(0, math.inf)},
    "texts": {"a": "", "b": "\0", "c": "a\0", "d": "\N{GRINNING FACE}", "e": "\r\n"},
    "texts that look like JSON": {"a": "null", "b": "[1]", "c": '{"int": "0x1"}'},
    "text of lone surrogates": {"a": "\ud800", "b": ["\udfff"]},
    "long text": {"a": "x" * 100_000, "l": ["y" * 100_000]},
    "bytes": {"a": b"", "b": b"\0\xff", "c": bytearray(b"\0"), "d": b"x" * 100_000},
    "text and its bytes": {"a": "x", "b": b"x", "c": bytearray(b"x")},
    "bool, int and float of one value": {"a": True, "b": 1, "c": 1.0, "l": [1, True]},
    "None at each place": {"a": None, "l": [None, X], "t": (None,), "d": {"n": None}},
}

# Come back as what they derive from, or as the same values in C order.
CHANGED = {
    "Fortran order": ({"a": np.asfortranarray(X)}, {"a": X}),
    "negative strides": ({"a": X[::-1, ::-1]}, {"a": X[::-1, ::-1].copy()}),
    "every other element": ({"a": X[:, ::2]}, {"a": X[:, ::2].copy()}),
    "broadcast": ({"a": np.broadcast_to(5.0, (2, 2))}, {"a": np.full((2, 2), 5.0)}),
    "read-only": ({"a": np.frombuffer(b"\1\2", "u1")}, {"a": np.array([1, 2], "u1")}),
    "matrix": ({"a": np.ones((2, 2)).view(np.matrix)}, {"a": np.ones((2, 2))}),
    "ordered dict": (collections.OrderedDict(b=X, a=1), {"b": X, "a": 1}),
    "default dict": (collections.defaultdict(list, a=[X]), {"a": [X]}),
    "mapping proxy": (types.MappingProxyType({"a": X}), {"a": X}),
    "named tuple": ({"a": Point(X, 1)}, {"a": (X, 1)}),
    "buffer": ({"a": memoryview(b"\1\2")}, {"a": np.array([1, 2], "u1")}),
    "NumPy text": ({"a": np.str_("x"), "b": np.bytes_(b"y")}, {"a": "x", "b": b"y"}),
}

# Refused in both formats, by key.
REFUSED = {
    "key of a float": {1.5: X},
    "key of a bool": {True: X},
    "key of None": {None: X},
    "key of a tuple": {("a", "b"): X},
    "key of bytes": {b"a": X},
    "key of a NumPy integer": {np.int64(1): X},
    "key of a NumPy text": {np.str_("a"): X},
    "key of a subclass of str": {Text("a"): X},
    "key of lone surrogates": {"\ud800": X},
    "array of datetime64": {"a": np.array(["2020-01-01"], "datetime64[D]")},
    "array of timedelta64": {"a": np.array([1], "timedelta64[s]")},
    "array of text": {"a": np.array(["x"])},
    "array of bytes": {"a": np.array([b"x"])},
    "array of objects": {"a": np.array([None], object)},
    "array of records": {"a": np.zeros(2, [("x", "i4")])},
    "array of void": {"a": np.zeros(2, "V4")},
    "masked array": {"a": np.ma.masked_array([1], [True])},
    "state in itself": IN_ITSELF,
    "65 levels": nested(65, X),
}

# Not arrays, numbers, texts, bytes, or None: a pickle has them, and `load` says so.
ONLY_PICKLED = {
    "set": {"a": {1, 2}},
    "frozen set": {"a": frozenset([1])},
    "date": {"a": dt.date(2020, 1, 1)},
    "enumeration": {"a": Colour.RED},
    "enumeration of ints": {"a": Level.LOW},
    "subclass of str": {"a": Text("x")},
    "range": {"a": range(3)},
    "slice": {"a": slice(1, 2)},
    "class": {"a": dict},
    "function": {"a": len},
    "ellipsis": {"a": ...},
    "datetime64": {"a": np.datetime64("2020-01-01")},
}

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
# NumPy and HDF5 know no names for these: their bits are what others read.
ONLY_BITS = {"bfloat16", "float8", "scalar of bfloat16"}


def saved(state, use_binary_format, **given):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format, **given)
    return buffer.getvalue()


def is_like(found, expected):
    """Return whether scalars are of one type, and of one value to the sign of zero."""
    same = found == expected
    if isinstance(expected, (float, complex)):
        same = repr(found) == repr(expected)
    return type(found) is type(expected) and same


def assert_exact(found, expected):
    assert_equal_states(found, expected)
    if isinstance(expected, dict):
        for key in expected:
            assert_exact(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for pair in zip(found, expected, strict=True):
            assert_exact(*pair)
    elif not isinstance(expected, np.ndarray):
        assert (
            found.tobytes() == expected.tobytes()
            if isinstance(expected, np.generic)
            else is_like(found, expected)
        )


def leaves(state, key=()):
    """Yield each array with its key."""
    if isinstance(state, np.ndarray):
        yield key, state
    items = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    for name, item in items:
        yield from leaves(item, (*key, name))


def arrays_by_h5py(data):
    """Return the arrays of a file by key, as stock h5py and docs/formats.md have it."""
    found = {}

    def visit(group, key):
        for name, item in group.items():
            if isinstance(item, h5py.Group):
                visit(item, (*key, unescape(name)))
            elif item.dtype.kind not in "OS":  # long texts are datasets too
                found[() if name == "%itself" else (*key, unescape(name))] = item

    with h5py.File(io.BytesIO(data), "r") as file:
        visit(file, ())
        return {key: np.asarray(item[()]) for key, item in found.items()}


def test_there_are_at_least_sixty_states():
    assert len(STATES) + len(CHANGED) + len(REFUSED) + len(ONLY_PICKLED) >= 60


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("name", STATES)
def test_odd_state_comes_back_as_it_was(name, use_binary_format):
    state = STATES[name]

    found = mpisave.load(io.BytesIO(saved(state, use_binary_format)))

    assert_exact(found, state)


@pytest.mark.parametrize("name", [name for name in STATES if name not in ONLY_BITS])
def test_odd_state_is_read_by_pickle_load(name):
    for protocol in (2, 4, 5):
        found = pickle.loads(saved(STATES[name], False, protocol=protocol))

        assert_exact(found, STATES[name])


@pytest.mark.parametrize("name", [name for name in STATES if name not in ONLY_BITS])
def test_arrays_of_an_odd_state_are_read_by_h5py(name):
    expected = dict(leaves(STATES[name]))

    found = arrays_by_h5py(saved(STATES[name], True))

    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert_equal_states(found[key], array)


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("name", CHANGED)
def test_odd_container_or_order_is_that_of_plain_python(name, use_binary_format):
    state, expected = CHANGED[name]

    data = saved(state, use_binary_format)

    assert_exact(mpisave.load(io.BytesIO(data)), expected)
    if not use_binary_format and name != "NumPy text":
        assert_exact(pickle.loads(data), expected)


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("name", REFUSED)
def test_state_that_is_not_legal_is_refused_with_a_reason(name, use_binary_format):
    with pytest.raises(StateDictError, match=r".{20}") as caught:
        saved(REFUSED[name], use_binary_format)

    key = next(iter(REFUSED[name]))
    assert repr(key) in str(caught.value) or ascii(key) in str(caught.value)


@pytest.mark.parametrize("name", ONLY_PICKLED)
def test_other_object_is_refused_by_hdf5_and_by_load_with_its_key(name):
    state = ONLY_PICKLED[name]

    with pytest.raises(StateDictError, match=r"'a' is of type"):
        saved(state, True)

    with pytest.warns(UserWarning, match="'a' is an object of .* gives it back"):
        data = saved(state, False)
    assert pickle.loads(data) == state
    with pytest.raises(FileFormatError, match=r"'a' is an object of type"):
        mpisave.load(io.BytesIO(data))


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("name", STATES)
def test_one_array_of_an_odd_state_is_loaded_by_its_key(name, use_binary_format):
    expected = dict(leaves(STATES[name]))
    data = saved(STATES[name], use_binary_format)
    for key, array in list(expected.items())[:5]:
        if any(isinstance(part, int) for part in key) or not key:
            continue  # a list is loaded whole

        found = mpisave.load(io.BytesIO(data), keys=[key])

        for part in key:
            found = found[part]
        assert_equal_states(found, array)
