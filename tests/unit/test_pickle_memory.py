"""What loading a pickle takes of memory, against its length: as documented."""

import contextlib
import gc
import io
import pickle
import pickletools
import random
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hostile_pickles import INT, NDARRAY, RECONSTRUCT, named, text, whole

from mpisave.errors import FileFormatError
from mpisave.formats import budget
from mpisave.formats.unpickle import unpickle
from mpisave.source import Source

A_BYTE = 96  # as docs/reliability.md says
NBYTES = 20_000  # of a pickle here
NAME_OF_SET = named("builtins", "set") + b"q\x000"
DTYPE = named("numpy", "dtype") + b"q\x00" + text("i2") + b"\x85q\x0100"
EMPTY = NDARRAY + b"q\x00" + INT + b"q\x01K\x00\x85q\x02C\x00q\x030000"
HALF_MADE = RECONSTRUCT + b"q\x00(" + NDARRAY + b"K\0\x85C\x01btq\x0100"

# What a pickle repeats, and what is before and behind it.
DENSE = {
    "empty sets": (b"](", b"\x8f", b"e"),
    "empty dicts": (b"](", b"}", b"e"),
    "empty lists": (b"](", b"]", b"e"),
    "empty tuples": (b"](", b")", b"e"),
    "empty frozensets": (b"](", b"(\x91", b"e"),
    "empty lists by marks": (b"](", b"(l", b"e"),
    "empty dicts by marks": (b"](", b"(d", b"e"),
    "none": (b"](", b"N", b"e"),
    "marks": (b"", b"(", b""),
    "memo": (b"N", b"\x94", b""),
    "lists in lists": (b"]", b"]", b""),
    "tuples in tuples": (b")", b"\x85", b""),
    "tuples in a list": (b"])", b"\x85", b"a"),
    "tuples of one": (b"](", b"N\x85", b"e"),
    "tuples of four": (b"](", b"(NNNNt", b"e"),
    "lists of one": (b"](", b"]Na", b"e"),
    "dicts of one": (b"](", b"}NNs", b"e"),
    "sets of one": (b"](", b"\x8f(N\x90", b"e"),
    "sets of five": (b"](", b"\x8f(K\x01K\x02K\x03K\x04K\x05\x90", b"e"),
    "items of one key": (b"}(", b"NN", b"u"),
    "floats": (b"](", b"G?\xf8\0\0\0\0\0\x01", b"e"),
    "ints": (b"](", b"M\x01\x70", b"e"),
    "texts": (b"](", b"\x8c\x02\xce\xb1", b"e"),
    "bytes": (b"](", b"C\x02ab", b"e"),
    "bytearrays": (b"](", b"\x96" + bytes(8), b"e"),
    "large bytes": (b"](", b"B" + struct.pack("<I", 5000) + bytes(5000), b"e"),
    "calls of set": (NAME_OF_SET + b"](", b"h\x00)R", b"e"),
    "calls of set of a list": (
        NAME_OF_SET
        + b"]("
        + b"".join(b"K%c" % n for n in range(99))
        + b"e\x85q\x010](",
        b"h\x00h\x01R",
        b"e",
    ),
    "calls of bytearray": (
        named("builtins", "bytearray") + b"q\x000](",
        b"h\0)R",
        b"e",
    ),
    "calls of OrderedDict": (
        named("collections", "OrderedDict") + b"q\x000](",
        b"h\x00)R",
        b"e",
    ),
    "names": (text("numpy") + b"q\0" + text("dtype") + b"q\1(", b"h\0h\1\x93", b"1"),
    "dtypes": (DTYPE + b"(", b"h\0h\1R", b"1"),
    "empty arrays": (EMPTY + b"](", b"h\x00h\x02h\x01h\x03\x87R", b"e"),
    "half-made arrays": (HALF_MADE + b"(", b"h\x00h\x01R", b"1"),
}


