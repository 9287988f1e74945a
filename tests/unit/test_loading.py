"""Files as they are met: whole, torn, altered, foreign."""

import io
import pickle
import shutil

import h5py
import numpy as np
import pytest
from helpers import MIXED, assert_equal_states

import mpisave
from mpisave import opening
from mpisave.errors import FileFormatError, MpisaveError

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]

STATE = MIXED


def saved(state, use_binary_format):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format)
    return buffer.getvalue()


@pytest.fixture(params=FORMATS, scope="module")
def whole(request):
    """Return the bytes of a small file of each format."""
    return saved(STATE, request.param)


def loads_as_saved_or_is_refused(data):
    """Load; fail unless that is refused, or gives the state that was saved."""
    try:
        found = mpisave.load(io.BytesIO(data))
    except FileFormatError:
        return
    assert_equal_states(found, STATE)


def test_state_comes_back_as_it_was_saved(whole):
    assert_equal_states(mpisave.load(io.BytesIO(whole)), STATE)


def test_loaded_arrays_are_the_callers_to_write_to(whole):
    first, second = (mpisave.load(io.BytesIO(whole)) for _ in range(2))

    first["w"][0, 0] = 99

    assert second["w"][0, 0] == 0
    assert first["w"].flags.c_contiguous
    assert first["w"].flags.owndata


def test_fortran_order_is_loaded_in_c_order():
    made = np.asfortranarray(np.arange(6.0).reshape(2, 3))

    found = mpisave.load(io.BytesIO(saved(made, use_binary_format=False)))

    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, made)


@pytest.mark.parametrize("suffix", ["", ".pdparams", ".h5", ".pkl", ".txt"])
@pytest.mark.parametrize("as_text", [False, True])
def test_content_and_not_the_name_says_what_a_file_is(tmp_path, whole, suffix, as_text):
    path = tmp_path / f"state{suffix}"
    path.write_bytes(whole)

    found = mpisave.load(str(path) if as_text else path)

    assert_equal_states(found, STATE)


def test_file_object_is_read_from_its_start_and_left_open(whole):
    buffer = io.BytesIO(whole)
    buffer.seek(7)

    found = mpisave.load(buffer)

    assert_equal_states(found, STATE)
    assert not buffer.closed


class OnlyReads:
    """A file object without `readinto`, which gives a few bytes at a time."""

    def __init__(self, data):
        self._inner = io.BytesIO(data)

    def seek(self, offset, whence=0):
        return self._inner.seek(offset, whence)

    def read(self, nbytes):
        return self._inner.read(min(nbytes, 5))


def test_file_object_that_reads_little_at_a_time_is_read_to_its_end(whole):
    assert_equal_states(mpisave.load(OnlyReads(whole)), STATE)


def test_missing_file_is_an_os_error_and_no_format_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        mpisave.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        mpisave.load(tmp_path)


FOREIGN = {
    "empty": b"",
    "zeros": bytes(100),
    "text": b"weights: 1, 2, 3\n",
    "zip": b"PK\x03\x04" + bytes(100),
    "npy": b"\x93NUMPY\x01\0" + bytes(100),
    "safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "json": b'{"a": 1}',
    "one byte": b"\x80",
    "protocol 0, torn": pickle.dumps([1], 0)[:-1],
    "text in brackets": b"(weights: 1.",
    "signature": b"\x89HDF\r\n\x1a\n",
    "signature and zeros": b"\x89HDF\r\n\x1a\n" + bytes(1000),
    "trailer": bytes(24) + b"\x89mpisave",
    "mark": b"\x80\x04C\x09mpisave-10N.",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_file_is_refused(case):
    with pytest.raises(FileFormatError, match="<BytesIO>: ") as caught:
        mpisave.load(io.BytesIO(FOREIGN[case]))

    assert isinstance(caught.value, MpisaveError)
    assert isinstance(caught.value, ValueError)


def test_error_names_the_file(tmp_path):
    path = tmp_path / "torn.pdparams"
    path.write_bytes(b"")

    with pytest.raises(FileFormatError, match=r"torn\.pdparams: the file is empty"):
        mpisave.load(path)


def test_hdf5_of_another_program_is_read(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["w"] = np.arange(3)

    assert mpisave.load(path)["w"].tolist() == [0, 1, 2]


def test_hdf5_changed_by_another_program_is_refused(tmp_path):
    path = tmp_path / "state.h5"
    path.write_bytes(saved(STATE, use_binary_format=True))
    with h5py.File(path, "r+") as file:
        file["more"] = np.arange(1000)

    with pytest.raises(FileFormatError):
        mpisave.load(path)


def test_pickle_of_another_program_is_read(tmp_path):
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"w": np.arange(3)}))

    assert mpisave.load(path)["w"].tolist() == [0, 1, 2]


def test_index_of_one_format_in_a_file_of_the_other_is_refused():
    pickled, hdf5 = saved(STATE, False), saved(STATE, True)
    # The same length, so that the trailer still points to the index.
    start = int.from_bytes(pickled[-32:-24], "little")
    mixed = hdf5[:start].ljust(start, b"\0") + pickled[start:]

    with pytest.raises(FileFormatError, match="pickle"):
        mpisave.load(io.BytesIO(mixed))


def test_file_that_was_cut_is_refused(whole):
    start = int.from_bytes(whole[-32:-24], "little")
    # HDF5 without an index is another program's: it takes longer to look into it, and
    # without its index only it is whole, so that a process has to.
    early, late = (5, 397) if whole[0] == 0x89 else (1, 1)
    cuts = *range(0, start, early), *range(start, len(whole), late), len(whole) - 1
    for nbytes in cuts:
        with pytest.raises(FileFormatError):
            mpisave.load(io.BytesIO(whole[:nbytes]))


