"""HDF5 files that mean harm: refused, or read as h5py reads them; nothing else is read.

They are made by `hostile_hdf5`, and loaded by a process of its own: a crash is one
failed test.
"""

import functools
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import hostile_hdf5
import numpy as np
import pytest
from helpers import assert_equal_states
from hostile_hdf5 import CASES, LEGAL, MAY_LOAD, SECRET

import mpisave
from mpisave.errors import FileFormatError, StateDictError
from mpisave.formats import foreign_hdf5, hdf5, hdf5_inspection, index
from mpisave.source import Source

HERE = Path(hostile_hdf5.__file__).parent

# Of processor time, a file of these lengths may take 10 s on top of a start.
DEADLINE_S = 30
MOST_NBYTES = 64 * 2**20


@functools.cache
def libraries_nbytes():
    """Return what a process takes that imports what the inspection needs."""
    code = (
        "import h5py, mpisave, resource;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


REACHING_OUT = [name for name in CASES if re.match("external|virtual|soft", name)]


class Worker:
    """Loads or compares files in a process of its own, one after the other."""

    def __init__(self, what, *under):
        self.command = [*under, sys.executable, str(HERE / "hostile_hdf5.py"), what]
        self.process = None

    def start(self):
        path = os.pathsep.join([str(Path(mpisave.__file__).parents[1]), *sys.path])
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, path):
        """Return what came of a file."""
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:  # one failed test: the next one has a process of its own
            code = self.process.wait()
            self.end()
            pytest.fail(f"the process ended with {code} at {path}")
        found = json.loads(line)
        assert found["file"] == path.name
        return found

    def end(self):
        if self.process is not None:
            with self.process as ended:
                ended.stdin.close()
            self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.end()


@pytest.fixture(scope="module")
def outcome_of():
    """Return a function that loads a file: what came of it, and what h5py reads."""
    with Worker("load") as load, Worker("compare") as compare:

        def outcome(path):
            found = load(path)
            same = found["refused"] is None and compare(path)["same"]
            return found | {"same": same}

        yield outcome


def assert_harmless(name, outcome):
    """Fail unless a file was refused, or read as h5py does, in time and in memory."""
    assert outcome["refused"] is not None or outcome["same"] is True, name
    assert outcome["seconds"] < DEADLINE_S, name
    assert outcome["others"] == [], name
    for most in ("most_kib", "most_kib_of_children"):
        limit = libraries_nbytes() + outcome["nbytes"] + MOST_NBYTES
        assert outcome[most] * 1024 < limit, name


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, outcome_of):
    """Return a function of a case's name: what came of its file, which loads once."""
    folder = tmp_path_factory.mktemp("hostile")
    files = {name: file for file, name in hostile_hdf5.write_all(folder, CASES).items()}
    return functools.cache(lambda name: outcome_of(folder / files[name]))


def test_there_are_at_least_sixty_files():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_hostile_file_is_refused_or_read_as_h5py_reads_it(outcomes, name):
    assert_harmless(name, outcomes(name))

    refused = outcomes(name)["refused"] is not None
    assert refused or name in MAY_LOAD
    assert not (refused and name in LEGAL)


PATHS = {
    "soft link": "'/s': it is a soft link",
    "external link deep down": "'/a/b/c/d': it is an external link",
    "group in itself": "'/a/b/c/again': it is also there",
    "2**30 ways to one dataset": "'/g1/l': it is also there",
    "dataset of two names": "it is also there under another name",
    "65 levels": "deeper than 64 levels",
    "external storage": "'/x': it has external storage",
    "virtual dataset of itself": "'/x': it is virtual",
    "gzip that inflates short": "'/x': it is stored in chunks",
    "compact": "'/x': it is stored in its header",
    "never written": "'/x': its data were never written",
    "object references": "'/x': its datatype is refused",
    "named datatype": "'/kind': it is a named datatype",
    "bytes that wrap": "'/w'",
    "larger shape": "'/w'",
    "smaller shape": "'/w': 2584 bytes are stored, its shape needs 2432",
    "attribute of ours on a group": "'/g': it has the attribute 'mpisave.kind'",
    "attribute of ours on the root": "'/': it has the attribute 'mpisave.format'",
}


