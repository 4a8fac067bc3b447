"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A signal stopped a run, which has saved its state."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class Interrupt:
    """While this context lasts, the first signal is noted and the second one kills.

    In another thread than the main one, such as Ray's, Python lets nobody note signals.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
