"""HDF5 files of ours, read by h5py and h5dump alone."""

import io
import json
import shutil
import subprocess
import time

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers import unescape
from hypothesis import given, settings
from hypothesis import strategies as st

import mpisave
from mpisave.formats import hdf5
from mpisave.formats.hdf5 import escape

DTYPES = [
    f"{order}{code}"
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for order in "<>"
] + ["?", "i1", "u1", "g"]
NAMES = [
    *("w", "", ".", "..", "/", "a/b", "%", "%2F", "%itself", "0", "-5", "12", "007"),
    *("mpisave.x", "mpisave.", "mpisave", "a.b", " ", "\0", "a\0b", "\n", "-", "--1"),
    *("\N{GREEK SMALL LETTER ALPHA}", "\N{GRINNING FACE}", "k" * 300),
]


def save(state, path, **given):
    return mpisave.save(state, path, use_binary_format=True, **given)


def saved(state, **given):
    buffer = io.BytesIO()
    save(state, buffer, **given)
    return buffer.getvalue()


def opened(state, **given):
    return h5py.File(io.BytesIO(saved(state, **given)), "r")


def index_of(data):
    """Return the JSON that the trailer at the end of a file points to."""
    offset, nbytes = (int.from_bytes(data[at:][:8], "little") for at in (-32, -24))
    return json.loads(data[offset : offset + nbytes])


def extents_of(data):
    """Return offset and nbytes of each array, by its key."""
    nodes = index_of(data)["nodes"]
    return {tuple(n[0]): (n[4], n[5]) for n in nodes if n[1] == "array"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_array_of_every_dtype_is_read_by_h5py(dtype):
    made = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)

    with opened({"w": made}) as file:
        found = file["w"][()]

    assert found.dtype == made.dtype
    assert found.dtype.byteorder == made.dtype.byteorder
    assert found.tobytes() == made.tobytes()


@pytest.mark.parametrize(
    "made",
    [
        np.array(2.5),
        np.zeros(0, np.int8),
        np.zeros((0, 3)),
        np.zeros((3, 0, 2)),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::-3],
        np.arange(100_000),
    ],
    ids=["0d", "empty", "0x3", "3x0x2", "fortran", "strided", "large"],
)
def test_array_of_every_shape_and_layout_is_read_by_h5py(made):
    with opened({"w": made, "after": np.arange(3)}) as file:
        found, after = file["w"][()], file["after"][()]

    assert np.shape(found) == made.shape
    np.testing.assert_array_equal(found, made)
    assert after.tolist() == [0, 1, 2]


def test_dataset_is_contiguous_and_lies_where_the_index_says():
    state = {
        "a": np.arange(5, dtype=np.int16),
        "empty": np.zeros(0),
        "nested": {"b/c": {3: np.arange(7.0)}, "d": [np.array(1), np.ones((2, 2))]},
    }
    paths = {
        ("a",): "a",
        ("nested", "b/c", 3): "nested/b%2Fc/3",
        ("nested", "d", 0): "nested/d/0",
        ("nested", "d", 1): "nested/d/1",
    }

    data = saved(state)

    extents = extents_of(data)
    assert set(extents) == {*paths, ("empty",)}
    assert extents["empty",][1] == 0
    with h5py.File(io.BytesIO(data)) as file:
        for key, path in paths.items():
            dataset = file[path]
            offset, nbytes = extents[key]
            assert dataset.chunks is None
            assert dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
            assert dataset.id.get_create_plist().get_external_count() == 0
            assert dataset.id.get_offset() == offset
            assert offset % 64 == 0
            assert data[offset : offset + nbytes] == dataset[()].tobytes()


def test_list_and_tuple_with_arrays_are_groups_that_say_so():
    with opened({"l": [np.zeros(1), 5], "t": (np.zeros(2),), "d": {}}) as file:
        assert file["l"].attrs["mpisave.kind"] == "list"
        assert file["l"].attrs["1"] == 5
        assert file["t"].attrs["mpisave.kind"] == "tuple"
        assert "mpisave.kind" not in file["d"].attrs
        assert "mpisave.kind" not in file.attrs


def test_state_that_is_a_list_is_the_root_group():
    with opened([np.arange(2), [np.arange(3)]]) as file:
        assert file.attrs["mpisave.kind"] == "list"
        assert file["0"][()].tolist() == [0, 1]
        assert file["1/0"][()].tolist() == [0, 1, 2]


