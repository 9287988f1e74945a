"""Arrays that are loaded to a device, with a stand-in for the device."""

import io
import pickle

import numpy as np
import pytest
from fakes import FakeDeviceArray, put_in_place
from helpers import small_blocks

import mpisave
from mpisave import ArgumentError, FileFormatError, Shard, StateDictError, reading

MIB = 2**20
FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]
RNG = np.random.default_rng(7)
STATE = {
    "w": RNG.standard_normal((40, 30)).astype(np.float32),
    "small": {f"s{n}": np.arange(n, dtype=np.int16) for n in range(5)},
    "scalar": np.array(2.5),
    "big": RNG.integers(0, 255, 9 * MIB, np.uint8),
    "step": 7,
}


@pytest.fixture(params=["device", "host", "neither"])
def library(request, monkeypatch):
    """Return a stand-in; checksums of long arrays are its, or not, or it has none."""
    least = 2**60 if request.param == "host" else 0
    monkeypatch.setattr("mpisave.to_device._LEAST_NBYTES", least)
    library = put_in_place(monkeypatch)
    library.can_sum = request.param != "neither"
    library.is_asked = request.param == "device"
    return library


@pytest.fixture(params=FORMATS)
def file(request):
    file = io.BytesIO()
    mpisave.save(STATE, file, use_binary_format=request.param)
    return file


def flat(state):
    return {
        key: value
        for part in (state, state["small"])
        for key, value in part.items()
        if not isinstance(value, (dict, int))
    }


def assert_on_device(found):
    for key, array in flat(STATE).items():
        assert isinstance(flat(found)[key], FakeDeviceArray), key
        np.testing.assert_array_equal(flat(found)[key]._host, array, strict=True)
    assert found["step"] == 7


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("verify", [True, False])
def test_whole_state_is_loaded_to_the_device(library, file, device, verify):
    found = mpisave.load(file, device=device, verify=verify)

    assert_on_device(found)
    # Not of arrays that are read together with their neighbours.
    by_device = STATE["big"].nbytes if verify and library.is_asked else 0
    assert library.summed_nbytes == by_device


def test_no_second_copy_of_the_state_is_in_host_memory(library, file):
    mpisave.load(file, device="cuda")

    assert max(library.pinned_nbytes) <= 4 * MIB


def like_of(state, make):
    return {
        key: like_of(value, make) if isinstance(value, dict) else make(value)
        for key, value in state.items()
    }


def blank(value):
    if isinstance(value, int):
        return 0
    return FakeDeviceArray(np.zeros_like(value))


def test_arrays_are_made_where_those_of_like_are(library, file):
    like = like_of(STATE, blank)
    like["w"] = np.zeros_like(STATE["w"])

    found = mpisave.load(file, like=like)

    assert type(found["w"]) is np.ndarray
    found["w"] = FakeDeviceArray(found["w"])
    assert_on_device(found)


@pytest.mark.parametrize(("device", "kind"), [("cpu", np.ndarray), ("cuda", object)])
def test_device_says_where_whatever_like_says(library, file, device, kind):
    found = mpisave.load(file, like=like_of(STATE, blank), device=device)

    assert isinstance(found["w"], kind)
    assert isinstance(found["w"], FakeDeviceArray) == (device == "cuda")


@pytest.mark.parametrize("layout", ["C", "F", "strided"])
@pytest.mark.parametrize("verify", [True, False])
def test_device_arrays_are_filled_in_place(library, file, layout, verify):
    def make(value):
        if isinstance(value, int):
            return 0
        host = np.zeros_like(value)
        if layout == "F" and host.ndim:
            host = np.asfortranarray(host)
        elif layout == "strided" and host.ndim:
            host = np.zeros((*host.shape[:-1], 2 * host.shape[-1]), host.dtype)
            host = host[..., ::2]
        return FakeDeviceArray(host)

    like = like_of(STATE, make)

    found = mpisave.load(file, like=like, into="inplace", verify=verify)

    assert found["w"] is like["w"]
    assert_on_device(found)
    assert library.settled >= 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("into", ["new", "inplace"])
def test_box_of_an_array_is_loaded_to_the_device(library, file, axis, into):
    start = (20, 0) if axis == 0 else (0, 10)
    shape = (20, 30) if axis == 0 else (40, 20)
    box = Shard(FakeDeviceArray(np.zeros(shape, np.float32)), (40, 30), start)

    with small_blocks(64):
        found = mpisave.load(
            io.BytesIO(saved_in_small_blocks()), like={"w": box}, into=into
        )

    expected = STATE["w"][start[0] :, start[1] :]
    np.testing.assert_array_equal(found["w"].array._host, expected)


def saved_in_small_blocks():
    file = io.BytesIO()
    mpisave.save({"w": STATE["w"]}, file)
    return file.getvalue()


def test_altered_byte_is_found_on_the_way_to_the_device(library, file):
    data = bytearray(file.getvalue())
    at = data.find(STATE["big"][5 * MIB :][:64].tobytes())
    data[at] ^= 1

    with pytest.raises(FileFormatError, match="'big' is altered"):
        mpisave.load(io.BytesIO(bytes(data)), device="cuda")


