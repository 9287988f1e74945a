"""A short cut of `make test-faults`: kills, errors, mistakes in jobs of two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "faults" / "run.py"


@pytest.mark.parametrize(
    ("part", "case"),
    [
        ("calls", ["--formats", "hdf5", "--roads", "direct"]),
        ("errors", ["--formats", "pickle", "--roads", "gather"]),
        ("scenarios", ["--formats", "pickle", "--roads", "direct"]),
    ],
)
def test_faults_are_survived_by_the_old_state_or_the_new_one(tmp_path, part, case):
    out = tmp_path / "counts.json"

    run = subprocess.run(
        [sys.executable, RUN, "--short", "--parts", part, *case, "--json", out],
        capture_output=True,
        text=True,
        timeout=110,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    (counts,) = json.loads(out.read_text())["parts"].values()
    tried = [count for count in counts if not count["skipped"]]
    if not tried:
        pytest.skip("; ".join(count["skipped"] for count in counts))
    assert all(count["passed"] == count["tried"] > 0 for count in tried)
