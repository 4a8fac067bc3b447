"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from zoo.train.mesh import is_first


class Progress:
    """Report steps, samples per second and losses.

    Args:
        total: Steps of the run.
        start: Steps that an earlier part of the run has done.
        samples: Samples a step, in `unit`.
    """

    def __init__(
        self, title: str, *, total: int, start: int = 0, samples: float = 1, unit: str = "img"
    ):
        self.console = Console(stderr=True, highlight=False)
        self.title, self.total, self.samples, self.unit = title, total, samples, unit
        self._step, self._time = start, time.perf_counter()
        self.waited = 0.0
        """Share of the time since the report before the last in which steps waited for data."""
        self._bar = bars.Progress(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not (self.console.is_terminal and is_first()),
        )
        self._task = self._bar.add_task(title, total=total, completed=start, text="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def report(
        self, step: int, values: Mapping[str, float], waited: float | None = None
    ) -> tuple[float, float]:
        """Show where the run is; give samples per second and seconds since the last report.

        Args:
            waited: Seconds of these in which steps waited for data.
        """
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._step) * self.samples / seconds
        steps = step - self._step
        self._step, self._time = step, now
        text = f"{rate:.0f} {self.unit}/s  " + "  ".join(f"{k} {v:.3g}" for k, v in values.items())
        if waited is not None:
            self.waited = min(waited / seconds, 1.0)
            text += f"  waited {self.waited:.0%}"
        self._bar.update(self._task, completed=step, text=text)
        if not self.console.is_terminal and is_first():
            left = (self.total - step) * seconds / max(steps, 1)
            self.console.print(
                f"{self.title} {step}/{self.total}  {text}  ETA {left:.0f} s", soft_wrap=True
            )
        return rate, seconds

    def print(self, text: str) -> None:
        """Print a line without tearing the bar; rank 0 alone does."""
        if is_first():
            self.console.print(text, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what happens inside (an evaluation, a save) out of the next rate."""
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began
