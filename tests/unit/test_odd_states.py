"""Legal but odd: states, file objects and files are right or refused with a reason."""

import contextlib
import io
import json
import pickle
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import unescape

import mpisave
from mpisave.checksum import crc32c
from mpisave.errors import ArgumentError, FileFormatError, MpisaveError, StateDictError
from mpisave.formats.hdf5 import escape

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]


def reloaded(state, use_binary_format=False):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format)
    return mpisave.load(buffer)


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_file_opened_for_appending_is_refused_or_holds_the_state(
    tmp_path, use_binary_format
):
    state = {f"w{i}": np.full(5000, i) for i in range(3)}
    with (tmp_path / "x").open("ab") as file:
        try:
            mpisave.save(state, file, use_binary_format=use_binary_format)
        except MpisaveError:
            return

    found = mpisave.load(tmp_path / "x")
    assert {key: set(array.tolist()) for key, array in found.items()} == {
        "w0": {0},
        "w1": {1},
        "w2": {2},
    }


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_byte_swapped_bfloat16_is_refused_or_keeps_its_values(use_binary_format):
    swapped = np.dtype(ml_dtypes.bfloat16).newbyteorder(">")
    made = np.array([1.0, 2.0], np.float32).astype(swapped)
    try:
        found = reloaded({"w": made}, use_binary_format)["w"]
    except StateDictError:
        return

    assert found.astype(np.float32).tolist() == [1.0, 2.0]


def test_array_of_a_foreign_pickle_is_in_native_order():
    found = mpisave.load(io.BytesIO(pickle.dumps(np.arange(3), 4)))

    assert found.dtype.byteorder == "="
    assert memoryview(found).tolist() == [0, 1, 2]


def with_index(nodes):
    text = json.dumps(
        {
            "mpisave": 1,
            "container": "pickle",
            "facts": {},
            "skeleton_crc32c": 0,
            "nodes": nodes,
        }
    ).encode()
    body = b"\x80\x04C\x09mpisave-10N." + bytes(20)
    fields = struct.pack("<QQI", len(body), len(text), 1)
    checksum = struct.pack("<I", crc32c(fields, crc32c(text)))
    return io.BytesIO(body + text + fields + checksum + b"\x89mpisave")


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [[[], "dict", None], [["a", "b"], "object", 1]],
        [[[], "object", 5], [["a"], "object", 1]],
        [[[], "dict", None], [[["x"]], "object", 1]],
        [[[], "list", 1], [["a"], "tuple", 0]],
        [[[], "array", "<f4", [1.0], 0, 4, 0]],
        [[[], "array", "<f4", [True], 0, 4, 0]],
        [[[], "array", "<f4", [1], 0.5, 4, 0]],
        [[[], "array", "<f4", [2**62, 0], 0, 0, 0]],
        [[[], "array", "<f4", [1] * 99, 0, 4, 0]],
        [[[], "list", 5], [[0], "object", 1]],
    ],
    ids=repr,
)
def test_index_with_a_right_checksum_and_wrong_content_is_a_format_error(nodes):
    with pytest.raises(FileFormatError):
        mpisave.load(with_index(nodes))


def test_foreign_pickle_takes_no_more_memory_than_a_few_times_its_length():
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0u1\x89\x88\x87Rq\x01"
    data = b"\x80\x04]B" + struct.pack("<I", 2**20) + bytes(2**20) + b"q\x000"
    data += dtype + b"0cnumpy\nndarray\nq\x020"
    data += b"h\x02J\x00\x00\x10\x00\x85h\x01h\x00\x87Ra" * 64 + b"."
    tracemalloc.start()
    with contextlib.suppress(FileFormatError):
        mpisave.load(io.BytesIO(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 16 * 2**20


def test_file_object_whose_write_returns_nothing_does_not_hang():
    class Wrapper(io.BytesIO):
        calls = 0

        def write(self, data):
            self.calls += 1
            if self.calls > 100:
                raise SystemExit("asked to write the same bytes for ever")
            super().write(data)

    with contextlib.suppress(MpisaveError):
        mpisave.save({"w": np.zeros(2)}, Wrapper())


def test_text_of_two_lone_surrogates_comes_back():
    state = {"x": "\ud83d\ude00"}

    assert reloaded(state) == state


def test_key_of_lone_surrogates_is_refused():
    with pytest.raises(StateDictError, match="no valid Unicode"):
        reloaded({"\ud83d\ude00": 1})


@pytest.mark.parametrize(
    "key", ["\N{ARABIC-INDIC DIGIT THREE}", "\N{FULLWIDTH DIGIT ONE}"]
)
def test_digit_of_another_script_is_unescaped_to_itself(key):
    assert unescape(escape(key)) == key


@pytest.mark.parametrize("ranks", [np.array([0]), np.array([0, 1])], ids=repr)
def test_gather_to_that_is_an_array_is_refused_by_name(ranks):
    with pytest.raises(ArgumentError, match="gather_to"):
        mpisave.save({}, io.BytesIO(), gather_to=ranks)


def test_path_with_nul_is_refused_as_an_argument(tmp_path):
    with pytest.raises(ArgumentError, match="path"):
        mpisave.save({}, f"{tmp_path}/a\0b")


def test_key_too_long_for_hdf5_is_refused_by_key():
    with pytest.raises(StateDictError, match="kkk"):
        reloaded({"k" * 70_000: 1}, use_binary_format=True)


def test_dlpack_object_that_numpy_cannot_read_is_refused_by_key():
    class Odd:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **kwargs):
            raise RuntimeError("Unsupported dtype in DLTensor.")

    with pytest.raises(StateDictError, match="'w'"):
        reloaded({"w": Odd()})
