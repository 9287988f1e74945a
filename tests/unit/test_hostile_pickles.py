"""Pickles made to run code, crash, hang or take memory: none does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_pickles
import pytest

import mpisave

ROOT = Path(mpisave.__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what came of each, in a process of its own that may die of one."""
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, hostile_pickles.__file__],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (found[-1:], done.stderr[-2000:])
    assert list(folder.iterdir()) == []
    assert not Path("/tmp/mpisave-tripwire").exists()  # noqa: S108 - what they touch
    return found


def test_there_are_hundreds_each_of_its_own_and_all_were_tried(results):
    names = [name for name, *_ in hostile_pickles.cases()]

    assert [result["name"] for result in results] == names
    assert len({data for *_, data in hostile_pickles.cases()}) > 1000


def test_none_runs_or_imports_anything(results):
    wrong = [r for r in results if r["events"] or r["imported"]]

    assert wrong == []


def test_each_is_refused_with_its_place_or_loads(results):
    wrong = [
        r
        for r in results
        if r["result"] != "refused"
        and not (r["kind"] == hostile_pickles.MAY_LOAD and r["result"] == "loaded")
    ]

    assert wrong == []


def test_none_takes_seconds(results):
    assert [r for r in results if r["seconds"] > 5] == []


def test_none_but_those_made_for_it_takes_more_than_its_size_and_64_mib(results):
    others = [r for r in results if r["kind"] != hostile_pickles.TAKES_MEMORY]

    assert [r for r in others if r["grown"] > r["nbytes"] + 2**26] == []


def test_those_made_to_take_memory_take_what_is_documented_and_are_refused(results):
    made = [r for r in results if r["kind"] == hostile_pickles.TAKES_MEMORY]

    assert len(made) == 1
    for result in made:
        assert result["result"] == "refused"
        assert 2**26 < result["grown"] < 2**26 + 96 * result["nbytes"], result
