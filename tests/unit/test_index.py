"""The index: a file's own table, and what altered ones are met with."""

import base64
import json
import random
import struct

import numpy as np
import pytest

from mpisave.checksum import BLOCK_NBYTES
from mpisave.errors import FileFormatError
from mpisave.formats.base import Layout, gaps
from mpisave.formats.index import (
    MAGIC,
    TRAILER_NBYTES,
    VERSION,
    Opaque,
    Stored,
    decode,
    encode,
    find,
)
from mpisave.merging import merge
from mpisave.metadata import describe
from mpisave.plan import Extent
from mpisave.tree import Node, flatten
from mpisave.wanted import All

SKELETON = ((0, b"head"), (28, b"tail"))


def state_of(index, make):
    return All(index.nodes, None, lambda stored, *_: make(stored)).state()


def reference_crc32c(data):
    """Return the CRC-32C of `data`, bit by bit (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def sums(*values):
    return np.array(values, np.uint32)


def small_index():
    state = {"w": np.zeros((2, 3), "<f4"), "lr": 0.5, "by": [None, (1j,)]}
    merged = merge([describe(flatten(state))[2]])
    layout = Layout(SKELETON, (Extent(4, 24),), 32)
    checksums = [sums(0xDEADBEEF)]
    return encode(merged, layout, checksums, container="pickle", facts={"a": "b"})


# An array of three blocks, the last of one byte; then an empty one, and one of a block.
LARGE_NBYTES = 2 * BLOCK_NBYTES + 1


def index_of_large_arrays():
    state = {
        "large": np.broadcast_to(np.uint8(0), LARGE_NBYTES),
        "empty": np.zeros(0, "<f8"),
        "block": np.broadcast_to(np.uint8(0), BLOCK_NBYTES),
    }
    stop = 4 + LARGE_NBYTES + BLOCK_NBYTES
    extents = (
        Extent(4, LARGE_NBYTES),
        Extent(0, 0),
        Extent(4 + LARGE_NBYTES, BLOCK_NBYTES),
    )
    layout = Layout(((0, b"head"),), extents, stop)
    checksums = [sums(1, 0x02030405, 2**32 - 1), sums(), sums(6)]
    merged = merge([describe(flatten(state))[2]])
    return stop, encode(merged, layout, checksums, container="pickle", facts={})


def sealed(content, *, offset=32, version=1):
    """Return an index as any program could write it, its checksum right."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = struct.pack("<QQI", offset, len(text), version)
    checksum = struct.pack("<I", reference_crc32c(text + fields))
    return text + fields + checksum + b"\x89mpisave"


def content(*nodes, **changes):
    return {
        "mpisave": 1,
        "container": "pickle",
        "facts": {},
        "skeleton_crc32c": 0,
        "nodes": [[[], "dict", None], *nodes],
        **changes,
    }


def read(data, start=32):
    """Do with an index what load does; return it."""
    nbytes = start + len(data)
    found = find(data[-TRAILER_NBYTES:], nbytes)
    if found is None:
        raise FileFormatError("no index")
    return decode(data[found[0] - start :], "pickle")


def test_reference_has_the_check_value_of_the_standard():
    assert reference_crc32c(b"123456789") == 0xE3069283


def test_bytes_of_a_small_index_are_as_specified():
    text = (
        b'{"mpisave":1,"container":"pickle","facts":{"a":"b"},'
        b'"skeleton_crc32c":%d,"nodes":['
        b'[[],"dict",null],'
        b'[["w"],"array","<f4",[2,3],4,24,3735928559],'
        b'[["lr"],"object",0.5],'
        b'[["by"],"list",2],'
        b'[["by",0],"object",null],'
        b'[["by",1],"tuple",1],'
        b'[["by",1,0],"object",{"complex":[0.0,1.0]}]]}'
    ) % reference_crc32c(b"headtail")
    fields = (32).to_bytes(8, "little") + len(text).to_bytes(8, "little")
    fields += b"\x01\0\0\0"
    checksum = reference_crc32c(text + fields).to_bytes(4, "little")

    assert small_index() == text + fields + checksum + b"\x89mpisave"
    assert TRAILER_NBYTES == 32


def test_index_is_read_back():
    index = read(small_index())

    stored = Stored(("w",), np.dtype("<f4"), (2, 3), Extent(4, 24), sums=(0xDEADBEEF,))
    assert index.container == "pickle"
    assert index.facts == {"a": "b"}
    assert index.nbytes == 32
    assert index.skeleton_crc32c == reference_crc32c(b"headtail")
    assert index.nodes == (
        Node((), "dict", None),
        Node(("w",), "leaf", stored),
        Node(("lr",), "leaf", 0.5),
        Node(("by",), "list", 2),
        Node(("by", 0), "leaf", None),
        Node(("by", 1), "tuple", 1),
        Node(("by", 1, 0), "leaf", 1j),
    )
    assert state_of(index, lambda stored: stored.key) == {
        "w": ("w",),
        "lr": 0.5,
        "by": [None, (1j,)],
    }


