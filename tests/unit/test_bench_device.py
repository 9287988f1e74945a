"""The measurements of arrays on a device, with a stand-in for it. Nothing is timed."""

import argparse
import importlib.util
import pickle
import statistics
import threading

import numpy as np
import pytest
from fakes import FakeAdopted, FakeGpu, put_in_place

import mpisave
from mpisave.bench import __main__ as main
from mpisave.bench import copies, device, device_peers, device_sides, states, turns
from mpisave.bench.content import STEP_NBYTES, Content, seen_in_pickle
from mpisave.bench.meter import Meter

MIB = 2**20
HAS_TORCH = importlib.util.find_spec("torch") is not None
SAVES = ["bound: pwrite", "bound: copy", "mpisave pickle", "mpisave HDF5"]
SAVING_PEERS = ["cupy.save, a file an array", "cupy.asnumpy, pickle protocol 5"]
LOADS = [
    *("bound: pread", "bound: copy"),
    *("mpisave in place", "mpisave in place, no verify"),
    *("mpisave device=", "mpisave device=, no verify"),
]
LOADING_PEERS = ["cupy.load, a file an array"]
if HAS_TORCH:
    SAVING_PEERS.insert(0, "torch.save")
    LOADING_PEERS.insert(0, "torch.load, map_location")
LOADING_PEERS.append("mpisave to the host, cupy.asarray")


class SoloComm:
    """What the sides ask of a communicator of one rank."""

    rank = 0
    size = 1

    def Barrier(self):
        pass

    def allgather(self, item):
        return [item]

    def bcast(self, item):
        return item


@pytest.fixture(autouse=True)
def library(monkeypatch):
    # One rank saves without MPI.
    monkeypatch.setattr(
        "mpisave.saving.communicator", lambda _: mpisave.comms.SoloComm()
    )
    return put_in_place(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path


def arguments(**given):
    plain = {"mib": [6], "arrays": 20, "repeats": 3, "fsync": "off", "sides": None}
    return argparse.Namespace(**{**plain, "seconds": 600, **given})


def measure(folder, gpu=None, **given):
    return device.measure(SoloComm(), arguments(**given), folder, gpu or FakeGpu())


def content_of(shapes):
    content = Content(shapes)
    return content, {key: content.array(key) for key in shapes}


# All sides


def test_one_rank_saves_and_loads_beside_bounds_and_peers(folder):
    rows = measure(folder)

    sides = [(row["what"], row["side"]) for row in rows]
    assert sides == [
        *(("save", side) for side in SAVES + SAVING_PEERS),
        *(("load", side) for side in LOADS + LOADING_PEERS),
    ]
    for row in rows:
        is_bound, is_peer = (
            "bound" in row["side"],
            row["side"]
            in [
                *SAVING_PEERS,
                *LOADING_PEERS,
            ],
        )
        assert row["turns"] == (2 if is_peer else 3)
        assert (row["mib"], row["ranks"]) == (6, 1)
        assert row["version"]
        assert row["fsync"] == ("off" if row["what"] == "save" else None)
        # Memory is of mpisave alone.
        assert (row["pinned_mib"] == 3) == (not is_bound and not is_peer)
        assert (row["device_mib"] is None) == (is_bound or is_peer)
    assert list(rows[0])[:2] == ["what", "side"]
    assert not list((folder / "files").iterdir())


def test_ratio_is_of_the_slower_bound(folder):
    rows = measure(folder, sides=["save"])

    median = {row["side"]: row["median_s"] for row in rows}
    slower = max(median["bound: pwrite"], median["bound: copy"])
    for row in rows[2:]:
        assert row["of_bound"] == pytest.approx(slower / row["median_s"])


def test_bounds_copy_the_bytes_of_the_state_in_steps(folder):
    gpu = FakeGpu()

    measure(folder, gpu, repeats=1, sides=["mpisave pickle", "in place, no verify"])

    for way in ("to host", "to device"):
        moved = [nbytes for direction, nbytes in gpu.queued if direction == way]
        # Checks copy to the host as well; small arrays are a copy each.
        assert sum(moved) >= 2 * 5.9 * MIB
        assert max(moved) <= STEP_NBYTES


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["save"], {"save": SAVES + SAVING_PEERS}),
        (["load"], {"load": LOADS + LOADING_PEERS}),
        (["HDF5"], {"save": [*SAVES[:2], "mpisave HDF5"]}),
        (["cupy.load"], {"load": [*LOADS[:2], "cupy.load, a file an array"]}),
    ],
)
def test_words_choose_phases_and_sides(folder, words, found):
    rows = measure(folder, sides=words, repeats=1)

    sides = {}
    for row in rows:
        sides.setdefault(row["what"], []).append(row["side"])
    assert sides == found


