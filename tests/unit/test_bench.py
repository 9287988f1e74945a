"""The measurements run, and compare the sides that they name. Nothing here is timed."""

import argparse
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

import mpisave
from mpisave.bench import __main__ as main
from mpisave.bench import checksums, load, output, peers, save, small, states, turns


class SoloComm:
    """What `take_turns` and the savers ask of a communicator of one rank."""

    rank = 0
    size = 1

    def Barrier(self):
        pass

    def allgather(self, item):
        return [item]


def bench(tmp_path, *arguments):
    out = tmp_path / "rows.json"
    run = subprocess.run(
        [sys.executable, "-m", "mpisave.bench", *arguments, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text()), run.stdout


def row(side, **columns):
    return {"side": side, "ranks": 2, "mib": 256, "gb_per_s": 1.5, **columns}


# What is started


def test_gather_compares_both_formats_with_bounds_and_peers(tmp_path):
    few = ["--ranks", "2", "--mib", "1", "--repeats", "1", "--dir", str(tmp_path)]

    rows, printed = bench(tmp_path, "gather", *few)

    sides = [row["side"] for row in rows]
    assert sum("bound" in side for side in sides) == 2
    assert sum("mpisave" in side for side in sides) == 2
    assert sum(side.startswith("(") for side in sides) == 2
    assert all(row["ranks"] == 2 and row["median_s"] > 0 for row in rows)
    assert "of_slower_bound" in printed
    assert not list(tmp_path.glob("mpisave-bench-*"))


def test_checksums_are_compared_with_none(tmp_path):
    few = ["--ranks", "2", "--mib", "1", "--repeats", "1", "--dir", str(tmp_path)]

    rows, printed = bench(tmp_path, "checksums", *few, "--fsync", "off")

    sides = [
        f"{what} {name}{how}"
        for what in ("save", "load")
        for name in ("pickle", "HDF5")
        for how in ("", ", no checksums")
    ]
    found = {row["side"]: row for row in rows}
    assert list(found)[:4] == sides[:4]
    assert set(found) == {*sides, "verify pickle", "verify HDF5"}
    for side in sides[::2]:
        without = found[f"{side}, no checksums"]
        ratio = found[side]["median_s"] / without["median_s"]
        assert found[side]["by_without"] == pytest.approx(ratio)
        assert without["by_without"] is None
    assert "by_without" in printed


def test_save_without_checksums_is_no_file_that_loads(tmp_path):
    path = tmp_path / "x"

    checksums._without_checksums(lambda: mpisave.save({"x": np.arange(9)}, path))

    with pytest.raises(mpisave.FileFormatError, match="index is altered"):
        mpisave.load(path)
    mpisave.save({"x": np.arange(9)}, path)
    assert mpisave.load(path)["x"].tolist() == list(range(9))


def test_save_compares_both_formats_with_bounds_and_peers(tmp_path):
    few = ["--ranks", "2", "--many", "7", "--repeats", "1", "--dir", str(tmp_path)]
    sides = ["--sides", "mpisave", "protocol", "gather"]

    rows, printed = bench(tmp_path, "save", *few, *sides)

    assert [row["side"] for row in rows if row["fsync"] == "on"] == [
        "bound: memcpy",
        "bound: pwrite",
        "mpisave pickle",
        "mpisave HDF5",
        "pickle protocol 4, a file a rank",
        "pickle protocol 5, a file a rank",
        "comm.gather + pickle.dump, one file",
    ]
    assert sum(row["fsync"] == "off" for row in rows) == 7
    assert all(row["of_bound"] == 1 for row in rows if row["side"] == save.BOUND)
    assert all(row["arrays"] == 7 and row["us_per_array"] > 0 for row in rows)
    assert all(row["version"] for row in rows if "bound" not in row["side"])
    assert "us_per_array" in printed
    assert not list(tmp_path.glob("mpisave-bench-*"))


@pytest.mark.parametrize("writers", [2, 3])
def test_load_compares_what_lands_in_place_with_the_ready_bound(tmp_path, writers):
    few = ["--ranks", "2", "--many", "7", "--repeats", "1", "--dir", str(tmp_path)]
    sides = ["--moments", "--sides", "mpisave", "protocol 5"]

    rows, printed = bench(
        tmp_path, "load", *few, *sides, "--writers", str(writers), "--each", "8"
    )

    median = {row["side"]: row["median_s"] for row in rows}
    for found in rows:
        is_ready = "inplace" in found["side"] or found["side"] == load.READY
        bound = median[load.READY if is_ready else load.FRESH]
        assert found["of_bound"] == pytest.approx(bound / found["median_s"])
    assert sum("no verify" in side for side in median) == 4
    # Files of a rank each are of no use to other ranks.
    assert ("pickle protocol 5, a file a rank" in median) == (writers == 2)
    assert "page cache" in printed


def test_load_of_whole_states_alone_finds_its_file(tmp_path):
    few = ["--ranks", "1", "--many", "7", "--repeats", "1", "--dir", str(tmp_path)]

    rows, _ = bench(tmp_path, "load", *few, "--each", "8", "--sides", "whole")

    assert [row["side"].split(":")[0] for row in rows] == ["bound", "bound", "whole"]


def test_memory_of_the_root_is_measured_for_both_formats(tmp_path):
    few = ["--ranks", "2", "--mib", "1", "--cap", "1M", "--dir", str(tmp_path)]

    rows, _ = bench(tmp_path, "memory", *few)

    assert len(rows) == 2
    assert all(0 < row["root_extra_mib"] < 49 for row in rows)


def test_layout_is_measured_for_both_formats(tmp_path):
    rows, _ = bench(tmp_path, "layout", "--arrays", "50", "--repeats", "1")

    assert [row["side"] for row in rows] == ["pickle", "hdf5"]


def test_traffic_is_counted_for_both_formats_and_two_saves(tmp_path):
    few = ["--ranks", "2", "--arrays", "20", "--dir", str(tmp_path)]

    rows, _ = bench(tmp_path, "traffic", *few)

    assert [row["side"] for row in rows] == ["mpisave pickle", "mpisave HDF5"]
    assert all(row["first_max_bytes"] > 0 for row in rows)
    assert all(row["second_max_bytes"] > 0 for row in rows)


def test_plan_has_a_row_for_each_case_and_number_of_ranks(monkeypatch):
    times = iter([9.0, 1.0, 3.0] * 6)
    monkeypatch.setattr(small, "plan_case", lambda *_: next(times))
    args = argparse.Namespace(ranks=[2, 4], arrays=10, repeats=2)

    rows = small.bench_plan(args)

    assert [(row["ranks"], row["side"]) for row in rows] == [
        (ranks, case) for ranks in (2, 4) for case in small.CASES
    ]
    # The first warms up.
    assert all(row["median_s"] == 2 for row in rows)


@pytest.mark.parametrize(
    "wrong",
    [
        ["memory", "--plot", "x.png"],
        ["gather", "--many", "3"],
        ["plan", "--moments"],
        ["save", "--writers", "3"],
        ["save", "--many", "3", "--each", "6"],
        ["save", "--many", "3", "--each", "0"],
    ],
)
def test_options_that_would_be_ignored_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main.main(wrong)

    assert wrong[1] in capsys.readouterr().err or "--each" in wrong


# States


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "whole",
    [
        states.gpt2(1, least=4),
        states.with_moments(states.gpt2(1, least=4)),
        states.many(7, 12),
        states.with_moments(states.many(7, 12)),
    ],
)
def test_every_array_is_held_by_one_rank(whole, size):
    shares = whole.shares(size)
    writers = whole.shares_of_writers(size, 4)

    assert len(shares) == len(writers) == size
    for dealt in (shares, writers):
        held = [key for keys in dealt for key in keys]
        assert sorted(held) == sorted(whole.shapes)


