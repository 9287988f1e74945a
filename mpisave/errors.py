"""Everything that mpisave raises.

::

    MpisaveError
    └── CollectiveError (RuntimeError)      raised alike on every rank
        ├── ArgumentError (ValueError)      the caller's: an argument of the call
        │   └── UnknownArgumentError (TypeError)
        ├── StateDictError (ValueError)     the caller's: what the state dict holds
        ├── LaunchError                     the launcher's: ranks that are alone
        ├── CollectiveTimeout (TimeoutError)  a rank did not come, or left: the job's
        ├── StorageError (OSError)          the file system's
        └── FileFormatError (ValueError)    the file's: torn, altered, foreign
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Where something stands in a nested state: dict keys and list indices, from the top.
Key: TypeAlias = "tuple[str | int, ...]"


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on one rank."""

    rank: int
    host: str
    kind: str  # name of the exception's type
    message: str
    errno: int | None = None  # of an OSError

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}): {self.kind}: {self.message}"


class MpisaveError(Exception):
    """Base of all errors of mpisave."""


class CollectiveError(MpisaveError, RuntimeError):
    """A step failed on some rank, and is raised alike on every rank.

    Attributes
    ----------
    step : str
        The step of the call that failed; empty before the first step.
    failures : dict of int to Failure
        The ranks on which it failed, relative to the communicator of the call.
    """

    def __init__(
        self,
        message: str,
        *,
        step: str = "",
        failures: dict[int, Failure] | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.failures = dict(failures or {})

    def __reduce__(self) -> tuple[object, ...]:
        state = {"step": self.step, "failures": self.failures}
        return type(self), (str(self),), state


class ArgumentError(CollectiveError, ValueError):
    """An argument is not legal, or ranks disagree on it: the caller's fault."""


class UnknownArgumentError(ArgumentError, TypeError):
    """There is no argument of that name: the caller's fault."""


class StateDictError(CollectiveError, ValueError):
    """A state dict cannot be saved, or ranks hold states that do not fit together."""


class LaunchError(CollectiveError):
    """The launcher started several processes, but MPI knows of one: the job's fault."""


class CollectiveTimeout(CollectiveError, TimeoutError):  # noqa: N818
    """Some ranks did not arrive at a step in time: dead, stopped, or elsewhere.

    Raised on every rank that waited. `failures` has those that did not arrive.
    """


class StorageError(CollectiveError, OSError):
    """The file system refused: full, read-only, missing, not permitted."""


class FileFormatError(CollectiveError, ValueError):
    """The file is no whole file that mpisave can read: torn, altered or foreign.

    Also raised where a file asks for more than arrays, containers and scalars: mpisave
    executes nothing that a file names.
    """


def collective_class(exc: BaseException) -> type[CollectiveError]:
    """Return the class under which `exc` of one rank is raised on every rank.

    One of this module, since other ranks may not know a class of the caller's.
    """
    for kind in type(exc).__mro__:
        if issubclass(kind, CollectiveError) and kind.__module__ == __name__:
            return kind
    return StorageError if isinstance(exc, OSError) else CollectiveError


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the key of an array in front of what is raised while it is moved."""
    try:
        yield
    except Exception as exc:
        kind = collective_class(exc)
        error = kind(f"{name}: {exc}" if kind is type(exc) else f"{name}: {exc!r}")
        if isinstance(error, OSError) and isinstance(exc, OSError):
            error.errno = exc.errno
        raise error from exc


@contextlib.contextmanager
def naming_path(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in an OSError what was tried, and with which path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        # The text has the number, since an exception crosses ranks as text.
        raise numbered(f"cannot {what} {os.fspath(path)}: {exc}", exc.errno) from exc


def numbered(message: str, number: int | None) -> StorageError:
    """Return an error of the file system with the number that the system gave."""
    error = StorageError(message)
    error.errno = number
    return error


def show_ranks(ranks: Iterable[int]) -> str:
    """Return ascending ranks as a person would write them: ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in itertools.islice(runs, 20))
    more = ", ..." if len(runs) > 20 else ""
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}{more}"


def show_key(key: Key) -> str:
    """Return `key` as a person would write it: ``['state'][0]['exp_avg']``."""
    if len(key) == 1:
        return repr(key[0])
    return "".join(f"[{part!r}]" for part in key) or "the state itself"
