"""The end of a call's time, which does what Ctrl-C does."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from zoo.train.interrupt import Interrupted


class Deadline:
    """When the time of a call is up, what Ctrl-C does is done: a training is saved and ends.

    Also in a job in the background, for which a shell has Ctrl-C ignored.

    Args:
        seconds: From now; `None` for no limit.
        least: With less time left no training is begun: opening its networks takes about as long.
    """

    def __init__(self, seconds: float | None, *, least: float):
        self.seconds, self.least = seconds, least
        self.began, self.passed = time.perf_counter(), False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Deadline":
        if (left := self.left) is not None:
            self._before = signal.signal(signal.SIGINT, signal.default_int_handler)
            self._timer = threading.Timer(max(left, 0), self._ring)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()
            signal.signal(signal.SIGINT, self._before)
            self._timer = None

    def _ring(self) -> None:
        self.passed = True
        os.kill(os.getpid(), signal.SIGINT)

    @property
    def spent(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float | None:
        """Seconds until the end; `None` for no limit."""
        return None if self.seconds is None else self.seconds - self.spent

    def allows(self) -> bool:
        """Tell whether there is time to begin a training."""
        if self.seconds is None:
            return True
        enough = min(self.least, self.seconds / 2)
        return not self.passed and self.seconds - self.spent >= enough

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Take this deadline's signal for the end of the context, and any other for what it is.

        It goes around the deadline's own context, at whose end the signal may come as well.
        """
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            if not self.passed:
                raise
            print(
                f"stopped after {self.spent:.0f} s, as --seconds asks; what was learnt is saved",
                flush=True,
            )
