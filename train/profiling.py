"""A few steps of a run under torch's profiler: a trace to look at, and a table to read."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

import torch

from zoo.files import written_whole

STEPS, WARM_UP = 20, 30
"""Steps that are profiled, and steps before them, in which code is compiled and caches fill."""
SHOWN = 30
TRACE, TABLE = "profile.json", "profile.txt"
"""In a run's folder: for https://ui.perfetto.dev, and where the time of a step goes."""


class StepProfile:
    """Profiles some steps of a run, and writes what it saw into the run's folder.

    Args:
        start: Steps that were done before.
        steps: Of the whole run; a short one is profiled at its end.
    """

    def __init__(self, folder: Path, start: int, steps: int, device: torch.device):
        self.folder, self.device = folder, device
        self.last = min(start + WARM_UP + STEPS, steps - 1)
        self.first = max(start + 1, self.last - STEPS)
        self.began, self.profiler = 0.0, None

    def step(self, done: int) -> str | None:
        """Be told that a step is done; return a line for a person at the end."""
        if done == self.first and self.first < self.last:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            # torch 2.11 warns of events of earlier cycles otherwise, and there is one cycle
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
            self._settle()
            self.profiler.start()
            self.began = perf_counter()
        if done != self.last or self.profiler is None:
            return None
        self._settle()
        seconds = perf_counter() - self.began
        self.profiler.stop()
        with written_whole(self.folder / TRACE) as path:
            self.profiler.export_chrome_trace(str(path))
        with written_whole(self.folder / TABLE) as path:
            path.write_text(self._table(seconds))
        self.profiler = None
        return f"profiled steps {self.first + 1} to {self.last}: {self.folder / TABLE}"

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _table(self, seconds: float) -> str:
        assert self.profiler is not None
        count, on_gpu = self.last - self.first, self.device.type == "cuda"
        wall = 1e3 * seconds / count
        lines = [f"a step: {wall:.2f} ms, over {count} steps"]
        times, calls = defaultdict[str, float](float), defaultdict[str, int](int)
        if on_gpu:
            events = [
                e for e in self.profiler.events() or () if str(e.device_type).endswith("CUDA")
            ]
            for event in events:
                times[event.name] += event.time_range.elapsed_us()
                calls[event.name] += 1
            busy = 1e-3 * covered((e.time_range.start, e.time_range.end) for e in events) / count
            total = 1e-3 * sum(times.values()) / count
            copies = 1e-3 * sum(t for n, t in times.items() if n.startswith("Mem")) / count
            lines += [
                f"the device works {busy:.2f} ms of it ({busy / wall:.1%}), idle {wall - busy:.2f} "
                "ms: launches, and waiting for the host or for data",
                f"kernels and copies {total:.2f} ms, of them at the same time {total - busy:.2f} "
                f"ms; copies {copies:.2f} ms; {sum(calls.values()) / count:.0f} of them a step",
            ]
        else:
            for row in self.profiler.key_averages():
                times[row.key], calls[row.key] = row.self_cpu_time_total, row.count
        lines += ["", "   ms/step    calls  " + ("kernel" if on_gpu else "operator")]
        for name in sorted(times, key=lambda name: -times[name])[:SHOWN]:
            ms = 1e-3 * times[name] / count
            lines.append(f"{ms:10.3f} {calls[name] / count:8.1f}  {name[:150]}")
        return "\n".join(lines) + "\n"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
