"""Write the first inputs of the fuzzers: python tests/fuzz/seeds.py FOLDER."""

import io
import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np

import mpisave
from mpisave.formats import index

STATES = (
    {
        "w": np.arange(6, dtype=">i2").reshape(2, 3),
        "b": np.zeros(0),
        "s": np.float32(1),
    },
    {"a": [1, 2.5, None, True, (1, "x", b"y")], "n": {"c": 1 + 2j, "d": 10**30}},
    {"f": np.asfortranarray(np.ones((2, 3), "c8")), "h": np.array(1, "f2")},
    {"big": np.zeros(2**18 + 1), "text": "\N{GREEK SMALL LETTER ALPHA}"},
    {"float": float("nan"), "surrogate": "\ud800", "array": bytearray(b"12")},
    [],
)
FOREIGN = (
    *STATES,
    {1, 2, 3},
    frozenset(["a", b"b"]),
    OrderedDict(a=1, b=OrderedDict()),
    {"shared": [made := np.arange(3), made]},
    np.bool_(1),
    {1: 2, 2: 3, None: 4, 0.5: 6, b"k": 7},
)


def of_ours(state):
    """Yield inputs of fuzz_index from what is saved."""
    for is_hdf5 in (False, True):
        out = io.BytesIO()
        mpisave.save(state, out, use_binary_format=is_hdf5, comm=None)
        whole = out.getvalue()
        offset, nbytes = index.find(whole[-index.TRAILER_NBYTES :], len(whole))
        yield (b"h" if is_hdf5 else b"j") + whole[offset : offset + nbytes]
        yield b"t" + whole[offset:]
        if len(whole) < 2**16:
            yield b"w" + whole


def write(folder, inputs):
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(inputs):
        (folder / f"seed-{number:03}").write_bytes(data)


def main(folder):
    states = [
        {"state": state} if type(state) is not dict else state for state in STATES
    ]
    write(folder / "index", [data for state in states for data in of_ours(state)])
    pickles = [pickle.dumps(s, n) for s in FOREIGN for n in range(6)]
    write(folder / "unpickle", [data for data in pickles if len(data) < 2**16])
    words = ["mpisave", "container", "facts", "skeleton_crc32c", "nodes", "per_rank"]
    words += ["array", "object", "opaque", "dict", "list", "tuple", "scalar", "complex"]
    words += ["pickle", "hdf5", "bfloat16", "<f4", "bytes", "bytearray", "int", "str"]
    lines = [json.dumps(f'"{word}"') for word in words]
    (folder / "index.dict").write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
