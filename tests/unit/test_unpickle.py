"""Pickles of other programs: arrays and containers load, nothing is run."""

import array
import datetime as dt
import io
import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

import mpisave
from mpisave.errors import FileFormatError

PROTOCOLS = (0, 1, 2, 3, 4, 5)
DTYPES = [
    f"{order}{code}"
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for order in "<>"
] + ["?", "i1", "u1", "g", "G"]


def loaded(data):
    return mpisave.load(io.BytesIO(data))


def assert_equal_states(found, expected):
    """Fail unless types, order of keys and values are the same, nan and -0.0 too."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(map(repr, found)) == list(map(repr, expected))
        for key, value in expected.items():
            assert_equal_states(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal_states(mine, theirs)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, (set, frozenset)):
        assert found == expected
    else:
        assert repr(found) == repr(expected)


def assert_loads_as_pickle_does(state, protocol):
    data = pickle.dumps(state, protocol)
    assert_equal_states(loaded(data), pickle.loads(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_of_every_dtype_loads(dtype, protocol):
    made = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)

    assert_loads_as_pickle_does({"w": made, "x": made[0, 0], "again": made}, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "u1", "?"])
@pytest.mark.parametrize(
    "made",
    [
        np.array(2),
        np.zeros(0),
        np.zeros((0, 3)),
        np.zeros((3, 0, 2)),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(24).reshape(4, 6)[::2, ::-3],
        np.arange(70_000),
    ],
    ids=["0d", "empty", "0x3", "3x0x2", "fortran", "strided", "large"],
)
def test_array_of_every_layout_loads(made, dtype, protocol):
    assert_loads_as_pickle_does([made.astype(dtype, order="K")], protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_transposed_array_loads(protocol):
    made = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)

    assert_loads_as_pickle_does([made], protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_loaded_array_can_be_written_to(protocol):
    state = {"c": np.zeros((2, 3)), "f": np.zeros((2, 3), order="F")}

    found = loaded(pickle.dumps(state, protocol))

    for made in found.values():
        made[1, 2] = 5
        assert made[1, 2] == 5


CONTAINERS = [
    None,
    True,
    [0, -1, 255, 256, 65536, 2**31, -(2**31), 2**63, 10**100, -(10**400)],
    [0.5, -0.0, float("inf"), 1e-320],
    [1 + 2j, complex("nan")],
    ["", "x" * 300, "\N{GREEK SMALL LETTER ALPHA}", "\ud800", "\0\n"],
    [b"", b"\0\xff", b"x" * 300],
    [bytearray(), bytearray(b"\0\xff")],
    [{}, [], (), set(), frozenset()],
    [{1, 2}, {"a"}, frozenset([1, b"x", None])],
    [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    {1: "a", "1": "b", None: 1, False: 2, 0.5: 3, b"k": 4},
    {"nested": [{"a": ({"b": []},)}]},
    {f"k{i}": i for i in range(3000)},
    list(range(3000)),
    [["same"] * 2] * 3,
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("state", CONTAINERS)
def test_plain_containers_and_scalars_load(state, protocol):
    assert_loads_as_pickle_does(state, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dict_loads_as_a_dict(protocol):
    state = OrderedDict([("z", np.arange(3)), ("a", OrderedDict(x=1))])

    found = loaded(pickle.dumps(state, protocol))

    assert_equal_states(found, {"z": np.arange(3), "a": {"x": 1}})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_parts_stay_shared(protocol):
    part, made = ["part"], np.arange(3)
    data = pickle.dumps({"a": part, "b": part, "v": made, "w": made}, protocol)

    found = loaded(data)

    assert found["a"] is found["b"]
    assert found["v"] is found["w"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_list_that_holds_itself_loads(protocol):
    made = [1]
    made.append(made)

    found = loaded(pickle.dumps(made, protocol))

    assert found[0] == 1
    assert found[1] is found


def test_names_of_numpy_1_and_2_are_both_known():
    data = pickle.dumps({"w": np.arange(3)}, 2)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    new = old.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")

    assert old != new
    assert_equal_states(loaded(old), {"w": np.arange(3)})
    assert_equal_states(loaded(new), {"w": np.arange(3)})


def test_pickle_without_memo_and_with_optimised_one_loads():
    data = pickle.dumps({"w": np.arange(3), "x": [1, 2]}, 4)

    found = loaded(pickletools.optimize(data))

    assert_equal_states(found, {"w": np.arange(3), "x": [1, 2]})


# ---- What is refused. Pickles are assembled by opcode: no object makes most of them.


def string(text):
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module, attribute):
    """Return STACK_GLOBAL of a name."""
    return string(module) + string(attribute) + b"\x93"


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def whole(body, protocol=4):
    return b"\x80" + bytes([protocol]) + body + b"."


INT_DTYPE = call(name("numpy", "dtype"), string("i2"), b"\x89", b"\x88")
OBJECT_DTYPE = call(name("numpy", "dtype"), string("O8"), b"\x89", b"\x88")
RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
NDARRAY = name("numpy", "ndarray")
SCALAR = name("numpy.core.multiarray", "scalar")
NEW_ARRAY = call(RECONSTRUCT, NDARRAY, b"K\0\x85", b"C\x01b")
BYTES_4 = b"C\x04\x01\x00\x02\x00"
TRIPWIRE = "mpisave-tripwire"


def state_of_array(version=b"K\x01", shape=b"K\x02\x85", dtype=INT_DTYPE, data=BYTES_4):
    return b"(" + version + shape + dtype + b"\x89" + data + b"tb"


def tuple_dag(depth):
    """Return opcodes of a tuple that stands for 2**depth: it hashes for ever."""
    return b")" + b"q\x00h\x00\x86" * depth


RUN_SHELL = string(f"touch {TRIPWIRE}")
RUN_PYTHON = string(f"open({TRIPWIRE!r}, 'w').close()")

# What to find in the message, and the pickle.
MALICIOUS = {
    # Names: each is refused where it stands, whether it is called or not.
    "os.system": ("os.system", whole(call(name("os", "system"), RUN_SHELL))),
    "posix.system": ("posix.system", whole(call(name("posix", "system"), RUN_SHELL))),
    "GLOBAL os.system": ("os.system", whole(b"cos\nsystem\n(" + RUN_SHELL + b"tR", 2)),
    "subprocess": (
        "subprocess.call",
        whole(call(name("subprocess", "call"), b"](" + string("id") + b"e")),
    ),
    "eval": ("builtins.eval", whole(call(name("builtins", "eval"), RUN_PYTHON))),
    "exec": ("builtins.exec", whole(call(name("builtins", "exec"), RUN_PYTHON))),
    "__builtin__.eval": (
        "__builtin__.eval",
        whole(b"c__builtin__\neval\n" + RUN_PYTHON + b"\x85R", 2),
    ),
    "getattr": ("builtins.getattr", whole(name("builtins", "getattr"))),
    "__import__": (
        "builtins.__import__",
        whole(call(name("builtins", "__import__"), string("antigravity"))),
    ),
    "importlib": (
        "importlib.import_module",
        whole(call(name("importlib", "import_module"), string("antigravity"))),
    ),
    "import by name": ("antigravity.geohash", whole(name("antigravity", "geohash"))),
    "open": (
        "builtins.open",
        whole(call(name("builtins", "open"), string(TRIPWIRE), string("w"))),
    ),
    "pickle.loads": ("pickle.loads", whole(name("pickle", "loads"))),
    "_pickle": ("_pickle.Unpickler", whole(name("_pickle", "Unpickler"))),
    "copyreg": ("copyreg._reconstructor", whole(name("copyreg", "_reconstructor"))),
    "functools": ("functools.partial", whole(name("functools", "partial"))),
    "operator": ("operator.attrgetter", whole(name("operator", "attrgetter"))),
    "types": ("types.FunctionType", whole(name("types", "FunctionType"))),
    "class": ("datetime.timedelta", pickle.dumps(dt.timedelta(1), 4)),
    "path": ("pathlib", pickle.dumps(Path("x"), 4)),
    "defaultdict": ("collections.defaultdict", pickle.dumps(defaultdict(list), 4)),
    # Names in the packages that are known, beside those that are.
    "numpy.load": ("numpy.load", whole(call(name("numpy", "load"), string("x.npy")))),
    "numpy.memmap": ("numpy.memmap", whole(name("numpy", "memmap"))),
    "numpy.fromfile": ("numpy.fromfile", whole(name("numpy", "fromfile"))),
    "numpy f2py": (
        "numpy.f2py.capi_maps.load_f2cmap_file",
        whole(name("numpy.f2py.capi_maps", "load_f2cmap_file")),
    ),
    "numpy runstring": (
        "numpy.testing._private.utils.runstring",
        whole(name("numpy.testing._private.utils", "runstring")),
    ),
    "numpy.core attribute": (
        "numpy.core.multiarray._reconstruct.__globals__",
        whole(name("numpy.core.multiarray", "_reconstruct.__globals__")),
    ),
    "dotted module": ("numpy.dtype.", whole(name("numpy.dtype", ""))),
    "joined name": ("numpy.ndarray.tofile", whole(name("numpy", "ndarray.tofile"))),
    "codecs": ("_codecs.decode", whole(name("_codecs", "decode"))),
    "ours": ("mpisave.save", whole(name("mpisave", "save"))),
    # Opcodes.
    "NEWOBJ": ("NEWOBJ", whole(name("numpy", "ndarray") + b")\x81")),
    "NEWOBJ_EX": ("NEWOBJ_EX", whole(name("numpy", "ndarray") + b")}\x92")),
    "INST": ("INST", whole(b"(" + RUN_SHELL + b"ios\nsystem\n", 2)),
    "OBJ": ("OBJ", whole(b"(" + name("numpy", "ndarray") + b"K\x01o")),
    "EXT1": ("EXT1", whole(b"\x82\x01")),
    "EXT2": ("EXT2", whole(b"\x83\x01\x00")),
    "EXT4": ("EXT4", whole(b"\x84\x01\x00\x00\x00")),
    "PERSID": ("PERSID", whole(b"Pid\n", 2)),
    "BINPERSID": ("BINPERSID", whole(string("id") + b"Q")),
    "DUP": ("DUP", whole(b"K\x012\x86")),
    "INT": ("INT", whole(b"Ix\n", 2)),
    "long INT": ("no end", whole(b"I" + b"1" * 600 + b"\n", 2)),
    "STRING": ("STRING", whole(b"S'x'\n", 2)),
    "UNICODE": ("UNICODE", whole(b"Vx", 2)),
    "SHORT_BINSTRING": ("SHORT_BINSTRING", whole(b"U\x01x", 2)),
    "NEXT_BUFFER": ("NEXT_BUFFER", whole(b"\x97", 5)),
    "READONLY_BUFFER": ("READONLY_BUFFER", whole(b"C\x01x\x98", 5)),
    # BUILD writes attributes: on nothing but a new array or dtype.
    "BUILD on a name": ("BUILD", whole(NDARRAY + b"}" + string("x") + b"K\x01sb")),
    "BUILD on a function": ("BUILD", whole(RECONSTRUCT + b"K\x01\x85b")),
    "BUILD on a dict": ("BUILD", whole(b"}K\x01\x85b")),
    "BUILD on a list": ("BUILD", whole(b"]K\x01\x85b")),
    "BUILD on a made array": (
        "BUILD",
        whole(NEW_ARRAY + state_of_array() + state_of_array()),
    ),
    "BUILD twice through the memo": (
        "BUILD",
        whole(NEW_ARRAY + b"q\x00" + state_of_array() + b"h\x00" + state_of_array()),
    ),
    # Half-made and odd arrays.
    "object array": (
        "dtype",
        whole(NEW_ARRAY + state_of_array(dtype=OBJECT_DTYPE, data=b"](NNe")),
    ),
    "array of a list": (
        "list",
        whole(NEW_ARRAY + state_of_array(data=b"](K\x01K\x02e")),
    ),
    "array of text": ("str", whole(NEW_ARRAY + state_of_array(data=string("abcd")))),
    "array of itself": (
        "",
        whole(NEW_ARRAY + b"q\x00" + state_of_array(data=b"h\x00")),
    ),
    "array of another kind": (
        "kind",
        whole(call(RECONSTRUCT, name("numpy", "dtype"), b"K\0\x85", b"C\x01b")),
    ),
    "array without its bytes": ("bytes", whole(NEW_ARRAY)),
    "half-made array in a list": (
        "bytes",
        whole(b"]" + NEW_ARRAY + b"a"),
    ),
    "half-made array in a tuple": (
        "bytes",
        whole(NEW_ARRAY + b"\x85"),
    ),
    "half-made array by the memo": (
        "bytes",
        whole(NEW_ARRAY + b"q\x000]h\x00a"),
    ),
    "array with a first shape": (
        "",
        whole(call(RECONSTRUCT, NDARRAY, b"J\xff\xff\xff\x7f\x85", b"C\x01b")),
    ),
    "array that is too large": (
        "has 4 bytes",
        whole(NEW_ARRAY + state_of_array(shape=b"J\xff\xff\xff\x7f\x85")),
    ),
    "array that is too small": (
        "has 4 bytes",
        whole(NEW_ARRAY + state_of_array(shape=b")")),
    ),
    "array of negative shape": (
        "shape",
        whole(
            NEW_ARRAY + state_of_array(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86")
        ),
    ),
    "array of no int shape": (
        "float",
        whole(NEW_ARRAY + state_of_array(shape=b"G@\0\0\0\0\0\0\0\x85")),
    ),
    "empty array of huge shape": (
        "",
        whole(
            NEW_ARRAY
            + state_of_array(
                shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\0\x86", data=b"C\0"
            )
        ),
    ),
    "array of 99 dimensions": (
        "99 dimensions",
        whole(NEW_ARRAY + state_of_array(shape=b"(" + b"K\x01" * 99 + b"t")),
    ),
    "array of another version": (
        "version",
        whole(NEW_ARRAY + state_of_array(version=b"K\x02")),
    ),
    "array's state cut short": ("BUILD", whole(NEW_ARRAY + b"K\x01\x85b")),
    "array's state no tuple": ("BUILD", whole(NEW_ARRAY + b"]b")),
    "subclass": ("numpy.matrix", whole(call(RECONSTRUCT, name("numpy", "matrix")))),
    # Dtypes.
    "object dtype": ("dtype", whole(call(SCALAR, OBJECT_DTYPE, BYTES_4))),
    "structured dtype": (
        "dtype",
        whole(call(name("numpy", "dtype"), string("i4,i4"), b"\x89", b"\x88")),
    ),
    "dtype of a list": (
        "REDUCE",
        whole(call(name("numpy", "dtype"), b"]")),
    ),
    "dtype of a long text": (
        "",
        whole(call(name("numpy", "dtype"), string("(2,)" * 50 + "i2"))),
    ),
    "dtype's state with fields": (
        "state",
        whole(
            INT_DTYPE + b"(K\x03" + string("<") + b"N" + b"}}"
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        ),
    ),
    "dtype as part of the state": ("dtype", whole(b"]" + INT_DTYPE + b"a")),
    "name as part of the state": ("part of the state", whole(b"]" + NDARRAY + b"a")),
    "name within tuples": ("part of the state", whole(NDARRAY + b"\x85\x85")),
    "name as a key": ("key", whole(b"}" + NDARRAY + b"K\x01s")),
    # Calls of what is no function, and with what it does not take.
    "call of a text": ("REDUCE", whole(string("os.system") + b")R")),
    "call of an array": ("REDUCE", whole(NEW_ARRAY + state_of_array() + b")R")),
    "call without arguments": ("REDUCE", whole(call(SCALAR))),
    "call with a list": ("REDUCE", whole(SCALAR + b"]R")),
    "ndarray with strides": (
        "REDUCE",
        whole(call(NDARRAY, b"K\x02\x85", INT_DTYPE, BYTES_4, b"K\x63", b"K\x01\x85")),
    ),
    "encode with a codec": (
        "encoding",
        whole(call(name("_codecs", "encode"), string("x"), string("zip"))),
    ),
    "set of a text": ("set", whole(call(name("builtins", "set"), string("ab")))),
    "bytearray of a number": (
        "REDUCE",
        whole(call(name("builtins", "bytearray"), b"J\xff\xff\xff\x7f")),
    ),
    "bytes of a number": (
        "REDUCE",
        whole(call(name("builtins", "bytes"), b"J\xff\xff\xff\x7f")),
    ),
    "frombuffer beyond its end": (
        "has 4 bytes",
        whole(
            call(
                name("numpy.core.numeric", "_frombuffer"),
                BYTES_4,
                INT_DTYPE,
                b"K\x63\x85",
                string("C"),
            )
        ),
    ),
    # Containers.
    "tuple DAG as a key": ("key", whole(b"}" + tuple_dag(60) + b"K\x01s")),
    "tuple DAG in a set": ("key", whole(b"\x8f(" + tuple_dag(60) + b"\x90")),
    "tuple DAG in a frozenset": ("key", whole(b"(" + tuple_dag(60) + b"\x91")),
    "list as a key": ("key", whole(b"}]K\x01s")),
    "key without a value": ("no value", whole(b"}(K\x01u")),
    "append to a dict": ("APPEND", whole(b"}K\x01a")),
    "set item of a list": ("SETITEM", whole(b"]K\x01K\x02s")),
    "add to a list": ("ADDITEMS", whole(b"](K\x01\x90")),
    # Stack and memo.
    "nothing": ("0 values", whole(b"")),
    "two values": ("2 values", whole(b"NN")),
    "mark at the end": ("", whole(b"(")),
    "empty stack": ("empty", whole(b"a")),
    "pop of nothing": ("empty", whole(b"0")),
    "no mark": ("mark", whole(b"K\x01t")),
    "memo that was not set": ("BINGET", whole(b"h\x05")),
    "long memo that was not set": ("LONG_BINGET", whole(b"j\xff\xff\xff\x7f")),
    "put of nothing": ("BINPUT", whole(b"q\x00")),
    "put of a mark": ("BINPUT", whole(b"(q\x00t")),
    "memoize of nothing": ("MEMOIZE", whole(b"\x94")),
    # Sizes that are not there.
    "BINBYTES8 of 2**62": ("", whole(b"\x8e" + struct.pack("<Q", 2**62) + b"x")),
    "BINBYTES8 of 2**64": ("", whole(b"\x8e" + b"\xff" * 8 + b"x")),
    "BINBYTES of 2**32": ("", whole(b"B\xff\xff\xff\xffx")),
    "BINUNICODE8 of 2**62": ("", whole(b"\x8d" + struct.pack("<Q", 2**62) + b"x")),
    "BYTEARRAY8 of 2**40": ("", whole(b"\x96" + struct.pack("<Q", 2**40) + b"x", 5)),
    "LONG4 of 2**31": ("", whole(b"\x8b\xff\xff\xff\x7f\x01")),
    "LONG4 of -1": ("", whole(b"\x8b\xff\xff\xff\xff\x01")),
    "FRAME of 2**62": ("", b"\x80\x04\x95" + struct.pack("<Q", 2**62)),
    # No pickle at all.
    "unknown opcode": ("", whole(b"\xff")),
    "no UTF-8": ("", whole(b"X\x01\0\0\0\xff")),
    "endless line": ("", b"\x80\x02c" + b"x" * 100_000),
    "bytes of chance": ("", b"\x80\x04" + bytes(range(1, 256)) * 3),
}
assert len(MALICIOUS) >= 40


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """Fail if a file is made in the working directory, or a module imported."""
    monkeypatch.chdir(tmp_path)
    "x".encode("raw-unicode-escape")  # a codec of Python's that UNICODE needs
    before = set(sys.modules)
    yield
    assert os.listdir() == []
    assert set(sys.modules) - before == set()


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_or_odd_pickle_is_refused_and_nothing_runs(case, nothing_runs):
    words, data = MALICIOUS[case]

    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            loaded(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert words in str(caught.value)
    assert peak < 2**24
    assert len(str(caught.value)) < 1000


def is_named_with_its_offset(message, data):
    """Return whether a message names an opcode of `data`, and where it stands."""
    return any(
        f"{opcode.name} at byte {offset}" in message
        for opcode, _, offset in pickletools.genops(data)
    )


@pytest.mark.parametrize(
    "case",
    [
        *("os.system", "eval", "numpy.load", "NEWOBJ", "EXT1", "BINPERSID", "DUP"),
        *("BUILD on a dict", "object array", "tuple DAG as a key", "call of a text"),
    ],
)
def test_refusal_names_the_opcode_and_its_offset(case):
    data = MALICIOUS[case][1]

    with pytest.raises(FileFormatError) as caught:
        loaded(data)

    assert is_named_with_its_offset(str(caught.value), data)


def test_refusal_names_the_file(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(MALICIOUS["os.system"][1])

    with pytest.raises(FileFormatError, match=r"evil\.pkl: .*os\.system"):
        mpisave.load(path)


def test_the_tripwire_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    pickle.loads(MALICIOUS["open"][1]).close()
    pickle.loads(MALICIOUS["eval"][1])

    assert os.listdir() == [TRIPWIRE]


class RunsCode:
    def __reduce__(self):
        return os.system, (f"touch {TRIPWIRE}",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"w": (x,)}])
def test_object_that_runs_code_is_refused_wherever_it_is(protocol, wrap, nothing_runs):
    data = pickle.dumps(wrap(RunsCode()), protocol)

    with pytest.raises(FileFormatError, match=r"posix\.system|os\.system"):
        loaded(data)


@pytest.mark.parametrize(
    "state",
    [
        np.array([1, "a"], object),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("x", "i4")]),
        np.array(["2026-01-01"], "M8[D]"),
        np.datetime64("2026-01-01"),
        array.array("i", [1]),
        dt.datetime(2026, 1, 1),
        Path("x"),
        range(3),
        slice(1),
        print,
        RunsCode,
    ],
    ids=lambda state: repr(state)[:30],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_object_is_refused(state, protocol):
    with pytest.raises(FileFormatError):
        loaded(pickle.dumps({"x": state}, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickle_cut_at_every_byte_is_refused(protocol):
    data = pickle.dumps(
        {"w": np.arange(3, dtype=">i2"), "n": [1, (2.5, None)]}, protocol
    )

    for nbytes in range(len(data)):
        with pytest.raises(FileFormatError):
            loaded(data[:nbytes])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flipped_bit_is_refused_or_gives_plain_values(protocol, nothing_runs):
    data = pickle.dumps({"w": np.arange(3), "n": [1, (2.5, None)]}, protocol)

    for at in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[at] ^= 1 << bit
            try:
                found = loaded(bytes(altered))
            except FileFormatError:
                continue
            assert_plain(found)


def assert_plain(value):
    plain = (dict, list, tuple, set, frozenset, np.ndarray, np.generic)
    scalars = (type(None), bool, int, float, complex, str, bytes, bytearray)
    assert isinstance(value, plain + scalars)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)


def test_deep_nesting_does_not_overflow_the_stack():
    depth = 100_000
    data = whole(b"]" * depth + b"a" * (depth - 1))

    found = loaded(data)

    for _ in range(depth - 1):
        (found,) = found
    assert found == []


def test_tuple_that_stands_for_many_is_looked_at_once():
    data = whole(b"]" + tuple_dag(60) + b"a")

    (found,) = loaded(data)

    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found == ()


def test_memo_chain_takes_no_more_memory_than_it_has_items():
    # Each list holds the one before twice: 2**40 leaves, 41 lists.
    lists = [b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)]
    data = whole(b"]q\x00" + b"".join(lists))
    tracemalloc.start()

    with pytest.raises(FileFormatError, match="41 values"):
        loaded(data)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# ---- What other programs write.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_array_of_ml_dtypes_loads_as_such(name, protocol):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    made = np.array([0, 1, 2]).astype(getattr(ml_dtypes, name))

    assert_loads_as_pickle_does({"w": made}, protocol)


def test_array_of_a_name_that_ml_dtypes_has_for_something_else_is_refused():
    data = whole(call(name("numpy", "dtype"), name("ml_dtypes", "finfo")))

    with pytest.raises(FileFormatError, match=r"ml_dtypes\.finfo"):
        loaded(data)


class AsPaddleDoes:
    """paddle.save writes a Tensor as a call of tuple."""

    def __reduce__(self):
        return tuple, (("linear_0.w_0", np.arange(3.0)),)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensor_as_paddle_writes_it_loads(protocol):
    data = pickle.dumps({"w": AsPaddleDoes(), "n": {"w": "linear_0.w_0"}}, protocol)

    assert_equal_states(loaded(data), pickle.loads(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_payload_loads_wherever_it_stands(protocol):
    raw = bytes(range(256)) * 300
    state = {
        "bytes": raw,
        "again": raw,
        "tuple": (raw, (raw, 1)),
        "set": {raw},
        "mutable": bytearray(raw),
        "deep": [((((raw,),),), bytearray(raw))],
        "w": np.frombuffer(raw, "<u2"),
        "swapped": np.frombuffer(raw, ">u4"),
        raw: "key",
    }

    assert_loads_as_pickle_does(state, protocol)


def test_same_large_bytes_are_one_object():
    raw = bytes(10_000)

    found = loaded(pickle.dumps([raw, (raw, raw), {"x": (raw,)}], 4))

    assert found[0] is found[1][0]
    assert found[0] is found[1][1]
    assert found[0] is found[2]["x"][0]


def test_array_takes_its_own_memory_and_no_more():
    data = pickle.dumps({"w": np.ones(2**21)}, 4)
    source = io.BytesIO(data)
    tracemalloc.start()

    mpisave.load(source)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24 + 2**20


@pytest.mark.parametrize("start", [0, 10**12])
@pytest.mark.parametrize("make", [dict.fromkeys, set, frozenset])
def test_many_numbers_that_follow_one_another_are_keys(make, start):
    made = make(range(start, start + 100_000))

    assert loaded(pickle.dumps(made, 4)) == made


def test_thousands_of_numbers_in_no_order_are_keys():
    made = {n * 7919 % 1_000_003: n for n in range(15_000)}

    assert loaded(pickle.dumps(made, 4)) == made


@pytest.mark.parametrize("opcode", [b"I", b"L", b"Np", b"N0g"])
@pytest.mark.parametrize("digits", [b"010", b"0x1", b"1_0", b" 1", b"+1", b"1e1", b""])
def test_number_that_loaders_read_in_different_ways_is_refused(opcode, digits):
    with pytest.raises(FileFormatError, match="is no decimal number"):
        loaded(whole(opcode + digits + b"\n", 2))


def test_names_are_not_undone_from_escapes():
    with pytest.raises(FileFormatError, match="is refused"):
        loaded(whole(b"cnum\\x70y\ndtype\n", 2))


def test_names_are_shown_so_that_nothing_looks_like_something_else():
    with pytest.raises(FileFormatError, match=r"n\\u0443mpy\.dtype"):
        loaded(whole(name("n\u0443mpy", "dtype")))


def test_refusal_of_a_value_of_2_to_the_60_parts_takes_no_time():
    dag = b")" + b"q\x00h\x00\x86" * 60
    data = whole(INT_DTYPE + b"(K\x03" + string("<") + b"NNN" + dag + dag + b"K\0tb")

    with pytest.raises(FileFormatError, match="opcode BUILD at byte"):
        loaded(data)
