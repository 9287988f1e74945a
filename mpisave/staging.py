"""Staging files: their names, which of them are in use, and how they are published.

Who creates one holds a lock on it for as long as it lives. Files that are locked by
nobody, on this machine, are left by jobs that have died. A lock may not reach from one
machine to another, so files of other machines have to be old as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import socket
from pathlib import Path

_log = logging.getLogger(__name__)

SUFFIX = ".mpisave-staging"

# A file of another machine is dead if nobody has written to it for a day. A job that
# was suspended for longer finds its file gone, and fails to publish.
STALE_S = 24 * 3600

# Of the final name: 125 bytes in all, where encrypted directories allow 143.
_SHOWN_NBYTES = 57

_TRIES = 10

# Machine of a file that could not be locked, for want of locks on the server, say: that
# it can be locked later on says nothing.
_NOWHERE = "0" * 16

# What link(2) answers where there are no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def create(final: Path, mode: int) -> tuple[Path, int]:
    """Create a staging file beside `final`, and lock it. Return it, open for writing.

    Raises
    ------
    OSError
        If the directory does not take it.
    """
    machine = _machine()
    for _ in range(_TRIES):
        path = final.with_name(f"{_head(final.name)}{machine}.{_token()}{SUFFIX}")
        # Not for reading: NFS would then fetch the pages that it changes.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, mode)
        try:
            is_held = _hold(descriptor)
            if is_held is None and machine != _NOWHERE:
                machine = _NOWHERE
            # Before it was locked, another job may have taken it for dead.
            elif is_held is not False and path.exists():
                return path, descriptor
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
    raise BlockingIOError(errno.EAGAIN, "other jobs removed it before it was locked")


def remove_stale(final: Path, mine: Path) -> None:
    """Remove the staging files that dead jobs have left for `final`.

    Parameters
    ----------
    final : Path
        The name to which they would have been renamed.
    mine : Path
        A staging file that was just created there: it has the time of the server.
    """
    # Whatever fails: the save does without.
    with contextlib.suppress(OSError):
        now = mine.stat().st_mtime
        head = _head(final.name)
        for name in os.listdir(final.parent):  # noqa: PTH208 - thousands, as names
            if name.startswith(head) and name != mine.name:
                found = _TAIL.fullmatch(name[len(head) :])
                if found is None:
                    continue
                with contextlib.suppress(OSError):
                    is_near = found[1] == _machine()
                    _remove_dead(final.with_name(name), now, is_near=is_near)


def _remove_dead(path: Path, now: float, *, is_near: bool) -> None:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        is_free = _lock(descriptor)
        if is_free is False:
            return
        # Locks of this machine are known here; where there are none, nothing is.
        is_old = now - os.fstat(descriptor).st_mtime > STALE_S
        if is_old or (is_free and is_near):
            path.unlink()
            _log.info("removed %s, which a job that has died left", path)
    finally:
        os.close(descriptor)


def keep_mode(descriptor: int, final: Path) -> None:
    """Take over mode, owner and group of the file that is replaced, where permitted."""
    try:
        old = final.stat()
    except OSError:  # there is none
        return
    mode = old.st_mode & 0o777
    with contextlib.suppress(OSError):
        os.fchown(descriptor, old.st_uid, -1)
    try:
        os.fchown(descriptor, -1, old.st_gid)
    except OSError:
        # What was granted to that group is not granted to another.
        mode = mode & 0o707 | (mode & mode << 3 & 0o070)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)


def rename_to_new(staging: Path, final: Path) -> None:
    """Rename a staging file, unless there is a file of the name: at one stroke.

    Raises
    ------
    FileExistsError
        If there is one.
    """
    try:
        os.link(staging, final)
    except FileExistsError:
        # NFS says so as well if its first answer was lost.
        if not staging.samefile(final):
            raise
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        _claim_and_rename(staging, final)
        return
    # It is published. A second name that stays is removed by a later save.
    with contextlib.suppress(OSError):
        staging.unlink()


def _claim_and_rename(staging: Path, final: Path) -> None:
    """Create an empty file under the name, which only one can, and replace it."""
    os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        staging.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            final.unlink()
        raise


def flush_directory(descriptor: int) -> None:
    """Make durable which names a directory holds."""
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # EINVAL: of a file system that has no such thing.
        if exc.errno != errno.EINVAL:
            raise


def _hold(descriptor: int) -> bool | None:
    """Keep a file from being removed for as long as it is open; return as `_lock`.

    Shared, since HDF5 locks what it reads, and the file may be read as soon as it is
    renamed. NFS lets only who may read share, and this is open for writing.
    """
    try:
        return _lock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return _lock(descriptor)


def _lock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool | None:
    """Lock a file for as long as it is open; return None where there are no locks.

    flock, not fcntl: it belongs to the open file, so that no other open and close of
    the file in this process gives it up. It hinders nobody from writing.
    """
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno == errno.EBADF:
            raise
        held = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
        return False if exc.errno in held else None
    return True


_TAIL = re.compile(rf"([0-9a-f]{{16}})\.[0-9a-f]{{16}}{re.escape(SUFFIX)}")


def _head(final: str) -> str:
    """Return how all staging files of a name begin."""
    shown = final
    while len(os.fsencode(shown)) > _SHOWN_NBYTES:
        shown = shown[:-1]
    return f".{shown}.{_digest(os.fsencode(final))}."


def _machine() -> str:
    """Return what tells this machine, as it runs now, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = b""
    return _digest(boot + socket.gethostname().encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _token() -> str:
    return secrets.token_hex(8)