def test_a_state_with_moments_is_nested_and_holds_thrice_the_bytes():
    plain = states.many(3, 8)
    whole = states.with_moments(plain)

    state = whole.state(whole.shares(2)[1])

    assert whole.nbytes == 3 * plain.nbytes == 72
    assert list(state) == ["params", "exp_avg", "exp_avg_sq"]
    assert list(state["exp_avg"]) == ["layer1.weight", "layer2.weight"]
    assert list(states.flat(state)) == whole.shares(2)[1]
    assert whole.state_type == "opt"


def test_arrays_of_equal_key_are_equal_on_any_rank():
    whole = states.many(4, 40)

    once = whole.state(whole.shares(1)[0])
    again = whole.state(whole.shares_of_writers(3, 1)[2])

    assert list(again) == ["layer2.weight"]
    np.testing.assert_array_equal(again["layer2.weight"], once["layer2.weight"])
    assert not np.array_equal(once["layer1.weight"], once["layer2.weight"])


def test_gpt2_like_has_about_the_bytes_that_were_asked_for():
    state = states.gpt2_like(60 * states.MIB, rank=1, size=2)

    assert next(iter(state)) == "h.1.ln_1.weight"
    assert all(array.dtype == np.float32 for array in state.values())
    assert 26 < sum(a.nbytes for a in state.values()) / states.MIB < 34


def test_a_bare_file_holds_the_arrays_rank_by_rank():
    shapes = {"a": (2,), "b": (3, 1), "c": ()}

    assert states.offsets(shapes, [["c", "a"], [], ["b"]]) == {"c": 0, "a": 4, "b": 12}


# Turns