def test_fsync_is_measured_where_it_is_asked_for(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(device_sides.os, "fsync", synced.append)

    rows = measure(folder, sides=["save"], repeats=1, fsync="both")

    assert [row["fsync"] for row in rows[:: len(rows) - 1]] == ["off", "on"]
    assert len(rows) == 2 * len(SAVES + SAVING_PEERS)
    assert synced


def test_a_peer_that_does_not_work_is_left_out_and_said(folder, monkeypatch, capsys):
    def save(self, folder, *, durable):
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(device_peers.CupySave, "save", save)

    rows = measure(folder, repeats=1)

    assert not any(row["side"].startswith("cupy.save") for row in rows)
    said = capsys.readouterr().err
    assert "cupy.save, a file an array is left out: RuntimeError: no such thing" in said
    assert "cupy.load, a file an array is left out" in said


def set_an_element(state):
    next(iter(state.values()))._host[0] = 7


@pytest.mark.parametrize("side", ["mpisave pickle", "mpisave HDF5"])
def test_a_save_of_other_bytes_is_refused(folder, monkeypatch, side):
    save = mpisave.save

    def altered(state, path, **options):
        state = {key: FakeAdopted(array._host.copy()) for key, array in state.items()}
        set_an_element(state)
        return save(state, path, **options)

    monkeypatch.setattr(device_sides.mpisave, "save", altered)

    with pytest.raises(RuntimeError, match=r"1 arrays differ, 'layer0\.weight' first"):
        measure(folder, sides=[side], repeats=1)


def test_a_load_that_loads_nothing_is_refused(folder, monkeypatch):
    monkeypatch.setattr(device_sides.mpisave, "load", lambda *_, like=None, **__: like)

    with pytest.raises(RuntimeError, match="20 arrays differ"):
        measure(folder, sides=["in place"], repeats=1)


# Parts


def test_content_is_found_again_in_memory_and_in_pickles(tmp_path):
    shapes = {"a": (3,), "b": (STEP_NBYTES // 4 + 7, 2), "c": ()}
    content, arrays = content_of(shapes)
    path = tmp_path / "x"
    path.write_bytes(pickle.dumps(arrays, 4))
    seen = seen_in_pickle(path)

    content.check(arrays, list(shapes))
    content.check(seen, list(shapes))

    assert len({array.tobytes()[:4] for array in arrays.values()}) == 3
    arrays["b"][-1, -1] += 1
    path.write_bytes(pickle.dumps(arrays, 4))
    for found in (arrays, seen_in_pickle(path)):
        with pytest.raises(RuntimeError, match="1 arrays differ, 'b' first"):
            content.check(found, list(shapes))
    with pytest.raises(RuntimeError, match="3 arrays are there, not the 2"):
        content.check(arrays, ["a", "b"])


@pytest.mark.parametrize(
    "wrong", [np.zeros(3, np.float32), np.zeros(3, np.int32), np.zeros((3, 1))]
)
def test_other_values_dtypes_and_shapes_differ(wrong):
    content, _ = content_of({"a": (3,)})
    gpu = FakeGpu()

    with pytest.raises(RuntimeError, match="differ"):
        content.check({"a": wrong}, ["a"])
    with pytest.raises(RuntimeError, match="differ"):
        copies.Copies(gpu).check(content, {"a": gpu.array(wrong)}, ["a"])


def test_copies_wait_before_a_buffer_is_used_again():
    content, arrays = content_of({"a": (5 * STEP_NBYTES // 8,), "b": (1,)})
    gpu = FakeGpu()
    held = {key: gpu.array(array) for key, array in arrays.items()}
    own = copies.Copies(gpu)
    own.check(content, held, list(held))
    parts = copies.steps_of(gpu, held.values())

    own.to_host(parts)
    own.to_device(parts)

    assert [nbytes for _, nbytes in gpu.queued[-4:]] == [
        *(STEP_NBYTES, STEP_NBYTES, STEP_NBYTES // 2, 4)
    ]
    # What was in the buffers, not the 0xDD of a copy that nobody waited for.
    assert not any((array._host.view(np.uint8) == 0xDD).all() for array in parts)


def test_jobs_of_several_threads_are_all_done_and_fail_aloud():
    done = []

    def fail():
        raise OSError("the disk")

    for threads in (1, 3):
        copies.run_all(threads, (lambda n=n: done.append(n) for n in range(50)))
        with pytest.raises(OSError, match="the disk"):
            copies.run_all(threads, iter([fail]))

    assert sorted(done) == sorted([*range(50)] * 2)


def test_memory_of_the_first_run_is_measured_at_its_peak():
    gpu = FakeGpu()
    gpu.used = 5 * MIB
    seen = threading.Event()
    ask = gpu.used_nbytes
    meter = Meter(SoloComm(), gpu)

    def watched():
        if gpu.used == 12 * MIB:
            seen.set()
        return ask()

    def run():
        gpu.used = 12 * MIB
        assert seen.wait(10)
        gpu.used = 6 * MIB
        return np.full(30 * MIB, 1, np.uint8)

    gpu.used_nbytes = watched
    measured = meter.around("x", run)

    assert measured().nbytes == 30 * MIB
    first = dict(meter.found["x"])
    measured()
    assert first["device_mib"] == 7
    assert first["pinned_mib"] == 3
    assert 29 < first["host_mib"] < 60
    assert meter.found == {"x": first}


def test_a_fifth_of_mixed_arrays_is_small():
    whole = states.mixed(64 * MIB, 300)

    nbytes = [4 * shape[0] for shape in whole.shapes.values()]
    small = [n for n in nbytes if n < 64 * 2**10]
    large = {n for n in nbytes if n >= 64 * 2**10}
    assert (len(nbytes), len(small), len(large)) == (300, 60, 1)
    assert abs(whole.nbytes - 64 * MIB) < 2**10
    assert len(states.mixed(1, 300).shapes) == 300


# Turns


class Clock:
    """Sides move it on."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def side(self, name, seconds, most=None):
        def run():
            self.now += seconds

        return turns.Side(name, run, most=most)


@pytest.mark.parametrize(
    ("seconds", "counts"),
    [
        (None, [5, 5, 2]),
        (0, [1, 1, 1]),  # once whatever it takes
        (16, [1, 1, 1]),
        (17, [2, 2, 1]),  # 3 to warm up, 3 + 8, 3, and no 8 more
        (25, [2, 2, 2]),
        (34, [5, 5, 2]),
    ],
)
def test_turns_end_in_time_and_slow_sides_have_few(monkeypatch, seconds, counts):
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    sides = [clock.side("a", 1), clock.side("b", 2), clock.side("slow", 8, 2)]
    said = []

    times = turns.take_turns(
        SoloComm(),
        sides,
        5,
        lambda: None,
        seconds=seconds,
        say=lambda *what: said.append(what),
    )

    assert [len(times[side.name]) for side in sides] == counts
    assert set(times["slow"]) == {8}
    assert said[:3] == [(0, "a", 1), (0, "b", 2), (1, "a", 1)]


def test_a_side_that_does_not_warm_up_is_checked_once():
    checked = []
    side = turns.Side("x", lambda: 7, check=checked.append, most=2)

    times = turns.take_turns(SoloComm(), [side], 3, lambda: None)

    assert checked == [7]
    assert statistics.median(times["x"]) >= 0
    assert len(times["x"]) == 2


# The command line


def test_no_gpu_is_said_and_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(main, "missing", lambda: "CUDA shows no device")

    status = main.main(["device", "--only", "save"])

    assert status == 1
    said = capsys.readouterr().err
    assert said == "there is no GPU to measure on: CUDA shows no device\n"


@pytest.mark.parametrize(
    ("given", "jobs"),
    [
        ([], [(1, 4096, 40), (2, 1024, 20), (4, 1024, 20)]),
        (["--ranks", "1,2", "--mib", "64"], [(1, 64, 80 * 2 / 3), (2, 64, 80 / 3)]),
        (["--ranks", "2", "--mib", "8,16"], [(2, 8, 40), (2, 16, 40)]),
    ],
)
def test_each_number_of_ranks_is_a_job_with_its_part_of_the_time(
    given, jobs, monkeypatch, tmp_path
):
    started = []

    def mpirun(ranks, argv, environ):
        args = main._parse(argv)
        started.append((ranks, args.mib[0], pytest.approx(args.seconds)))
        assert (args.fsync, args.arrays) == ("off", 300)
        assert args.sides == ["save", "torch"]
        assert "none" in environ.values()
        (args.job / "rows.json").write_text('[{"side": "x"}]')

    monkeypatch.setattr(main, "missing", lambda: "")
    monkeypatch.setattr(main, "_mpirun", mpirun)

    status = main.main(["device", *given, "--only", "save,torch", f"--dir={tmp_path}"])

    assert status == 0
    assert jobs == started