def test_array_of_several_blocks_has_its_checksums_in_base64():
    _, written = index_of_large_arrays()

    # 01 00 00 00, 05 04 03 02, ff ff ff ff, by hand.
    text = (
        b'{"mpisave":1,"container":"pickle","facts":{},'
        b'"skeleton_crc32c":%d,"nodes":['
        b'[[],"dict",null],'
        b'[["large"],"array","|u1",[2097153],4,2097153,"AQAAAAUEAwL/////"],'
        b'[["empty"],"array","<f8",[0],0,0,0],'
        b'[["block"],"array","|u1",[1048576],2097157,1048576,6]]}'
    ) % reference_crc32c(b"head")
    assert written[: len(text)] == text
    assert len(written) == len(text) + 32


def test_checksums_of_blocks_are_read_back():
    stop, written = index_of_large_arrays()

    index = read(written, start=stop)

    found = [node.value.sums for node in index.nodes[1:]]
    assert found == [(1, 0x02030405, 2**32 - 1), (), (6,)]


def test_every_single_flipped_bit_is_refused():
    whole = small_index()

    for at in range(len(whole)):
        for bit in range(8):
            altered = bytearray(whole)
            altered[at] ^= 1 << bit
            with pytest.raises(FileFormatError):
                read(bytes(altered))


def test_every_truncation_is_refused():
    whole = small_index()

    for nbytes in range(len(whole)):
        with pytest.raises(FileFormatError):
            read(whole[:nbytes])


@pytest.mark.parametrize("more", [b"\0", b"x" * 40, MAGIC])
def test_bytes_behind_the_index_are_refused(more):
    with pytest.raises(FileFormatError):
        read(small_index() + more)


def test_bytes_lost_before_the_index_are_refused():
    with pytest.raises(FileFormatError, match="bytes were lost or added"):
        read(small_index(), start=31)


def test_file_without_trailer_has_no_index():
    assert find(b"", 0) is None
    assert find(MAGIC, 8) is None
    assert find(b"\0" * 32, 1000) is None


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_other_version_is_refused_by_its_number(version):
    assert VERSION == 1

    with pytest.raises(FileFormatError, match=f"version {version}"):
        read(sealed(content(), version=version))


def test_well_made_index_of_another_program_is_read():
    array = [["x"], "array", "<i2", [2], 28, 4, 7]

    index = read(sealed(content(array, [["n"], "object", 5])))

    assert state_of(index, lambda stored: stored.shape) == {
        "x": (2,),
        "n": 5,
    }


def test_values_of_each_rank_are_read_though_some_ranks_have_none():
    values = [[["r"], "per_rank", 4], [["r", 3], "object", 5], [["r", 0], "list", 0]]

    index = read(sealed(content(*values)))

    assert index.nodes[1] == Node(("r",), "per_rank", 4)
    assert state_of(index, lambda stored: None) == {"r": {3: 5, 0: []}}


ARRAY = [["x"], "array", "<f4", [2], 0, 8, 0]


def base64_of(*numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}I", *numbers)).decode()


def large(checksums, nbytes=LARGE_NBYTES):
    """Return the index of one array that has these checksums."""
    return sealed(
        content([["x"], "array", "|u1", [nbytes], 0, nbytes, checksums]),
        offset=LARGE_NBYTES,
    )


def test_checksums_of_another_program_are_read():
    index = read(large(base64_of(7, 8, 9)), start=LARGE_NBYTES)

    assert index.nodes[1].value.sums == (7, 8, 9)


@pytest.mark.parametrize(
    "checksums",
    [
        *(5, 0, -1, None, 1.5, True, [1, 2, 3], ""),
        *(base64_of(1, 2), base64_of(1, 2, 3, 4), base64_of(1, 2, 3)[:-1]),
        *("AQAAAAUEAwL____/", "AQAA AAUEAwL/////"),
        "\N{LATIN SMALL LETTER E WITH ACUTE}" * 16,
    ],
    ids=repr,
)
def test_checksums_that_do_not_fit_the_blocks_are_refused(checksums):
    with pytest.raises(FileFormatError, match="makes no sense"):
        read(large(checksums), start=LARGE_NBYTES)


