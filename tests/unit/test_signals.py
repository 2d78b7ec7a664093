"""Signals of the process that calls are its own again afterwards, ignored ones too."""

from __future__ import annotations

import signal
import threading

from ray_peft.schedule.signals import callers_signals


def own(number, frame):
    raise AssertionError("nobody sends it")


def test_every_answer_is_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        for handlers in ([own, signal.SIG_IGN, signal.SIG_DFL], [signal.SIG_IGN, own, signal.SIG_IGN]):
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
            with callers_signals():
                for number in numbers:
                    signal.signal(number, lambda *_: None)
            assert [signal.getsignal(number) for number in numbers] == handlers
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_nothing_is_touched():
    failures = []

    def work():
        try:
            with callers_signals():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
