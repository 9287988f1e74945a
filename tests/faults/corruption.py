"""Damage to files, counted: what verify and load say of it, and what others do.

``python tests/faults/corruption.py`` damages files of one state in every way below and
reads each. Of a file of mpisave, `verify` has to find all; `load` has to give the state
as it was saved, bit for bit, or raise FileFormatError. Beside it, pickle.load, h5py and
safetensors (where installed) read files of their own of the same state, damaged in the
same ways: how often are they wrong and do not say so?

Every reader works in a process of its own, so that a crash or a hang is counted too.
The exit status says whether mpisave has kept its promise.
"""

import argparse
import collections
import importlib.util
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import h5py
import numpy as np

import mpisave
from mpisave.errors import FileFormatError

# Seconds that one damaged file may take, and memory that its readers may.
HANGS_AFTER_S = 20
MEMORY_NBYTES = 4 * 2**30


def state_of(nbytes):
    """Return a state of arrays and small objects: half of the bytes in one array."""
    rng = np.random.default_rng(5)
    many = max(2, nbytes // 8)
    return {
        "w": rng.standard_normal(many // 2, np.float32).reshape(2, -1),
        "b": rng.integers(0, 2**15, many // 2).astype(np.int16),
        "layers": {
            f"l{i}": rng.integers(0, 255, max(3, nbytes // 32), np.uint8)
            for i in range(8)
        },
        "lr": 0.1,
        "step": 1234567,
        "name": "adam",
        "betas": [0.9, 0.999],
    }


def flat(state, prefix=""):
    """Return the arrays of a state by a name, which all formats can hold."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = np.asarray(value)
    return found


def same(found, expected):
    """Return whether two states are the same, bit for bit."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            same(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, np.ndarray):
        return (
            found.dtype == expected.dtype
            and found.shape == expected.shape
            and found.tobytes() == expected.tobytes()
        )
    return found == expected


# Files: of mpisave, and of others with the same state.


def ours(state, use_binary_format):
    buffer = io.BytesIO()
    mpisave.save(state, buffer, use_binary_format=use_binary_format)
    return buffer.getvalue()


def plain_hdf5(state):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in flat(arrays_of(state)).items():
            file[name] = array
    return buffer.getvalue()


def arrays_of(state):
    """Return what formats without small objects hold of a state."""
    return {k: v for k, v in state.items() if not isinstance(v, (list, str))}


def of_safetensors(state):
    from safetensors.numpy import save

    return save(flat(arrays_of(state)))


FILES = {
    "mpisave pickle": lambda state: ours(state, use_binary_format=False),
    "mpisave HDF5": lambda state: ours(state, use_binary_format=True),
    "pickle": lambda state: pickle.dumps(state, 4),
    "h5py": plain_hdf5,
    "safetensors": of_safetensors,
}


# Readers: each returns a verdict on the bytes of a damaged file.


def verify(data, state):
    try:
        mpisave.verify(io.BytesIO(data))
    except FileFormatError:
        return "found"
    except Exception as exc:
        return f"raised {type(exc).__name__}"
    return "missed"


def load(data, state, **how):
    try:
        found = mpisave.load(io.BytesIO(data), **how)
    except FileFormatError:
        return "refused"
    except Exception as exc:
        return f"raised {type(exc).__name__}"
    return "right" if same(found, state) else "wrong"


def load_unverified(data, state):
    return load(data, state, verify=False)


def by(read):
    """Return a reader of others: whatever it raises, the damage did not go unseen."""

    def judge(data, state):
        try:
            found = read(data)
        except Exception:
            return "refused"
        expected = state if read is pickle.loads else flat(arrays_of(state))
        return "right" if same(found, expected) else "wrong"

    return judge


def read_h5py(data):
    with h5py.File(io.BytesIO(data), "r") as file:
        return in_order({name: np.asarray(file[name][()]) for name in file})


def in_order(found):
    """Return arrays in the order of the state: these formats sort them by name."""
    names = [*flat(arrays_of(state_of(SMALL_NBYTES)))]
    return {name: found.pop(name) for name in names if name in found} | found


def read_safetensors(data):
    from safetensors.numpy import load as load_them

    return in_order(load_them(data))


OURS = {"verify": verify, "load": load, "load, verify=False": load_unverified}
READERS = {
    "mpisave pickle": OURS,
    "mpisave HDF5": OURS,
    "pickle": {"pickle.load": by(pickle.loads)},
    "h5py": {"h5py": by(read_h5py)},
    "safetensors": {"safetensors": by(read_safetensors)},
}
# What mpisave may say. Without checksums, a wrong value is what was asked for.
ALLOWED = {
    "verify": {"found"},
    "load": {"right", "refused"},
    "load, verify=False": {"right", "refused", "wrong"},
}


# Damage: each way yields damaged files; some of them as they were, which are left out.


def flips(data, rng, many):
    """One bit, at random."""
    for at in rng.integers(0, 8 * len(data), many).tolist():
        yield with_bit(data, at // 8, at % 8)


def every_byte(data, rng, bits, step):
    """One bit of every byte, or each of its bits."""
    for at in range(0, len(data), step):
        for bit in range(8) if bits == 8 else (at % 8,):
            yield with_bit(data, at, bit)


def with_bit(data, at, bit):
    altered = bytearray(data)
    altered[at] ^= 1 << bit
    return bytes(altered)


def truncations(data, rng, step):
    for nbytes in range(0, len(data), step):
        yield data[:nbytes]


def zeroed(data, rng, many, block):
    """A block that was never written."""
    starts = [*range(0, len(data), block)]
    for start in rng.permutation(starts)[:many].tolist():
        stop = min(start + block, len(data))
        yield data[:start] + bytes(stop - start) + data[stop:]


def swapped(data, rng, many, block):
    """Two blocks in each other's place."""
    starts = np.arange(0, len(data) - block + 1, block)
    for _ in range(many):
        a, b = sorted(rng.choice(starts, 2, replace=False).tolist())
        first, second = data[a : a + block], data[b : b + block]
        yield data[:a] + second + data[a + block : b] + first + data[b + block :]


def inserted(data, rng, many):
    for _ in range(many):
        at, nbytes = rng.integers(0, len(data) + 1), rng.choice([1, 8, 64, 512, 4096])
        yield data[:at] + rng.bytes(nbytes) + data[at:]


def deleted(data, rng, many):
    for _ in range(many):
        at, nbytes = rng.integers(0, len(data)), rng.choice([1, 8, 64, 512, 4096])
        yield data[:at] + data[at + nbytes :]


def tails(data, rng, many):
    """The end of the file twice."""
    for nbytes in rng.integers(1, len(data) + 1, many).tolist():
        yield data + data[-nbytes:]


def trailing(data, rng, many):
    for nbytes in rng.integers(1, 10_000, many).tolist():
        yield data + (bytes(nbytes) if nbytes % 2 else rng.bytes(nbytes))


def concatenated(data, rng):
    """Two files as one, in either order."""
    state = state_of(1000)
    for make in (FILES["mpisave pickle"], FILES["mpisave HDF5"], FILES["pickle"]):
        other = make(state)
        yield data + other
        yield other + data
    yield data + data


def damages(small, large, many, *, bits, one_in=1, seed=0):
    """Yield name and bytes of each damaged file.

    Parameters
    ----------
    small, large : bytes
        Whole files: one whose every byte is damaged, one that is damaged at random.
    many : int
        Number of bits that are flipped at random; of the others, some are as many.
    bits : {1, 8}
        How many bits of every byte of the small file.
    one_in : int
        Of the small file, one in so many bytes and lengths is taken.
    """
    rng = np.random.default_rng(seed)
    some = max(5, many // 20)
    ways = [
        ("random bit", large, flips(large, rng, many)),
        ("bit of every byte", small, every_byte(small, rng, bits, one_in)),
        ("truncation, small", small, truncations(small, rng, one_in)),
        ("truncation, large", large, truncations(large, rng, len(large) // some)),
        ("zeroed 512 B", large, zeroed(large, rng, some, 512)),
        ("zeroed 4 KiB", large, zeroed(large, rng, some, 4096)),
        ("swapped 512 B", large, swapped(large, rng, some, 512)),
        ("swapped 4 KiB", large, swapped(large, rng, some, 4096)),
        ("insertion", large, inserted(large, rng, some)),
        ("deletion", large, deleted(large, rng, some)),
        ("tail twice", large, tails(large, rng, some)),
        ("trailing bytes", large, trailing(large, rng, some)),
        ("concatenation", large, concatenated(large, rng)),
    ]
    for name, whole, made in ways:
        yield from ((name, data) for data in made if data != whole)


SMALL_NBYTES, LARGE_NBYTES = 96, 512 * 2**10
# Damage in the small files, of which the state is another.
OF_SMALL = {"bit of every byte", "truncation, small"}


def read_all(file, many, *, bits, one_in=1, skip=0):
    """Yield way, reader and verdict of all that is damaged of one kind of file."""
    states = state_of(SMALL_NBYTES), state_of(LARGE_NBYTES)
    whole = [FILES[file](state) for state in states]
    for state, data in zip(states, whole, strict=True):
        for name, reader in READERS[file].items():
            if reader(data, state) not in ("right", "missed"):
                raise SystemExit(f"{file}: {name} does not read the whole file")
    for number, (way, data) in enumerate(
        damages(*whole, many, bits=bits, one_in=one_in)
    ):
        if number < skip:
            continue
        state = states[0 if way in OF_SMALL else 1]
        for name, reader in READERS[file].items():
            yield number, way, name, reader(data, state)


Counts = collections.Counter


def work(args):
    """Read all in this process, telling each verdict: the parent counts."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    signal.alarm(HANGS_AFTER_S)
    for verdict in read_all(args.work, args.many, bits=args.bits, skip=args.skip):
        signal.alarm(HANGS_AFTER_S)  # by default, it kills
        print(*verdict, sep="\t", flush=True)


def counted(file, many, bits):
    """Return the verdicts on one kind of file, by way and reader."""
    counts, skip = collections.defaultdict(Counts), 0
    readers = list(READERS[file])
    while True:
        argv = ["--work", file, "--many", many, "--bits", bits, "--skip", skip]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                [sys.executable, sys.argv[0], *map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            at, done = skip, 0  # the next file, and how many readers are done with it
            for line in process.stdout:
                number, way, reader, verdict = line.rstrip("\n").split("\t")
                counts[way, reader][verdict] += 1
                at, done = int(number), readers.index(reader) + 1
            process.wait()
            errors.seek(0)
            text = errors.read().decode(errors="replace")
        if process.returncode == 0:
            return counts
        if process.returncode > 0:
            raise SystemExit(f"{file}: {text}")
        # Killed by a signal, in the reader that did not come back.
        verdict = "hung" if process.returncode == -signal.SIGALRM else "crashed"
        if done == len(readers):
            at, done = at + 1, 0
        counts["(any)", readers[done]][verdict] += 1
        skip = at + 1


def misses(counts):
    """Return what mpisave must not say, as a list of (way, reader, verdict, n)."""
    return [
        (way, reader, verdict, n)
        for (way, reader), verdicts in counts.items()
        for verdict, n in verdicts.items()
        if verdict not in ALLOWED.get(reader, ())
    ]


def table(file, counts):
    """Return lines: for each reader, how many of how many in each way."""
    readers = list(dict.fromkeys(reader for _, reader in counts))
    lines = []
    for reader in readers:
        total = sum((v for (_, r), v in counts.items() if r == reader), Counts())
        shown = ", ".join(f"{verdict} {n}" for verdict, n in sorted(total.items()))
        share = 100 * total["wrong"] / total.total()
        lines.append(
            f"{file}: {reader}: {total.total()}: {shown} ({share:.1f} % wrong)"
        )
        lines += [
            f"    {way:20} {v.total():6}  "
            + ", ".join(f"{verdict} {n}" for verdict, n in sorted(v.items()))
            for (way, r), v in counts.items()
            if r == reader
        ]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", type=int, default=10_000, help="random bits")
    parser.add_argument("--bits", type=int, choices=(1, 8), default=8)
    parser.add_argument("--only", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--work", choices=FILES, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    failed, every = [], {}
    for file in args.only:
        if file == "safetensors" and importlib.util.find_spec(file) is None:
            print("safetensors is not installed: left out")
            continue
        began = time.monotonic()
        counts = counted(file, args.many, args.bits)
        print(*table(file, counts), sep="\n")
        print(f"    in {time.monotonic() - began:.0f} s", flush=True)
        every[file] = [[*at, dict(verdicts)] for at, verdicts in counts.items()]
        if READERS[file] is OURS:
            failed += [(file, *miss) for miss in misses(counts)]
    if args.json:
        args.json.write_text(json.dumps(every, indent=1))
    for file, way, reader, verdict, n in failed:
        print(f"MISSED: {file}, {way}: {reader} {verdict} {n} times")
    print("mpisave:", "misses" if failed else "every damage found or without effect")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