def test_state_that_is_a_single_array_is_one_dataset():
    with opened(np.arange(4)) as file:
        assert list(file) == ["%itself"]
        assert file["%itself"][()].tolist() == [0, 1, 2, 3]


def test_small_objects_are_attributes():
    state = {
        "int": -7,
        "bool": True,
        "float": 0.1,
        "nan": float("nan"),
        "complex": 1 - 2j,
        "text": "\N{GREEK SMALL LETTER ALPHA}bc",
        "bytes": b"\0\xff",
        "half": np.float16(0.5),
        "bfloat16": ml_dtypes.bfloat16(1),
        "np_text": np.str_("x"),
    }

    with opened({"n": state}) as file:
        found = dict(file["n"].attrs)

    assert set(found) == set(state)
    assert found["int"] == -7
    assert found["int"].dtype == np.int64
    assert found["bool"].dtype == np.bool_
    assert found["bool"]
    assert found["float"] == 0.1
    assert np.isnan(found["nan"])
    assert found["complex"] == 1 - 2j
    assert found["text"] == state["text"]
    assert found["bytes"].tobytes() == b"\0\xff"
    assert found["half"].dtype == np.float16
    assert found["half"] == 0.5
    assert found["bfloat16"] == np.uint16(0x3F80)
    assert found["np_text"] == "x"


def test_object_that_hdf5_lacks_is_json_in_an_attribute():
    state = {
        "none": None,
        "big": 2**80,
        "huge": 2**20_000,
        "nul": "a\0b",
        "surrogate": "\ud800",
        "list": [1, 0.5, None, "x", True, {"a": (2, [])}],
        "tuple": ("beta", 0.9),
        "ints": {"inner": [{"a": np.float32(0.5)}]},
    }

    with opened(state) as file:
        found = {
            name: json.loads(text)
            for name, text in file.attrs.items()
            if not name.startswith("mpisave.")
        }
        inner = json.loads(file["ints"].attrs["inner"])

    assert found == {
        "none": None,
        "big": 2**80,
        # Python refuses to read decimals of more than 4,300 digits.
        "huge": {"int": hex(2**20_000)},
        "nul": "a\0b",
        "surrogate": "\ud800",
        "list": [1, 0.5, None, "x", True, {"a": [2, []]}],
        "tuple": ["beta", 0.9],
    }
    assert inner == [{"a": 0.5}]


@pytest.mark.parametrize("nbytes", [32 * 1024 - 1, 32 * 1024, 70_000, 300_000])
def test_text_too_long_for_an_attribute_is_a_dataset(nbytes):
    text = "x" * nbytes

    with opened({"note": text, "list": [text]}) as file:
        notes = [v for v in (file.attrs.get("note"), file.get("note")) if v is not None]
        note = notes[0] if isinstance(notes[0], str) else json.loads(notes[0][()])
        listed = file.get("list")
        listed = file.attrs["list"] if listed is None else listed[()]

    assert len(notes) == 1
    assert note == text
    assert json.loads(listed) == [text]


def test_long_bytes_and_long_text_beyond_ascii_are_datasets():
    state = {
        "text": "\N{GREEK SMALL LETTER ALPHA}" * 40_000,
        "bytes": bytes(range(256)) * 300,
    }

    with opened(state) as file:
        text = json.loads(file["text"][()])

        assert text == state["text"]
        assert set(file) == {"text", "bytes"}


def test_more_attributes_than_an_object_header_holds_are_kept():
    state = {f"k{i}": "x" * 5000 for i in range(40)} | {f"n{i}": i for i in range(3000)}

    with opened({"n": state}) as file:
        assert len(file["n"].attrs) == 3040
        assert file["n"].attrs["k39"] == "x" * 5000
        assert file["n"].attrs["n2999"] == 2999


def test_dtype_of_ml_dtypes_is_named_in_an_attribute():
    made = np.array([1.0, -2.0], ml_dtypes.bfloat16)

    with opened({"w": made}) as file:
        assert file["w"].attrs["mpisave.dtype"] == "bfloat16"
        assert file["w"][()].tolist() == [0x3F80, 0xC000]
        assert file["w"].dtype == np.uint16


def test_root_says_version_format_and_state_type():
    with opened({"w": np.zeros(1)}, state_type="params") as file:
        assert dict(file.attrs) == {
            "mpisave.version": mpisave.__version__,
            "mpisave.format": "1",
            "mpisave.state_type": "params",
        }
    with opened({}) as file:
        assert "mpisave.state_type" not in file.attrs
        assert list(file) == []


