"""Who loads or verifies while others save, and two jobs that save to one path."""

import multiprocessing
import shutil
import time

import jobs
import killing
import states
from report import Count

import mpisave

MISSES_KEPT = 5


def read(options):
    """Load all the while; every load has to be one of the whole states."""
    for case in states.cases([2], options.formats, options.roads):
        name = f"loads during {options.saves} saves to one path: {case}"
        jobs_of = [{"first": 2, "saves": options.saves}]
        yield _watch(Count(name), case, options.scratch, jobs_of)
    for case in states.cases([2], options.formats, options.roads):
        name = f"loads while two jobs save {options.rivals} times each: {case}"
        jobs_of = [
            {"first": first, "saves": options.rivals} for first in (10_000, 20_000)
        ]
        yield _watch(Count(name), case, options.scratch, jobs_of)


def _watch(count, case, scratch, jobs_of):
    place = killing.Place(case, scratch, "read")
    tags = {states.OLD}
    running = []
    stop, results = multiprocessing.Event(), multiprocessing.Queue()
    for number, changed in enumerate(jobs_of):
        tags |= set(range(changed["first"], changed["first"] + changed["saves"]))
        folder = place.work / f"job{number}"
        folder.mkdir()
        request = place.request(task="many", tells=False, token=False, **changed)
        running.append(jobs.Job(folder, case.size, request))
    loaders = [
        multiprocessing.Process(
            target=_load_on, args=(case, place.path, tags, load, stop, results)
        )
        for load in ("mpisave", "stock", "verify")
    ]
    for loader in loaders:
        loader.start()
    every = [job.wait(300) for job in running]
    time.sleep(0.05)
    stop.set()
    for _ in loaders:
        kind, loads, seen, misses = results.get(timeout=60)
        count.tried += loads
        count.passed += loads - len(misses)
        count.misses += misses[:MISSES_KEPT]
        count.tally(f"states seen by {kind}", seen)
    for loader in loaders:
        loader.join()
    _count_jobs(count, case, place, every, tags)
    shutil.rmtree(place.work)
    return count


def _count_jobs(count, case, place, every, tags):
    """Every save has to have returned, and to have left nothing behind."""
    for ended in every:
        failed = [line for lines in ended.lines for line in lines if line.get("type")]
        is_done = all(lines and lines[-1].get("done") for lines in ended.lines)
        problem = "" if ended.code == 0 and is_done else f"exit {ended.code}"
        count.add(f"{case}, the job", str(failed[0]) if failed else problem)
    left = place.left_behind()
    count.add(f"{case}, the folder", f"left behind: {left}" if left else "")
    last = mpisave.load(place.path)
    is_whole = states.is_one_of_many(last, case.size, tags)
    count.add(f"{case}, the last state", "" if is_whole else "not whole")


def _load_on(case, path, tags, kind, stop, results):
    """Load until told to stop; tell how often, and what was wrong."""
    loads, seen, misses = 0, set(), []
    while not stop.is_set():
        loads += 1
        try:
            if kind == "verify":
                seen.add(mpisave.verify(path).digest)
                continue
            is_mpisave = kind == "mpisave"
            state = mpisave.load(path) if is_mpisave else states.stock_load(case, path)
            seen.add(int(state["replica"][0]))
            if not states.is_one_of_many(state, case.size, tags):
                misses.append(f"load {loads} by {kind}: a mixture")
        except Exception as exc:
            misses.append(f"load {loads} by {kind}: {type(exc).__name__}: {exc}")
    results.put((kind, loads, len(seen), misses))
