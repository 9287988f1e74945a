"""A rank is killed, stopped, late, elsewhere, interrupted: nobody waits for ever.

Each case is an MPI job of its own, since it does not survive.
"""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import mpi_environment, mpirun

from mpisave import deadlines

HEAD = """
import json, os, signal, sys, time
import numpy as np
from mpi4py import MPI
import mpisave
from mpisave import testing
comm = MPI.COMM_WORLD
state = {"shared": np.arange(4.0) + 1, f"w{comm.rank}": np.full(1000, comm.rank + 1.0)}
def save(**options):
    mpisave.save(state, "x.params", state_type="params", **{"timeout": 2, **options})
def tell(exc, began):
    found = {
        "rank": comm.rank,
        "type": type(exc).__name__,
        "text": str(exc),
        "seconds": time.monotonic() - began,
        "step": getattr(exc, "step", ""),
        "failures": sorted(getattr(exc, "failures", {})),
    }
    with open(f"told.{comm.rank}", "w") as file:
        json.dump(found, file)
def told(call):
    began = time.monotonic()
    try:
        call()
    except BaseException as exc:
        tell(exc, began)
        time.sleep(1.5)  # an error that ends a rank ends the job: all are to tell
        return exc
"""


class Job:
    """A run of a script on some ranks, in an empty folder with a file of old state."""

    def __init__(self, folder, script, ranks, *, with_m=True, limit_s=60):
        self.folder = folder
        old = {"shared": np.zeros(4)}
        (folder / "x.params").write_bytes(pickle.dumps(old))
        (folder / "job.py").write_text(HEAD + script)
        command = [*mpirun(), "-n", str(ranks)]
        command += [sys.executable, *(["-m", "mpi4py"] if with_m else []), "job.py"]
        began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=mpi_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            self.output, _ = self.process.communicate(timeout=limit_s)
            self.ended = True
        except subprocess.TimeoutExpired:
            self.ended = False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            if not self.ended:
                self.output, _ = self.process.communicate()
        self.seconds = time.monotonic() - began

    @property
    def told(self):
        """What each rank that could tell has met."""
        files = sorted(self.folder.glob("told.*"))
        return [json.loads(file.read_text()) for file in files]

    def is_whole(self):
        """Return whether the file is the old state, or all of the new one."""
        state = pickle.loads((self.folder / "x.params").read_bytes())
        if set(state) == {"shared"}:
            return not state["shared"].any()
        return state["shared"].tolist() == [1, 2, 3, 4]


@pytest.fixture
def job(tmp_path):
    def run(script, ranks=3, **options):
        found = Job(tmp_path, script, ranks, **options)
        assert found.ended, f"it hangs:\n{found.output}"
        assert found.is_whole(), found.output
        return found

    return run


def assert_timed_out(told, missing, ranks, within_s=10):
    # A launcher that ends the job may have had a stopped rank continue first.
    told = [t for t in told if t["rank"] not in missing]
    assert [t["rank"] for t in told] == [r for r in range(ranks) if r not in missing]
    for rank in told:
        assert rank["type"] == "CollectiveTimeout", rank
        assert rank["failures"] == missing, rank
        assert rank["seconds"] < within_s, rank
        for lost in missing:
            assert f"rank {lost} (" in rank["text"]
        assert "did not arrive" in rank["text"]


@pytest.mark.parametrize("gather_to", [None, 0])
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("step", ["describe the state dict", "seal"])
def test_rank_that_is_stopped_is_named_by_all_others(job, gather_to, victim, step):
    found = job(
        f"""
comm.Barrier()
def call():
    with testing.fault({step!r}, rank={victim}, action=testing.stop()):
        save(gather_to={gather_to})
exc = told(call)
raise exc
"""
    )

    assert_timed_out(found.told, [victim], 3)
    assert f"step {step!r} of save" in found.told[0]["text"]
    assert "gives others up in save" in found.output
    assert found.process.returncode != 0


def test_rank_that_the_file_system_holds_writes_where_it_is(job):
    found = job(
        """
if comm.rank == 1:
    pwrite = os.pwrite
    def hold_this(*arguments):
        time.sleep(60)  # the error of the others ends it
        return pwrite(*arguments)
    os.pwrite = hold_this
raise told(save)
"""
    )

    assert_timed_out([t for t in found.told if t["rank"] != 1], [1], 3)
    assert re.search(r"rank 1 \(.*\) is in save, step 'write', for 2", found.output)
    assert "in hold_this" in found.output


