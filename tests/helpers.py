"""What several test files need."""

import contextlib
import os
import re

import ml_dtypes
import numpy as np
import pytest

# Of every kind that both formats hold.
MIXED = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big": np.array([0x1234, -0x5678], ">i2"),
    "half": np.array([1, 2], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 2)),
    "nested": [np.array(5), {"lr": 0.5, 3: (None, True, b"x", "y")}],
    "scalar": np.float32(2.5),
}


def steps_of(call):
    """Return the steps that a call comes to on this rank, in order, each once."""
    from mpisave import collective

    names = []
    collective.before_action = names.append
    try:
        call()
    finally:
        collective.before_action = None
    return list(dict.fromkeys(names))


def assert_on_all_ranks(comm, condition, what=""):
    """Fail on every rank if `condition` is false on any."""
    bad = [rank for rank, ok in enumerate(comm.allgather(bool(condition))) if not ok]
    assert not bad, f"{what} does not hold on rank {bad}"


def assert_equal_states(found, expected, path="state"):
    """Fail unless values, types, dtypes, shapes and the order of keys are the same."""
    assert type(found) is type(expected), (path, type(found), type(expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_equal_states(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for number, item in enumerate(expected):
            assert_equal_states(found[number], item, f"{path}[{number}]")
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, (path, found.dtype, expected.dtype)
        assert found.dtype.byteorder == expected.dtype.byteorder, path
        assert found.shape == expected.shape, (path, found.shape, expected.shape)
        assert found.tobytes() == expected.tobytes(), path
    else:
        assert found == expected or (found != found and expected != expected), path


def files_in(folder):
    return sorted(os.listdir(folder))


def watch_writes(monkeypatch):
    """Return what will be the lengths of all that this process writes at offsets."""
    lengths, pwrite = [], os.pwrite

    def watched(descriptor, data, offset):
        lengths.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    return lengths


def equal_on_rank(comm, rank, check):
    """Run `check` on one rank; fail on all if it fails there."""
    error = None
    if comm.rank == rank:
        try:
            check()
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
    error = comm.bcast(error, root=rank)
    assert error is None, error


@contextlib.contextmanager
def failing_on(comm, rank, monkeypatch, target, name, exc):
    """Have `target.name` raise on one rank."""

    def fail(*args, **kwargs):
        raise exc

    with monkeypatch.context() as patch:
        if comm.rank == rank:
            patch.setattr(target, name, fail)
        yield


def unescape(text):
    """Return the key of a name in HDF5, by the rules of docs/formats.md."""
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    if text == "%":
        return ""
    return re.sub(r"%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), text)


@contextlib.contextmanager
def small_blocks(nbytes=64):
    """Have blocks of checksums of a few bytes, so that small arrays are of many."""
    with pytest.MonkeyPatch.context() as patch:
        modules = ("checksum", "plan", "reading", "blocks", "to_device", "verifying")
        for module in (*modules, "transport.direct", "formats.digest"):
            patch.setattr(f"mpisave.{module}.BLOCK_NBYTES", nbytes)
        patch.setattr("mpisave.reading._WINDOW_NBYTES", 4 * nbytes)
        yield
