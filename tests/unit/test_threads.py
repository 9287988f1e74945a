"""Jobs that several threads share."""

import concurrent.futures.thread
import contextlib
import threading
import time

import pytest

from mpisave.threads import in_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("many", [0, 1, 40])
def test_results_are_in_the_order_of_the_jobs(threads, many):
    def job(number):
        time.sleep(0.001 * (number % 3))
        return number

    jobs = ((lambda n=n: job(n)) for n in range(many))

    assert in_threads(jobs, threads) == list(range(many))


def test_jobs_are_made_as_they_are_taken():
    made, done, ahead = [], [], []

    def jobs():
        for number in range(50):
            made.append(number)
            ahead.append(len(made) - len(done))
            yield lambda: done.append(1)

    in_threads(jobs(), 3)

    assert len(done) == 50
    assert max(ahead) <= 4


def test_threads_work_at_the_same_time_and_each_begins_once():
    begun, together = [], threading.Barrier(3, timeout=10)

    in_threads(
        [together.wait] * 3, 3, lambda: begun.append(threading.current_thread().name)
    )

    assert len(begun) == 3
    assert all(name.startswith("mpisave worker") for name in begun)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_first_failure_is_raised_and_no_more_jobs_are_taken(error):
    done = []

    def jobs():
        yield lambda: time.sleep(0.2)

        def fail():
            raise error

        yield fail
        for _ in range(1000):
            yield lambda: (time.sleep(0.01), done.append(1))

    with pytest.raises(type(error)):
        in_threads(jobs(), 2)

    assert len(done) < 100
    assert not [t for t in threading.enumerate() if "mpisave" in t.name]


def test_interrupt_while_threads_are_started_ends_those_that_work(monkeypatch):
    done, start = [], threading.Thread.start

    def interrupted(self):
        if done:
            raise KeyboardInterrupt
        start(self)
        while not done:
            time.sleep(0.001)

    monkeypatch.setattr(threading.Thread, "start", interrupted)

    def job():
        done.append(1)
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        in_threads([job] * 5000, 2)

    assert len(done) < 1000


def test_handler_of_signals_may_have_threads_work_while_others_are_started():
    """It is called within whatever the thread does, holding the locks of Python."""
    locks = [
        concurrent.futures.thread._global_shutdown_lock,
        getattr(threading, "_shutdown_locks_lock", None),  # until Python 3.12
    ]
    with contextlib.ExitStack() as held:
        for lock in filter(None, locks):
            held.enter_context(lock)
        assert in_threads([lambda: 1] * 9, 3) == [1] * 9


def test_failure_while_a_job_is_made_is_raised():
    def jobs():
        yield lambda: None
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        in_threads(jobs(), 3)


def test_failure_to_begin_is_raised():
    def begin():
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        in_threads([lambda: None] * 9, 2, begin)