def test_rank_that_is_stopped_while_payload_travels_is_named(job):
    found = job(
        """
state[f"large{comm.rank}"] = np.ones(2**21)
def stop(name):
    from mpisave.transport.sender import Sender
    send = Sender._igatherv
    def stopping(self, data, calls=[]):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return send(self, data)
    Sender._igatherv = stopping
if comm.rank == 1:
    stop("x")
raise told(lambda: save(gather_to=0, max_grouped_size="4M"))
"""
    )

    # The deadline, and the roll: once.
    assert_timed_out(found.told, [1], 3, within_s=5.5)
    assert {t["step"] for t in found.told} == {"gather and write"}


def test_rank_that_is_interrupted_while_it_packs_tells_the_others(job):
    found = job(
        """
state[f"large{comm.rank}"] = np.ones(2**21)
from mpisave.transport.sender import Sender
send = Sender._igatherv
def interrupted(self, data, calls=[]):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return send(self, data)
if comm.rank == 1:
    Sender._igatherv = interrupted
told(lambda: save(gather_to=0, max_grouped_size="4M", timeout=60))
time.sleep(2)
os._exit(0)
"""
    )

    kinds = [t["type"] for t in found.told]
    assert kinds == ["CollectiveError", "KeyboardInterrupt", "CollectiveError"]
    assert all(t["seconds"] < 5 for t in found.told)
    assert found.told[0]["failures"] == found.told[2]["failures"] == [1]


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError"])
def test_rank_that_fails_between_two_steps_tells_the_others(job, error):
    found = job(
        f"""
from mpisave import saving
class Fails:
    def __init__(self, *_, **__):
        raise {error}
if comm.rank == 1:
    saving.Mover = Fails
told(lambda: save(timeout=60))
time.sleep(2)
os._exit(0)
"""
    )

    kinds = [t["type"] for t in found.told]
    mine = error if error == "KeyboardInterrupt" else "CollectiveError"
    assert kinds == ["CollectiveError", mine, "CollectiveError"]
    assert all(t["seconds"] < 5 for t in found.told)
    assert found.told[0]["failures"] == found.told[2]["failures"] == [1]


def test_save_that_was_given_up_is_not_published_later(job):
    found = job(
        """
with testing.fault("publish", rank=0, action=testing.delay(6)):
    told(lambda: save(gather_to=0))
time.sleep(6 if comm.rank else 0)
os._exit(0)
"""
    )

    assert [t["type"] for t in found.told] == ["CollectiveTimeout"] * 3
    left = pickle.loads((found.folder / "x.params").read_bytes())
    assert list(left) == ["shared"]


def test_groups_of_which_a_rank_is_stopped_wait_once(job):
    found = job(
        """
state = {"x": np.ones(9)}
mpisave.save(state, f"warm.{comm.rank // 3}", comm=comm)
from mpisave import saving
divide = saving.divide
def stopping(*args, **how):
    os.kill(os.getpid(), signal.SIGSTOP)
if comm.rank == 0:
    saving.divide = stopping
state["y"] = np.ones(3)
raise told(lambda: mpisave.save(state, f"x.{comm.rank // 3}", timeout=2))
""",
        ranks=4,
    )

    assert_timed_out(found.told, [0], 4, within_s=5.5)


def test_rank_that_is_stopped_while_groups_are_made_is_named(job):
    found = job(
        """
from mpisave import comms
in_thread = comms._InThread
def stopped(call):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return in_thread(call)
comms._InThread = stopped
path = "x.params" if comm.rank < 2 else "y.params"
exc = told(lambda: mpisave.save(state, path, timeout=2))
raise exc
"""
    )

    assert_timed_out(found.told, [1], 3)


def test_deadline_of_a_step_that_reads_together_names_that_step(job):
    found = job(
        """
save()
from mpisave import sharing
pass_on = sharing._pass_on
def stopping(*args):
    os.kill(os.getpid(), signal.SIGSTOP)
if comm.rank == 1:
    sharing._pass_on = stopping
import mpisave.loading as loading
place = loading.where_this_runs
loading.where_this_runs = lambda: (f"node{comm.rank}", *place()[1:])
raise told(lambda: mpisave.load("x.params", comm=comm, timeout=2))
"""
    )

    assert_timed_out(found.told, [1], 3, within_s=5.5)
    assert {t["step"] for t in found.told} == {"read"}


