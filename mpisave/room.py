"""What room there is for a file: on its file system, and for this process."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# What a file system answers that cannot reserve space.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# Set by `testing`: the disk is full, whatever it says.
is_full = False


def reserve(descriptor: int, nbytes: int) -> None:
    """Have the file take up `nbytes` of its file system from now on.

    Where the file system cannot reserve, what it has available is compared.

    Raises
    ------
    OSError
        If there is no room (ENOSPC), a quota leaves none (EDQUOT), or the process may
        not write such a file (EFBIG).
    """
    check_limit(nbytes)
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        _fallocate(descriptor, nbytes)
    except OSError as exc:
        if exc.errno not in _NOT_SUPPORTED:
            raise
        free = available(descriptor)
        if free is not None and free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(descriptor, nbytes)


def write(descriptor: int, data: memoryview, offset: int) -> int:
    """Write some of `data` at an offset; return how many bytes."""
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return os.pwrite(descriptor, data, offset)


def check_limit(nbytes: int) -> None:
    """Refuse a file of which this process may not write the last byte.

    Raises
    ------
    OSError
        EFBIG. Python ignores the signal, so a write would be cut short, then fail.
    """
    limit = _limit()
    if limit is not None and nbytes > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def explain(exc: OSError, descriptor: int) -> str:
    """Return what else there is to say of an error: nothing, or ``"; ..."``."""
    if exc.errno == errno.EDQUOT:
        return (
            "; a quota of this user, group or project is used up. An older file needs "
            "its room until the new one is whole"
        )
    if exc.errno == errno.EFBIG and (limit := _limit()) is not None:
        return f"; this process may write files of {limit} bytes at most (ulimit -f)"
    free = available(descriptor) if exc.errno == errno.ENOSPC else None
    return "" if free is None else f"; {free} bytes are available there"


def available(descriptor: int) -> int | None:
    """Return the bytes that the file system has for this user, None if it is silent."""
    try:
        found = os.fstatvfs(descriptor)
    except OSError:
        return None
    # ramfs and some that are mounted over a network call themselves 0 bytes large.
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _limit() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def _fallocate(descriptor: int, nbytes: int) -> None:
    """Call fallocate(2), which Python does not offer.

    `os.posix_fallocate` of glibc writes a byte to every block where the file system
    cannot reserve: all of the file, over the network, before the first array.
    """
    function = _function()
    while function is not None:
        if function(descriptor, 0, 0, nbytes) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@functools.cache
def _function() -> Callable[[int, int, int, int], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    # glibc has both; others the second, with 64 bits.
    for name in ("fallocate64", "fallocate"):
        function = getattr(library, name, None)
        if function is not None:
            whole = ctypes.c_int64
            function.argtypes = (ctypes.c_int, ctypes.c_int, whole, whole)
            function.restype = ctypes.c_int
            return function  # type: ignore[no-any-return]
    return None
