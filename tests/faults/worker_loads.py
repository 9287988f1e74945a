"""Faults at the steps of load and verify, one after another, within one job."""

import injection
import states
from helpers import steps_of

import mpisave


def calls(me):
    """Return calls that read the file, by what they are called in the docs."""
    timeout = me.request.get("timeout", 60)
    options = {"comm": me.comm, "timeout": timeout}
    like = me.state(states.NEW)
    return {
        "load(like=)": lambda: mpisave.load(me.path, like=like, **options),
        "load": lambda: mpisave.load(me.path, **options),
        "verify": lambda: mpisave.verify(me.path, **options),
    }


def do(me):
    """Report a line for each fault, and the steps of each call before."""
    for name, call in calls(me).items():
        steps = me.comm.bcast(steps_of(call))
        me.say(call=name, steps=steps)
        for step in steps:
            for fault in me.request["faults"]:
                for victim in range(me.size):
                    _fail(me, name, call, step, fault, victim)


def is_right(me, name, found):
    """Return whether a call gave the old state, which is not that of `like`."""
    whole = states.whole_state(me.size, states.OLD)
    if name == "verify":
        sizes = (me.path.stat().st_size, len(whole))
        return (found.nbytes, found.arrays) == sizes
    if name == "load":
        return states.is_equal(found, whole)
    mine = me.state(states.OLD)
    arrays = [
        {k: getattr(v, "array", v) for k, v in state.items()} for state in (found, mine)
    ]
    return states.is_equal(*arrays)


def _fail(me, name, call, step, fault, victim):
    fired = []
    with injection.at_step(step, fault, victim, me, fired):
        result = me.outcome(call)
    me.comm.Barrier()
    found = []
    again = me.outcome(lambda: found.append(call()))
    wrong = again["type"]
    if not wrong and not is_right(me, name, found[0]):
        wrong = "another state"
    about = {"call": name, "step_of_fault": step, "fault": fault, "victim": victim}
    me.say(**about, fired=bool(fired), next=wrong, **result)
