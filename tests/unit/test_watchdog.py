"""A process that is stuck writes its stacks, once, and others do not."""

import sys
import threading
import time

from mpisave.watchdog import watchdog


def test_stacks_are_written_once_if_nothing_goes_on(capfd):
    with watchdog(lambda: (5.0, "rank 1 writes"), 0.02):
        time.sleep(0.3)

    text = capfd.readouterr().err
    assert text.count("mpisave: rank 1 writes for 5.0 s") == 1
    assert "test_stacks_are_written_once" in text


def test_nothing_is_written_of_what_goes_on(capfd):
    with watchdog(lambda: (0.0, "rank 1 writes"), 0.02):
        time.sleep(0.2)

    assert capfd.readouterr().err == ""


def test_what_stops_later_is_noticed(capfd):
    began = time.monotonic()

    def stuck():
        return max(0.0, time.monotonic() - began - 0.1), "rank 1 writes"

    with watchdog(stuck, 0.05):
        time.sleep(0.4)

    assert "rank 1 writes for 0.1 s" in capfd.readouterr().err


def test_no_thread_is_left_and_none_begins_without_a_deadline():
    before = threading.active_count()
    with watchdog(lambda: (0.0, ""), None):
        assert threading.active_count() == before
    with watchdog(lambda: (0.0, ""), 60):
        assert threading.active_count() == before + 1

    assert threading.active_count() == before


def test_without_standard_error_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)

    with watchdog(lambda: (5.0, "rank 1 writes"), 0.01):
        time.sleep(0.1)


def test_call_does_without_where_there_are_no_more_threads(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)

    with watchdog(lambda: (5.0, "rank 1 writes"), 0.01):
        done = True

    assert done