@pytest.mark.parametrize("name", PATHS)
def test_refusal_says_where_and_why(outcomes, name):
    assert PATHS[name] in outcomes(name)["refused"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_file_but_the_one_that_is_loaded_is_even_asked_for(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    written = hostile_hdf5.write_all(files, REACHING_OUT)
    trace = tmp_path / "trace"

    calls = "trace=open,openat,openat2,creat,link,linkat,unlink,rename,execve"
    with Worker(
        "load", "strace", "--seccomp-bpf", "-f", "-qq", "-e", calls, "-o", str(trace)
    ) as load:
        lines = [load(files / name) for name in written]

    text = trace.read_text(errors="replace")
    assert {line["refused"] is None for line in lines} == {False}
    assert text.count("execve(") >= len(REACHING_OUT)
    reached = re.findall(r'open[^"]*"([^"]*)"', text)
    assert len(reached) > 100 * len(REACHING_OUT)
    ours = [name for name in reached if str(files) in name and ".hostile" not in name]
    assert ours == []
    names = {"hostname", "zero", "secret", "secret.h5", "none", "none.h5", "made.h5"}
    assert {Path(name).name for name in reached} & names == set()
    assert SECRET.decode() not in text


def assert_flips_do_no_harm(folder, outcome_of, count, seed):
    loaded = 0
    for number, (name, data) in enumerate(hostile_hdf5.flipped(folder, count, seed)):
        path = folder / f"{number}.hostile"
        path.write_bytes(data)
        outcome = outcome_of(path)
        assert_harmless(name, outcome)
        loaded += outcome["refused"] is None
    assert loaded > count // 10  # otherwise nothing was compared


def test_flipped_bytes_of_metadata_do_no_harm(tmp_path, outcome_of):
    assert_flips_do_no_harm(tmp_path, outcome_of, 20, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 28))
def test_many_flipped_bytes_of_metadata_do_no_harm(tmp_path, outcome_of, seed):
    assert_flips_do_no_harm(tmp_path, outcome_of, 24, seed)


# What other programs write, and mpisave reads.

STATE = {
    "b": {"be": np.arange(4, dtype=">i2"), "empty": np.zeros((0, 3)), "g": {}},
    "bool": np.array([[True], [False]]),
    "complex": np.array([1 - 2j], np.complex64),
    "half": np.float16([1, 2]),
    "w": np.arange(60_000.0).reshape(200, 300),
    "x": np.array(7),
}


def write(file, state):
    for key, value in state.items():
        if isinstance(value, dict):
            write(file.create_group(key), value)
        else:
            file[key] = value


@pytest.fixture(params=[{}, {"libver": "latest"}], ids=["oldest", "latest"])
def foreign(request, tmp_path):
    path = tmp_path / "foreign.h5"
    with h5py.File(path, "w", **request.param) as file:
        write(file, STATE)
    return path


def test_file_of_another_program_is_dicts_of_arrays(foreign):
    assert_equal_states(mpisave.load(foreign), STATE)
    assert_equal_states(mpisave.load(io.BytesIO(foreign.read_bytes())), STATE)


def test_checks_say_the_same_in_this_process(foreign):
    data = foreign.read_bytes()

    nodes = hdf5_inspection.found_in(io.BytesIO(data), len(data))

    found = index.decode_foreign(nodes.encode(), len(data))
    assert {("w",), ("b", "be"), ("x",)} < found.arrays().keys()


@pytest.mark.parametrize("name", [n for n in PATHS if n != "65 levels"])
def test_refusals_are_the_same_in_this_process(tmp_path, name):
    data = CASES[name](tmp_path)

    with pytest.raises(FileFormatError) as caught:
        hdf5_inspection.found_in(io.BytesIO(data), len(data))

    assert PATHS[name] in str(caught.value)


def test_part_of_a_foreign_file_is_loaded_by_key(foreign):
    found = mpisave.load(foreign, keys=["b/be", "x"])

    assert_equal_states(found, {"b": {"be": STATE["b"]["be"]}, "x": STATE["x"]})


def test_foreign_file_is_mapped(foreign):
    found = mpisave.load(foreign, mmap=True)

    assert_equal_states(found, STATE)
    assert not found["w"].flags.writeable


def test_box_of_a_foreign_file_is_loaded_with_like(foreign):
    like = {"w": mpisave.Shard(np.empty((50, 300)), (200, 300), (100, 0))}

    found = mpisave.load(foreign, like=like, unexpected="skip", keys="w")

    np.testing.assert_array_equal(found["w"].array, STATE["w"][100:150])


def test_like_that_does_not_fit_a_foreign_file_is_refused(foreign):
    with pytest.raises(StateDictError, match="'w'"):
        mpisave.load(foreign, keys="w", like={"w": np.zeros(3)})


def test_foreign_file_that_shrinks_is_torn(foreign):
    data = foreign.read_bytes()

    with pytest.raises(FileFormatError, match=f"torn: {len(data) - 1} of {len(data)}"):
        mpisave.load(io.BytesIO(data[:-1]))


# Files of ours that stock h5py has opened for writing.


def keep(file):
    pass


def rename(file):
    file.move("w", "renamed")


def delete(file):
    del file["w"]


def append(file):
    file["more"] = np.arange(3)


def change_attribute(file):
    file.attrs["lr"] = 7.0


def change_values(file):
    file["w"][0] = 7


def swap(file):
    file.move("w", "t")
    file.move("v", "w")
    file.move("t", "v")


EDITS = (keep, rename, delete, append, change_attribute, change_values, swap)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", [3, 100_000])
def test_file_of_ours_that_h5py_opened_for_writing_is_refused(tmp_path, edit, size):
    path = tmp_path / "ours.h5"
    state = {"w": np.arange(size), "v": -np.arange(size), "lr": 0.5}
    mpisave.save(state, path, use_binary_format=True)
    with h5py.File(path, "r+") as file:
        edit(file)

    with pytest.raises(FileFormatError, match="HDF5 file of mpisave without an index"):
        mpisave.load(path)


def test_file_of_ours_whose_marks_were_removed_is_that_of_another_program(tmp_path):
    path = tmp_path / "ours.h5"
    state = {"w": np.arange(3), "n": {"v": np.arange(2.0)}}
    mpisave.save(state, path, use_binary_format=True)
    with h5py.File(path, "r+") as file:
        file["more"] = np.arange(4)
        for name in list(file.attrs):
            del file.attrs[name]
    with path.open("r+b") as file:
        file.seek(hdf5.MARK_OFFSET)
        file.write(bytes(len(hdf5.MARK)))

    found = mpisave.load(path)

    assert found["w"].tolist() == [0, 1, 2]
    assert found["n"]["v"].tolist() == [0, 1]
    assert found["more"].tolist() == [0, 1, 2, 3]


# The process that inspects.


class Harmful:
    """Stands in for the process: answers what it likes."""

    def __init__(self, data):
        self.data = data

    def __call__(self, there, nbytes):
        there.sendall(self.data)
        return subprocess.Popen(
            [sys.executable, "-c", ""], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )


def answer(nodes):
    text = json.dumps(nodes).encode()
    return hdf5_inspection.MESSAGE.pack(b"A", len(text), 0) + text


def array_node(offset=0, nbytes=8, shape=(1,), dtype="<f8", key=("w",)):
    return [list(key), "array", dtype, list(shape), offset, nbytes]


ROOT = [[], "dict", None]
LIES = {
    "nothing": b"",
    "noise": b"x" * 100,
    "no JSON": hdf5_inspection.MESSAGE.pack(b"A", 3, 0) + b"{{{",
    "an answer without an end": hdf5_inspection.MESSAGE.pack(b"A", 2**62, 0),
    "a list": answer([]),
    "no nodes": answer({"nodes": []}),
    "beyond the file": answer({"nodes": [ROOT, array_node(offset=10**9)]}),
    "larger than the file": answer(
        {"nodes": [ROOT, array_node(nbytes=8 * 10**9, shape=(10**9,))]}
    ),
    "negative": answer({"nodes": [ROOT, array_node(offset=-8)]}),
    "objects": answer({"nodes": [ROOT, array_node(dtype="|O8")]}),
    "a small object": answer({"nodes": [ROOT, [["w"], "object", 5]]}),
    "overlapping": answer({"nodes": [ROOT, array_node(), array_node(key=("v",))]}),
    "twice": answer({"nodes": [ROOT, array_node(), array_node(offset=8)]}),
    "in no group": answer({"nodes": [ROOT, array_node(key=("a", "b"))]}),
    "key of a number": answer({"nodes": [ROOT, array_node(key=(1,))]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_the_process_answers_is_checked(foreign, monkeypatch, lie):
    monkeypatch.setattr(foreign_hdf5, "_start", Harmful(LIES[lie]))

    with pytest.raises(FileFormatError):
        mpisave.load(foreign)


def program(monkeypatch, text):
    monkeypatch.setattr(foreign_hdf5, "_PROGRAM", text)


def test_crash_of_the_process_is_a_format_error(foreign, monkeypatch):
    program(monkeypatch, "import os; os.kill(os.getpid(), 11)")

    with pytest.raises(FileFormatError, match=r"HDF5 crashed \(SIGSEGV\)"):
        mpisave.load(foreign)


def test_failure_of_the_process_is_told(foreign, monkeypatch):
    program(monkeypatch, "raise ValueError('no such thing')")

    with pytest.raises(FileFormatError, match="ValueError: no such thing"):
        mpisave.load(foreign)


def test_process_that_hangs_is_ended(foreign, monkeypatch):
    program(
        monkeypatch,
        "import sys; sys.path[:] = sys.argv.pop().splitlines();"
        "from mpisave.formats import hdf5_inspection as h;"
        "h._SECONDS = 1; h.limit_this_process(0)\nwhile True: pass",
    )

    with pytest.raises(FileFormatError, match="more processor time"):
        mpisave.load(foreign)


def test_process_that_stands_still_is_ended(foreign, monkeypatch):
    monkeypatch.setattr(foreign_hdf5, "_PATIENCE_S", 0.5)
    program(monkeypatch, "import time; time.sleep(60)")

    with pytest.raises(FileFormatError, match="asked for nothing"):
        mpisave.load(foreign)


def test_process_can_open_nothing_and_has_little_memory(foreign, monkeypatch):
    program(
        monkeypatch,
        "import sys; sys.path[:] = sys.argv.pop().splitlines();"
        "from mpisave.formats import hdf5_inspection as h;"
        "h.limit_this_process(0)\n"
        "try: open('/etc/hostname')\n"
        "except OSError as exc: print(exc.errno, end=' ', file=sys.stderr)\n"
        "try: bytearray(2**27)\n"
        "except MemoryError: print('no memory', file=sys.stderr)\n"
        "sys.exit(3)",
    )

    with pytest.raises(FileFormatError, match="24 no memory"):
        mpisave.load(foreign)


def test_h5py_that_is_missing_is_an_import_error(foreign, monkeypatch):
    program(
        monkeypatch,
        "import sys; sys.path[:] = sys.argv.pop().splitlines();"
        "sys.modules['h5py'] = None;"
        "from mpisave.formats.hdf5_inspection import main; main()",
    )

    with pytest.raises(ImportError, match="need h5py"):
        mpisave.load(foreign)


def test_process_is_told_nothing_of_mpi(foreign, monkeypatch):
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    program(
        monkeypatch,
        "import os, sys; sys.exit(' '.join(n for n in os.environ if n.startswith"
        "(('PMI', 'OMPI', 'SLURM'))) or 'none of them')",
    )

    with pytest.raises(FileFormatError, match="failed: none of them"):
        mpisave.load(foreign)


def test_pages_are_those_of_the_file(foreign):
    data = foreign.read_bytes()
    here, there = socket.socketpair()
    with here, there, Source(foreign) as source:
        pages = hdf5_inspection._Pages(there, len(data))
        out = bytearray(40_000)

        pages._page = lambda number: source.read(number * 2**14, 2**14)
        pages.seek(-50_000, os.SEEK_END)
        done = pages.readinto(out)
        at = pages.tell()
        for beyond in (len(data), 2**63, 2**64 - 1):
            pages.seek(beyond)
            with pytest.raises(OSError, match="beyond the end"):
                pages.readinto(bytearray(1))

    assert done == len(out)
    assert out == data[-50_000:][:40_000]
    assert at == len(data) - 10_000
    for wrong in (lambda: pages.write(b"x"), pages.truncate):
        with pytest.raises(OSError, match="read"):
            wrong()