def test_every_name_is_found_under_its_escaped_form():
    state = {name: np.array(number) for number, name in enumerate(NAMES)}
    state |= {number: np.array(number) for number in (0, 12, -5)}
    notes = {name: number for number, name in enumerate(NAMES)}

    with opened({"arrays": state, "notes": notes}) as file:
        found = {unescape(name): d[()] for name, d in file["arrays"].items()}
        found_notes = {unescape(n): v for n, v in file["notes"].attrs.items()}

    assert found == state
    assert found_notes == notes


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.integers(),
        st.integers().map(str),
        st.sampled_from(NAMES),
        st.text(alphabet="%/.\0" + "0123456789-mpisave.ABCDEF", max_size=8),
        st.text(st.characters(codec="utf-8", categories=["L", "Z", "P", "S", "C"])),
    )
)
def test_unescape_is_the_inverse_of_escape(name):
    text = escape(name)

    assert unescape(text) == name
    assert type(unescape(text)) is type(name)
    assert text
    assert "/" not in text
    assert "\0" not in text
    assert text not in (".", "..", "%itself")
    assert not text.startswith("mpisave.")


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text("%/.0F25-", max_size=4) | st.integers(-30, 30), max_size=20))
def test_different_keys_have_different_names(names):
    assert len({escape(name) for name in names}) == len(names)


def test_same_state_gives_the_same_bytes_at_another_time():
    state = {"w": np.arange(5), "n": {"lr": 0.1, "x": np.ones(2)}, "t": "x" * 40_000}
    first = saved(state)
    # HDF5 counts whole seconds.
    time.sleep(1.1)

    assert saved(state) == first


# What HDF5 2.0.0 makes of the file below: runs of bytes by offset, zeros between.
SMALL_FILE = {
    0: (b"\x89HDF\r\n\x1a\n\x02\x08\x08"),
    20: (
        b"\xff\xff\xff\xff\xff\xff\xff\xffN\x13\0\0\0\0\0\0@\0\0\0\0\0\0\0\xee\xc1\xa8W"
    ),
    48: b"mpisave-1",
    64: (
        b"OHDR\x02\0x\x10\x10\0\0\0\x11\0\0\0"
        b"\0\0\0s\0\0\0\0\0\0\0\n\x02\0\x01\0"
        b"\0\x10\x10\0\0\0\x13\0\0\0\0\0\0N\0\0"
        b"\0\0\0\0\0\x0cA\0\0\x03\0\x10\0\x14\0\x04"
        b"\0\0mpisave.versio"
        b"n\0\x19\x01\x01\0\x10\0\0\0\x10\0\0\0\x01\0"
        b"\0\0\0\0\x08\0\x02\0\0\0\x05\0\0\0\0\x01"
        b"\0\0\0\0\0\0\x01\0\0\0\0\x01\0\0\0\xc9"
        b"\xcc\xe8\x8c"
    ),
    256: (
        b"GCOL\x01\0\0\0\0\x10\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0"
        b"0.1.0\0\0\0\x02\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\x001"
    ),
    328: (b"\xc0\x0f"),
    4352: (
        b"OCHK\x02\x12\0\0\0\0\xff\xff\xff\xff\xff\xff"
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x0c@\0\0\x03\0"
        b"\x0f\0\x14\0\x04\0\0mpisave.f"
        b"ormat\0\x19\x01\x01\0\x10\0\0\0\x10\0"
        b"\0\0\x01\0\0\0\0\0\x08\0\x02\0\0\0\x01\0"
        b"\0\0\0\x01\0\0\0\0\0\0\x02\0\0\0\x06\r"
        b"\0\0\x01\x10\x01\x01w\x80\x11\0\0\0\0\0\0?"
        b" EE"
    ),
    4480: (
        b"OHDR\x02\x01\0\x01\x01\x14\0\0\x02\x01\x01\x01"
        b"\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"
        b"\x03\x0c\0\x01\x10\x08\0\0\x02\0\0\0\0\0\x10\0"
        b"\x05\x02\0\x01\x03\x05\x08\x12\0\x01\x03\x01\xc0\x12\0\0"
        b"\0\0\0\0\x04\0\0\0\0\0\0\0\0\xb8"
    ),
    4744: (b"|\x0c\xf46"),
    4800: (b"\x01\0\x02"),
    4864: (
        b"OCHK\x15\x12\0\x04\0\0\xff\xff\xff\xff\xff\xff"
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x0c,\0\0\x03\0"
        b"\x03\0\x14\0\x04\0\0lr\0\x11 ?\0\x08\0"
        b"\0\0\0\0@\x004\x0b\x004\xff\x03\0\0\x02"
    ),
    4936: (b"\xe0?\xf2\xfeu3"),
}
INDEX = (
    b'{"mpisave":1,"container":"hdf5",'
    b'"facts":{"version":"0.1.0","format":"1"},'
    b'"skeleton_crc32c":1032215757,'
    b'"nodes":['
    b'[[],"dict",null],'
    b'[["w"],"array","<i2",[2],4800,4,2993148305],'
    b'[["lr"],"object",0.5]]}'
    b"N\x13\0\0\0\0\0\0"  # the index is at 4942
    b"\xc3\0\0\0\0\0\0\0"  # and 195 bytes long
    b"\x01\0\0\0"  # version 1
    b"y\x04pp"  # CRC-32C
    b"\x89mpisave"
)


