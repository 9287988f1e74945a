"""The tests of many ranks end, and say which rank failed, whatever happens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "failure": ("assert comm.rank != 1", "failed on rank 1 of 2"),
    "hang": ("comm.Barrier() if comm.rank == 0 else time.sleep(60)", "in test_case"),
    "deadlock": ("comm.recv(source=1 - comm.rank)", "in test_case"),
    "early failure": (
        "assert comm.rank\n    comm.recv(source=0)",
        "other ranks did not come within",
    ),
    "exit": ("sys.exit(3) if comm.rank else comm.Barrier()", ""),
    "success": ("comm.Barrier()", "1 passed"),
}


@pytest.mark.parametrize("name", CASES)
def test_run_on_two_ranks_ends_and_tells_why(tmp_path, name):
    body, expected = CASES[name]
    for module in ("conftest.py", "launching.py"):
        shutil.copy(Path(__file__).parents[1] / module, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_case.py").write_text(
        "import sys, time\nimport pytest\n\n@pytest.mark.mpi\n"
        f"def test_case(comm):\n    {body}\n"
    )
    command = [sys.executable, "-m", "pytest", "--mpi-sizes", "2"]
    limits = ["--mpi-timeout", "6", "--mpi-grace", "2"]

    run = subprocess.run(
        [*command, *limits, "test_case.py"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("MPI_SIZES")},
        capture_output=True,
        text=True,
        timeout=60,
    )

    output = run.stdout + run.stderr
    assert (run.returncode == 0) == (name == "success"), output
    assert expected in output
