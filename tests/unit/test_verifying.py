"""verify: all damage of a file is found, and equal states have equal digests."""

import functools
import hashlib
import io
import json
import pickle
import re
import struct
import threading

import h5py
import numpy as np
import pytest
from helpers import MIXED, small_blocks

import mpisave
from mpisave import skeleton, verifying
from mpisave.checksum import crc32c
from mpisave.errors import FileFormatError
from mpisave.source import Source

FORMATS = [pytest.param(False, id="pickle"), pytest.param(True, id="hdf5")]

STATE = MIXED | {"nan": float("nan")}


def saved(state, use_binary_format=False, **how):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format, **how)
    return buffer.getvalue()


def verified(data):
    return mpisave.verify(io.BytesIO(data))


def digest(state, *arguments, **how):
    return verified(saved(state, *arguments, **how)).digest


@pytest.fixture(params=FORMATS, scope="module")
def whole(request):
    """Return the bytes of a small file of each format."""
    return saved(STATE, request.param)


def flipped(data, at, bit=0):
    altered = bytearray(data)
    altered[at] ^= 1 << bit
    return bytes(altered)


def test_report_says_what_the_file_holds(tmp_path, whole):
    path = tmp_path / "state"
    path.write_bytes(whole)

    report = mpisave.verify(path)

    arrays = {("w",): 24, ("big",): 4, ("half",): 4, ("empty",): 0, ("nested", 0): 8}
    assert report.path == str(path)
    assert report.container == ("hdf5" if whole.startswith(b"\x89HDF") else "pickle")
    assert report.nbytes == len(whole)
    assert report.payload_nbytes == sum(arrays.values())
    assert report.arrays == len(arrays)
    assert list(report.digests) == list(arrays)
    assert re.fullmatch("[0-9a-f]{64}", report.digest)
    assert pickle.loads(pickle.dumps(report)) == report


