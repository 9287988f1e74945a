"""A rank that is killed, and one that is stopped: how long the others wait."""

import inspect
import shutil
import time
from pathlib import Path

import jobs
import killing
import states
from report import Count, skipped

import mpisave

LIMIT_S = 10.0
TIMEOUT_S = 3.0


def count(options):
    """Measure it with the MPI at hand, and with another one, where there is one."""
    pythons = {"this MPI": None}
    if options.other_python:
        pythons["the other MPI"] = options.other_python
    for name, python in pythons.items():
        yield _kill(options, name, python)
        yield _stop(options, name, python)
    if not options.other_python:
        yield skipped("a rank killed and stopped, another MPI", "no --other-python")


def _start(place, signal_name, victim, python):
    request = place.request(
        task="stop", signal=signal_name, victim=victim, timeout=TIMEOUT_S, token=False
    )
    more = {"python": str(Path(python).absolute())} if python else {}
    return jobs.Job(place.work, place.case.size, request, **more)


def _kill(options, name, python):
    total = Count(f"a rank killed while the others save, {name}: the job ends")
    slowest = 0.0
    for case in states.cases([n for n in options.sizes if n > 1], ["pickle"]):
        for victim in range(case.size):
            place = killing.Place(case, options.scratch, "waiting")
            ended = _start(place, "SIGKILL", victim, python).wait()
            at = time.time()
            what = f"{case}, rank {victim}"
            killed = [line["at"] for line in ended.lines[victim] if "at" in line]
            waited = at - killed[-1] if killed else ended.seconds
            slowest = max(slowest, waited)
            problem = f"after {waited:.0f} s" if waited > LIMIT_S else ""
            if ended.code == 0 or not killed:
                problem = f"exit {ended.code}: {ended.output}"
            total.add(what, problem)
            shutil.rmtree(place.work)
    total.facts["slowest, s"] = round(slowest, 2)
    return total


def _stop(options, name, python):
    title = f"a rank stopped, {name}: the others raise after timeout={TIMEOUT_S:g}"
    if "timeout" not in inspect.signature(mpisave.save).parameters:
        return skipped(title, "mpisave.save has no timeout yet: the others wait")
    total = Count(title)
    slowest = 0.0
    for case in states.cases([n for n in options.sizes if n > 1], ["pickle"]):
        for victim in range(case.size):
            place = killing.Place(case, options.scratch, "waiting")
            job = _start(place, "SIGSTOP", victim, python)
            others = [rank for rank in range(case.size) if rank != victim]
            lines = what_others_raise(job, others)
            raised = [line["type"] for line in lines]
            slowest = max([slowest, *(line["seconds"] for line in lines)])
            problem = "" if raised == ["CollectiveTimeout"] * len(others) else raised
            if not problem and slowest > TIMEOUT_S + LIMIT_S:
                problem = f"after {slowest:.0f} s"
            total.add(f"{case}, rank {victim}", problem and f"raised {problem}")
            shutil.rmtree(place.work)
    total.facts["slowest, s"] = round(slowest, 2)
    return total


def what_others_raise(job, ranks):
    """Return what these ranks report as soon as all have; then end the job."""
    until = time.monotonic() + TIMEOUT_S + 20
    found = []
    while time.monotonic() < until and not (found and all(found)):
        time.sleep(0.05)
        found = [
            [line for line in lines if "type" in line]
            for rank, lines in enumerate(job.lines())
            if rank in ranks
        ]
    job.kill()
    job.wait()
    return [lines[-1] for lines in found if lines]
