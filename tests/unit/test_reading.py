"""Boxes of files: what NumPy slices, no more bytes than needed, every bit checked."""

import contextlib
import io
import math
import threading

import ml_dtypes
import numpy as np
import pytest
from boxes import boxes_in, made, noise, shapes, tilings, where
from helpers import small_blocks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import mpisave
from mpisave import Shard, Shards, loading, reading, skeleton
from mpisave.comms import SoloComm
from mpisave.errors import ArgumentError, FileFormatError
from mpisave.finding import find_index
from mpisave.formats import index
from mpisave.plan import Extent
from mpisave.sharing import read_shared
from mpisave.source import Source
from mpisave.wanted import Match

PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
BLOCK, UNIT = 64, 16
MIB = 2**20

DTYPES = st.sampled_from(["u1", "<f4", ">i2", "<f8", "c16", "?", ml_dtypes.bfloat16])


@contextlib.contextmanager
def small_reads():
    """Have everything that decides how to read count in a few bytes."""
    with pytest.MonkeyPatch.context() as patch, small_blocks(BLOCK):
        patch.setattr(reading, "_SHORTEST_RUN_NBYTES", UNIT)
        patch.setattr(reading, "_SMALL_NBYTES", 40)
        patch.setattr(reading, "_TOGETHER_NBYTES", 200)
        patch.setattr(reading, "_GAP_NBYTES", 70)
        yield


def saved(state, use_binary_format=False):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format)
    return buffer.getvalue()


def box_like(array, start, count):
    """Return what asks for a box of an array."""
    return Shard(np.zeros(count, array.dtype), array.shape, start)