@pytest.mark.parametrize("more", [1, 32, 1000])
def test_file_with_bytes_added_is_refused(whole, more):
    with pytest.raises(FileFormatError):
        mpisave.load(io.BytesIO(whole + bytes(more)))


def test_flipped_bit_in_every_byte_is_refused_or_does_no_harm(whole):
    for at in range(len(whole)):
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        loads_as_saved_or_is_refused(bytes(altered))


def arrays_at(data):
    """Yield the offset of each array's first and last byte, by unique content."""
    for made in (STATE["w"], STATE["big"], np.array([0x3F80, 0x4000], "<u2")):
        assert data.count(made.tobytes()) == 1
        first = data.index(made.tobytes())
        yield from (first, first + made.nbytes - 1)


def test_every_flipped_bit_of_payload_is_refused_by_key_unless_not_verified(whole):
    for at in arrays_at(whole):
        for bit in range(8):
            altered = bytearray(whole)
            altered[at] ^= 1 << bit

            with pytest.raises(FileFormatError, match="is altered: the CRC-32C"):
                mpisave.load(io.BytesIO(bytes(altered)))

            found = mpisave.load(io.BytesIO(bytes(altered)), verify=False)
            assert list(found) == list(STATE)


def test_every_flipped_bit_of_the_index_is_refused(whole):
    start = int.from_bytes(whole[-32:-24], "little")

    for at in range(start, len(whole)):
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        with pytest.raises(FileFormatError):
            mpisave.load(io.BytesIO(bytes(altered)))


def test_bytes_lost_in_the_middle_are_refused(whole):
    for at in range(0, len(whole), 13):
        with pytest.raises(FileFormatError):
            mpisave.load(io.BytesIO(whole[:at] + whole[at + 1 :]))


def test_file_that_shrinks_while_it_is_read_is_refused(whole, monkeypatch):
    class Shrinks(io.BytesIO):
        """Has no payload any more once its end was read."""

        def readinto(self, out):
            if self.tell() < 1000 and len(out) == STATE["w"].nbytes:
                return 0
            return super().readinto(out)

    data = saved({"w": STATE["w"]}, use_binary_format=False)

    with pytest.raises(FileFormatError, match="torn: 0 of 24 bytes"):
        mpisave.load(Shrinks(data))


def test_two_files_glued_together_are_refused(whole):
    with pytest.raises(FileFormatError):
        mpisave.load(io.BytesIO(whole + whole))


def test_file_that_is_not_seekable_is_no_file_object():
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

    with pytest.raises(OSError, match="seek"):
        mpisave.load(Pipe())


def test_copy_of_a_file_loads(tmp_path, whole):
    (tmp_path / "a").write_bytes(whole)

    shutil.copy(tmp_path / "a", tmp_path / "b")

    assert_equal_states(mpisave.load(tmp_path / "b"), STATE)


# Files that are replaced while they are loaded


@pytest.mark.parametrize("use_binary_format", FORMATS)
@pytest.mark.parametrize("how", [{}, {"verify": False}, {"mmap": True}])
def test_file_that_is_replaced_between_index_and_payload_loads_as_it_was(
    tmp_path, monkeypatch, use_binary_format, how
):
    old = {"a": np.arange(5), "b": np.full(70_000, 1.5)}
    path = tmp_path / "state"
    path.write_bytes(saved(old, use_binary_format))
    # With the same keys elsewhere in the file.
    other = tmp_path / "other"
    other.write_bytes(saved({"b": np.full(9, 2.5), "a": np.arange(7)}, False))
    find = opening.find_index

    def find_and_replace(source):
        found = find(source)
        other.replace(path)
        return found

    monkeypatch.setattr(opening, "find_index", find_and_replace)

    assert_equal_states(mpisave.load(path, **how), old)


@pytest.mark.parametrize("use_binary_format", [False, True])
def test_arrays_that_share_memory_are_checked_one_after_the_other(
    monkeypatch, use_binary_format
):
    """Tied weights, of a file in which they were not: the last is what is there."""
    monkeypatch.setattr("mpisave.loading.threads_of", lambda *_: 4)
    rng = np.random.default_rng(3)
    state = {f"x{n}": rng.integers(0, 255, 3 * 2**20, np.uint8) for n in range(6)}
    data = saved(state, use_binary_format)
    memory = np.zeros(3 * 2**20, np.uint8)
    like = dict.fromkeys(state, memory) | {"x2": np.zeros_like(memory)}

    for _ in range(5):
        memory[:] = 0
        mpisave.load(io.BytesIO(data), like=like, into="inplace")

        np.testing.assert_array_equal(memory, state["x5"])
        np.testing.assert_array_equal(like["x2"], state["x2"])


def test_short_array_in_the_memory_of_a_long_one_comes_in_the_order_of_the_file():
    state = {"a": np.full(10, 1.0), "b": np.full(100_000, 2.0), "c": np.full(5, 3.0)}
    memory = np.zeros(100_000)
    like = {"a": memory[:10], "b": memory, "c": memory[7:12]}

    mpisave.load(io.BytesIO(saved(state, False)), like=like, into="inplace")

    assert memory[:14].tolist() == 7 * [2.0] + 5 * [3.0] + 2 * [2.0]


@pytest.mark.parametrize("path", [3, None, ["x"], io.StringIO("x")], ids=type)
@pytest.mark.parametrize("call", [mpisave.load, mpisave.verify])
def test_path_that_is_none_is_refused(call, path):
    with pytest.raises(mpisave.ArgumentError, match="it is a path, or a seekable"):
        call(path)
