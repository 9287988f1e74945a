"""Who creates which file: one for all ranks that see the same directory."""

from __future__ import annotations

import functools
import os
import socket
from typing import TYPE_CHECKING

from mpisave.collective import exchange, on_all_ranks
from mpisave.errors import StorageError, numbered
from mpisave.fileobject import FileObject
from mpisave.storage import StagedFile, sees_staging_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from mpisave.comms import Comm
    from mpisave.storage import Target


def check_places(
    given: Sequence[str | None], resolved: Sequence[str | None], hosts: Sequence[str]
) -> None:
    """Refuse a path that means another file on other ranks: each would save a part.

    Parameters
    ----------
    given, resolved : sequence of str or None, one a rank
        The path, and where it leads; None for a file object.
    hosts : sequence of str
        Of each rank.

    Raises
    ------
    StorageError
        If a link or the working directory has one path lead to several places.
    """
    first: dict[str, int] = {}
    for rank, (path, place) in enumerate(zip(given, resolved, strict=True)):
        if path is None or place is None:
            continue
        other = first.setdefault(path, rank)
        if resolved[other] != place:
            raise StorageError(
                f"{path} is {resolved[other]} on rank {other} ({hosts[other]}) and "
                f"{place} on rank {rank} ({hosts[rank]}), by a link or the working "
                f"directory: each would hold a part of the state. Give one place that "
                f"all ranks see, gather to one rank with gather_to=0, or put {{rank}} "
                f"into the path for a file of each rank."
            )


def create_for_roots(
    own: Comm,
    roots: Sequence[int],
    paths: Sequence[str | None],
    place: str | BinaryIO,
    *,
    must_begin: bool,
    overwrite: bool,
) -> tuple[Target | None, tuple[int, ...]]:
    """Create one staging file for all roots that see the same directory. Collective.

    Parameters
    ----------
    own : Comm
        Of all ranks.
    roots : sequence of int
        The ranks that may write.
    paths : sequence of str or None
        Where each rank writes, links resolved; None for a file object.
    place : str or file object
        Of this rank.
    must_begin : bool
        Whether a file object has to stand at its start.
    overwrite : bool
        Whether a file of that name may be replaced.

    Returns
    -------
    target : Target or None
        The file of this rank, if it writes.
    writers : tuple of int
        The roots that write, ascending.
    """
    made: list[Target] = []

    def create() -> str | None:
        if own.rank not in roots:
            return None
        made.append(_create(place, must_begin=must_begin, overwrite=overwrite))
        return _name_of(made[0])

    try:
        if any(paths[root] is None for root in roots):
            on_all_ranks(own, "create the staging file", create)
            return (made[0] if made else None), tuple(roots)
        writers: list[int] = []
        waiting = list(roots)
        while waiting:
            # One of each path goes ahead; the others look whether they see its file.
            first = {paths[root]: root for root in reversed(waiting)}
            names = exchange(
                own,
                "create the staging file",
                create if own.rank in first.values() else lambda: None,
            )
            writers += first.values()
            waiting = [root for root in waiting if root not in first.values()]
            if waiting:
                ahead = {root: names[first[paths[root]]] for root in waiting}
                seen = exchange(
                    own,
                    "look for the staging file",
                    functools.partial(_sees, place, ahead.get(own.rank)),
                )
                waiting = [root for root in waiting if not seen[root]]
    except BaseException:
        for target in made:
            target.discard()
        raise
    return (made[0] if made else None), tuple(sorted(writers))


def _create(place: str | BinaryIO, *, must_begin: bool, overwrite: bool) -> Target:
    if isinstance(place, str):
        return StagedFile(place, overwrite=overwrite)
    target = FileObject(place)
    target.check(must_begin=must_begin)
    return target


def _name_of(target: Target) -> str | None:
    """Return the name under which others find a staging file."""
    return target.staging_name if isinstance(target, StagedFile) else None


def _sees(place: str | BinaryIO, staging_name: str | None) -> bool:
    if not isinstance(place, str) or staging_name is None:
        return False
    return sees_staging_file(place, staging_name)


def create_for_all(
    own: Comm,
    sealers: Sequence[int],
    place: str | BinaryIO,
    *,
    must_begin: bool,
    overwrite: bool,
) -> Target:
    """Have one rank of each group create a file, and the others open it. Collective.

    Parameters
    ----------
    own : Comm
        Of all ranks.
    sealers : sequence of int
        For each rank, who creates its file.
    place, must_begin, overwrite
        As for `create_for_roots`.

    Raises
    ------
    StorageError
        On every rank, if one does not see the file that another has created.
    """
    made: list[Target] = []
    sealer = sealers[own.rank]

    def create() -> tuple[str, str, str] | None:
        if own.rank != sealer:
            return None
        made.append(_create(place, must_begin=must_begin, overwrite=overwrite))
        name = _name_of(made[0])
        if name is None or not isinstance(place, str):
            return None
        final = os.path.basename(os.path.realpath(place))  # noqa: PTH119
        return name, socket.gethostname(), final

    def join() -> None:
        found = names[sealer]
        if found is None or not isinstance(place, str):
            return
        if own.rank == sealer:
            _check_apart(place, sealer, names)
            return
        name, host, _ = found
        try:
            made.append(StagedFile.join(place, name))
        except OSError as exc:
            text = (
                f"cannot open the file that rank {sealer} on {host} has created beside "
                f"{place}: {exc}. If this is not the same file system on all nodes, "
                f"gather to one rank with gather_to=0, or put {{rank}} into the path."
            )
            raise numbered(text, exc.errno) from exc

    try:
        names = exchange(own, "create the staging file", create)
        if own.size > 1:
            on_all_ranks(own, "open the staging file", join)
    except BaseException:
        for target in made:
            target.discard()
        raise
    return made[0]


def _check_apart(
    place: str, sealer: int, names: Sequence[tuple[str, str, str] | None]
) -> None:
    """Refuse two groups that give one file different paths: each would write a part."""
    mine = names[sealer]
    for other, found in enumerate(names):
        if found is None or mine is None or other == sealer:
            continue
        if found[2] == mine[2] and sees_staging_file(place, found[0]):
            raise StorageError(
                f"ranks {min(sealer, other)} and {max(sealer, other)} give different "
                f"paths to one directory, and would write over one another: rank "
                f"{sealer} gives {place}. Give the same path, or put {{rank}} into it."
            )