def test_job_of_which_a_rank_is_killed_ends_at_once(job):
    found = job(
        """
save()
with testing.fault("write", rank=1, action=testing.kill()):
    save(timeout=None)
""",
        limit_s=20,
    )

    assert found.process.returncode != 0
    assert found.seconds < 10


@pytest.mark.parametrize("with_m", [True, False], ids=["-m mpi4py", "plain python"])
def test_rank_that_raises_between_two_calls_ends_the_job(job, with_m):
    found = job(
        """
save()
if comm.rank == 1:
    raise SystemExit("the data has ended") if len(sys.argv) > 1 else ValueError("mine")
exc = told(save)
raise exc
""",
        with_m=with_m,
        limit_s=40,
    )

    assert found.process.returncode != 0
    assert "ValueError: mine" in found.output
    if not with_m:
        assert_timed_out(found.told, [1], 3)


def test_rank_that_skips_the_very_first_call_is_named(job):
    found = job(
        """
if comm.rank == 1:
    time.sleep(8)
else:
    raise told(save)
""",
        with_m=False,
    )

    assert_timed_out(found.told, [1], 3)


def test_ranks_that_make_different_calls_are_told_who_is_where(job):
    found = job(
        """
save()
comm.Barrier()
if comm.rank == 1:
    exc = told(lambda: comm.Barrier() or time.sleep(30))
else:
    exc = told(save)
    print(exc)
    raise exc
""",
    )

    assert_timed_out(found.told, [1], 3)


def test_rank_that_comes_too_late_is_told_that_it_was_given_up(job):
    found = job(
        """
save()
if comm.rank == 1:
    time.sleep(6)
exc = told(save)
again = told(save)
again = told(save)
time.sleep(6 if comm.rank != 1 else 0)
os._exit(0)
""",
    )

    assert [t["rank"] for t in found.told] == [0, 1, 2]
    for rank in found.told:
        assert rank["type"] == "CollectiveTimeout"
        assert "an earlier call on this communicator was given up" in rank["text"]
        assert "comm.Dup()" in rank["text"]
        assert rank["seconds"] < 0.5


def test_ranks_that_were_only_slow_go_on_with_a_new_communicator(job):
    found = job(
        """
save()
if comm.rank == 1:
    time.sleep(4)
assert isinstance(told(save), mpisave.CollectiveTimeout)
new = comm.Dup()
save(comm=new)
loaded = mpisave.load("x.params", comm=new, timeout=5)
assert set(loaded) == {"shared", "w0", "w1", "w2"}
print("went on")
"""
    )

    assert found.process.returncode == 0, found.output
    assert found.output.count("went on") == 3


def test_rank_that_is_interrupted_while_it_waits_tells_the_others(job):
    found = job(
        """
save()
if comm.rank == 1:
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.alarm(1)
if comm.rank == 2:
    time.sleep(3)
told(lambda: save(timeout=60))
time.sleep(4)
os._exit(0)
"""
    )

    kinds = {t["rank"]: t["type"] for t in found.told}
    assert kinds == {0: "CollectiveError", 1: "KeyboardInterrupt", 2: "CollectiveError"}
    for rank in (found.told[0], found.told[2]):
        assert "rank 1 (" in rank["text"]
        assert "KeyboardInterrupt" in rank["text"]
        assert rank["failures"] == [1]


def test_loading_and_verifying_have_deadlines_too(job):
    found = job(
        """
save()
if comm.rank == 0:
    time.sleep(30)
first = told(lambda: mpisave.load("x.params", comm=comm, timeout=1))
assert isinstance(first, mpisave.CollectiveTimeout), first
os._exit(7)
"""
    )

    assert [t["rank"] for t in found.told] == [1, 2]
    assert "step 'check arguments' of load" in found.told[0]["text"]


def test_ranks_are_shown_in_runs():
    assert deadlines.show_ranks([3]) == "rank 3"
    assert deadlines.show_ranks([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert deadlines.show_ranks(range(0, 100, 2)).endswith("38, ...")
