"""Errors of the file system: at every call of every rank, and of real disks."""

import contextlib
import errno
import shutil
import subprocess

import jobs
import killing
import states
from report import Count, skipped

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
LIMIT_S = 10.0


def judge(case, lines, path, victims, kind="StorageError"):
    """Return what is wrong with what the ranks of one save raised, or nothing."""
    types = {line["type"] for line in lines}
    if types != {kind}:
        return f"raised {[line['type'] for line in lines]}, not {kind} everywhere"
    slowest = max(line["seconds"] for line in lines)
    if slowest > LIMIT_S:
        return f"took {slowest:.1f} s"
    for line in lines:
        if line["ranks"] and not set(victims) & set(line["ranks"]):
            return f"blames rank {line['ranks']}"
        if case.size > 1 and "rank" not in line["message"]:
            return f"does not name a rank: {line['message']}"
        if path and str(path) not in line["message"]:
            return f"does not name the path: {line['message']}"
    return ""


def judge_state(line):
    """Return what is wrong with what is on the disk after a fault, or nothing."""
    # After the rename the new file is there, whole: docs/reliability.md, step 10.
    if line["found"] not in ("old", "new"):
        return f"on the disk: {line['found']}"
    if line["left"]:
        return f"left behind: {line['left']}"
    if line["next"] is not None or line["after"] != "new":
        return f"the next save: {line['next']}, then {line['after']}"
    return ""


def at_every_call(options):
    """Have each call of each rank fail with each error, from within Python."""
    table = {}
    for case in states.cases(options.sizes, options.formats, options.roads):
        count = Count(f"errors at every file call: {case}")
        place = killing.Place(case, options.scratch, f"errors-{case.size}")
        old = place.work / "old"
        old.write_bytes(place.old)
        request = place.request(
            task="faults",
            old=str(old),
            errors=ERRORS[: 1 if options.short else None],
            thin=1,
        )
        ended = jobs.run(place.work, case.size, request, deadline_s=240)
        _count_calls(count, case, place, ended, table)
        yield count
        shutil.rmtree(place.work)
    yield from _by_strace(options, table)


def _count_calls(count, case, place, ended, table):
    if ended.code != 0:
        count.add(str(case), f"exit {ended.code}: {ended.output}")
    dry, *_ = rows = list(zip(*(lines[1:] for lines in ended.lines), strict=False))
    count.tally("calls", sum(len(line["seen"]) for line in dry))
    for lines in rows[1:]:
        first = lines[0]
        victim, name = first["victim"], first["name"]
        what = f"{case}, rank {victim}, call {first['call']} ({name}), {first['error']}"
        problem = "" if lines[victim]["fired"] else "the call was not reached"
        if _is_let_be(lines, dry[victim]["seen"]):
            count.tally("let be")
        else:
            problem = problem or judge(case, lines, place.path, [victim])
        count.add(what, problem or judge_state(first))
        count.tally("old file" if first["found"] == "old" else "new file, whole")
        key = (case, victim, name, first["error"])
        table.setdefault(key, set()).add((first["type"], first["step"]))


def _is_let_be(lines, seen):
    """Return whether a call failed that a save may do without, and it has saved.

    Mode and owner are kept where permitted; after the rename, all that is closed is a
    lock and a directory.
    """
    first = lines[0]
    renamed = [n for n, name in enumerate(seen, 1) if name in ("rename", "replace")]
    is_late = bool(renamed) and first["call"] > renamed[0]
    may_fail = first["name"] in ("fchown", "fchmod") or (
        first["name"] == "close" and is_late
    )
    saved = all(line["type"] is None for line in lines)
    return may_fail and saved and first["found"] == "new"


def _by_strace(options, table):
    """Have calls fail in the kernel's name, and compare with those made in Python."""
    reason = jobs.why_not_strace()
    if reason or options.short:
        yield skipped("errors by strace", reason or "the short cut")
        return
    sizes = [n for n in options.sizes if n <= 2]
    for case in states.cases(sizes, options.formats, options.roads):
        count = Count(f"errors by strace, as from within Python: {case}")
        place = killing.Place(case, options.scratch, f"strace-{case.size}")
        paths = killing.paths_touched(case, place)
        for victim in range(case.size):
            names = killing.calls_of(place, paths, victim)
            for number, name in enumerate(dict.fromkeys(names)):
                if (case.format, case.road) != ("pickle", "gather") and number % 2:
                    continue
                error = ERRORS[number % 2]
                _fail_by_strace(count, place, paths, (victim, name, error), table)
        yield count
        shutil.rmtree(place.work)


# What strace calls what Python calls otherwise.
_IN_PYTHON = {
    "openat": "open",
    "pwrite64": "pwrite",
    "rename": "replace",
}


def _fail_by_strace(count, place, paths, fault, table):
    victim, name, error = fault
    case = place.case
    place.reset()
    log = place.work / "trace"
    options = ["-e", f"inject={name}:error={error}:when=1"]
    under = {victim: jobs.traced(paths, log, *options)}
    request = place.request(task="save")
    ended = jobs.run(place.work, case.size, request, under)
    what = f"{case}, rank {victim}, first {name}, {error}"
    lines = [lines[-1] for lines in ended.lines]
    problem = "" if "(INJECTED)" in log.read_text(errors="replace") else "not reached"
    if ended.code != 0:
        problem = problem or f"exit {ended.code}: {ended.output}"
    found = states.which(case, place.path)
    python = table.get((case, victim, _IN_PYTHON.get(name, name), error), set())
    outcome = (lines[0]["type"], lines[0]["step"])
    # What was let be there may be let be here.
    if outcome[0] is None and outcome in python and found == "new":
        count.tally("let be")
    else:
        problem = problem or judge(case, lines, place.path, [victim])
    if not problem and place.left_behind():
        problem = f"left behind: {place.left_behind()}"
    if not problem and found not in ("old", "new"):
        problem = found
    if not problem and python and outcome not in python:
        problem = f"{lines[0]['type']} in {lines[0]['step']!r}, in Python {python}"
    count.add(what, problem or place.next_save(count))


