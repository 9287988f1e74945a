"""Loss of power: the backing image of a mounted ext4, copied while a rank is stopped.

What the loop device has written to its backing file is what ext4 has sent to the disk.
Two extremes of what a disk may hold are tried: nothing was written but what was flushed
(the file system is mounted so that it writes by itself late), and everything was.
"""

import contextlib
import os
import shutil
import subprocess

import jobs
import killing
import states
from report import Count, skipped

IMAGE_NBYTES = 24 * 2**20


def why_not():
    reason = jobs.why_not_strace() or jobs.why_not_root()
    if reason:
        return reason
    for tool in ("mkfs.ext4", "losetup", "mount"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    return ""


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def mounted(image, at, options="loop,commit=300"):
    at.mkdir(exist_ok=True)
    _run("mount", "-o", options, str(image), str(at))
    try:
        yield at
    finally:
        _run("umount", "-l", str(at))


def _can_mount(options):
    image = options.scratch / "try.img"
    try:
        _make(image)
        with mounted(image, options.scratch / "try"):
            return ""
    except (subprocess.CalledProcessError, OSError) as exc:
        return f"no loop device of ext4: {getattr(exc, 'stderr', exc)}"
    finally:
        image.unlink(missing_ok=True)


def _make(image):
    with image.open("wb") as file:
        file.truncate(IMAGE_NBYTES)
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", str(image))


def _copy(image, to):
    """Copy a backing file while nobody writes to it: again, if somebody did."""
    for _ in range(10):
        before = image.stat().st_mtime_ns
        _run("cp", "--sparse=always", str(image), str(to))
        if image.stat().st_mtime_ns == before:
            return
    raise RuntimeError(f"{image} does not come to rest")


def at_every_call(options):
    """Copy the disk at each call of each rank; mount the copies; load."""
    reason = why_not() or _can_mount(options)
    if reason:
        yield skipped("power loss at every file call", reason)
        return
    control = Count("control: a save in place that loses its power is found out")
    case = states.Case("pickle", "gather", 1)
    _lose_power(control, case, options.scratch, is_flushed=True, control=True)
    yield killing.found_out(control)
    for case in states.cases(options.sizes, options.formats, options.roads):
        for is_flushed in (False, True):
            how = "all written" if is_flushed else "only what was flushed"
            count = Count(f"power loss at every file call, {how}: {case}")
            _lose_power(count, case, options.scratch, is_flushed=is_flushed)
            yield count


def _lose_power(count, case, scratch, *, is_flushed, control=False):
    root = scratch / f"power-{case.format}-{case.road}-{case.size}"
    root.mkdir()
    image, copies = root / "disk.img", []
    _make(image)
    with mounted(image, root / "mnt") as at:
        place = killing.Place(case, at, "w")
        # Reports and traces are kept off the disk that loses its power.
        place.work = root / "reports"
        place.work.mkdir()
        place.changed = {"control": control}
        paths = killing.paths_touched(case, place)
        place.reset()
        os.sync()

        def at_call(job, rank, number, pid, line):
            if is_flushed:
                _run("sync", "-f", str(at))
            copies.append((f"rank {rank}, call {number} ({jobs.name_of(line)})", None))
            _copy(image, root / f"copy{len(copies)}.img")

        ended = jobs.run_stopping(
            place.work,
            case.size,
            place.request(task="save"),
            paths,
            range(case.size),
            at_call,
        )
        assert ended.code == 0, ended.output
        copies.append(("after the return", "new"))
        _copy(image, root / f"copy{len(copies)}.img")
    relative = place.path.relative_to(at)
    for number, (what, must_be) in enumerate(copies, 1):
        _look(count, case, root, number, relative, f"{case}, {what}", must_be)
    shutil.rmtree(root)


def _look(count, case, root, number, relative, what, must_be):
    copy = root / f"copy{number}.img"
    try:
        with mounted(copy, root / "after", "loop") as at:
            found = states.which(case, at / relative)
    except subprocess.CalledProcessError as exc:
        found = f"does not mount: {exc.stderr}"
    copy.unlink()
    is_good = found == must_be if must_be else found in ("old", "new")
    count.tally(f"{found} state" if is_good else "misses")
    if must_be:
        count.tally("of them after the return")
    count.add(what, "" if is_good else f"{found}, not {must_be or 'old or new'}")
