"""The measurements run, and compare the sides that they name. Nothing here is timed."""

import json
import subprocess
import sys


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


def test_gather_compares_both_formats_with_bounds_and_peers(tmp_path):
    small = ["--ranks", "2", "--mib", "1", "--repeats", "1", "--dir", str(tmp_path)]

    rows, printed = bench(tmp_path, "gather", *small)

    sides = [row["side"] for row in rows]
    assert sum("bound" in side for side in sides) == 2
    assert sum("mpisave" in side for side in sides) == 2
    assert sum(side.startswith("(") for side in sides) == 2
    assert all(row["ranks"] == 2 and row["median_s"] > 0 for row in rows)
    assert "of_slower_bound" in printed
    assert not list(tmp_path.glob("mpisave-bench-*"))


def test_memory_of_the_root_is_measured_for_both_formats(tmp_path):
    small = ["--ranks", "2", "--mib", "1", "--cap", "1M", "--dir", str(tmp_path)]

    rows, _ = bench(tmp_path, "memory", *small)

    assert len(rows) == 2
    assert all(0 < row["root_extra_mib"] < 49 for row in rows)


def test_layout_is_measured_for_both_formats(tmp_path):
    rows, _ = bench(tmp_path, "layout", "--arrays", "50", "--repeats", "1")

    assert [row["side"] for row in rows] == ["pickle", "hdf5"]