def test_sides_take_turns_and_the_first_turn_is_checked_not_timed():
    done = []
    sides = [
        turns.Side("a", lambda: done.append("a"), check=lambda _: done.append("ok")),
        turns.Side("b", lambda: done.append("b")),
    ]

    times = turns.take_turns(SoloComm(), sides, 2, lambda: done.append("-"))

    assert done == ["a", "ok", "-", "b", "-", "a", "-", "b", "-", "a", "-", "b", "-"]
    assert [len(seconds) for seconds in times.values()] == [2, 2]


def test_rows_have_medians_and_ratios_to_the_slower_bound():
    sides = [
        turns.Side("bound: x", int),
        turns.Side("bound: y", int),
        turns.Side("z", int, ("bound: x", "bound: y", "gone"), version="z 1"),
    ]
    times = {"bound: x": [1.0], "bound: y": [2.0], "z": [9.0, 4.0, 1.0]}

    rows = turns.rows_of(sides, times, 8 * 10**9, arrays=1000, ranks=2)

    assert rows[0]["of_bound"] is None
    assert rows[2] == {
        "side": "z",
        "ranks": 2,
        "mib": 7629,
        "median_s": 4.0,
        "min_s": 1.0,
        "max_s": 9.0,
        "gb_per_s": 2.0,
        "of_bound": 0.5,
        "arrays": 1000,
        "us_per_array": 4000.0,
        "version": "z 1",
    }


def test_bounds_are_chosen_whatever_is_wanted():
    sides = [turns.Side(name, int) for name in ("bound: x", "mpisave HDF5", "h5py")]

    chosen = turns.choose(sides, ["HDF5"])

    assert [side.name for side in chosen] == ["bound: x", "mpisave HDF5"]
    assert turns.choose(sides, None) == sides


# Peers


SIMPLE = [
    peers.Pickle4,
    peers.Pickle5,
    peers.Savez,
    peers.H5py,
    peers.Safetensors,
    peers.Torch,
]


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("durable", [True, False])
def test_a_peer_saves_all_bytes_and_loads_them(kind, durable, tmp_path):
    if not kind.is_installed():
        pytest.skip(f"{kind.library} is not installed")
    whole = states.many(5, 400)
    arrays = whole.state(whole.shares(1)[0])
    peer = kind(SoloComm(), arrays)

    peer.save(tmp_path, durable=durable)
    loaded = peer.load(tmp_path)

    assert turns.nbytes_in(tmp_path) >= whole.nbytes
    assert set(loaded) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(loaded[key]), array)
    assert any(character.isdigit() for character in peer.version())


def test_the_bare_write_holds_every_array_where_the_bare_read_looks(tmp_path):
    whole = states.with_moments(states.many(5, 16))
    saver = save.Saver(SoloComm(), whole, whole.shares(1)[0], tmp_path)
    saver.bare(durable=True)
    loader = load.Loader(SoloComm(), whole, 1, tmp_path)

    loader.check(loader.read_ready())
    loader.check(loader.read_fresh())

    assert (tmp_path / "bound").stat().st_size == whole.nbytes
    # Checking has spoiled the ready memory, so that nobody passes with old bytes.
    with pytest.raises(RuntimeError, match="15 arrays differ"):
        loader.check(loader.like)


def test_a_side_that_writes_too_little_is_refused(tmp_path):
    whole = states.many(2, 16)
    saver = save.Saver(SoloComm(), whole, whole.shares(1)[0], tmp_path)
    (tmp_path / "short").write_bytes(bytes(31))

    with pytest.raises(RuntimeError, match="31 bytes were written, not 32"):
        saver.check(None)

    saver.clean()
    assert not list(tmp_path.iterdir())


# Output


def test_a_table_is_aligned_and_hides_versions():
    rows = [
        {"side": "a", "x": 1.23456, "y": None, "version": "hidden"},
        {"side": "long", "x": 0.000123, "y": 7, "version": "hidden"},
    ]

    assert output.table(rows).splitlines() == [
        "side  x         y",
        "a     1.235     -",
        "long  0.000123  7",
    ]


def test_each_comparison_has_a_panel():
    rows = [
        row("bound", fsync="off"),
        row("peer", fsync="off"),
        row("bound", fsync="on"),
    ]

    found = output.panels(rows)

    assert {title: len(of_panel) for title, of_panel in found.items()} == {
        "2 ranks, 256 MiB, fsync off": 2,
        "2 ranks, 256 MiB, fsync on": 1,
    }


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)
def test_rows_are_drawn_as_a_picture(tmp_path):
    path = tmp_path / "x.png"

    output.plot([row("bound: x"), row("mpisave y"), row("z", ranks=4)], path)

    assert path.read_bytes().startswith(b"\x89PNG\r\n")