@pytest.mark.parametrize("at", [0, 3 * MIB - 1, 9 * MIB - 1])
def test_altered_block_is_named_whoever_computes_checksums(library, at):
    file = io.BytesIO()
    mpisave.save({"big": STATE["big"], "more": np.ones(2**18)}, file)
    data = bytearray(file.getvalue())
    offset = data.find(STATE["big"][:64].tobytes())
    data[offset + at] ^= 128
    if library.is_asked:  # of several, the first in the file
        data[data.find(np.ones(9).tobytes())] ^= 128

    with pytest.raises(FileFormatError) as caught:
        mpisave.load(io.BytesIO(bytes(data)), device="cuda")

    block = at // MIB
    text = f"block {block} at offset {offset + block * MIB} is"
    assert "'big' is altered" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("start", "stop", "blocks"),
    # A window of four blocks is checked there if all of it is wanted.
    [(0, 9 * MIB, 9), (MIB, 6 * MIB, 5), (1, 9 * MIB, 5), (5, 8 * MIB + 1, 4)],
)
def test_block_that_is_not_all_wanted_is_checked_by_the_host(
    library, file, start, stop, blocks
):
    part = FakeDeviceArray(np.zeros(stop - start, np.uint8))
    like = {"big": Shard(part, STATE["big"].shape, (start,))}

    mpisave.load(file, like=like, into="inplace", keys=("big",))

    np.testing.assert_array_equal(part._host, STATE["big"][start:stop])
    assert library.summed_nbytes == (blocks * MIB if library.is_asked else 0)


@pytest.mark.parametrize("key", [None, "a", "b"])
@pytest.mark.parametrize("threads", [1, 3])
def test_arrays_that_share_memory_are_checked_as_they_come(
    library, monkeypatch, key, threads
):
    """Tied weights: what is there in the end is of one of them."""
    monkeypatch.setattr("mpisave.loading.threads_of", lambda *_: threads)
    big, other = STATE["big"], STATE["big"][::-1].copy()
    file = io.BytesIO()
    mpisave.save({"a": big, "b": other, "alone": big}, file)
    data = bytearray(file.getvalue())
    if key:
        start = data.find({"a": big, "b": other}[key][:64].tobytes())
        data[start + MIB + 5] ^= 1
    shared = FakeDeviceArray(np.zeros(big.size + 100, np.uint8))
    whole = library.adopt(shared)
    like = {"a": whole[: big.size], "b": whole[100:][: big.size]}
    like["alone"] = FakeDeviceArray(np.zeros_like(big))

    def load():
        return mpisave.load(io.BytesIO(bytes(data)), like=like, into="inplace")

    if key:
        with pytest.raises(FileFormatError, match=f"'{key}' is altered.*block 1 at"):
            load()
    else:
        load()
        assert library.summed_nbytes == (big.size if library.is_asked else 0)
        np.testing.assert_array_equal(like["alone"]._host, big)


@pytest.mark.parametrize("threads", [1, 2, 12])
def test_long_array_is_work_for_all_threads(library, monkeypatch, threads):
    asked = []
    in_threads = reading.in_threads

    def watched(jobs, threads, *begin):
        jobs = list(jobs)
        asked.append(len(jobs))
        return in_threads(jobs, threads, *begin)

    monkeypatch.setattr("mpisave.loading.threads_of", lambda *_: threads)
    monkeypatch.setattr(reading, "in_threads", watched)
    file = io.BytesIO()
    mpisave.save({"big": np.zeros(80 * MIB, np.uint8)}, file)

    mpisave.load(file, device="cuda")

    assert sum(asked) == {1: 3, 2: 4, 12: 20}[threads]


def test_dtype_that_the_device_does_not_know_is_refused_by_key(library, monkeypatch):
    def empty(*args):
        raise TypeError("no such dtype")

    file = io.BytesIO()
    mpisave.save({"x": np.zeros(3, ">f4")}, file)
    monkeypatch.setattr(library, "empty", empty)

    with pytest.raises(StateDictError, match=r"'x' is of dtype .*device='cpu'"):
        mpisave.load(file, device="cuda")


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", 0, b"cuda"]
)
def test_other_device_is_refused(device):
    with pytest.raises(ArgumentError, match="device is"):
        mpisave.load(io.BytesIO(b"x"), device=device)


@pytest.mark.parametrize("how", [{"mmap": True}, {"into": "inplace", "like": {}}])
def test_device_is_refused_where_no_array_is_made(library, how):
    with pytest.raises(ArgumentError, match="where new arrays are made"):
        mpisave.load(io.BytesIO(b"x"), device="cuda", **how)


def test_device_without_its_library_says_what_to_install(file):
    with pytest.raises(ImportError, match=r"pip install 'mpisave\[cuda12\]'"):
        mpisave.load(file, device="cuda")


def test_device_cpu_loads_pickles_of_others_and_is_refused_in_place(library):
    file = io.BytesIO(pickle.dumps({"x": np.arange(3)}))

    assert mpisave.load(file, device="cpu")["x"].tolist() == [0, 1, 2]
    with pytest.raises(FileFormatError, match="device="):
        mpisave.load(file, device="cuda")
    with pytest.raises(ArgumentError, match="where new arrays are made"):
        mpisave.load(file, like={"x": np.zeros(3)}, into="inplace", device="cpu")


def test_pinned_memory_is_asked_for_in_few_sizes(library):
    rng = np.random.default_rng(3)
    state = {f"a{n}": rng.random(int(rng.integers(1, 9000))) for n in range(400)}
    state |= {f"b{n}": rng.random(int(rng.integers(9000, 10**6))) for n in range(8)}
    file = io.BytesIO()
    mpisave.save({key: FakeDeviceArray(value) for key, value in state.items()}, file)
    mpisave.load(file, device="cuda")

    assert len(set(library.pinned_nbytes)) <= 5