def real(options):
    """Save to disks that are full, limited, missing, read-only, hidden from a rank."""
    reason = jobs.why_not_root()
    for name, part in REAL.items():
        if reason and part is not _limited and part is not _missing:
            yield skipped(name, reason)
            continue
        count = Count(name)
        for case in states.cases(options.sizes, options.formats, options.roads):
            place = killing.Place(case, options.scratch, "real")
            try:
                part(count, place)
            except subprocess.CalledProcessError as exc:
                count = skipped(name, f"{exc.cmd[0]}: {exc.stderr.strip()}")
                break
            finally:
                shutil.rmtree(place.work)
        yield count


def _sh(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


def _save(place, under=None, **request):
    request = {"task": "save", "token": False, "one_thread": False} | request
    return jobs.run(place.work, place.case.size, place.request(**request), under)


def _count(count, place, ended, what, victims, *, path=None, number=None):
    """Judge a save that had to fail, and the one after it."""
    case = place.case
    lines = [lines[-1] for lines in ended.lines]
    what = f"{case}, {what}"
    if ended.code != 0 or any("type" not in line for line in lines):
        count.add(what, f"exit {ended.code}: {ended.output}")
        return
    problem = judge(case, lines, path or place.path, victims)
    if not problem and number and {line["errno"] for line in lines} != {number}:
        problem = f"errno {[line['errno'] for line in lines]}"
    if not problem and place.path.exists() and place.path.read_bytes() != place.old:
        problem = "the old file was changed"
    if not problem and place.folder.exists() and place.left_behind():
        problem = f"left behind: {place.left_behind()}"
    count.add(what, problem)


def _after(count, place):
    """Check that a save works once the fault is gone."""
    problem = place.next_save(count)
    if problem:
        count.add(f"{place.case}, the save after", problem)


@contextlib.contextmanager
def _tmpfs(place, nbytes):
    _sh("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(place.folder))
    try:
        place.path.write_bytes(place.old)
        yield
    finally:
        _sh("umount", "-l", str(place.folder))


def _full(count, place):
    # Room for nothing but the old file, for part of the new one, for all but its end.
    old = len(place.old)
    for spare in (0.0, 0.5, 0.98):
        with _tmpfs(place, (int(old * (1 + spare)) // 4096 + 2) * 4096):
            ended = _save(place)
            what = f"room for {spare:.0%} of the new file"
            _count(count, place, ended, what, [0], number=errno.ENOSPC)
    with _tmpfs(place, 3 * old):
        _after(count, place)


def _limited(count, place):
    writers = range(place.case.size) if place.case.road == "direct" else [0]
    for victim in writers:
        limit = len(place.old) // 2
        if victim:  # its own part lies behind this
            limit = 4096
        ended = _save(place, task="limited", victim=victim, limit_nbytes=limit)
        _count(count, place, ended, f"rank {victim}", [victim], number=errno.EFBIG)
    _after(count, place)


def _missing(count, place):
    path = place.folder / "not there" / place.path.name
    ended = _save(place, path=str(path))
    _count(count, place, ended, "no such folder", [0], path=path)
    _after(count, place)


def _immutable(count, place):
    _sh("chattr", "+i", str(place.folder))
    try:
        _count(count, place, _save(place), "chattr +i", [0])
    finally:
        _sh("chattr", "-i", str(place.folder))
    _after(count, place)


def _read_only(count, place):
    _sh("mount", "--bind", str(place.folder), str(place.folder))
    try:
        _sh("mount", "-o", "remount,ro,bind", str(place.folder))
        ended = _save(place)
        _count(count, place, ended, "read-only", [0], number=errno.EROFS)
    finally:
        _sh("umount", "-l", str(place.folder))
    _after(count, place)


def _hidden(count, place):
    """Have a rank see another, empty folder, or none, where the others see theirs."""
    size, is_direct = place.case.size, place.case.road == "direct"
    if size == 1:
        return
    for victim in range(size):
        # A rank that does not write need not see the folder.
        for hides in (place.folder, place.folder.parent / "top"):
            if not is_direct and (victim or hides == place.folder):
                continue
            _hide(count, place, victim, hides)
    _after(count, place)


def _hide(count, place, victim, hides):
    kept = place.path, place.folder
    if hides != place.folder:  # the folder itself is missing: it lies in a hidden one
        hides.mkdir(exist_ok=True)
        place.folder = hides / "saved"
        place.folder.mkdir(exist_ok=True)
        place.path = place.folder / kept[0].name
        place.path.write_bytes(place.old)
    script = f'mount -t tmpfs none "{hides}" && exec "$@"'
    under = {victim: ["unshare", "-m", "sh", "-c", script, "sh"]}
    ended = _save(place, under)
    what = f"rank {victim} sees another {hides.name}"
    others = range(place.case.size)
    _count(count, place, ended, what, others if victim == 0 else [victim])
    place.path, place.folder = kept


REAL = {
    "a full tmpfs, three sizes": _full,
    "RLIMIT_FSIZE on a rank that writes": _limited,
    "a missing directory": _missing,
    "an immutable directory (chattr +i)": _immutable,
    "a read-only mount": _read_only,
    "a directory that one rank does not see": _hidden,
}