@pytest.mark.parametrize("checksums", [-1, 1.5, None, True, "", "BQAAAA==", [5], 2**32])
def test_checksum_of_one_block_is_a_whole_number(checksums):
    with pytest.raises(FileFormatError, match="makes no sense"):
        read(large(checksums, nbytes=8), start=LARGE_NBYTES)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"[",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        content(nodes=None),
        content(nodes=5),
        content(container="hdf5"),
        content(facts=None),
        content(facts=["version"]),
        content(facts={"version": 1}),
        content([["w"], "array", "<f4", {}, 0, 4, 5]),
        content(container=None),
        content(skeleton_crc32c=None),
        content(skeleton_crc32c="0"),
        content(skeleton_crc32c=-1),
        content([]),
        content([["x"]]),
        content([["x"], "set", 1]),
        content([["x"], "dict"]),
        content([5, "object", 1]),
        content([["x"], "object"]),
        content([["x"], "object", {"run": "me"}]),
        content([["x"], "array"]),
        content([["x"], "array", "<f4", [2], 0, 8]),
        content([["x"], "array", "<f4", [3], 0, 8, 0]),
        content([["x"], "array", "<f4", [-2], 0, -8, 0]),
        content([["x"], "array", "<f4", [-2, -1], 0, 8, 0]),
        content([["x"], "array", "<f4", [2], -1, 8, 0]),
        content([["x"], "array", "<f4", [2], 25, 8, 0]),
        content([["x"], "array", "<f4", [2**62], 0, 2**64, 0]),
        content([["x"], "array", "<f4", ["2"], 0, 8, 0]),
        content([["x"], "array", "|O", [1], 0, 8, 0]),
        content([["x"], "array", "os", [8], 0, 8, 0]),
        content([["x"], "array", 5, [2], 0, 8, 0]),
        content([["x"], "per_rank", None]),
        content([["x"], "per_rank", -1]),
        content([["x"], "per_rank", 2], [["x", 2], "object", 5]),
        content([["x"], "per_rank", 2], [["x", -1], "object", 5]),
        content([["x"], "per_rank", 2], [["x", "0"], "object", 5]),
        content(
            [["x"], "per_rank", 2], [["x", 0], "object", 5], [["x", 0], "dict", None]
        ),
        content(ARRAY, [["y"], "array", "<f4", [2], 4, 8, 0]),
        content(ARRAY, [["y"], "array", "<f4", [2], 0, 8, 0]),
        # Ints of one hash: a dict of them would take minutes.
        content(*([[n * (2**61 - 1)], "object", 0] for n in range(60_000))),
    ],
    ids=lambda hostile: str(hostile)[-50:],
)
def test_index_that_makes_no_sense_is_refused_though_its_checksum_is_right(hostile):
    with pytest.raises(FileFormatError):
        read(sealed(hostile))


def test_opaque_object_is_named_and_refused_when_the_state_is_asked_for():
    index = read(sealed(content([["hook"], "opaque", "mod.Hook"])))

    assert index.nodes[1].value == Opaque("mod.Hook")
    with pytest.raises(FileFormatError, match=r"'hook' .* type mod\.Hook"):
        state_of(index, lambda stored: None)


def test_gaps_are_what_lies_outside_of_the_extents():
    extents = [Extent(20, 5), Extent(4, 6), Extent(10, 0), Extent(0, 0), Extent(10, 2)]

    def found(extents, nbytes):
        begins, ends = gaps(extents, nbytes)
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    assert found(extents, 30) == [(0, 4), (12, 20), (25, 30)]
    assert found([], 5) == [(0, 5)]
    assert found([Extent(0, 5)], 5) == []
    assert found([], 0) == []


def test_skeleton_is_written_in_few_runs_with_zeros_where_small_extents_go():
    far = 100_000
    skeleton = ((0, b"ab"), (10, b"cd"), (far, b"ef"), (far + 3, b"g"))
    layout = Layout(skeleton, (), far + 4)

    assert list(layout.runs()) == [
        (0, b"ab" + bytes(8) + b"cd"),
        (far, b"ef" + bytes(1) + b"g"),
    ]


def test_layout_without_skeleton_has_no_runs():
    assert list(Layout((), (), 0).runs()) == []


def test_runs_leave_out_what_other_ranks_write():
    layout = Layout(((0, b"ab"), (10, b"cd"), (20, b"ef")), (), 22)

    assert list(layout.runs({10})) == [(0, b"ab" + bytes(18) + b"ef")]
    assert list(layout.runs({0, 10})) == [(20, b"ef")]
    assert list(layout.runs({0, 10, 20})) == []


@pytest.mark.parametrize(
    "keys",
    [
        *(range(50_000), range(0, -50_000, -1)),
        *([n << shift for n in range(50_000)] for shift in (40, 48, 70)),
    ],
    ids=["in order", "negative", "far apart", "further", "beyond 64 bits"],
)
def test_many_numbers_are_honest_keys(keys):
    keys = random.Random(1).sample(keys, len(keys))

    found = read(sealed(content(*([[key], "object", 0] for key in keys))))

    assert [node.key for node in found.nodes[1:]] == [(key,) for key in keys]
