"""The border between host and device: any byte range of any array."""

import array
import ctypes
import importlib.util
import math
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from fakes import FakeDeviceArray, put_in_place
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpisave.arrays import HeldArray, held_array, is_writable
from mpisave.devices import fence
from mpisave.dtypes import (
    dtype_from_name,
    dtype_name,
    is_ml_dtype,
    savable,
    stored_dtype,
)

ML_DTYPES = [
    np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")
]
NUMPY_DTYPES = [
    np.dtype(code)
    for kind in ("?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "F", "D")
    for code in (f"<{kind}", f">{kind}")
]
DTYPES = [*NUMPY_DTYPES, np.dtype("g"), np.dtype("G"), *ML_DTYPES]


class FakeTensor:
    """What mpisave uses of a tensor of torch on the host."""

    def __init__(self, array, dtype, *, is_detached=False, lazy=""):
        self.array, self.dtype, self.is_detached = array, dtype, is_detached
        self.lazy = lazy

    def is_conj(self):
        return self.lazy == "conj"

    def is_neg(self):
        return self.lazy == "neg"

    def detach(self):
        return FakeTensor(self.array, self.dtype, is_detached=True)

    def view(self, dtype):
        return FakeTensor(self.array.view(dtype), dtype, is_detached=True)

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        if not self.is_detached:
            raise RuntimeError("Can't export tensors that require gradient")
        if str(self.dtype).startswith("torch."):
            raise RuntimeError("Unsupported dtype in DLTensor.")
        return self.array.__dlpack__(**options)


class DLPackArray:
    """An array that only DLPack gives access to."""

    def __init__(self, host, device=(1, 0)):
        self._host = host
        self._device = device

    def __dlpack__(self, **kwargs):
        return self._host.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._device


@pytest.fixture
def library(monkeypatch):
    """Return what serves device arrays where there is no device."""
    return put_in_place(monkeypatch)


@st.composite
def arrays_and_ranges(draw):
    """Return an array of any layout, and the byte range to be staged."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    raw = draw(st.binary(min_size=1, max_size=64))
    nbytes = math.prod(shape) * dtype.itemsize
    whole = np.frombuffer((raw * nbytes)[:nbytes], np.uint8).copy()
    if dtype == np.bool_:
        whole &= 1
    made = whole.view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["C", "F", "transposed", "strided"]))
    if layout == "F":
        made = np.asfortranarray(made)
    elif layout == "transposed":
        made = made.T
    elif layout == "strided" and made.ndim:
        made = np.asarray(made[draw(hnp.basic_indices(shape))])
    start = draw(st.integers(0, made.nbytes))
    return made, start, draw(st.integers(start, made.nbytes))


def staged(held, start, stop):
    # Filled, so that bytes which were not copied show.
    out = np.full(stop - start, 0xA5, np.uint8)
    held.stage(start, out)
    fence(held.library)()
    return out.tobytes()


@settings(max_examples=100, deadline=None)
@given(arrays_and_ranges())
def test_any_byte_range_of_any_array_is_staged(case):
    made, start, stop = case
    held = held_array(made)

    view = held.view(start, stop)

    assert staged(held, start, stop) == made.tobytes()[start:stop]
    assert (held.dtype, held.shape, held.nbytes) == (
        made.dtype,
        made.shape,
        made.nbytes,
    )
    assert view is None or view.tobytes() == made.tobytes()[start:stop]
    assert (view is not None) == made.flags.c_contiguous


@pytest.mark.parametrize(
    "made",
    [
        np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2],
        np.asfortranarray(np.arange(12, dtype=">i4").reshape(3, 4)),
        np.arange(30, dtype=np.int16).reshape(5, 6).T[1::2, ::3],
        np.broadcast_to(np.float32(1.5), (3, 2)),
        np.arange(6, dtype=np.complex64).reshape(1, 6)[:, ::5],
    ],
    ids=["negative", "fortran", "transposed", "broadcast", "complex"],
)
def test_every_byte_range_is_staged(made):
    held, data = held_array(made), made.tobytes()

    for start in range(len(data) + 1):
        for stop in range(start, len(data) + 1):
            assert staged(held, start, stop) == data[start:stop]


def test_contiguous_array_is_viewed_and_not_copied():
    made = np.arange(10)

    view = held_array(made).view(8, 24)

    assert np.shares_memory(view, made)
    assert view.dtype == np.uint8


@pytest.mark.parametrize("made", [np.array(7.5), np.zeros((0, 3)), np.zeros((2, 0, 4))])
def test_0d_and_empty_arrays_are_arrays(made):
    held = held_array(made)

    assert held.shape == made.shape
    assert staged(held, 0, held.nbytes) == made.tobytes()


def test_array_is_not_modified_and_may_be_read_only():
    made = np.arange(6).reshape(2, 3)
    made.flags.writeable = False

    assert staged(held_array(made), 3, 20) == made.tobytes()[3:20]
    assert staged(held_array(made.T), 3, 20) == made.T.tobytes()[3:20]


def test_matrix_is_staged_as_an_array():
    made = np.arange(6).reshape(2, 3).view(type("Odd", (np.ndarray,), {}))[:, ::2]

    held = held_array(made)

    assert type(held.source) is np.ndarray
    assert staged(held, 0, held.nbytes) == made.tobytes()


@pytest.mark.parametrize(
    ("made", "dtype", "shape"),
    [
        (array.array("h", [1, 2, 3]), np.dtype(np.int16), (3,)),
        (array.array("d", []), np.dtype(np.float64), (0,)),
        (memoryview(np.arange(6, dtype="<i4").reshape(2, 3)), np.dtype("<i4"), (2, 3)),
        (memoryview(np.arange(6, dtype="<i4"))[::2], np.dtype("<i4"), (3,)),
        (memoryview(b"abc"), np.dtype(np.uint8), (3,)),
        ((ctypes.c_float * 4)(1, 2, 3, 4), np.dtype(np.float32), (4,)),
    ],
)
def test_object_of_the_buffer_protocol_is_an_array(made, dtype, shape):
    held = held_array(made)

    assert (held.dtype, held.shape) == (dtype, shape)
    assert staged(held, 0, held.nbytes) == memoryview(made).tobytes()


def test_object_that_only_dlpack_reads_is_an_array():
    made = np.arange(12, dtype=np.float32).reshape(3, 4)

    held = held_array(DLPackArray(made))

    assert (held.dtype, held.shape, held.library) == (made.dtype, (3, 4), None)
    assert np.shares_memory(held.view(0, 48), made)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_tensor_that_requires_a_gradient_is_read_and_filled_where_it_lies(
    monkeypatch, name
):
    torch = types.SimpleNamespace(Tensor=FakeTensor, int8=np.int8, int16=np.int16)
    monkeypatch.setitem(sys.modules, "torch", torch)
    dtype = np.dtype(getattr(ml_dtypes, name))
    memory = np.array([[1.5, -2], [0.5, 4]], dtype)

    held = held_array(FakeTensor(memory.T, f"torch.{name}"))
    plain = held_array(FakeTensor(np.arange(3.0), np.dtype(float)))

    assert (held.dtype, held.shape) == (dtype, (2, 2))
    assert held.source.tolist() == memory.T.tolist()
    assert held.source.ctypes.data == memory.ctypes.data
    assert plain.source.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("lazy", ["conj", "neg"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_tensor_whose_memory_holds_other_values_is_refused(
    monkeypatch, library, lazy, where
):
    """PyTorch leaves the sign of ``x.conj().imag`` to whoever reads it."""
    torch = types.SimpleNamespace(Tensor=FakeTensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    made = FakeTensor(np.arange(3.0), np.dtype(float), lazy=lazy)
    if where == "device":
        made.__cuda_array_interface__ = None

    with pytest.raises(TypeError, match="resolve_neg"):
        held_array(made)


def test_tensor_on_a_device_that_requires_a_gradient_may_be_written_to(monkeypatch):
    class Cuda(FakeTensor):
        @property
        def __cuda_array_interface__(self):
            if not self.is_detached:
                raise RuntimeError("Can't get it on Variable that requires grad.")
            return self.array.__array_interface__

        def detach(self):
            return Cuda(self.array, self.dtype, is_detached=True)

    class Library:
        def is_writable(self, obj):
            return not obj.__cuda_array_interface__["data"][1]

    torch = types.SimpleNamespace(Tensor=FakeTensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    held = HeldArray(None, np.dtype(float), (3,), Library())

    assert is_writable(Cuda(np.arange(3.0), held.dtype), held)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
def test_tensors_of_torch_are_what_they_say():
    torch = importlib.import_module("torch")
    values = torch.tensor([1 + 2j, 3 - 4j])

    held = held_array(values.conj().resolve_conj())

    assert held.source.tolist() == [1 - 2j, 3 + 4j]
    for lazy in (values.conj(), values.conj().imag):
        with pytest.raises(TypeError, match="resolve_neg"):
            held_array(lazy)


def test_pinned_memory_of_the_host_is_read_and_filled_where_it_lies():
    made = np.arange(3.0)

    held = held_array(DLPackArray(made, device=(3, 0)))

    assert held.library is None
    assert np.shares_memory(held.source, made)


@pytest.mark.parametrize("kind", [2, 13], ids=["device", "managed"])
def test_object_that_only_dlpack_reads_on_a_device_is_a_device_array(library, kind):
    made = DLPackArray(np.arange(3.0), device=(kind, 0))

    held = held_array(made)

    assert held.library is library
    assert staged(held, 0, 24) == np.arange(3.0).tobytes()


def test_dlpack_object_on_a_device_of_another_kind_is_refused():
    rocm = (10, 0)

    with pytest.raises(TypeError, match="kind 10"):
        held_array(DLPackArray(np.zeros(3), device=rocm))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 5, 1.5, 2j, "text", b"bytes", bytearray(b"x"), object()),
        *(np.float32(1), np.bool_(True), np.str_("x"), [1, 2], {"a": 1}, {1}),
    ],
)
def test_anything_else_is_no_array(value):
    assert held_array(value) is None


@pytest.mark.parametrize(
    ("made", "advice"),
    [
        (np.array([1, None], object), "take the objects out"),
        (np.zeros(2, [("x", "i4"), ("y", "f8")]), "take its fields apart"),
        (np.zeros(2, [("x", object)]), "take the objects out"),
        (np.array(["a", "bc"]), "view it as integers"),
        (np.array([b"a"]), "view it as integers"),
        (np.array(["2020-01-01"], "M8[D]"), "view it as integers"),
        (np.zeros(2, "m8[s]"), "view it as integers"),
        (np.zeros(2, "V5"), "view it as integers"),
        (np.ma.masked_array([1, 2], [0, 1]), "save its data and its mask"),
        (memoryview(b"ab").cast("c"), "view it as integers"),
    ],
)
def test_dtype_that_no_file_can_hold_is_refused_with_advice(made, advice):
    with pytest.raises(TypeError, match="cannot be saved") as caught:
        held_array(made)

    assert advice in str(caught.value)


class TestDevice:
    def test_device_array_is_never_read_by_numpy(self, library):
        made = FakeDeviceArray(np.arange(6, dtype=np.float32).reshape(2, 3))

        held = held_array(made)

        assert held.source.owner is made
        assert held.library is library
        assert (held.dtype, held.shape) == (np.dtype(np.float32), (2, 3))
        assert held.view(0, 24) is None
        assert library.calls == []

    @pytest.mark.parametrize(("start", "stop"), [(16, 40), (3, 9)])
    def test_bytes_of_a_contiguous_array_are_staged_in_one_copy(
        self, library, start, stop
    ):
        host = np.arange(10, dtype=np.float64)

        found = staged(held_array(FakeDeviceArray(host)), start, stop)

        assert found == host.tobytes()[start:stop]
        assert library.calls == [("read", stop - start)]

    def test_nothing_is_there_before_the_fence(self, library):
        host, out = np.arange(10.0), np.zeros(80, np.uint8)

        held_array(FakeDeviceArray(host)).stage(0, out)

        assert out.tobytes() != host.tobytes()
        fence(library)()
        assert out.tobytes() == host.tobytes()

    def test_host_and_device_arrays_go_to_a_buffer_of_the_device(self, library):
        host = np.arange(24, dtype=np.int32).reshape(4, 6)
        for made in (host, host[:, ::2], FakeDeviceArray(host[::2])):
            held = held_array(made)
            buffer = library.buffer(
                held.nbytes, held_array(FakeDeviceArray(host)).source
            )

            held.stage(0, buffer)
            fence(library)()
            found = np.zeros(held.nbytes, np.uint8)
            library.copy(buffer, found)
            fence(library)()

            data = (host[::2] if held.library else made).tobytes()
            assert found.tobytes() == data

    @pytest.mark.parametrize("layout", ["C", "strided"])
    def test_device_array_is_filled(self, library, layout):
        host, data = np.zeros((4, 6), np.int32), np.arange(12, dtype=np.int32)
        box = host[:, :3] if layout == "strided" else host[:2]
        held = held_array(FakeDeviceArray(box))

        if layout == "C":
            held.fill(0, data.view(np.uint8))
        else:
            held.fill_box((slice(0, 4), slice(0, 3)), data.view(np.uint8))
        fence(library)()

        assert box.tobytes() == data.tobytes()
        assert np.count_nonzero(host) == 11

    @pytest.mark.parametrize("scratch", [2, 7, 16, 1000])
    @pytest.mark.parametrize("where", ["device", "host"])
    def test_blocks_are_the_bytes_in_order_within_the_scratch(
        self, library, where, scratch
    ):
        host = np.arange(60, dtype=np.int32).reshape(6, 10)[:, ::3]
        held = held_array(FakeDeviceArray(host) if where == "device" else host)

        found = [bytes(block) for block in held.blocks(3, 90, 16, scratch)]

        assert b"".join(found) == host.tobytes()[3:90]
        assert max(map(len, found)) <= max(1, min(16, scratch // 2))
        if where == "device":
            assert sum(library.pinned_nbytes) <= scratch

    def test_copies_of_a_block_that_fails_are_waited_for(self, library):
        host = np.arange(60, dtype=np.int32).reshape(6, 10)[:, ::3]
        held = held_array(FakeDeviceArray(host))
        copies, read_box = [], library.read_box

        def fail_later(*args):
            copies.append(args)
            if len(copies) == 3:
                raise RuntimeError("the device is lost")
            read_box(*args)

        library.read_box = fail_later
        with pytest.raises(RuntimeError, match="lost"):
            list(held.blocks(3, 90, 64, 1000))

        assert len(copies) == 3
        assert not any(library._queues.values())

    def test_array_of_numpy_that_a_device_writes_to_is_a_device_array(self, library):
        class Managed(np.ndarray):  # as Numba has them
            _host = property(np.asarray)
            __cuda_array_interface__ = property(lambda self: self.__array_interface__)

        made = np.arange(6.0).view(Managed)

        assert held_array(made).library is library

    @pytest.mark.parametrize("layout", ["C", "F", "strided"])
    def test_every_byte_range_is_staged(self, library, layout):
        host = np.arange(6, dtype=np.int32).reshape(2, 3).copy("F")
        host = {"C": host.copy("C"), "F": host, "strided": np.repeat(host, 2, 1)}[
            layout
        ]
        host = host[:, ::2] if layout == "strided" else host
        held = held_array(FakeDeviceArray(host))

        for start in range(host.nbytes + 1):
            for stop in range(start, host.nbytes + 1):
                assert staged(held, start, stop) == host.tobytes()[start:stop]

    def test_0d_device_array_is_staged(self, library):
        host = np.array(2.5, np.float32)

        held = held_array(FakeDeviceArray(host))

        assert (held.shape, held.nbytes) == ((), 4)
        assert staged(held, 0, 4) == host.tobytes()

    def test_failure_on_the_device_reaches_the_caller(self, library, monkeypatch):
        def fail(*args):
            raise RuntimeError("an illegal memory access was encountered")

        held = held_array(FakeDeviceArray(np.zeros(3)))
        monkeypatch.setattr(library, "read", fail)

        with pytest.raises(RuntimeError, match="illegal memory access"):
            held.stage(0, np.empty(24, np.uint8))

    def test_device_array_of_no_savable_dtype_is_refused(self, library):
        with pytest.raises(TypeError, match="cannot be saved"):
            held_array(FakeDeviceArray(np.zeros(2, "V4")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_name_of_a_dtype_gives_it_back(dtype):
    found = dtype_from_name(dtype_name(dtype))

    assert found == dtype
    assert found.byteorder == dtype.byteorder


@pytest.mark.parametrize(
    "name",
    [
        *("", "<", "<f3", "<O", "|O", "<U4", "|S3", "|V8", "<M8[s]", "<f4,<f4", "=zz"),
        # NumPy gives these to Python's parser, which raises SyntaxError.
        *("<02", "<(2,)f4", "<9i4", "<i4, <i4", "<f4\n", "<i\u0664"),
        *("float32", "nothing", "__name__", "finfo", "os", "int4.x"),
    ],
)
def test_name_of_no_dtype_is_refused(name):
    with pytest.raises(ValueError, match="dtype"):
        dtype_from_name(name)


def test_name_that_needs_ml_dtypes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)

    with pytest.raises(ImportError, match=r"pip install 'mpisave\[bfloat16\]'"):
        dtype_from_name("bfloat16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_ml_dtypes_is_stored_as_unsigned_integers(dtype):
    found = stored_dtype(dtype)

    assert savable(dtype) is dtype
    assert found.itemsize == dtype.itemsize
    if dtype in ML_DTYPES:
        assert is_ml_dtype(dtype)
        assert found.kind == "u"
    else:
        assert not is_ml_dtype(dtype)
        assert found == dtype
