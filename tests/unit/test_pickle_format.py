"""Pickles of ours, read by the pickle module alone."""

import io
import pickle
import pickletools
import struct

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_equal_states
from hypothesis import given, settings
from hypothesis import strategies as st

import mpisave

PROTOCOLS = (2, 3, 4, 5)
DTYPES = [
    f"{order}{code}"
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for order in "<>"
] + ["?", "i1", "u1", "g", "G"]


def saved(state, **given):
    """Return the bytes of a file."""
    buffer = io.BytesIO()
    mpisave.save(state, buffer, **given)
    return buffer.getvalue()


def opcodes(data):
    """Return (name, argument, offset) of each opcode."""
    return [(op.name, arg, at) for op, arg, at in pickletools.genops(data)]


def payload_offsets(data):
    """Yield offset and bytes of each bytes object that is no code or filler."""
    found = opcodes(data)
    heads = {"BINBYTES": 5, "BINBYTES8": 9, "BYTEARRAY8": 9}
    for name, argument, at in found:
        if name in heads:
            yield at + heads[name], bytes(argument)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_of_every_dtype_is_read_by_pickle_load(dtype, protocol):
    made = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)

    found = pickle.loads(saved({"w": made}, protocol=protocol))

    assert_equal_states(found, {"w": made})
    assert type(found["w"]) is np.ndarray


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (2, 3), (1, 1, 1, 1, 1, 2)], ids=str
)
def test_array_of_every_shape_is_read_by_pickle_load(shape, dtype, protocol):
    made = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)

    found = pickle.loads(saved([made], protocol=protocol))

    assert_equal_states(found, [made])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "made",
    [
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::-3],
        np.broadcast_to(np.int8(3), (2, 5)),
    ],
    ids=["fortran", "strided", "broadcast"],
)
def test_array_of_every_layout_is_read_in_c_order(made, protocol):
    found = pickle.loads(saved({"w": made}, protocol=protocol))["w"]

    assert_equal_states(found, np.ascontiguousarray(made))
    assert found.flags.c_contiguous


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "u1", "?"])
def test_array_that_was_read_can_be_written_to(dtype, protocol):
    found = pickle.loads(saved({"w": np.zeros(3, dtype)}, protocol=protocol))

    found["w"][1] = 1

    assert found["w"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bfloat16_is_stored_as_uint16_for_readers_without_ml_dtypes(protocol):
    made = np.array([1.0, -2.0], ml_dtypes.bfloat16)

    data = saved({"w": made, "x": ml_dtypes.bfloat16(1)}, protocol=protocol)

    found = pickle.loads(data)
    assert_equal_states(found["w"], np.array([0x3F80, 0xC000], np.uint16))
    assert found["x"] == np.uint16(0x3F80)
    assert b"ml_dtypes" not in data[: data.index(b'{"mpisave"')]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_small_objects_come_back_with_their_types(protocol):
    state = {
        "none": None,
        "bools": [True, False],
        "ints": (0, -1, 2**31, 2**63, -(2**200)),
        "floats": [0.1, -0.0, float("inf"), float("nan")],
        "complex": 1 - 2j,
        "text": ["", "x" * 300, "\N{GREEK SMALL LETTER ALPHA}", "\0\n"],
        "bytes": [b"", b"\0\xff", bytearray(b"abc")],
        "set": {1, 2},
        "numpy": [np.float32(0.5), np.bool_(True), np.int64(3), np.complex128(1j)],
        7: {"empty": [{}, [], ()], "1": 1, 1: "1"},
        -1: ((), ((),)),
    }
    with pytest.warns(UserWarning, match="object of type set"):
        data = saved(state, protocol=protocol)

    assert_equal_states(pickle.loads(data), state)


SMALL = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats()
STATES = st.recursive(
    SMALL | st.integers(0, 9).map(lambda n: np.arange(n, dtype=np.int16)),
    lambda inner: (
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(STATES, st.sampled_from(PROTOCOLS))
def test_nested_state_is_read_by_pickle_load(state, protocol):
    assert_equal_states(pickle.loads(saved(state, protocol=protocol)), state)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_keys_keep_their_order(protocol):
    keys = [f"k{(7 * i) % 100}" for i in range(100)]
    state = {key: np.zeros(1, np.int8) if i % 2 else i for i, key in enumerate(keys)}

    found = pickle.loads(saved(state, protocol=protocol))

    assert list(found) == keys


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["u1", ">u2"])
def test_payload_is_aligned_to_64_bytes(dtype, protocol):
    state = {
        "k" * n: np.full(n, 0x5A, dtype) for n in [*range(1, 140, 7), 4096, 70_000]
    }

    found = list(payload_offsets(saved(state, protocol=protocol)))

    assert [data for _, data in found] == [a.tobytes() for a in state.values()]
    assert [offset % 64 for offset, _ in found] == [0] * len(state)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickletools_accepts_every_opcode_as_of_the_protocol(protocol):
    state = {"w": np.arange(3, dtype=">f4"), "v": np.arange(3), "n": [1, (2.5, None)]}
    printed = io.StringIO()

    data = saved(state, protocol=protocol)
    pickletools.dis(data, printed)

    highest = max(op.proto for op, _, _ in pickletools.genops(data))
    assert opcodes(data)[0] == ("PROTO", protocol, 0)
    # In protocol 2 too, bytes are those of protocol 3: it has none of its own.
    assert highest <= max(protocol, 3)
    assert "FRAME" not in printed.getvalue()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_name_of_numpy_2_is_in_the_file(protocol):
    state = {
        "w": np.zeros(3),
        "big": np.zeros(3, ">i2"),
        "scalar": np.float32(1),
    }
    with pytest.warns(UserWarning, match="'when' is an object"):
        data = saved({**state, "when": np.datetime64("2026-01-01")}, protocol=protocol)

    assert b"numpy._core" not in data
    assert b"numpy.core.multiarray" in data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_four_globals_are_named(protocol):
    state = {"w": np.zeros(3), "big": np.zeros(3, ">i2"), "x": np.float32(1)}

    data = saved(state, protocol=protocol)

    names, strings = set(), []
    for name, argument, _ in opcodes(data):
        if name == "GLOBAL":
            names.add(argument)
        elif name == "STACK_GLOBAL":
            names.add(" ".join(strings[-2:]))
        elif name == "BINUNICODE":
            strings.append(argument)
    assert names <= {
        "numpy ndarray",
        "numpy dtype",
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "builtins bytearray",
    }


def test_arrays_of_every_dtype_share_a_file():
    state = {dtype: np.arange(3).astype(dtype) for dtype in DTYPES}

    found = pickle.loads(saved({"a": state, "b": dict(reversed(state.items()))}))

    assert_equal_states(found, {"a": state, "b": dict(reversed(state.items()))})


def test_bytes_behind_the_end_of_the_pickle_are_not_read():
    stream = io.BytesIO(saved({"w": np.zeros(3)}))

    pickle.load(stream)

    assert stream.tell() < len(stream.getvalue())
    assert stream.read(1) == b"{"


def test_file_in_a_file_begins_where_the_object_stood():
    buffer = io.BytesIO(b"before")
    buffer.seek(0, io.SEEK_END)
    mpisave.save({"w": np.arange(3)}, buffer)

    buffer.seek(6)

    assert_equal_states(pickle.load(buffer), {"w": np.arange(3)})
    assert buffer.getvalue().startswith(b"before\x80\x04")


def test_same_state_gives_the_same_bytes():
    state = {"w": np.arange(5), "n": {"lr": 0.1}}

    assert saved(state) == saved(state)


def test_small_file_is_what_its_bytes_spell(monkeypatch):
    # Frozen: a change of any byte is a change of the format, and needs a version.
    monkeypatch.setattr(mpisave, "__version__", "0.1.0")

    found = saved({"w": np.array([1, 2], "<i2"), "n": [0.5]}, protocol=4)

    minus_one = b"J\xff\xff\xff\xff"
    skeleton_and_payload = (
        b"\x80\x04"  # PROTO 4
        b"C\x09mpisave-1"
        b"0"  # the mark, popped again
        b"}("  # EMPTY_DICT MARK
        b"X\x01\0\0\0w"
        b"X\x15\0\0\0numpy.core.multiarray"
        b"X\x0c\0\0\0_reconstruct"
        b"\x93"
        b"q\0"  # STACK_GLOBAL BINPUT 0
        b"X\x05\0\0\0numpy"
        b"X\x07\0\0\0ndarray"
        b"\x93"
        b"q\x01"
        b"K\0\x85"
        b"C\x01b"
        b"\x87R"  # _reconstruct(ndarray, (0,), b"b")
        b"("
        b"K\x01"  # version of the state
        b"K\x02\x85"  # shape (2,)
        b"X\x05\0\0\0numpy"
        b"X\x05\0\0\0dtype"
        b"\x93"
        b"q\x02"
        b"X\x02\0\0\0i2"
        b"\x89\x88\x87R"  # dtype("i2", False, True)
        b"("
        b"K\x03"
        b"X\x01\0\0\0<"
        b"NNN" + 2 * minus_one + b"K\0"
        b"tb"
        b"q\x03"
        b"\x89"  # not in Fortran order
        b"C\x0a\0\0\0\0\0\0\0\0\0\0"
        b"0"  # filler: payload comes to offset 192
        b"\x8e\x04\0\0\0\0\0\0\0"  # BINBYTES8 of 4 bytes
        b"\x01\0\x02\0"  # payload
        b"tb"  # TUPLE BUILD
        b"X\x01\0\0\0n"
        b"]("
        b"G\x3f\xe0\0\0\0\0\0\0"
        b"e"
        b"u."  # SETITEMS STOP
    )
    index = (
        b'{"mpisave":1,"container":"pickle",'
        b'"facts":{"version":"0.1.0","format":"1"},'
        b'"skeleton_crc32c":737476688,'
        b'"nodes":['
        b'[[],"dict",null],'
        b'[["w"],"array","<i2",[2],192,4,2993148305],'
        b'[["n"],"list",1],'
        b'[["n",0],"object",0.5]]}'
    )
    trailer = (
        b"\xda\0\0\0\0\0\0\0"  # the index is at 218
        b"\xd5\0\0\0\0\0\0\0"  # and 213 bytes long
        b"\x01\0\0\0"  # version 1
        b"\x16\x85\x9e\x8b"  # CRC-32C
        b"\x89mpisave"
    )
    assert (len(skeleton_and_payload), len(index)) == (218, 213)
    assert skeleton_and_payload[192:196] == struct.pack("<2h", 1, 2)
    assert found == skeleton_and_payload + index + trailer
