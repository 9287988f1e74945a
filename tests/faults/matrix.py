"""The matrices of docs/reliability.md: what comes of each fault at each step."""

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

import errors
import jobs
import killing
import states
import waiting
from injection import LATE_S
from report import Count

BEGIN = "<!-- matrix: written by tests/faults/run.py --markdown -->"
END = "<!-- end of the matrix -->"

COMMON = (
    "check arguments",
    "describe the state dict",
    "plan",
    "create the staging file",
    "lay out the file",
    "allocate buffers",
    "exchange and write",
    "seal",
    "publish",
)
STEPS = {
    "gather": ("gather and write", *COMMON),
    "direct": ("open the staging file", "write", *COMMON),
}
ORDER = (
    *COMMON[:4],
    "open the staging file",
    "lay out the file",
    "write",
    "allocate buffers",
    "gather and write",
    *COMMON[6:],
)
SIZE = 2
# What happens within a job that lives on, and what ends it.
SURVIVED = {
    "ENOSPC": "an OSError",
    "memory": "a MemoryError",
    "full": "a full disk",
    "late": f"{LATE_S} s late",
}
FATAL = {"kill": "SIGKILL", "stop": "SIGSTOP"}
# A load writes nothing.
SURVIVED_BY_LOAD = {f: name for f, name in SURVIVED.items() if f != "full"}

KINDS = {"ENOSPC": "StorageError", "memory": "CollectiveError"}
NOTHING = "nothing"
ENDED = "nothing: the launcher ends the job"

TIMEOUT_S = 1.0
# Jobs at a time: of the time of one, most is waiting.
JOBS = 4
ALONE = {"token": False, "one_thread": False}

OF_READING = (
    "Of reading, what each rank raises. The file stays as it was, byte for byte, and "
    "the next call gives the state."
)

# (step, fault) to what was seen, of all formats, roads and victims.
_SEEN = {}
# (call, step, fault) to what was raised, of all formats and victims.
_RAISED = {}


def count(options):
    """Have every fault at every step, on the first rank and on the last."""
    _SEEN.clear()
    _RAISED.clear()
    for case in states.cases([SIZE], options.formats, options.roads):
        total = Count(f"faults at steps of save: {case}")
        place = killing.Place(case, options.scratch, "matrix")
        old = place.work / "old"
        old.write_bytes(place.old)
        _survive(total, place, str(old))
        shutil.rmtree(place.work)
        faults = [(s, f, v) for s in STEPS[case.road] for f in FATAL for v in (0, 1)]
        _at_once(total, faults, functools.partial(_end, options, case))
        yield total
    for case in states.cases([SIZE], options.formats, options.roads[:1]):
        total = Count(f"faults at steps of load and verify: {case.format}")
        place = killing.Place(case, options.scratch, "matrix")
        steps = _survive_loading(total, place)
        shutil.rmtree(place.work)
        faults = [(c, s, f, v) for c, s in steps for f in FATAL for v in (0, 1)]
        _at_once(total, faults, functools.partial(_end_loading, options, case))
        yield total


def _at_once(total, faults, end):
    """Have each fault in a job of its own, several at a time."""
    with ThreadPoolExecutor(JOBS) as pool:
        counts = pool.map(lambda item: end(item[0], *item[1]), enumerate(faults))
        for part in counts:
            total.take(part)


def _note(step, fault, road, disk, load, raises):
    _SEEN.setdefault((step, fault), set()).add((road, disk, load, raises))


def _disk(found, left):
    if found == "new":
        return "the new file"
    return "the old file" + (" and a staging file" if left else "")


def _raised_by(lines):
    types = sorted({str(line["type"] or NOTHING) for line in lines})
    return " or ".join(types)


# ---- save


def _survive(total, place, old):
    case = place.case
    faults = [(s, f, v) for s in STEPS[case.road] for f in SURVIVED for v in (0, 1)]
    request = place.request(task="steps", faults=faults, old=old, token=False)
    ended = jobs.run(place.work, case.size, request, deadline_s=180)
    if ended.code != 0:
        total.add(str(case), f"exit {ended.code}: {ended.output}")
    for lines in zip(*(lines[1:] for lines in ended.lines), strict=False):
        first = lines[0]
        step, fault, victim = (first[k] for k in ("step_of_fault", "fault", "victim"))
        problem = "" if lines[victim]["fired"] else "the step was not reached"
        problem = problem or _judge(case, lines, step, fault, victim)
        what = f"{case}, rank {victim}, {step}, {fault}"
        total.add(what, problem or errors.judge_state(first))
        found = first["found"]
        disk = _disk(found, first["left"])
        _note(step, fault, case.road, disk, f"the {found} state", _raised_by(lines))


def _judge(case, lines, step, fault, victim):
    """Return what is wrong with what was raised, or with the file; or nothing."""
    found = lines[0]["found"]
    is_written_to = fault == "full" and _writes_after(case, step, victim)
    is_quiet = not any(line["type"] for line in lines)
    if fault == "late" or (fault == "full" and is_quiet and not is_written_to):
        raised = [line["type"] for line in lines if line["type"]]
        return f"raised {raised}" if raised else "" if found == "new" else found
    problem = errors.judge(
        case, lines, None, [victim], KINDS.get(fault, "StorageError")
    )
    # Nothing holds back the rank that publishes once another one is at fault.
    is_published = found == "new" and step == "publish" and victim
    if not problem and found != "old" and not is_published:
        problem = f"on the disk: {found}"
    return problem


