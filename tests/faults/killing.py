"""SIGKILL: of a rank at every file call that changes something, and of a whole job."""

import os
import random
import re
import shutil
import time

import jobs
import states
from report import Count, skipped

import mpisave


def paths_touched(case, place):
    """Return every path in the folder of `place` that a save touches, and the folder.

    Found by tracing a save whole, so that it need not be known how mpisave calls its
    staging file, only that it asks `secrets` for a random part.
    """
    log = place.work / "names"
    under = {
        rank: [*jobs.traced([], f"{log}{rank}"), "-s", "4096"]
        for rank in range(case.size)
    }
    ended = jobs.run(place.work, case.size, place.request(task="save"), under)
    assert ended.code == 0, ended.output
    found = set()
    for rank in range(case.size):
        text = (place.work / f"names{rank}").read_text(errors="replace")
        inside = re.escape(str(place.folder)) + r"(?:/[^\"<>]+)?"
        found |= set(re.findall(rf"[\"<]({inside})[\">]", text))
    return sorted(found | {str(place.folder), str(place.path)})


class Place:
    """A folder with an old file, where a job saves the new state over it."""

    def __init__(self, case, root, name):
        self.case = case
        self.work = root / name
        self.folder = self.work / "saved"
        self.folder.mkdir(parents=True)
        self.path = self.folder / states.file_name(case)
        self.old = states.put_old(case, self.path)
        self.changed = {}

    def request(self, **changed):
        return {
            "format": self.case.format,
            "road": self.case.road,
            "path": str(self.path),
            "token": True,
            "one_thread": True,
            **self.changed,
            **changed,
        }

    def reset(self):
        for other in self.folder.iterdir():
            other.unlink()
        self.path.write_bytes(self.old)

    def left_behind(self):
        return [n for n in os.listdir(self.folder) if n != self.path.name]

    def next_save(self, count):
        """Save once more, alone; return what is wrong, and count what it removed."""
        before = self.left_behind()
        state = states.whole_state(self.case.size, states.NEW)
        is_hdf5 = self.case.format == "hdf5"
        try:
            mpisave.save(state, self.path, use_binary_format=is_hdf5)
        except Exception as exc:
            return f"the next save failed: {type(exc).__name__}: {exc}"
        count.tally("files left behind by the dead", len(before))
        after = len(self.left_behind())
        count.tally("of them there after the next save", after)
        found = states.which(self.case, self.path)
        return "" if found == "new" else f"after the next save: {found}"


def at_every_call(options):
    """Kill each rank in turn after each of its calls, and look what is on the disk."""
    reason = jobs.why_not_strace()
    if reason:
        yield skipped("SIGKILL of a rank at every file call", reason)
        return
    yield _control(options)
    for case in states.cases(options.sizes, options.formats, options.roads):
        count = Count(f"SIGKILL of a rank at every file call: {case}")
        place = Place(
            case, options.scratch, f"kill-{case.format}-{case.road}-{case.size}"
        )
        paths = paths_touched(case, place)
        total = 0
        for victim in range(case.size):
            names = calls_of(place, paths, victim)
            total += len(names)
            thin = options.thin if case.size > 2 else options.thin_small
            for number in range(1, len(names) + 1, thin):
                _kill(count, place, paths, victim, number)
        count.tally("calls", total)
        if not total:
            count.add("enumeration", "no file call was seen")
        yield count
        shutil.rmtree(place.work)


def found_out(control):
    """Return the count of a control: it passes if the bad save was found out."""
    result = Count(control.name)
    result.facts = {"misses found": len(control.misses), "of": control.tried}
    result.add(control.name, "" if control.misses else "nothing was found")
    return result


def _control(options):
    """Kill a save that writes in place: the harness has to find that out."""
    case = states.Case("pickle", "gather", 1)
    count = Count("control: a save in place, killed at every file call, is found out")
    place = Place(case, options.scratch, "kill-control")
    place.changed = {"control": True}
    paths = paths_touched(case, place)
    for number in range(1, len(calls_of(place, paths, 0)) + 1):
        _kill(count, place, paths, 0, number)
    shutil.rmtree(place.work)
    return found_out(count)


def calls_of(place, paths, victim):
    names = []
    place.reset()
    ended = jobs.run_stopping(
        place.work,
        place.case.size,
        place.request(task="save"),
        paths,
        [victim],
        lambda job, rank, number, pid, line: names.append(jobs.name_of(line)),
    )
    assert ended.code == 0, ended.output
    return names


def _kill(count, place, paths, victim, number):
    place.reset()
    killed = []

    def at_call(job, rank, now, pid, line):
        if now == number:
            jobs.kill_rank(pid)
            killed.append((jobs.name_of(line), time.monotonic()))

    request = place.request(task="save")
    size = place.case.size
    ended = jobs.run_stopping(place.work, size, request, paths, [victim], at_call)
    what = f"{place.case}, rank {victim}, call {number}"
    if not killed:
        count.add(what, "the call was not reached")
        return
    what += f" ({killed[0][0]})"
    count.tally(f"after {killed[0][0]}")
    found = states.which(place.case, place.path)
    problem = "" if found in ("old", "new") else found
    if ended.is_hung:
        problem = problem or f"the job was still there after {ended.seconds:.0f} s"
    if ended.code == 0:
        problem = problem or "the launcher reports success"
    count.tally(f"{found} state" if not problem else "misses")
    count.add(what, problem or place.next_save(count))


def whole_job(options):
    """Kill all ranks and the launcher at random moments of saving again and again."""
    rng = random.Random(options.seed)
    for format_name in options.formats:
        for road in options.roads:
            count = Count(
                f"SIGKILL of the whole job, random moments: {format_name}, {road}"
            )
            for number in range(options.kills):
                size = options.sizes[number % len(options.sizes)]
                case = states.Case(format_name, road, size)
                place = Place(case, options.scratch, "job")
                # Of one length for all: the kill falls into a save.
                _kill_job(count, place, rng.uniform(0, 0.25))
                shutil.rmtree(place.work)
            yield count


def _kill_job(count, place, after_s):
    case = place.case
    request = place.request(
        task="many", first=2, saves=100_000, tells=False, token=False, one_thread=False
    )
    job = jobs.Job(place.work, case.size, request)
    while None in job.pids() and time.monotonic() < job.began + jobs.DEADLINE_S:
        time.sleep(0.005)
    time.sleep(after_s)
    was_running = job.process.poll() is None
    job.kill()
    ended = job.wait()
    what = f"{case}, {after_s * 1000:.0f} ms after the start"
    if not was_running:
        count.add(what, f"the job had ended: {ended.output}")
        return
    problem = ""
    try:
        loaded = mpisave.load(place.path)
        stock = states.stock_load(case, place.path)
        tag = int(loaded["replica"][0])
        whole = states.whole_state(case.size, tag)
        count.tally("old state" if tag == states.OLD else "a new state")
        if not (states.is_equal(loaded, whole) and states.is_equal(stock, whole)):
            problem = "a mixture"
    except Exception as exc:
        problem = f"{type(exc).__name__}: {exc}"
    count.add(what, problem or place.next_save(count))