@pytest.mark.parametrize(
    "bits", [1, pytest.param(8, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_every_byte_of_a_file_is_covered(whole, bits):
    missed = []
    for at in range(len(whole)):
        for bit in range(8) if bits == 8 else (at % 8,):
            try:
                verified(flipped(whole, at, bit))
            except FileFormatError:
                continue
            missed.append((at, bit))

    assert missed == []


def test_file_cut_at_every_byte_is_found(whole):
    for nbytes in range(len(whole)):
        with pytest.raises(FileFormatError):
            verified(whole[:nbytes])


@pytest.mark.parametrize("use_binary_format", FORMATS)
def test_all_damage_is_named_by_key_and_block(use_binary_format):
    rng = np.random.default_rng(0)
    state = {name: rng.integers(0, 256, 1000, np.uint8) for name in ("x", "y", "z")}
    with small_blocks(256):
        data = bytearray(saved(state, use_binary_format))
        starts = {name: data.index(array.tobytes()) for name, array in state.items()}
        # Blocks 0 and 3, the last one short, of x, and all of z; the skeleton too.
        for at in (starts["x"], starts["x"] + 999, starts["y"] - 1):
            data[at] ^= 1
        data[starts["z"] : starts["z"] + 1000] = bytes(1000)

        with pytest.raises(FileFormatError, match=r"<BytesIO>: 7 part\(s\)") as caught:
            verified(bytes(data))

    lines = str(caught.value).splitlines()[1:]
    assert lines[0].startswith("  the skeleton (all that lies around the arrays")
    places = [
        ("x", 0, starts["x"]),
        ("x", 3, starts["x"] + 768),
        *(("z", n, starts["z"] + 256 * n) for n in range(4)),
    ]
    begins = [f"  {name!r}, block {n} at offset {o}: " for name, n, o in places]
    assert [line.startswith(b) for line, b in zip(lines[1:], begins, strict=True)] == (
        [True] * 6
    )
    part = bytes(data[starts["x"] : starts["x"] + 256])
    good = state["x"][:256].tobytes()
    expected = f"its CRC-32C is {crc32c(part):#010x}, not {crc32c(good):#010x}"
    assert lines[1].endswith(expected)


def test_more_than_twenty_damages_are_counted():
    with small_blocks(64):
        data = saved({"x": np.zeros(64 * 30, np.uint8)})
        # One zero byte of each block of the array becomes a one.
        altered = bytearray(data)
        first = data.index(bytes(64 * 30))
        altered[first : first + 64 * 30 : 64] = b"\1" * 30

        with pytest.raises(FileFormatError, match="30 part") as caught:
            verified(bytes(altered))

    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 10 more"


def test_file_that_shrinks_while_it_is_verified_is_torn(tmp_path, monkeypatch):
    path = tmp_path / "state"
    state = {"x": np.arange(1000), "y": np.arange(1000, 2000)}
    mpisave.save(state, path)
    begin = verifying._Blocks.check

    def cut(blocks, source, threads):
        with path.open("r+b") as file:
            file.truncate(path.read_bytes().index(state["y"].tobytes()) + 10)
        return begin(blocks, source, threads)

    monkeypatch.setattr(verifying._Blocks, "check", cut)

    with pytest.raises(FileFormatError, match="2 part") as caught:
        mpisave.verify(path)

    assert "only 10 of its 8000 bytes are there" in str(caught.value)
    assert "the skeleton: it is torn" in str(caught.value)


@pytest.mark.parametrize(
    "data", [pickle.dumps({"w": np.arange(3)}), b"", b"text"], ids=repr
)
def test_file_of_another_program_has_nothing_to_verify_against(data):
    expected = "nothing to verify against" if data[:1] == b"\x80" else "file|begins"

    with pytest.raises(FileFormatError, match=f"^<BytesIO>: .*({expected})"):
        verified(data)


def test_missing_file_is_an_os_error_and_no_format_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        mpisave.verify(tmp_path / "missing")


def test_crc_of_an_array_is_that_of_its_bytes_however_it_was_cut():
    array = np.random.default_rng(0).integers(0, 256, 3 * 2**20 + 5, np.uint8)

    found = [verified(saved({"x": array}, b)).digests for b in (False, True)]
    with small_blocks(999):
        found.append(verified(saved({"x": array})).digests)

    assert found == [{("x",): crc32c(array.data)}] * 3


HOW = [
    *({"protocol": protocol} for protocol in (2, 3, 4, 5)),
    {"use_binary_format": True},
    {"gather_to": 0, "state_type": "opt"},
]


def test_equal_states_have_equal_digests_whatever_wrote_them(monkeypatch):
    found = {digest(STATE, **how) for how in HOW}
    found.add(digest(dict(reversed(STATE.items()))))
    monkeypatch.setattr(mpisave, "__version__", "9.9.9")
    monkeypatch.setattr("mpisave.formats.pkl.ALIGNMENT", 8)
    found.add(digest(STATE))
    with small_blocks(16):
        found.add(digest(STATE))

    assert len(found) == 1


def other(**values):
    return {**STATE, **values}


DIFFERENT = {
    "the same": STATE,
    "a bit": other(w=np.nextafter(STATE["w"], np.float32(9))),
    "shape": other(w=STATE["w"].reshape(3, 2)),
    "empty shape": other(empty=np.zeros((2, 0))),
    "dtype": other(w=STATE["w"].view(np.int32)),
    "byte order": other(big=STATE["big"].astype("<i2")),
    "kind of half": other(half=STATE["half"].view(np.float16)),
    "bits of half": other(half=STATE["half"].view(np.uint16)),
    "a key": {("v" if key == "w" else key): value for key, value in STATE.items()},
    "one key less": {key: value for key, value in STATE.items() if key != "scalar"},
    "one key more": other(more={}),
    "type of a key": other(nested=[np.array(5), {"lr": 0.5, "3": (None,)}]),
    "a number": other(scalar=np.float32(2.25)),
    "type of a number": other(scalar=2.5),
    "precision of a number": other(scalar=np.float64(2.5)),
    "array of a number": other(scalar=np.array(2.5, np.float32)),
    "int for bool": other(nan=1),
    "bool": other(nan=True),
    "float for int": other(nan=1.0),
    "text": other(nan="nan"),
    "bytes": other(nan=b"nan"),
    "bytearray": other(nan=bytearray(b"nan")),
    "tuple": other(nested=tuple(STATE["nested"])),
    "order of a list": other(nested=STATE["nested"][::-1]),
    "per rank": other(nested=mpisave.PerRank(STATE["nested"])),
}


def test_states_that_differ_in_anything_have_different_digests():
    found = {name: digest(state) for name, state in DIFFERENT.items()}

    assert len(set(found.values())) == len(DIFFERENT)


def test_of_an_object_that_only_pickle_holds_its_type_counts():
    def of(value):
        with pytest.warns(UserWarning, match="pickle.load alone"):
            return digest({"x": value})

    assert of({1, 2}) == of({3})
    assert of({1, 2}) != of(frozenset({1, 2}))


def test_digest_is_what_the_specification_says(whole):
    index = json.loads(whole[int.from_bytes(whole[-32:-24], "little") : -32])
    lines = []
    for key, kind, *detail in index["nodes"]:
        what = detail
        if kind == "array":  # small ones: a checksum is that of the whole
            dtype, shape, _offset, _nbytes, checksum = detail
            what = [dtype, shape, checksum]
        order = [(isinstance(part, str), part) for part in key]
        line = json.dumps([key, kind, *what], separators=(",", ":"))
        lines.append((order, line))
    text = "".join(line + "\n" for _, line in sorted(lines))

    assert verified(whole).digest == hashlib.sha256(text.encode()).hexdigest()


def test_digest_is_frozen():
    state = {"w": np.arange(3, dtype="<i4"), "lr": 0.5, 1: [None, "x"]}

    found = digest(state)

    text = (
        '[[],"dict",null]\n'
        '[[1],"list",2]\n'
        '[[1,0],"object",null]\n'
        '[[1,1],"object","x"]\n'
        '[["lr"],"object",0.5]\n'
        f'[["w"],"array","<i4",[3],{crc32c(struct.pack("<3i", 0, 1, 2))}]\n'
    )
    assert found == hashlib.sha256(text.encode()).hexdigest()


def test_memory_is_bounded_and_threads_share_the_work(tmp_path, monkeypatch):
    path = tmp_path / "state"
    arrays = {f"x{i}": np.full(3 * 2**20 + i, i, np.uint8) for i in range(8)}
    mpisave.save(arrays | {f"s{i}": np.array(i) for i in range(500)}, path)
    reads, where = [], set()
    read_into = Source.read_into

    def watch(source, offset, out):
        reads.append((out.nbytes, id(out.obj)))
        where.add(threading.get_ident())
        return read_into(source, offset, out)

    monkeypatch.setattr(Source, "read_into", watch)
    monkeypatch.setattr(verifying, "threads_of", lambda *_: 3)

    mpisave.verify(path)

    at_once = [nbytes for nbytes, _ in reads]
    assert max(at_once[2:]) <= 2**20
    # The index, three buffers of blocks and one of the skeleton.
    assert len({buffer for nbytes, buffer in reads if nbytes > 2**19}) <= 4
    assert 1 < len(where) <= 4
    assert len(reads) < 8 * 4 + 8 + 20


class TestSkeletonOnLoading:
    """What a load with verify=True checks beside the blocks that it reads."""

    def changed(self, whole):
        """Return the file with a key of another name, and where that is."""
        at = whole.index(b"nested")
        assert at < int.from_bytes(whole[-32:-24], "little")
        return whole[:at] + b"tested" + whole[at + 6 :]

    @pytest.mark.parametrize("how", [{}, {"keys": "w"}, {"like": {"w": STATE["w"]}}])
    def test_altered_skeleton_is_refused(self, whole, how):
        data = self.changed(whole)
        if "like" in how:
            how = {**how, "unexpected": "skip"}

        with pytest.raises(
            FileFormatError, match=r"^<BytesIO>: the skeleton "
        ) as caught:
            load_quietly(data, **how)

        assert "verify=False" in str(caught.value)
        assert "w" in load_quietly(data, **how, verify=False)

    def test_changed_attribute_and_swapped_links_are_found(self, tmp_path):
        path = tmp_path / "state.h5"
        state = {"aa": np.arange(9.0), "bb": np.arange(9.0, 18.0), "lr": 0.5}
        data = saved(state, True)

        for old, new in [
            (struct.pack("<d", 0.5), struct.pack("<d", 0.25)),
            (b"\x02bb", b"\x02cc"),
        ]:
            assert data.count(old) == 1
            path.write_bytes(data.replace(old, new))
            with pytest.raises(FileFormatError, match="skeleton"):
                mpisave.load(path)

    def test_mapped_arrays_are_not_verified(self, tmp_path, whole):
        path = tmp_path / "state"
        path.write_bytes(self.changed(whole))

        assert "nested" in mpisave.load(path, mmap=True)

    @pytest.mark.parametrize("size", [1, 2, 3, 50])
    @pytest.mark.parametrize("least", [1, 100, 10_000])
    def test_parts_of_all_ranks_make_the_whole(self, whole, monkeypatch, size, least):
        monkeypatch.setattr(skeleton, "_LEAST_NBYTES", least)
        monkeypatch.setattr(skeleton, "_WINDOW_NBYTES", 300)
        content = verifying._decode(verifying.find_index(Source(io.BytesIO(whole))))
        read = functools.partial(skeleton.read_part, Source(io.BytesIO(whole)))

        parts = [read(content, rank, size) for rank in range(size)]

        outside = content.nbytes - sum(
            stored.extent.nbytes for stored in content.arrays().values()
        )
        assert sum(nbytes for _, nbytes in parts) == outside
        assert skeleton.is_altered(content, parts) == ""
        if size == 50 and least == 1:
            assert all(nbytes for _, nbytes in parts)


def load_quietly(data, **how):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mpisave.load(io.BytesIO(data), **how)


@pytest.mark.parametrize("data", [STATE, {f"a{i}": i for i in range(50)}, {}, 5])
def test_hdf5_of_ours_without_its_index_is_not_taken_for_another_programs(
    tmp_path, data
):
    path = tmp_path / "state.h5"
    mpisave.save(data, path, use_binary_format=True)
    with h5py.File(path, "r+") as file:
        file["more"] = np.arange(1000)

    for read in (mpisave.load, mpisave.verify):
        with pytest.raises(FileFormatError, match="of mpisave without an index"):
            read(path)
    with h5py.File(path) as file:
        assert file["more"].shape == (1000,)


def test_hdf5_of_another_program_has_no_mark(tmp_path):
    for libver in ("earliest", "v108", "latest"):
        path = tmp_path / f"{libver}.h5"
        with h5py.File(path, "w", libver=libver) as file:
            file["w"] = np.arange(3)

        with pytest.raises(FileFormatError) as caught:
            mpisave.verify(path)

        assert "of mpisave without" not in str(caught.value)
