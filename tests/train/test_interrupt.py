"""Signals while training goes on."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from zoo.train.interrupt import Interrupt


def noted() -> int | None:
    with Interrupt() as interrupt:
        if signal.getsignal(signal.SIGTERM) == interrupt._note:
            os.kill(os.getpid(), signal.SIGTERM)
        return interrupt.signal


def test_the_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) == interrupt._note
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_is_noted_and_one_cannot_be_in_another_thread():
    assert noted() == signal.SIGTERM
    assert ThreadPoolExecutor(1).submit(noted).result() is None
