"""Injects faults into saves, and counts what came of them: `make test-faults`.

mpisave is a black box here: it is called, killed, starved and cut off, and judged by
what raises on which rank and by what is on the disk afterwards, as `mpisave.load` and a
reader that does not know mpisave (pickle.load, h5py) see it. Each line of the table is
"N of N"; what was missed is named, what cannot run on this machine is SKIPPED with the
reason. The exit status is 1 if anything was missed.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # mpisave
sys.path.insert(1, str(Path(__file__).parents[1]))  # what tests share

import errors
import jobs
import killing
import matrix
import power
import readers
import scenarios
import states
import waiting
from report import Report

PARTS = {
    "calls": killing.at_every_call,
    "job": killing.whole_job,
    "power": power.at_every_call,
    "errors": errors.at_every_call,
    "disks": errors.real,
    "readers": readers.read,
    "scenarios": scenarios.count,
    "waiting": waiting.count,
    "matrix": matrix.count,
}
# A few seconds, for the tests that run always.
SHORT = ("calls", "errors", "scenarios")


def _numbers(text):
    return [int(number) for number in text.split(",")]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in order")
    parser.add_argument("--sizes", type=_numbers, default=[1, 2, 4], help="of jobs")
    parser.add_argument("--formats", default=",".join(states.FORMATS))
    parser.add_argument("--roads", default=",".join(states.ROADS))
    parser.add_argument(
        "--thin",
        type=int,
        default=1,
        help="of the file calls of more than 2 ranks, kill at every n-th only",
    )
    parser.add_argument("--thin-small", type=int, default=1, help="of 1 and 2 ranks")
    parser.add_argument("--kills", type=int, default=100, help="of whole jobs, each")
    parser.add_argument("--saves", type=int, default=1000, help="beside readers")
    parser.add_argument("--rivals", type=int, default=50, help="saves of two jobs each")
    parser.add_argument("--other-python", help="of an environment with another MPI")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--short", action="store_true", help="a few seconds of three parts"
    )
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--markdown", type=Path, help="put the matrix into this page")
    options = parser.parse_args(arguments)
    options.formats = options.formats.split(",")
    options.roads = options.roads.split(",")
    options.parts = options.parts.split(",")
    if options.short:
        options.parts = [part for part in options.parts if part in SHORT]
        options.sizes, options.thin_small = [2], 12
    return options


def main(arguments=None):
    options = parse(arguments)
    began = time.monotonic()
    # Of a time limit around this one: its jobs and mounts end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Programs for root, such as mkfs.ext4, lie where not every PATH looks.
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    )
    report = Report(thin=options.thin)
    options.scratch = Path(tempfile.mkdtemp(prefix="mpisave-faults-"))
    try:
        for part in options.parts:
            report.run(part, lambda part=part: PARTS[part](options))
    finally:
        jobs.kill_all()
        shutil.rmtree(options.scratch, ignore_errors=True)
    if options.json:
        report.write_json(options.json)
    if options.markdown and "matrix" in options.parts:
        matrix.put_into(options.markdown)
    missed, seconds = report.missed, time.monotonic() - began
    print(
        f"{missed} missed, in {seconds:.0f} s" if missed else f"all in {seconds:.0f} s"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
