"""Mistakes of the caller: no file call fails, and yet every rank has to hear of it."""

import shutil

import errors
import jobs
import killing
import states
from report import Count

# These stay what they are on the rank that they were raised on.
STAYS = ("KeyboardInterrupt", "SystemExit")


def count(options):
    """Try every scenario with every rank as the one that makes the mistake."""
    for case in states.cases(options.sizes, options.formats, options.roads):
        total = Count(f"mistakes of the caller: {case}")
        place = killing.Place(case, options.scratch, "scenarios")
        old = place.work / "old"
        old.write_bytes(place.old)
        request = place.request(task="scenarios", old=str(old), token=False)
        ended = jobs.run(place.work, case.size, request, deadline_s=180)
        if ended.code != 0:
            total.add(str(case), f"exit {ended.code}: {ended.output}")
        names = set()
        for lines in zip(*(lines[1:] for lines in ended.lines), strict=False):
            first = lines[0]
            names.add(first["name"])
            what = f"{case}, rank {first['victim']}, {first['name']}"
            total.add(what, _judge(case, lines) or _old(first))
        total.tally("scenarios", len(names))
        yield total
        shutil.rmtree(place.work)


def _judge(case, lines):
    victim = lines[0]["victim"]
    stays = lines[victim]["type"] in STAYS
    others = [line for rank, line in enumerate(lines) if rank != victim or not stays]
    if not others:
        return ""
    kind = others[0]["type"]
    if kind is None:
        return f"raised {[line['type'] for line in lines]}"
    return errors.judge(case, others, None, range(case.size), kind)


def _old(line):
    if line["found"] != "old":
        return f"on the disk: {line['found']}"
    return errors.judge_state(line)
