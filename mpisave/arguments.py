"""The arguments of save: what is legal, and whether all ranks gave the same. Pure."""

from __future__ import annotations

import difflib
import io
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.errors import ArgumentError, UnknownArgumentError
from mpisave.state_types import handler_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROTOCOLS = (2, 3, 4, 5)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_NAMES = (
    "protocol",
    "use_binary_format",
    "gather_to",
    "state_type",
    "max_grouped_size",
    "replicas",
    "transport",
    "durable",
    "overwrite",
    "timeout",
    "comm",
)
# As str.format would fill it in, with zeros in front if these are asked for.
_RANK = re.compile(r"\{rank(?::(0[1-9]d?|d))?\}")

# Longer than a slow file system takes for what one rank writes; shorter than a night.
DEFAULT_TIMEOUT_S = 600.0

REPLICAS = ("first", "check", "share")
TRANSPORTS = ("auto", "device", "host")


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one rank, checked."""

    protocol: int
    use_binary_format: bool
    roots: tuple[int, ...] | None  # ascending; None: nobody gathers
    state_type: str | None
    max_nbytes: int
    replicas: str
    transport: str
    durable: bool
    overwrite: bool
    timeout_s: float | None
    path: str | None  # as given, {rank} not filled in; None for a file object
    has_file: bool  # the path is a file object

    def filled_path(self, rank: int) -> str | None:
        """Return the path of a rank, or None if it has none."""
        if self.path is None:
            return None
        return _RANK.sub(lambda found: format(rank, found[1] or ""), self.path)


def parse(path: object, size: int, given: Mapping[str, Any]) -> Arguments:
    """Return the arguments of `save`, or refuse them.

    Parameters
    ----------
    path : object
        As the caller gave it.
    size : int
        Ranks of the communicator.
    given : mapping of str to object
        The keyword arguments.

    Raises
    ------
    ArgumentError
        Naming the argument, what it is and what it may be.
    """
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {_NAMES}"
        raise UnknownArgumentError(f"save has no argument {unknown[0]!r}: {hint}")
    protocol = given["protocol"]
    if type(protocol) is not int or protocol not in PROTOCOLS:
        raise ArgumentError(f"protocol is {protocol!r}: it is one of {PROTOCOLS}")
    binary = given["use_binary_format"]
    if not isinstance(binary, bool):
        raise ArgumentError(
            f"use_binary_format is {binary!r}: it is True (HDF5) or False (pickle)"
        )
    roots = parse_gather_to(given["gather_to"], size)
    state_type = given["state_type"]
    if state_type is not None:
        handler_of(state_type)
        state_type = str.__str__(state_type)
    elif roots is not None and size > 1:
        raise ArgumentError(
            "state_type is None: say 'params' or 'opt' when gathering from "
            f"{size} ranks"
        )
    replicas = given["replicas"]
    if not isinstance(replicas, str) or replicas not in REPLICAS:
        raise ArgumentError(f"replicas is {replicas!r}: it is one of {REPLICAS}")
    transport = given["transport"]
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        raise ArgumentError(f"transport is {transport!r}: it is one of {TRANSPORTS}")
    if transport == "device" and roots is None:
        raise ArgumentError(
            "transport='device' is of a save that gathers: where each rank writes, MPI "
            "moves no arrays. Give gather_to, or leave transport at 'auto'"
        )
    durable = given["durable"]
    if not isinstance(durable, bool):
        raise ArgumentError(f"durable is {durable!r}: it is True or False")
    overwrite = given["overwrite"]
    if not isinstance(overwrite, bool):
        raise ArgumentError(f"overwrite is {overwrite!r}: it is True or False")
    timeout_s = parse_timeout(given["timeout"])
    has_file = all(hasattr(path, n) for n in ("write", "seek", "tell", "truncate"))
    if has_file and isinstance(path, io.TextIOBase):
        raise ArgumentError(f"path is a {type(path).__name__}: open it in binary mode")
    is_name = isinstance(path, (str, os.PathLike))
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if isinstance(text, str):
        text = str.__str__(text)  # of a subclass, which other ranks may not know
    if is_name and not (isinstance(text, str) and text and "\0" not in text):
        raise ArgumentError(
            f"path is {path!r}: it is a non-empty str or os.PathLike, without NUL"
        )
    if isinstance(text, str) and "{rank" in _RANK.sub("", text):
        raise ArgumentError(
            f"path is {path!r}: a rank is written {{rank}}, or {{rank:05d}} with zeros"
        )
    if not is_name and not has_file and path is not None:
        raise ArgumentError(
            f"path is of type {type(path).__name__}: it is a str, an os.PathLike, or a "
            f"seekable binary file object"
        )
    return Arguments(
        protocol,
        binary,
        roots,
        state_type,
        parse_max_grouped_size(given["max_grouped_size"]),
        str.__str__(replicas),
        str.__str__(transport),
        durable,
        overwrite,
        timeout_s,
        text,
        has_file,
    )


def parse_gather_to(gather_to: object, size: int) -> tuple[int, ...] | None:
    """Return the ranks to gather to, ascending, or None.

    Raises
    ------
    ArgumentError
        If there is none among them, one twice, or one that is not in the communicator.
    """
    if gather_to is None:
        return None
    many = gather_to if isinstance(gather_to, (list, tuple)) else [gather_to]
    if not many:
        raise ArgumentError("gather_to is empty: give a rank, or None to not gather")
    roots = []
    for rank in many:
        # operator.index takes arrays, and then refuses most of them.
        if type(rank) is not int and not isinstance(rank, np.integer):
            raise ArgumentError(
                f"gather_to is {gather_to!r}: it is a rank, or a list of ranks, or "
                f"None; {rank!r} is of type {type(rank).__name__}"
            )
        roots.append(int(rank))
        if not 0 <= roots[-1] < size:
            raise ArgumentError(
                f"gather_to is {gather_to!r}: the communicator has {size} rank(s), "
                f"0 to {size - 1}"
            )
    if len(set(roots)) < len(roots):
        raise ArgumentError(f"gather_to is {gather_to!r}: it names a rank twice")
    return tuple(sorted(roots))


def parse_max_grouped_size(value: object) -> int:
    """Return the cap in bytes of an int, or of a number with unit K, M or G.

    Raises
    ------
    ArgumentError
        If it is nothing of that kind, or not positive.
    """
    if type(value) is int and value > 0:
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,18})([KMG])", value, flags=re.ASCII)
        if found and int(found[1]) > 0:
            return int(found[1]) * _UNITS[found[2]]
    raise ArgumentError(
        f"max_grouped_size is {value!r}: it is a positive int of bytes, or a positive "
        f"whole number with K, M or G (1024-based) behind it, such as '512M'"
    )


def parse_timeout(value: object) -> float | None:
    """Return how many seconds ranks wait for one another, or None for ever.

    Raises
    ------
    ArgumentError
        If it is no positive number, nor None.
    """
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < value < math.inf:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise ArgumentError(
        f"timeout is {value!r}: it is a positive number of seconds, or None to wait "
        f"for ever"
    )


def deadline(value: object) -> float | None:
    """Return the same; for what is not legal the default, until it is refused."""
    try:
        return parse_timeout(value)
    except ArgumentError:
        return DEFAULT_TIMEOUT_S


def check_alike(every: Sequence[Arguments]) -> None:
    """Refuse arguments that differ between ranks.

    Raises
    ------
    ArgumentError
        Naming the argument, the ranks and both values.
    """
    compared = {
        "protocol": "protocol",
        "use_binary_format": "use_binary_format",
        "gather_to": "roots",
        "state_type": "state_type",
        "max_grouped_size": "max_nbytes",
        "replicas": "replicas",
        "transport": "transport",
        "durable": "durable",
        "overwrite": "overwrite",
    }
    for name, attribute in compared.items():
        values = [getattr(arguments, attribute) for arguments in every]
        _check_same(name, values, range(len(every)))
    roots = every[0].roots
    if roots is None:
        missing = [r for r, a in enumerate(every) if a.path is None and not a.has_file]
    elif any(every[root].has_file for root in roots):
        missing = [root for root in roots if not every[root].has_file]
    else:
        _check_same("path", [a.path for a in every], range(len(every)))
        missing = [] if every[0].path is not None else [0]
    if missing:
        raise ArgumentError(
            f"path on rank {missing[0]} is {every[missing[0]].path!r}: it is a path on "
            f"all ranks, or a file object on all ranks that write"
        )


def check_same(every: Sequence[Sequence[tuple[str, object]]]) -> None:
    """Refuse arguments that differ between ranks.

    Parameters
    ----------
    every : sequence of sequences of (str, object)
        What each rank was given: name and value, in the same order.

    Raises
    ------
    ArgumentError
        Naming the argument, the ranks and both values.
    """
    for column in zip(*every, strict=True):
        values = [value for _, value in column]
        _check_same(column[0][0], values, range(len(values)))


def _check_same(name: str, values: Sequence[object], ranks: Sequence[int]) -> None:
    for value in values:
        if value != values[0]:
            alike = [r for r, v in zip(ranks, values, strict=True) if v == value]
            raise ArgumentError(
                f"{name} differs between ranks: {_show(name, values[0])} on rank "
                f"{ranks[0]}, {_show(name, value)} on rank {_some(alike)}. All ranks "
                f"must give the same."
            )


def _show(name: str, value: object) -> str:
    if name == "gather_to" and isinstance(value, tuple):
        return repr(list(value))
    return f"{value} bytes" if name == "max_grouped_size" else repr(value)


def _some(ranks: Sequence[int]) -> str:
    """Return up to three ranks as text."""
    text = ", ".join(map(str, ranks[:3]))
    return f"{text} and {len(ranks) - 3} more" if len(ranks) > 3 else text
