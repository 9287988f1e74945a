"""Faults in a rank's own process: at its file calls, and at the steps of save."""

import contextlib
import errno
import os
import pathlib
import signal
import threading
import time

# What Python offers to change a directory or what is in a file. fallocate it does not.
NAMES = (
    "open",
    "pwrite",
    "pwritev",
    "write",
    "ftruncate",
    "truncate",
    "fsync",
    "fdatasync",
    "close",
    "replace",
    "rename",
    "link",
    "unlink",
    "remove",
    "chmod",
    "fchmod",
    "fchown",
)


class FileCalls:
    """Counts, and makes fail, the calls of this process on what lies in a folder."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.seen = []
        self.fail_at = None
        self.error = 0
        self.fired = ""
        self._lock = threading.Lock()
        self._depth = threading.local()

    def _is_here(self, args):
        first = args[0] if args else None
        if isinstance(first, int):
            try:
                first = pathlib.Path(f"/proc/self/fd/{first}").readlink()
            except OSError:
                return False
        try:
            text = os.fspath(first)
        except TypeError:
            return False
        return os.fsdecode(text).startswith(self.folder)

    def _wrap(self, name, call):
        def wrapped(*args, **kwargs):
            # One of these may call another of them.
            if getattr(self._depth, "is_in", False) or not self._is_here(args):
                return call(*args, **kwargs)
            self._depth.is_in = True
            try:
                self._count(name, args)
                return call(*args, **kwargs)
            finally:
                self._depth.is_in = False

        return wrapped

    def _count(self, name, args):
        with self._lock:
            self.seen.append(name)
            fires = len(self.seen) == self.fail_at
        if not fires:
            return
        self.fired = name
        if name == "close":
            # As Linux has it: the descriptor is gone, whatever close returns.
            os.closerange(args[0], args[0] + 1)
        raise OSError(self.error, os.strerror(self.error))

    @contextlib.contextmanager
    def watched(self, fail_at=None, error=0):
        """Count the calls; have call number `fail_at`, from 1, fail."""
        self.seen, self.fail_at, self.error, self.fired = [], fail_at, error, ""
        from mpisave import room

        kept = {name: getattr(os, name) for name in NAMES}
        fallocate = room._fallocate
        room._fallocate = self._wrap("fallocate", fallocate)
        old_pathlib = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10
        kept_pathlib = {}
        for name, call in kept.items():
            setattr(os, name, self._wrap(name, call))
            if old_pathlib is not None and hasattr(old_pathlib, name):
                kept_pathlib[name] = old_pathlib.__dict__[name]
                setattr(old_pathlib, name, staticmethod(self._wrap(name, call)))
        try:
            yield self
        finally:
            room._fallocate = fallocate
            for name, call in kept.items():
                setattr(os, name, call)
            for name, call in kept_pathlib.items():
                setattr(old_pathlib, name, call)


LATE_S = 0.3


def _act(fault):
    """Do at a step what a fault is."""
    from mpisave import testing

    if fault == "late":
        time.sleep(LATE_S)
        return
    if fault == "full":
        testing.full_disk()()
        return
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    if fault == "memory":
        raise MemoryError("injected")
    if fault == "interrupt":
        raise KeyboardInterrupt("injected")
    number = getattr(errno, fault)
    raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def at_step(step, fault, victim, me, fired=None):
    """Have a fault at the beginning of a step, on one rank."""
    from mpisave import testing

    def act():
        if fired is not None:
            fired.append(step)
        _act(fault)

    with testing.fault(step, rank=victim, action=act, comm=me.comm):
        yield
