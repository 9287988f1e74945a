"""mpisave.testing: what happens at which step, and that nothing stays behind."""

import errno
import pickle

import numpy as np
import pytest
from helpers import steps_of

import mpisave
from mpisave import collective, room, testing

STATE = {"x": np.arange(5.0)}


def test_steps_are_those_that_calls_come_to(tmp_path):
    path = tmp_path / "x"

    saved = steps_of(lambda: mpisave.save(STATE, path))
    loaded = steps_of(lambda: mpisave.load(path))
    verified = steps_of(lambda: mpisave.verify(path))

    assert set(saved) <= set(testing.STEPS_OF_SAVE)
    assert sorted(saved, key=testing.STEPS_OF_SAVE.index) == saved
    assert {"seal", "publish"} <= set(saved)
    assert set(loaded + verified) <= set(testing.STEPS_OF_LOAD)


@pytest.mark.parametrize("step", ["plan", "write", "seal", "publish"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, step):
    path = tmp_path / "x"
    mpisave.save({"x": np.zeros(5)}, path)

    action = testing.fail(OSError(errno.EIO, "injected"))
    with (
        testing.fault(step, rank=0, action=action),
        pytest.raises(mpisave.StorageError, match="injected") as caught,
    ):
        mpisave.save(STATE, path)

    assert caught.value.step == step
    assert not pickle.loads(path.read_bytes())["x"].any()
    assert list(tmp_path.iterdir()) == [path]
    mpisave.save(STATE, path)
    assert pickle.loads(path.read_bytes())["x"].tolist() == STATE["x"].tolist()


@pytest.mark.parametrize("step", ["create the staging file", "write", "seal"])
def test_full_disk_is_full_until_the_fault_is_taken_back(tmp_path, step):
    with (
        testing.fault(step, rank=0, action=testing.full_disk()),
        pytest.raises(mpisave.StorageError) as caught,
    ):
        mpisave.save(STATE, tmp_path / "x")

    assert caught.value.errno == errno.ENOSPC
    assert not room.is_full
    assert not list(tmp_path.iterdir())
    mpisave.save(STATE, tmp_path / "x")


def test_load_and_verify_can_fail_too(tmp_path):
    mpisave.save(STATE, tmp_path / "x")

    for call, step in [(mpisave.load, "read"), (mpisave.verify, "verify")]:
        action = testing.fail(MemoryError("injected"))
        with (
            testing.fault(step, rank=0, action=action),
            pytest.raises(MemoryError, match="injected"),
        ):
            call(tmp_path / "x")


def test_delay_is_as_long_as_it_says(tmp_path):
    with testing.fault("publish", rank=0, action=testing.delay(0.2)):
        report = mpisave.save(STATE, tmp_path / "x")

    assert report.seconds["publish"] >= 0.2


def test_it_happens_once(tmp_path):
    calls = []

    with testing.fault("plan", rank=0, action=lambda: calls.append(1)) as fault:
        assert not fault.happened
        mpisave.save(STATE, tmp_path / "x")
        mpisave.save(STATE, tmp_path / "x")

    assert calls == [1]
    assert fault.happened


def test_fault_tells_that_no_call_came_to_its_step(tmp_path):
    with testing.fault("exchange", rank=0, action=lambda: None) as fault:
        mpisave.save(STATE, tmp_path / "x")

    assert not fault.happened


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"step": "polish", "rank": 0}, "save has"),
        ({"step": "plan", "rank": 1}, "there are 1"),
        ({"step": "plan", "rank": -1}, "there are 1"),
    ],
)
def test_other_arguments_are_refused(options, text):
    with (
        pytest.raises(mpisave.ArgumentError, match=text),
        testing.fault(**options, action=testing.kill()),
    ):
        raise AssertionError("not reached")


def test_faults_do_not_nest():
    with (
        testing.fault("plan", rank=0, action=testing.kill()),
        pytest.raises(mpisave.ArgumentError, match="one at a time"),
        testing.fault("plan", rank=0, action=testing.kill()),
    ):
        raise AssertionError("not reached")

    assert collective.before_action is None