def memory(layout, shape, dtype):
    """Return an array of a layout, and what lies around it in memory."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if layout == "unaligned":
        around = np.full(nbytes + 1, 77, np.uint8)
        return around[1:].view(dtype).reshape(shape), around[:1]
    if layout == "strided":
        around = np.zeros([2 * n for n in shape], dtype)
        return around[(..., *(slice(1, None, 2) for _ in shape))], np.zeros(0)
    array = np.zeros(shape[::-1] if layout == "fortran" else shape, dtype)
    if layout == "fortran":
        array = array.T
    if layout == "negative":
        array = array[(..., *(slice(None, None, -1) for _ in shape))]
    return array, np.zeros(0)


LAYOUTS = st.sampled_from(["c", "fortran", "strided", "negative", "unaligned"])


@st.composite
def arrays_and_boxes(draw):
    """Draw an array that is no longer than many blocks, and a box of it."""
    shape = draw(shapes(0, 4, longest=7))
    return made(shape, draw(DTYPES)), *draw(boxes_in(shape))


class Counted:
    """What was read of the payload of a file."""

    def __init__(self, first, stop):
        self._first, self._stop = first, stop
        self.reads = []

    def __call__(self, offset, nbytes):
        first, stop = max(offset, self._first), min(offset + nbytes, self._stop)
        if stop > first:
            self.reads.append((first - self._first, stop - first))

    @property
    def nbytes(self):
        return sum(nbytes for _, nbytes in self.reads)


@contextlib.contextmanager
def counting(data, array):
    """Count what is read of the bytes of one array of a file."""
    content = array.tobytes()
    assert data.count(content) == 1
    first = data.index(content)
    counted = Counted(first, first + len(content))
    read_into = Source.read_into

    def counts(source, offset, out):
        counted(offset, out.nbytes)
        return read_into(source, offset, out)

    def not_counted(source, *arguments):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(Source, "read_into", read_into)
            return skeleton.read_part(source, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read_into", counts)
        patch.setattr(loading, "read_part", not_counted)
        yield counted


def touched(array, start, count, unit):
    """Return how many bytes the units have that hold a byte of a box."""
    marked = np.zeros(array.shape, bool)
    marked[where(start, count)] = True
    by_byte = np.repeat(marked.reshape(-1), array.itemsize)
    edges = range(0, array.nbytes, unit)
    return sum(
        len(by_byte[at : at + unit]) for at in edges if by_byte[at : at + unit].any()
    )


class TestBoxes:
    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @PROPERTY
    @given(case=arrays_and_boxes(), verify=st.booleans())
    def test_box_is_what_numpy_slices(self, use_binary_format, case, verify):
        array, start, count = case
        with small_reads():
            data = saved({"x": array, "y": made((3,), "u1")}, use_binary_format)
            like = {"x": box_like(array, start, count)}

            found = mpisave.load(io.BytesIO(data), like=like, keys="x", verify=verify)

        box = found["x"]
        assert (box.global_shape, box.start) == (array.shape, start)
        assert box.array.dtype == array.dtype
        assert box.array.shape == count
        assert box.array.tobytes() == array[where(start, count)].tobytes()
        assert box.array.flags.c_contiguous
        assert box.array.flags.writeable

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @PROPERTY
    @given(case=arrays_and_boxes(), layout=LAYOUTS, verify=st.booleans())
    def test_box_is_read_in_place_into_memory_of_any_layout(
        self, use_binary_format, case, layout, verify
    ):
        array, start, count = case
        target, around = memory(layout, count, array.dtype)
        before = around.tobytes()
        event(layout)
        with small_reads():
            data = saved(array, use_binary_format)
            like = Shard(target, array.shape, start)

            found = mpisave.load(
                io.BytesIO(data), like=like, into="inplace", verify=verify
            )

        assert found.array is target
        assert target.tobytes() == array[where(start, count)].tobytes()
        assert around.tobytes() == before

    @PROPERTY
    @given(case=arrays_and_boxes(), layout=LAYOUTS, verify=st.booleans())
    def test_whole_array_is_read_in_place_into_memory_of_any_layout(
        self, case, layout, verify
    ):
        array, _, _ = case
        target, _ = memory(layout, array.shape, array.dtype)
        with small_reads():
            data = saved(array)

            found = mpisave.load(
                io.BytesIO(data), like=target, into="inplace", verify=verify
            )

        assert found is target
        assert target.tobytes() == array.tobytes()

    @PROPERTY
    @given(tilings(0, 3), st.booleans(), st.data())
    def test_boxes_that_make_an_array_are_loaded_at_once(self, case, verify, data):
        shape, boxes = case
        array = made(shape, data.draw(DTYPES))
        like = Shards(*(box_like(array, *box) for box in boxes))
        with small_reads():
            found = mpisave.load(io.BytesIO(saved(array)), like=like, verify=verify)

        together = np.zeros(shape, array.dtype)
        for (start, count), box in zip(boxes, found.boxes, strict=True):
            together[where(start, count)] = box.array
        assert together.tobytes() == array.tobytes()

    @PROPERTY
    @given(st.lists(arrays_and_boxes(), max_size=8), st.integers(1, 4), st.booleans())
    def test_many_arrays_are_read_by_any_number_of_threads(self, cases, cores, verify):
        state = {f"x{n}": array for n, (array, _, _) in enumerate(cases)}
        like = {
            f"x{n}": box_like(array, start, count) if n % 2 else np.zeros_like(array)
            for n, (array, start, count) in enumerate(cases)
        }
        with small_reads(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mpisave.loading.threads_of", lambda *_: cores)

            found = mpisave.load(io.BytesIO(saved(state)), like=like, verify=verify)

        for n, (array, start, count) in enumerate(cases):
            expected = array[where(start, count)] if n % 2 else array
            loaded = found[f"x{n}"].array if n % 2 else found[f"x{n}"]
            assert loaded.tobytes() == expected.tobytes()

    def test_array_of_several_blocks_is_sliced(self, tmp_path):
        array = noise((700, 1300), "<f4")
        path = tmp_path / "x"
        mpisave.save({"x": array}, path)

        for start, count in [
            ((0, 0), (700, 1300)),
            ((3, 0), (2, 1300)),
            ((0, 1299), (700, 1)),
            ((200, 100), (400, 1000)),
        ]:
            for verify in (True, False):
                like = {"x": box_like(array, start, count)}
                found = mpisave.load(path, like=like, verify=verify)["x"].array
                assert found.tobytes() == array[where(start, count)].tobytes()

    def test_empty_box_and_empty_array_are_loaded_without_a_read(self):
        array, empty = made((4, 5), "<f8"), np.zeros((0, 3))
        data = saved({"x": array, "empty": empty})
        like = {"x": box_like(array, (4, 0), (0, 5)), "empty": empty}

        with counting(data, array) as counted:
            found = mpisave.load(io.BytesIO(data), like=like)

        assert found["x"].array.shape == (0, 5)
        assert found["empty"].shape == (0, 3)
        assert counted.reads == []


class TestBytesRead:
    @PROPERTY
    @given(arrays_and_boxes())
    def test_blocks_that_a_box_touches_are_read_once_and_no_others(self, case):
        array, start, count = case
        if array.nbytes < 40:  # read with its neighbours
            return
        with small_reads():
            data = saved(array)
            if data.count(array.tobytes()) != 1:
                return
            with counting(data, array) as counted:
                mpisave.load(io.BytesIO(data), like=box_like(array, start, count))

        assert counted.nbytes == touched(array, start, count, BLOCK)
        assert len({offset for offset, _ in counted.reads}) == len(counted.reads)

    @PROPERTY
    @given(arrays_and_boxes())
    def test_box_of_long_runs_is_read_alone_when_not_verified(self, case):
        array, start, count = case
        with small_reads(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_SHORTEST_RUN_NBYTES", 1)
            patch.setattr(reading, "_SMALL_NBYTES", 0)
            data = saved(array)
            if data.count(array.tobytes()) != 1:
                return
            with counting(data, array) as counted:
                like = box_like(array, start, count)
                mpisave.load(io.BytesIO(data), like=like, verify=False)

        assert counted.nbytes == math.prod(count) * array.itemsize

    @PROPERTY
    @given(arrays_and_boxes())
    def test_box_of_short_runs_is_read_with_what_is_near_when_not_verified(self, case):
        array, start, count = case
        with small_reads():
            data = saved(array)
            if data.count(array.tobytes()) != 1:
                return
            with counting(data, array) as counted:
                like = box_like(array, start, count)
                mpisave.load(io.BytesIO(data), like=like, verify=False)

        assert counted.nbytes <= touched(array, start, count, UNIT)

    @pytest.mark.parametrize(
        ("start", "count", "verified", "alone"),
        [
            # Rows of 1 MiB, of which rows 1 and 2 are two blocks.
            ((1, 0), (2, MIB), 2 * MIB, 2 * MIB),
            ((3, 5), (1, 100), MIB, 64 * 2**10),
            # Halves of rows: runs of 512 KiB.
            ((0, 0), (4, MIB // 2), 4 * MIB, 2 * MIB),
            # A column: one unit of 64 KiB in each row.
            ((0, 7), (4, 1), 4 * MIB, 4 * 64 * 2**10),
            ((0, 0), (4, MIB), 4 * MIB, 4 * MIB),
        ],
    )
    def test_bytes_that_are_read_of_blocks_of_a_mebibyte(
        self, start, count, verified, alone
    ):
        array = noise((4, MIB), "u1")
        data = saved({"x": array})
        like = {"x": box_like(array, start, count)}

        found = []
        for verify in (True, False):
            with counting(data, array) as counted:
                mpisave.load(io.BytesIO(data), like=like, verify=verify)
            found.append(counted.nbytes)

        assert found == [verified, alone]

    def test_one_read_is_of_four_mebibytes_at_most(self):
        array = noise(9 * MIB, "u1")
        data = saved({"x": array})

        with counting(data, array) as counted:
            mpisave.load(io.BytesIO(data), verify=False)

        assert [n for _, n in sorted(counted.reads)] == [4 * MIB, 4 * MIB, MIB]

    def test_small_arrays_are_read_together(self):
        state = {f"x{n}": noise(1000, "u1", n) for n in range(200)}
        data = saved(state)
        payload = np.frombuffer(data, np.uint8)[: len(data) * 9 // 10].copy()

        with counting(data, payload) as counted:
            found = mpisave.load(io.BytesIO(data))

        assert len(counted.reads) <= 4
        assert all((found[key] == array).all() for key, array in state.items())

    def test_keys_that_are_not_asked_for_are_not_read(self):
        array, other = noise(MIB, "u1", 1), noise(MIB, "u1", 2)
        data = saved({"x": array, "y": other})

        with counting(data, other) as counted:
            found = mpisave.load(io.BytesIO(data), keys="x")

        assert counted.reads == []
        assert (found["x"] == array).all()


class TestMap:
    STATE = {
        "w": noise((6, 5), "<f4"),
        "big": np.arange(3, dtype=">i4"),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3)),
        "n": 5,
    }

    @pytest.fixture(params=FORMATS)
    def path(self, request, tmp_path):
        path = tmp_path / "state"
        path.write_bytes(saved(self.STATE, request.param))
        return path

    def test_arrays_are_mapped_and_are_what_was_saved(self, path):
        found = mpisave.load(path, mmap=True)

        assert list(found) == list(self.STATE)
        assert found["n"] == 5
        for key, array in self.STATE.items():
            if key != "n":
                assert isinstance(found[key], np.ndarray)
                assert (found[key].dtype, found[key].shape) == (
                    array.dtype,
                    array.shape,
                )
                assert found[key].tobytes() == array.tobytes()

    def test_mapped_arrays_are_read_only(self, path):
        found = mpisave.load(path, mmap=True)

        with pytest.raises(ValueError, match="read-only"):
            found["w"][0, 0] = 1

    def test_nothing_of_a_mapped_array_is_read(self, path):
        with counting(path.read_bytes(), self.STATE["w"]) as counted:
            mpisave.load(path, mmap=True)

        assert counted.reads == []

    def test_mapped_arrays_outlive_the_call_and_the_name_of_the_file(self, path):
        found = mpisave.load(path, mmap=True)
        path.unlink()

        assert found["w"].tobytes() == self.STATE["w"].tobytes()

    @given(boxes_in((6, 5)))
    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_box_of_an_array_is_mapped(self, path, box):
        like = {"w": box_like(self.STATE["w"], *box)}

        found = mpisave.load(path, like=like, keys="w", mmap=True)["w"].array

        assert found.tobytes() == self.STATE["w"][where(*box)].tobytes()
        assert not found.flags.owndata

    def test_file_object_cannot_be_mapped(self):
        with pytest.raises(ArgumentError, match="mmap=True needs a path"):
            mpisave.load(io.BytesIO(saved(self.STATE)), mmap=True)

    def test_index_is_checked_all_the_same(self, path):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)

        with pytest.raises(FileFormatError, match="the index is altered"):
            mpisave.load(path, mmap=True)


class Torn(io.BytesIO):
    """A file that lost the end of an array once its index was read."""

    def __init__(self, data, array, there, *, before=None):
        super().__init__(data)
        first = data.index(array.tobytes())
        self._stop, self._lost = first + array.nbytes, first + there
        # Reads of the index go on; those of payload begin here.
        self._first = first if before is None else data.index(before.tobytes())

    def readinto(self, out):
        at = self.tell()
        if self._first <= at < self._stop:
            out = out[: max(0, self._lost - at)]
        return super().readinto(out)


class TestDamage:
    ARRAY = noise((20, 16), "u1")  # five blocks of four rows

    def blocks(self):
        return range(self.ARRAY.nbytes // BLOCK)

    def flipped(self, data, block, bit):
        at = data.index(self.ARRAY.tobytes()) + block * BLOCK + bit // 8
        altered = bytearray(data)
        altered[at] ^= 1 << bit % 8
        return io.BytesIO(altered), at // BLOCK * BLOCK

    @pytest.mark.parametrize("use_binary_format", FORMATS)
    @pytest.mark.parametrize("bit", [0, 7, 8 * 31 + 5, 8 * BLOCK - 1])
    def test_flipped_bit_in_every_block_is_found_and_the_block_is_named(
        self, use_binary_format, bit
    ):
        with small_reads():
            data = saved({"layer": [self.ARRAY]}, use_binary_format)
            for block in self.blocks():
                file, _ = self.flipped(data, block, bit)
                offset = data.index(self.ARRAY.tobytes()) + block * BLOCK

                with pytest.raises(FileFormatError, match="is altered") as caught:
                    mpisave.load(file)

                message = str(caught.value)
                assert "['layer'][0] is altered: the CRC-32C of block" in message
                assert f"block {block} at offset {offset} is 0x" in message

    @PROPERTY
    @given(st.integers(0, 4), st.integers(0, 8 * BLOCK - 1), st.data())
    def test_flipped_bit_is_found_by_every_box_that_touches_its_block(
        self, block, bit, data
    ):
        box = data.draw(boxes_in(self.ARRAY.shape))
        like = {"x": box_like(self.ARRAY, *box)}
        with small_reads():
            file, _ = self.flipped(saved({"x": self.ARRAY}), block, bit)
            first, stop = box[0][0] // 4, (box[0][0] + box[1][0] - 1) // 4
            if first <= block <= stop:
                with pytest.raises(FileFormatError, match=f"of block {block} at"):
                    mpisave.load(file, like=like)
            else:
                found = mpisave.load(file, like=like)["x"].array
                assert found.tobytes() == self.ARRAY[where(*box)].tobytes()
            # Not looked at, the bit is as it is in the file.
            mpisave.load(file, like=like, verify=False)

    @pytest.mark.parametrize("layout", ["c", "fortran", "strided", "negative"])
    def test_flipped_bit_is_found_in_memory_of_any_layout(self, layout):
        with small_reads():
            data = saved(self.ARRAY)
            for block in self.blocks():
                file, _ = self.flipped(data, block, bit=100)
                target, _ = memory(layout, self.ARRAY.shape, "u1")

                with pytest.raises(FileFormatError, match=f"block {block} at"):
                    mpisave.load(file, like=target, into="inplace")

    @pytest.mark.parametrize("verify", [True, False])
    @pytest.mark.parametrize("cut", [0, 1, BLOCK, BLOCK + 7, 5 * BLOCK - 1])
    def test_torn_file_is_refused_by_key(self, verify, cut):
        with small_reads():
            file = Torn(saved({"x": self.ARRAY}), self.ARRAY, cut)

            with pytest.raises(FileFormatError, match="'x' is torn: ") as caught:
                mpisave.load(file, verify=verify)

        assert f"of {self.ARRAY.nbytes} bytes are there" in str(caught.value)

    @pytest.mark.parametrize("there", [0, 1, 9])
    def test_torn_file_is_refused_by_the_small_array_that_is_torn(self, there):
        state = {"x": noise(10, "u1", 1), "y": noise(10, "u1", 2)}
        file = Torn(saved(state), state["y"], there, before=state["x"])

        with pytest.raises(FileFormatError, match=f"'y' is torn: {there} of 10 bytes"):
            mpisave.load(file)

    def test_file_that_shrank_before_it_was_mapped_is_refused(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(bytes(100))
        stored = index.Stored(("x",), np.dtype("u1"), (50,), Extent(60, 50), (0,))

        with Source(path) as source, pytest.raises(FileFormatError, match="40 of 50"):
            reading.mapped(source)(stored, (0,), (50,))

    @pytest.mark.parametrize("cores", [1, 4])
    def test_what_fails_in_a_thread_is_raised_and_no_thread_is_left(
        self, monkeypatch, cores
    ):
        monkeypatch.setattr("mpisave.loading.threads_of", lambda *_: cores)
        before = threading.active_count()

        with small_reads():
            file, _ = self.flipped(saved(self.ARRAY), 3, 0)
            with pytest.raises(FileFormatError, match="block 3"):
                mpisave.load(file)

        assert threading.active_count() == before


class TestShared:
    """What several nodes read together, by one rank that is alone."""

    def wants(self, data, like):
        nodes = index.decode(*find_index(Source(io.BytesIO(data)))).nodes
        return Match(like, nodes, 0, None, in_place=True).wants

    @PROPERTY
    @given(st.lists(arrays_and_boxes(), max_size=5), st.integers(1, 300))
    def test_arrays_are_read_in_windows(self, cases, window):
        state = {f"x{n}": array for n, (array, _, _) in enumerate(cases)}
        like = {key: np.zeros_like(array) for key, array in state.items()}
        with small_reads(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mpisave.sharing.WINDOW_NBYTES", window)
            patch.setattr("mpisave.sharing._GAP_NBYTES", 100)
            data = saved(state)
            wants = self.wants(data, like)

            read_shared(SoloComm(), Source(io.BytesIO(data)), wants, verify=True)

        for key, array in state.items():
            assert like[key].tobytes() == array.tobytes()

    def test_altered_block_is_found_unless_not_verified(self):
        array = noise(5 * BLOCK, "u1")
        with small_reads():
            data = bytearray(saved(array))
            data[bytes(data).index(array.tobytes()) + 3 * BLOCK] ^= 1
            wants = self.wants(bytes(data), np.zeros_like(array))
            source = Source(io.BytesIO(data))

            with pytest.raises(FileFormatError, match="block 3 at"):
                read_shared(SoloComm(), source, wants, verify=True)
            read_shared(SoloComm(), source, wants, verify=False)

    def test_torn_file_is_refused(self):
        array = noise(5 * BLOCK, "u1")
        with small_reads():
            data = saved(array)
            wants = self.wants(data, np.zeros_like(array))
            stop = data.index(array.tobytes()) + 100

            with pytest.raises(FileFormatError, match=f"torn: it ends at byte {stop}"):
                read_shared(
                    SoloComm(), Source(io.BytesIO(data[:stop])), wants, verify=True
                )
