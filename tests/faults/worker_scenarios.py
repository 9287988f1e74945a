"""Mistakes of the caller on one rank, or between ranks, without a file call failing."""

import errno
import os
from collections.abc import Mapping

import numpy as np
import states
import worker_faults

import mpisave


class Raising:
    """Looks like an array, and raises when asked what it is."""

    def __init__(self, exc):
        self.exc = exc

    @property
    def __array_interface__(self):
        raise self.exc

    dtype = shape = __cuda_array_interface__ = __array_interface__


class RaisingMapping(Mapping):
    def __getitem__(self, key):
        raise RuntimeError("no item")

    def __iter__(self):
        raise RuntimeError("no keys")

    def __len__(self):
        return 1


class MuteError(Exception):
    def __str__(self):
        raise ValueError("no text")


class UnpicklableError(Exception):
    def __reduce__(self):
        raise TypeError("does not pickle")


def _cycle(state):
    child = {}
    child["child"] = child
    return state | {"again": child}


def _deep(state):
    for _ in range(5000):
        state = {"deeper": state}
    return state


def _put(key, value):
    return lambda state: state | {key: value}


def _drop(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


# What of a state is other on one rank, and on how many ranks that is a mistake.
STATES = {
    "another dtype of a replica": (_put("replica", np.zeros(300)), 2),
    "another shape of a replica": (_put("replica", np.zeros(9, np.int32)), 2),
    "a dict where others have an array": (_put("replica", {"a": np.zeros(3)}), 2),
    "a number where others have an array": (_put("replica", 3), 2),
    "a function": (_put("f", lambda: 0), 1),
    "an open file": (_put("f", open(os.devnull)), 1),  # noqa: SIM115, PTH123
    "an array of objects": (_put("f", np.array([object()])), 1),
    "a key that is a float": (_put(1.5, np.zeros(3)), 1),
    "a key that is bytes": (_put(b"k", np.zeros(3)), 1),
    "a state that is None": (lambda _: None, 1),
    "a state that is text": (lambda _: "state", 1),
    "a dict that holds itself": (_cycle, 1),
    "a dict of 5,000 levels": (_deep, 1),
    "a mapping that raises": (lambda _: RaisingMapping(), 1),
    "MemoryError in a property": (_put("f", Raising(MemoryError("none left"))), 1),
    "OSError in a property": (_put("f", Raising(OSError(errno.EIO, "bad"))), 1),
    "an exception without a text": (_put("f", Raising(MuteError())), 1),
    "an exception that does not pickle": (_put("f", Raising(UnpicklableError())), 1),
    "KeyboardInterrupt in a property": (_put("f", Raising(KeyboardInterrupt())), 1),
    "SystemExit in a property": (_put("f", Raising(SystemExit(3))), 1),
    "a part of an array that is missing": (_drop("columns"), 2),
    "parts of an array that overlap": (
        _put("columns", mpisave.Shard(np.zeros((24, 8), np.int32), (24, 16), (0, 4))),
        2,
    ),
}

# What arguments are other on one rank.
ARGUMENTS = {
    "protocol=9": ({"protocol": 9}, 1),
    "protocol='4'": ({"protocol": "4"}, 1),
    "use_binary_format='yes'": ({"use_binary_format": "yes"}, 1),
    "gather_to=[99]": ({"gather_to": [99]}, 1),
    "gather_to='0'": ({"gather_to": "0"}, 1),
    "gather_to=[]": ({"gather_to": []}, 1),
    "max_grouped_size='3X'": ({"max_grouped_size": "3X"}, 1),
    "max_grouped_size=-1": ({"max_grouped_size": -1}, 1),
    "state_type='none'": ({"state_type": "none"}, 1),
    "replicas='perhaps'": ({"replicas": "perhaps"}, 1),
    "durable='yes'": ({"durable": "yes"}, 1),
    "an unknown argument": ({"gather_too": 0}, 1),
    "path=3": ({"path": 3}, 1),
    "path=''": ({"path": ""}, 1),
    "another protocol": ({"protocol": 5}, 2),
    "another format": ({"use_binary_format": None}, 2),
    "another gather_to": ({"gather_to": 1}, 2),
    "another max_grouped_size": ({"max_grouped_size": "1G"}, 2),
    "another durable": ({"durable": False}, 2),
    "another state_type": ({"state_type": "opt"}, 2),
    "another replicas": ({"replicas": "share"}, 2),
}


def do(me):
    """Report a line for each scenario and each rank that makes the mistake."""
    for victim in range(me.size):
        for name, (change, least) in STATES.items():
            if me.size >= least:
                _try(me, victim, name, change, {})
        for name, (changed, least) in ARGUMENTS.items():
            if me.size >= least:
                _try(me, victim, name, None, changed)


def _try(me, victim, name, change, changed):
    worker_faults.restore(me)
    state = me.state(states.NEW)
    arguments = {}
    if me.rank == victim:
        state = change(state) if change else state
        arguments = dict(changed)
        if arguments.get("use_binary_format", 0) is None:  # the other one
            arguments["use_binary_format"] = me.case.format != "hdf5"
    path = arguments.pop("path", me.path)
    result = me.outcome(lambda: me.save_at(path, state, **arguments))
    me.say(victim=victim, name=name, **worker_faults.aftermath(me), **result)
