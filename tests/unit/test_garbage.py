import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

import mpisave
from mpisave import garbage


@pytest.fixture(autouse=True)
def enabled():
    was_enabled = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_enabled else gc.disable)()


def test_nothing_is_looked_for_within_and_again_afterwards():
    with garbage.kept():
        with garbage.kept():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_is_looked_for_again_after_an_error():
    @garbage.kept()
    def fail():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            fail()
        assert gc.isenabled()


def test_threads_that_come_and_go_leave_it_as_it_was():
    begin = threading.Barrier(4)

    def enter_often():
        begin.wait()
        for _ in range(20_000):
            with garbage.kept():
                pass

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)

    assert gc.isenabled()


def test_thread_that_leaves_first_does_not_turn_it_on_for_others():
    inside, done = threading.Event(), threading.Event()

    def stay():
        with garbage.kept():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait(10)
    with garbage.kept():
        pass
    still = gc.isenabled()
    done.set()
    thread.join()

    assert not still
    assert gc.isenabled()


FORK = """
import gc, os, threading, warnings
from mpisave import garbage
warnings.simplefilter("ignore")  # of Python 3.12: this process has threads
locked, done = threading.Event(), threading.Event()
def stay():
    with garbage.kept(), garbage._lock:
        locked.set()
        done.wait(20)
thread = threading.Thread(target=stay)
thread.start()
locked.wait(20)
child = os.fork()
if child == 0:
    was = gc.isenabled()
    with garbage.kept():
        inside = gc.isenabled()
    os._exit(0 if (was, inside, gc.isenabled()) == (True, False, True) else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
thread.join()
raise SystemExit(code if gc.isenabled() else 2)
"""


def test_child_of_a_fork_has_neither_the_lock_nor_the_threads_of_its_parent():
    run = subprocess.run([sys.executable, "-c", FORK], timeout=60)

    assert run.returncode == 0


def test_caller_who_has_turned_it_off_keeps_it_off():
    gc.disable()

    with garbage.kept():
        pass

    assert not gc.isenabled()


def test_many_arrays_are_saved_and_loaded_with_few_looks(tmp_path):
    # By count: 3 looks at all there is would take as long as reading them.
    state = {f"w{i}": np.zeros(1) for i in range(20_000)}
    looks = []

    def look(phase, info):
        if phase == "start" and info["generation"] == 2:
            looks.append(phase)

    gc.collect()
    gc.callbacks.append(look)
    try:
        mpisave.save(state, tmp_path / "x.params")
        mpisave.load(tmp_path / "x.params", like=state)
    finally:
        gc.callbacks.remove(look)

    assert len(looks) <= 2
    assert gc.isenabled()
