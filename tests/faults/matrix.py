"""The matrix of docs/reliability.md: step, fault, disk, load, what each rank raises."""

import shutil

import errors
import jobs
import killing
import states
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
FAULTS = {"ENOSPC": "an OSError", "memory": "a MemoryError", "kill": "SIGKILL"}

# (step, fault) to what was seen, of all formats, roads and victims.
_SEEN = {}


def count(options):
    """Have every fault at every step, on the first rank and on the last."""
    _SEEN.clear()
    size = 2
    for case in states.cases([size], options.formats, options.roads):
        total = Count(f"faults at steps: {case}")
        place = killing.Place(case, options.scratch, "matrix")
        old = place.work / "old"
        old.write_bytes(place.old)
        _raise(total, place, str(old))
        for step in STEPS[case.road]:
            for victim in (0, size - 1):
                _kill(total, place, step, victim)
        yield total
        shutil.rmtree(place.work)


def _note(step, fault, road, disk, load, raises):
    _SEEN.setdefault((step, fault), set()).add((road, disk, load, raises))


def _disk(left):
    return "the old file" + (" and a staging file" if left else "")


def _raise(total, place, old):
    case = place.case
    faults = [
        (step, fault, victim)
        for step in STEPS[case.road]
        for fault in FAULTS
        for victim in (0, case.size - 1)
        if fault != "kill"
    ]
    request = place.request(task="steps", faults=faults, old=old, token=False)
    ended = jobs.run(place.work, case.size, request, deadline_s=180)
    if ended.code != 0:
        total.add(str(case), f"exit {ended.code}: {ended.output}")
    for lines in zip(*(lines[1:] for lines in ended.lines), strict=False):
        first = lines[0]
        step, fault, victim = (first[k] for k in ("step_of_fault", "fault", "victim"))
        kind = "StorageError" if fault == "ENOSPC" else "CollectiveError"
        is_fired = lines[victim]["fired"]
        problem = "" if is_fired else "the step was not reached"
        problem = problem or errors.judge(case, lines, None, [victim], kind)
        # Nothing holds back the rank that publishes once another one is at fault.
        is_published = first["found"] == "new" and step == "publish" and victim
        if not problem and first["found"] != "old" and not is_published:
            problem = f"on the disk: {first['found']}"
        what = f"{case}, rank {victim}, {step}, {fault}"
        total.add(what, problem or errors.judge_state(first))
        raises = " or ".join(sorted({str(line["type"]) for line in lines}))
        load = f"the {first['found']} state"
        disk = "the new file" if is_published else _disk(first["left"])
        _note(step, fault, case.road, disk, load, raises)


def _kill(total, place, step, victim):
    case = place.case
    place.reset()
    request = place.request(
        task="step", step=step, fault="kill", victim=victim, token=False
    )
    ended = jobs.run(place.work, case.size, request)
    what = f"{case}, rank {victim}, {step}, SIGKILL"
    if ended.code == 0 or ended.is_hung:
        total.add(what, f"exit {ended.code}: {ended.output}")
        return
    found, left = states.which(case, place.path), place.left_behind()
    reported = [line for lines in ended.lines for line in lines if "type" in line]
    raises = "nothing: the launcher ends the job"
    if reported:
        raises = " or ".join(sorted({str(line["type"]) for line in reported}))
    # Killed at the publication, a rank that does not publish loses nothing.
    disk = "the new file" if found == "new" else _disk(left)
    _note(step, "kill", case.road, disk, f"the {found} state", raises)
    problem = "" if found in ("old", "new") else found
    total.add(what, problem or place.next_save(total))


def table():
    """Return the matrix as Markdown."""
    lines = [
        "| step | fault | on the disk afterwards | `load` gives | each rank raises |",
        "|---|---|---|---|---|",
    ]
    for step in ORDER:
        for fault, name in FAULTS.items():
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
    return "\n".join(lines)


def put_into(page):
    """Put the matrix between its markers in a page of the documentation."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no place for the matrix: add {BEGIN!r}, {END!r}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