@pytest.mark.parametrize("after", [0, 1, 7, 100])
def test_state_that_takes_several_openings_of_the_file_is_complete(monkeypatch, after):
    monkeypatch.setattr(hdf5, "_REOPEN_AFTER", after)
    layers = {
        f"l{i}": {"w": np.full(i, i), "s": np.array(i), "t": f"t{i}", "n": [i, "x"]}
        for i in range(30)
    }
    state = {"layers": layers, "l": [np.arange(2), {"bf": np.ones(20, "f2")}], "i": 5}

    data = saved(state)

    assert saved(state) == data
    extents = extents_of(data)
    with h5py.File(io.BytesIO(data)) as file:
        for name, layer in layers.items():
            group = file["layers"][name]
            assert dict(group.attrs) == {"t": layer["t"], "n": json.dumps(layer["n"])}
            for key in ("w", "s"):
                np.testing.assert_array_equal(group[key][()], layer[key])
                offset = group[key].id.get_offset() or 0
                assert offset == extents["layers", name, key][0]
                assert offset % 64 == 0
        assert file["l/1/bf"][()].tolist() == [1] * 20
        assert file["l"].attrs["mpisave.kind"] == "list"
        assert file.attrs["i"] == 5


@pytest.mark.skipif(
    h5py.version.hdf5_version_tuple != (2, 0, 0),
    reason="another HDF5 may lay a file out differently",
)
def test_small_file_is_what_its_bytes_spell(monkeypatch):
    # Frozen: a change of any byte is a change of the format, and needs a version.
    monkeypatch.setattr(mpisave, "__version__", "0.1.0")

    found = saved({"w": np.array([1, 2], "<i2"), "lr": 0.5})

    expected = bytearray(4942)
    for offset, run in SMALL_FILE.items():
        expected[offset : offset + len(run)] = run
    expected += INDEX
    assert found == bytes(expected)


def test_payload_does_not_pass_through_h5py(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("h5py was given payload")

    monkeypatch.setattr(h5py.Dataset, "__setitem__", refuse)
    monkeypatch.setattr(h5py.Dataset, "write_direct", refuse)

    assert len(saved({"w": np.arange(1000)})) > 8000


def test_h5dump_prints_the_file(tmp_path):
    h5dump = shutil.which("h5dump")
    if h5dump is None:
        pytest.skip("h5dump is not installed")
    path = tmp_path / "state.h5"
    save({"a/b": {"w": np.arange(3, dtype="<i2")}, "lr": 0.5, "n": [1, "x"]}, path)

    done = subprocess.run([h5dump, path], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert 'GROUP "a%2Fb"' in done.stdout
    assert 'DATASET "w"' in done.stdout
    assert "(0): 0, 1, 2" in done.stdout
    assert 'ATTRIBUTE "lr"' in done.stdout


def test_file_can_be_opened_by_name_and_changed_by_h5py(tmp_path):
    path = tmp_path / "state.h5"
    save({"w": np.arange(3)}, path)

    with h5py.File(path, "r+") as file:
        file["w"][1] = 9
        file["more"] = [1, 2]

    with h5py.File(path) as file:
        assert file["w"][()].tolist() == [0, 9, 2]
        assert file["more"][()].tolist() == [1, 2]
