"""What failed while other measurements went on: named at once, and counted at the end."""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from zoo.eval.results import Record
from zoo.train.interrupt import Interrupted


class NotWritten(OSError):
    """The result file takes no result any more: nothing that comes would be kept."""


class Unfinished(ValueError):
    """Some measurements failed; the others were made, and are in `records`."""

    def __init__(self, message: str):
        super().__init__(message)
        self.records: list[Record] = []


class Failures:
    """Go on after what fails, and raise at the end what did.

    Of a single measurement its own error is the answer. A signal ends all of them, and so does a
    result that cannot be written.
    """

    def __init__(self, count: int, what: str):
        self.count, self.what = count, what
        self.failed: list[str] = []

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Carry out a measurement; print and remember its error if it is one of several."""
        try:
            yield
        except (Interrupted, NotWritten):
            raise
        except Exception as error:  # of any kind: the other measurements still count
            if self.count == 1:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            if os.environ.get("ZOO_TRACEBACK"):
                traceback.print_exc()
            print(f"FAILED {name}: {reason}", file=sys.stderr, flush=True)
            self.failed.append(f"{name}: {reason}")

    def tell(self, records: Sequence[Record] = ()) -> None:
        """Say how many failed, which, and why.

        Raises:
            Unfinished: some did.
        """
        if self.failed:
            told = f"{len(self.failed)} of {self.count} {self.what} failed"
            error = Unfinished(f"{told}. {' | '.join(self.failed)}")
            error.records.extend(records)
            raise error
