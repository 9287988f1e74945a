"""What the ranks of a job do, told by FOLDER/request.json; one JSON line a save.

Started by jobs.Job. Everything that is raised is caught and reported.
"""

import importlib
import inspect
import json
import os
import pickle
import secrets
import sys
import time
from pathlib import Path

import injection
import states

import mpisave


class Rank:
    """This rank, and the request."""

    def __init__(self, folder):
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.request = json.loads((folder / "request.json").read_text())
        request = self.request
        self.case = states.Case(request["format"], request["road"], self.size)
        self.path = Path(request["path"])
        self.out = (folder / f"rank{self.rank}.jsonl").open("a")
        self.say(pid=os.getpid())

    def say(self, **facts):
        self.out.write(json.dumps(facts) + "\n")
        self.out.flush()

    def save(self, state, **changed):
        if self.request.get("control"):
            save_in_place(self, state)
            return None
        return self.save_at(self.path, state, **changed)

    def save_at(self, path, state, **changed):
        arguments = states.arguments(self.case) | changed
        limit = self.request.get("timeout")
        # Deadlines may not be there yet.
        if limit is not None and takes_timeout():
            arguments.setdefault("timeout", limit)
        arguments.setdefault("comm", self.comm)
        return mpisave.save(state, path, **arguments)

    def outcome(self, call):
        """Return what a call raised, on this rank."""
        began = time.monotonic()
        raised = None
        try:
            call()
        except BaseException as exc:
            raised = exc
        return describe(raised, time.monotonic() - began)

    def state(self, tag):
        return states.held_by(self.rank, self.size, tag)


def save_in_place(me, state):
    """Save as one should not: what the harness must find out."""
    whole = states.whole_state(me.size, states.NEW)
    if me.rank == 0:
        with me.path.open("wb") as file:
            pickle.dump(whole, file)


def takes_timeout():
    return "timeout" in inspect.signature(mpisave.save).parameters


def describe(raised, seconds):
    """Return what a report says of an exception."""
    failures = getattr(raised, "failures", None) or {}
    return {
        "type": type(raised).__name__ if raised is not None else None,
        "message": str(raised) if raised is not None else "",
        "step": getattr(raised, "step", ""),
        "ranks": sorted(failures),
        "errno": getattr(raised, "errno", None),
        "seconds": seconds,
    }


def do_save(me):
    """Save the new state once."""
    me.say(**me.outcome(lambda: me.save(me.state(states.NEW))))


def do_limited(me):
    """Save under a limit of the size of files, on one rank."""
    import resource

    if me.rank == me.request["victim"]:
        limit = me.request["limit_nbytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    result = me.outcome(lambda: me.save(me.state(states.NEW)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    me.say(**result)


def do_many(me):
    """Save again and again, states with the tags that are asked for."""
    request = me.request
    for tag in range(request["first"], request["first"] + request["saves"]):
        result = me.outcome(lambda tag=tag: me.save(me.state(tag)))
        if result["type"] is not None or request["tells"]:
            me.say(tag=tag, **result)
    me.say(done=True)


def do_stop(me):
    """Have one rank stopped, as by SIGSTOP, before a save that all others make."""
    import signal

    me.save(me.state(states.OLD))
    me.comm.Barrier()
    me.say(at=time.time())
    if me.rank == me.request["victim"]:
        os.kill(os.getpid(), getattr(signal, me.request["signal"]))
    me.say(**me.outcome(lambda: me.save(me.state(states.NEW))), at=time.time())


def do_step(me):
    """Save with a fault at a step of one rank."""
    request = me.request
    with injection.at_step(request["step"], request["fault"], request["victim"], me):
        result = me.outcome(lambda: me.save(me.state(states.NEW)))
    me.say(**result)


def do_steps(me):
    """Have errors at steps of ranks, one after another."""
    import worker_faults

    for step, fault, victim in me.request["faults"]:
        worker_faults.restore(me)
        comm = me.comm.Dup()  # without plans that were kept
        fired = []
        with injection.at_step(step, fault, victim, me, fired):
            result = me.outcome(lambda comm=comm: me.save(me.state(2), comm=comm))
        comm.Free()
        about = {"step_of_fault": step, "fault": fault, "victim": victim}
        me.say(**about, fired=bool(fired), **worker_faults.aftermath(me), **result)


def do_load_step(me):
    """Load, or verify, with a fault at a step of one rank."""
    import worker_loads

    request = me.request
    call = worker_loads.calls(me)[request["call"]]
    with injection.at_step(request["step"], request["fault"], request["victim"], me):
        result = me.outcome(call)
    me.say(**result)


def main():
    folder = Path(sys.argv[1])
    me = Rank(folder)
    task = me.request["task"]
    if me.request.get("token"):
        # A known name of the staging file: strace is told names, not folders.
        secrets.token_hex = lambda nbytes=32: "5a" * nbytes
    if me.request.get("one_thread"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if task in ("faults", "scenarios", "loads"):
        importlib.import_module(f"worker_{task}").do(me)
    else:
        globals()[f"do_{task}"](me)
    # Who is raising may not wait for others: nobody finalises before all are here.
    me.comm.Barrier()


if __name__ == "__main__":
    main()
