"""Jobs of several ranks: started, watched, stopped at a file call, ended in time."""

import contextlib
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launching import mpi_environment, mpirun

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 60.0

# Calls that change what is in a directory, or whether it outlives a crash.
CALLS = (
    "openat,open,creat,pwrite64,pwritev,pwritev2,write,writev,ftruncate,truncate,"
    "fallocate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,"
    "symlink,symlinkat,unlink,unlinkat,close,fchmod,chmod,fchmodat,fchown,copy_file_range"
)

RANK = "${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}"

# mpisave, and what tests share.
_PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
# Threads of a library that is not at work here.
SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": _PATHS}


def why_not_strace():
    """Return why no rank can be traced here, or nothing."""
    if not shutil.which("strace"):
        return "there is no strace"
    run = subprocess.run(
        ["strace", "-qq", "-o", os.devnull, "-e", "trace=fsync", "true"],
        capture_output=True,
        text=True,
    )
    return f"strace does not work: {run.stderr.strip()}" if run.returncode else ""


def why_not_root():
    """Return why nothing can be mounted here, or nothing."""
    if os.geteuid():
        return "only root mounts"
    run = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    return f"no mount namespace: {run.stderr.strip()}" if run.returncode else ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended."""

    code: int | None  # None: it had to be killed
    seconds: float
    output: str
    lines: list  # what each rank wrote, by rank

    @property
    def is_hung(self):
        return self.code is None


_ALIVE = set()


def kill_all():
    """End every job that still runs: the harness is being ended."""
    for job in list(_ALIVE):
        job.kill()


class Job:
    """An mpirun of worker.py.

    Parameters
    ----------
    folder : Path
        For what ranks report: one file of JSON lines a rank.
    size : int
        Ranks.
    request : dict
        What worker.py is to do.
    under : dict of int to list of str
        The command under which a rank is started.
    """

    def __init__(self, folder, size, request, under=None, python=sys.executable):
        self.folder, self.size = folder, size
        for rank in range(size):
            self.lines_of(rank).unlink(missing_ok=True)
        self.output = folder / "output"
        (folder / "request.json").write_text(json.dumps(request))
        worker = [python, "-m", "mpi4py", str(HERE / "worker.py"), str(folder)]
        script = "".join(
            f'[ "{RANK}" = {rank} ] && exec {shlex.join(command)} "$@"\n'
            for rank, command in (under or {}).items()
        )
        ranks = ["sh", "-c", f'{script}exec "$@"', "sh", *worker]
        self.began = time.monotonic()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*mpirun(python), "-n", str(size), *ranks],
                env=mpi_environment() | SETTINGS,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _ALIVE.add(self)

    def lines_of(self, rank):
        return self.folder / f"rank{rank}.jsonl"

    def lines(self):
        """Return what each rank has reported so far."""
        every = []
        for rank in range(self.size):
            path = self.lines_of(rank)
            text = path.read_text() if path.exists() else ""
            # A rank that is killed may leave half a line.
            whole = [t for t in text.splitlines(keepends=True) if t.endswith("\n")]
            every.append([json.loads(t) for t in whole])
        return every

    def pids(self):
        """Return the process of each rank that has said so."""
        return [lines[0]["pid"] if lines else None for lines in self.lines()]

    def kill(self):
        """End every process of the job: the ranks, what traces them, the launcher."""
        for pid in [*filter(None, self.pids())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, deadline_s=DEADLINE_S):
        """Wait for the end, or end it at the deadline."""
        code = None
        try:
            code = self.process.wait(
                max(0.1, self.began + deadline_s - time.monotonic())
            )
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        _ALIVE.discard(self)
        seconds = time.monotonic() - self.began
        return Ended(code, seconds, self.output.read_text()[-2000:], self.lines())


def run(folder, size, request, under=None, deadline_s=DEADLINE_S):
    return Job(folder, size, request, under).wait(deadline_s)


def traced(paths, log, *options):
    """Return the command that has a rank's file calls on these paths traced."""
    names = [word for path in paths for word in ("-P", str(path))]
    trace = ["strace", "-f", "-qq", "-y", "-s", "16", "-e", f"trace={CALLS}"]
    return [*trace, *names, *options, "-o", str(log)]


_CALL = re.compile(r"^\d+\s+(\w+)\((.*)")
_STOPPED = re.compile(r"^(\d+)\s+--- SIGSTOP \{")
# Only looks: open without O_CREAT.
_CHANGES_NOTHING = re.compile(r"^\d+\s+open\w*\((?!.*O_CREAT)")


def run_stopping(folder, size, request, paths, victims, at_call, deadline_s=DEADLINE_S):
    """Run a job in which `victims` stop after every file call that changes something.

    Parameters
    ----------
    at_call : callable
        Given the job, the rank, the number of the call, from 1, the process and the
        text of the call; the rank goes on afterwards, if it still lives.

    Returns
    -------
    Ended
        How the job ended.
    """
    fifos, under = {}, {}
    for rank in victims:
        fifo = folder / f"trace{rank}"
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        fifos[rank] = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        under[rank] = traced(paths, fifo, "-e", f"inject={CALLS}:signal=SIGSTOP")
    job = Job(folder, size, request, under)
    follower = _Follower(job, fifos, at_call)
    try:
        follower.follow(job.began + deadline_s)
    finally:
        for descriptor in fifos.values():
            os.close(descriptor)
    return job.wait(deadline_s + 2)


class _Follower:
    """Reads what strace writes, and lets stopped ranks go on."""

    def __init__(self, job, fifos, at_call):
        self.job, self.at_call = job, at_call
        self.selector = selectors.DefaultSelector()
        for rank, descriptor in fifos.items():
            self.selector.register(descriptor, selectors.EVENT_READ, rank)
        self.rest = dict.fromkeys(fifos, b"")
        self.calls = dict.fromkeys(fifos, 0)
        self.last = dict.fromkeys(fifos, "")

    def follow(self, until):
        while self.job.process.poll() is None and time.monotonic() < until:
            for key, _ in self.selector.select(0.02):
                data = os.read(key.fd, 65536)
                if not data:  # no writer yet, or no longer
                    time.sleep(0.002)
                    continue
                *lines, self.rest[key.data] = (self.rest[key.data] + data).split(b"\n")
                for line in lines:
                    self._read(key.data, line.decode(errors="replace"))

    def _read(self, rank, line):
        if _CALL.match(line):
            self.last[rank] = line
        found = _STOPPED.match(line)
        if found is None:
            return
        pid = int(found[1])
        if not _CHANGES_NOTHING.match(self.last[rank]):
            self.calls[rank] += 1
            self.at_call(self.job, rank, self.calls[rank], pid, self.last[rank])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def name_of(line):
    """Return the name of the call that a line of strace shows."""
    found = _CALL.match(line)
    return found[1] if found else "?"


def kill_rank(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
