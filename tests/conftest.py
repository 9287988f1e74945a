"""pytest on several ranks, made safe.

``pytest --mpi-sizes 1,2,3,4 tests/mpi`` runs that folder once on each number of ranks,
an mpirun each. Within such a run all ranks agree on every phase of every test: a
failure on one rank fails the test on all, and rank 0 prints which. A rank that waits
for one that has failed already, or a test over its time limit, ends the whole job with
the stacks of every rank.
"""

import array
import faulthandler
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from launching import mpi_environment, mpirun

LAUNCHED = any(
    name in os.environ
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "PMI_RANK")
)
NO_TESTS_COLLECTED = 5


def pytest_addoption(parser):
    group = parser.getgroup("mpi sizes")
    group.addoption(
        "--mpi-sizes",
        default=os.environ.get("MPI_SIZES", ""),
        help="run the tests under mpirun on these numbers of ranks, such as 1,2,3,4",
    )
    group.addoption(
        "--mpi-timeout",
        type=float,
        default=90.0,
        help="seconds that a test may take before the job is ended",
    )
    group.addoption(
        "--mpi-grace",
        type=float,
        default=10.0,
        help="seconds that a failed rank waits for the others",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave half of the cases of tests that are marked so to ``make test-slow``."""
    for item in items:
        if item.get_closest_marker("half") and zlib.crc32(item.name.encode()) % 2:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    sizes = [int(size) for size in config.getoption("--mpi-sizes").split(",") if size]
    if LAUNCHED or not sizes or config.option.collectonly or config.option.help:
        return None
    codes = {}
    for size in sizes:
        arguments = [*config.invocation_params.args, "--with-mpi"]
        # Open MPI's mpirun gives ranks a terminal: no colours.
        arguments += ["-p", "no:cacheprovider", "--color=no"]
        # `make coverage` measures ranks too, of one job: it takes longer by a third.
        measured = max((n for n in sizes if n <= 3), default=min(sizes))
        is_measured = os.environ.get("MPISAVE_COVERAGE") and size == measured
        under = ["-m", "coverage", "run"] if is_measured else []
        python = [sys.executable, *under, "-m", "pytest"]
        run = [*mpirun(), "-n", str(size), *python, *arguments]
        print(f"=== {size} rank(s): {shlex.join(run)}", flush=True)
        codes[size] = subprocess.run(
            run, env=mpi_environment(), stdin=subprocess.DEVNULL
        ).returncode
    failed = [c for c in codes.values() if c not in (0, NO_TESTS_COLLECTED)]
    lines = [f"{n}: {'ok' if c in (0, 5) else f'exit {c}'}" for n, c in codes.items()]
    print("=== by number of ranks:", ", ".join(lines))
    if failed:
        return failed[0]
    return 0 if 0 in codes.values() else NO_TESTS_COLLECTED


class Agreement:
    """Has all ranks agree on the outcome of each phase of each test."""

    def __init__(self, config):
        from mpi4py import MPI

        self.MPI = MPI
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.stderr = os.dup(2)  # the real one: captured output is lost in an abort
        self.limit = config.getoption("--mpi-timeout")
        self.grace = config.getoption("--mpi-grace")
        if self.rank:  # one report: rank 0's
            reporter = config.pluginmanager.getplugin("terminalreporter")
            if reporter:
                reporter._tw._file = Path(os.devnull).open("w")  # noqa: SIM115

    def say(self, text):
        os.write(self.stderr, f"\n[rank {self.rank} of {self.size}] {text}\n".encode())

    def largest(self, value, item, when, text=""):
        """Return the largest value of all ranks, or end the job if they do not come."""
        mine, result = array.array("i", [value]), array.array("i", [0])
        request = self.comm.Iallreduce(mine, result, op=self.MPI.MAX)
        began, pause = time.monotonic(), 1e-5
        while not request.Test():
            waited = time.monotonic() - began
            if waited > (self.grace if value else self.limit):
                outcome = "failed here" if value else "done here"
                self.say(
                    f"{item.nodeid} {when}: {outcome}, but other ranks did not come "
                    f"within {waited:.0f} s; ending the job\n{text}"
                )
                faulthandler.dump_traceback(file=self.stderr)
                self.comm.Abort(70)
            time.sleep(pause)
            pause = min(2 * pause, 1e-2)
        return result[0]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        # Unlike a signal, this gets out of a blocked MPI call.
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if self.size == 1:
            return report
        failed = 2
        mine = {"passed": 0, "skipped": 1, "failed": failed}[report.outcome]
        text = report.longreprtext if mine == failed else ""
        if mine == failed and self.rank:
            self.say(f"{item.nodeid} {report.when} failed:\n{text}")
        if self.largest(mine, item, report.when, text) == failed:
            every = self.comm.allgather((mine, text))
            ranks = [
                rank for rank, (outcome, _) in enumerate(every) if outcome == failed
            ]
            report.outcome = "failed"
            if hasattr(report, "wasxfail"):
                del report.wasxfail
            details = "\n\n".join(f"[rank {r}]\n{every[r][1]}" for r in ranks[:3])
            names = ", ".join(map(str, ranks))
            report.longrepr = f"failed on rank {names} of {self.size}\n\n{details}"
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        # mpirun ends the others when one exits with an error: let rank 0 print first.
        sys.stdout.flush()
        request = self.comm.Ibarrier()
        began = time.monotonic()
        while not request.Test() and time.monotonic() - began < self.limit:
            time.sleep(1e-3)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if not LAUNCHED:
        return
    # Ranks that share pytest's temporary folder delete each other's, and some runs fail
    # at exit. First: pytest's own plugin reads the option when it is configured.
    config.option.basetemp = tempfile.mkdtemp(prefix="mpisave-pytest-")
    config.add_cleanup(
        lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True)
    )
    config.pluginmanager.register(Agreement(config), "mpi-agreement")


@pytest.fixture
def comm():
    from mpi4py import MPI

    own = MPI.COMM_WORLD.Dup()
    yield own
    own.Free()


@pytest.fixture
def shared_dir(comm):
    """Return a folder that all ranks see, and that is gone after the test."""
    path = comm.bcast(tempfile.mkdtemp(prefix="mpisave-") if comm.rank == 0 else None)
    yield Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