def _writes_after(case, step, victim):
    """Return whether a rank surely writes to the file once it has come to a step."""
    if victim == 0:  # it seals the file
        return step != "publish"
    return case.road == "direct" and step not in COMMON[-3:]


def _end(options, case, number, step, fault, victim):
    total = Count("")
    place = killing.Place(case, options.scratch, f"matrix{number}")
    about = {"step": step, "fault": fault, "victim": victim}
    request = place.request(task="step", **about, **ALONE)
    problem, raises = _problem_of(fault, place, request, victim)
    found, left = states.which(case, place.path), place.left_behind()
    # At the publication, a rank that does not publish loses nothing.
    disk = _disk(found, left)
    _note(step, fault, case.road, disk, f"the {found} state", raises)
    problem = problem or ("" if found in ("old", "new") else found)
    what = f"{case}, rank {victim}, {step}, {fault}"
    total.add(what, problem or place.next_save(total))
    shutil.rmtree(place.work)
    return total


def _problem_of(fault, place, request, victim):
    """Run a job that a fault ends; return what is wrong, and what ranks have raised."""
    size = place.case.size
    if fault == "stop":
        job = jobs.Job(place.work, size, request | {"timeout": TIMEOUT_S})
        lines = waiting.what_others_raise(job, [r for r in range(size) if r != victim])
        raises = _raised_by(lines)
        is_named = all(line["ranks"] == [victim] for line in lines)
        is_right = len(lines) == size - 1 and raises == "CollectiveTimeout" and is_named
        problem = "" if is_right else f"the others raised {lines}"
        if any("type" in line for line in job.lines()[victim]):
            problem = problem or "the rank was not stopped"
        return problem, raises
    ended = jobs.run(place.work, size, request)
    reported = [line for lines in ended.lines for line in lines if "type" in line]
    problem = ""
    if ended.code == 0 or ended.is_hung:
        problem = f"exit {ended.code}: {ended.output}"
    return problem, _raised_by(reported) if reported else ENDED


# ---- load and verify


def _survive_loading(total, place):
    """Return the calls and their steps."""
    case = place.case
    faults = list(SURVIVED_BY_LOAD)
    request = place.request(task="loads", faults=faults, token=False)
    ended = jobs.run(place.work, case.size, request, deadline_s=180)
    if ended.code != 0:
        total.add(str(case), f"exit {ended.code}: {ended.output}")
    steps = []
    for lines in zip(*(lines[1:] for lines in ended.lines), strict=False):
        first = lines[0]
        if "steps" in first:
            steps += [(first["call"], step) for step in first["steps"]]
            continue
        names = ("call", "step_of_fault", "fault", "victim")
        call, step, fault, victim = (first[name] for name in names)
        problem = "" if lines[victim]["fired"] else "the step was not reached"
        if fault == "late":
            raised = [line["type"] for line in lines if line["type"]]
            problem = problem or (f"raised {raised}" if raised else "")
        else:
            problem = problem or errors.judge(case, lines, None, [victim], KINDS[fault])
        if not problem and any(line["next"] for line in lines):
            problem = f"the next {call}: {[line['next'] for line in lines]}"
        total.add(f"{case}, rank {victim}, {call}, {step}, {fault}", problem)
        _RAISED.setdefault((call, step, fault), set()).add(_raised_by(lines))
    if place.path.read_bytes() != place.old:
        total.add(str(case), "the file is another one")
    return steps


def _end_loading(options, case, number, call, step, fault, victim):
    total = Count("")
    place = killing.Place(case, options.scratch, f"matrix{number}")
    about = {"call": call, "step": step, "fault": fault, "victim": victim}
    request = place.request(task="load_step", **about, **ALONE)
    problem, raises = _problem_of(fault, place, request, victim)
    if place.path.read_bytes() != place.old or place.left_behind():
        problem = problem or "the folder is not as it was"
    if (found := states.which(case, place.path)) != "old":
        problem = problem or f"the next load gives {found}"
    total.add(f"{case}, rank {victim}, {call}, {step}, {fault}", problem)
    _RAISED.setdefault((call, step, fault), set()).add(raises)
    shutil.rmtree(place.work)
    return total


# ---- Markdown


def tables():
    """Return the matrices as Markdown."""
    lines = [
        "| step | fault | on the disk afterwards | `load` gives | each rank raises |",
        "|---|---|---|---|---|",
    ]
    for step in ORDER:
        for fault, name in (SURVIVED | FATAL).items():
            seen = _SEEN.get((step, fault))
            if not seen:
                continue
            roads = {road for road, *_ in seen}
            where = "" if len(roads) > 1 else f" ({roads.pop()} only)"
            cells = [
                " or ".join(sorted({row[column] for row in seen}))
                for column in (1, 2, 3)
            ]
            lines.append(f"| {step}{where} | {name} | {' | '.join(cells)} |")
    faults = SURVIVED_BY_LOAD | FATAL
    lines += ["", OF_READING, ""]
    lines += [
        f"| call | step | {' | '.join(faults.values())} |",
        "|---" * (2 + len(faults)) + "|",
    ]
    for call, step in dict.fromkeys(key[:2] for key in _RAISED):
        cells = [
            " or ".join(sorted(_RAISED.get((call, step, fault), {"?"})))
            for fault in faults
        ]
        lines.append(f"| `{call}` | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into(page):
    """Put the matrices between their markers in a page of the documentation."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no place for the matrix: add {BEGIN!r}, {END!r}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")
