"""Every file call of every rank made to fail in turn, within one job."""

import errno
import os
import shutil

import injection
import states


def do(me):
    """Report a line for each fault: victim, call, error, and what this rank raised."""
    request = me.request
    calls = injection.FileCalls(me.path.parent)
    restore(me)
    with calls.watched():
        first = me.outcome(lambda: me.save(me.state(states.NEW)))
    every = me.comm.allgather(calls.seen)
    me.say(seen=calls.seen, **first)
    number = 0
    for victim, names in enumerate(every):
        for call, name in enumerate(names, 1):
            for error in request["errors"]:
                number += 1
                if number % request["thin"] == 0:
                    _fail(me, calls, victim, call, name, error)


def restore(me):
    """Have the old file alone in the folder."""
    me.comm.Barrier()
    if me.rank == 0:
        for other in me.path.parent.iterdir():
            other.unlink()
        shutil.copyfile(me.request["old"], me.path)
    me.comm.Barrier()


def _fail(me, calls, victim, call, name, error):
    restore(me)
    fail_at = call if me.rank == victim else None
    with calls.watched(fail_at, getattr(errno, error)):
        result = me.outcome(lambda: me.save(me.state(states.NEW)))
    me.say(
        victim=victim,
        call=call,
        name=name,
        error=error,
        fired=calls.fired,
        **aftermath(me),
        **result,
    )


def aftermath(me):
    """Return what lies on the disk after a fault, and what comes of the next save."""
    me.comm.Barrier()
    left = sorted(os.listdir(me.path.parent))
    is_old = me.rank != 0 or is_file_of(me, me.request["old"])
    found = "" if is_old or me.rank else states.which(me.case, me.path)
    me.comm.Barrier()
    again = me.outcome(lambda: me.save(me.state(states.NEW)))
    after = states.which(me.case, me.path) if me.rank == 0 else ""
    return {
        "left": [n for n in left if n != me.path.name],
        "found": "old" if is_old else found,
        "next": again["type"],
        "after": after,
    }


def is_file_of(me, old):
    """Return whether the file is, byte for byte, the one that was there."""
    with open(old, "rb") as one, me.path.open("rb") as other:  # noqa: PTH123
        return one.read() == other.read()