def dense(case):
    before, one, after = DENSE[case]
    return whole(before + one * (NBYTES // len(one)) + after, 5)


def places_of_the_memo():
    return whole(
        b"N" + b"".join(b"r" + struct.pack("<I", n * 7919 + 9) for n in range(4000))
    )


def read(data):
    return unpickle(Source(io.BytesIO(data)))


@contextlib.contextmanager
def peak_of_memory():
    """Give a list that has the peak in bytes afterwards."""
    read(pickle.dumps([np.zeros(1), {1.5: "x"}, {2}]))  # what is made once for all
    gc.collect()
    found = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", [*DENSE, "places of the memo"])
def test_no_pickle_takes_more_memory_than_one_of_its_length_may(case, monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 0)
    data = dense(case) if case in DENSE else places_of_the_memo()

    with peak_of_memory() as peak, contextlib.suppress(FileFormatError):
        read(data)

    # Beside it: a window of the file, and a traceback.
    assert peak[0] < A_BYTE * len(data) + 2**18


@pytest.mark.parametrize(
    "case",
    [
        *("empty sets", "empty frozensets", "tuples in tuples", "tuples in a list"),
    ],
)
def test_pickle_that_takes_more_memory_is_refused_where_it_does(case, monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 0)
    data = dense(case)

    with pytest.raises(FileFormatError, match="of memory, the most") as caught:
        read(data)

    words = str(caught.value)
    assert f"{A_BYTE * len(data)} bytes" in words
    assert "allow_pickle=True" in words
    at = int(words.rpartition("byte ")[2].rstrip(")"))
    assert 100 < at < len(data)
    names = {offset: opcode.name for opcode, _, offset in pickletools.genops(data)}
    assert f"(opcode {names[at]} at byte {at})" in words


def test_small_pickle_of_the_same_loads():
    assert len(read(whole(b"](" + b"\x8f" * 100_000 + b"e"))) == 100_000


dice = random.Random(1)
COUNT = 1000
# Each in as many bytes as pickle.dumps takes for it, and nothing else in the file.
HONEST = {
    "empty dicts": [{} for _ in range(COUNT)],
    "empty lists": [[] for _ in range(COUNT)],
    "empty tuples": [()] * COUNT,
    "none": [None] * COUNT,
    "floats": [dice.random() for _ in range(COUNT)],
    "ints": list(range(COUNT)),
    "texts": [f"layer{n}" for n in range(COUNT)],
    "dicts of one": [{"a": 1} for _ in range(COUNT)],
    "dicts of one int": [{1: 2} for _ in range(COUNT)],
    "dicts of three": [{"a": n, "b": n / 3, "c": str(n)} for n in range(COUNT)],
    "dicts of six": [dict.fromkeys("abcdef", n) for n in range(COUNT)],
    "dicts of dicts": {f"k{n}": {"lr": n / 3, "n": [n]} for n in range(COUNT)},
    "OrderedDicts": [OrderedDict() for _ in range(COUNT)],
    "lists of one": [[1] for _ in range(COUNT)],
    "lists of five": [[1, 2, 3, 4, 5] for _ in range(COUNT)],
    "tuples of one": [(n,) for n in range(COUNT)],
    "tuples of tuples": [((n,), (n, n)) for n in range(COUNT)],
    "sets of one": [{1} for _ in range(COUNT)],
    "sets of six": [{1, 2, 3, 4, 5, 6} for _ in range(COUNT)],
    "frozensets of one": [frozenset([n]) for n in range(COUNT)],
    "a large set": {f"k{n}" for n in range(COUNT)},
    "a large dict": {f"k{n}": n for n in range(COUNT)},
    "complex numbers": [complex(n, 1) for n in range(COUNT)],
    "bytearrays": [bytearray(b"x") for _ in range(COUNT)],
    "arrays": [np.zeros(1) for _ in range(COUNT)],
    "arrays of no elements": [np.zeros(0) for _ in range(COUNT)],
    "arrays in swapped order": [np.zeros(1, ">f4") for _ in range(COUNT)],
    "scalars": [np.float32(n) for n in range(COUNT)],
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", HONEST)
def test_what_pickle_writes_loads_however_much_it_is(case, protocol, monkeypatch):
    """With nothing allowed but for each byte, its length does not matter."""
    monkeypatch.setattr(budget, "MEMORY", 0)
    state = HONEST[case]

    found = read(pickle.dumps(state, protocol))

    assert len(found) == len(state)


def test_empty_sets_are_what_pickle_writes_and_may_be_refused(monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 0)

    with pytest.raises(FileFormatError, match="EMPTY_SET"):
        read(pickle.dumps([set() for _ in range(COUNT)], 4))


def out_of_order(n):
    return random.Random(7).sample(range(n), n)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(lambda: dict.fromkeys(out_of_order(50_257), 1), id="tokens"),
        pytest.param(lambda: set(out_of_order(50_257)), id="set of tokens"),
        pytest.param(lambda: {n: n for n in range(40_000, 0, -1)}, id="descending"),
        pytest.param(lambda: {10 * n: 0.5 for n in range(60_000)}, id="every tenth"),
    ],
)
def test_honest_numbers_as_keys_are_loaded_however_many(state):
    value = state()

    assert read(pickle.dumps(value)) == value


def test_honest_tuples_of_one_are_loaded_however_many(monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 0)  # as if there were millions
    value = [tuple([None]) for _ in range(30_000)]  # noqa: C409 - each a new one

    assert read(pickle.dumps(value)) == value
