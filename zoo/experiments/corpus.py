"""The experiment's text: the bytes of the interpreter's own standard library."""

import hashlib
import os
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zoo.data.feed import PlanFeed
from zoo.data.plan import Plan
from zoo.data.text import TextSource
from zoo.language.tokens import Tokens

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD = 20
"""One file in so many is held out."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and held-out ones, of different files, and where they come from."""

    train: TextSource
    held: TextSource
    about: Mapping[str, str | int]


def standard_library(length: int) -> Corpus:
    """Read the Python files beside the interpreter, without tests and installed packages.

    A file is held out by the hash of its path, so that two interpreters of a version agree.

    Args:
        length: Bytes in a row.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[bytes]] = {"train": [], "held": []}
    for path in sorted(_files(root)):
        digest = hashlib.sha256(path.encode()).digest()
        held = int.from_bytes(digest, "big") % HELD == 0
        parts["held" if held else "train"].append((root / path).read_bytes())
    about: dict[str, str | int] = dict(python=platform.python_version())
    sources = {}
    for name, files in parts.items():
        content = b"".join(files)
        about[f"{name}_bytes"], about[f"{name}_files"] = len(content), len(files)
        about[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
        tokens = np.frombuffer(content, np.uint8)
        # One document: a recurrent state goes on from file to file, as the stream does.
        sources[name] = TextSource(name, tokens, np.array([0, len(tokens)]), length, 1.0)
    return Corpus(sources["train"], sources["held"], about)


def _files(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(root).as_posix()


@dataclass
class ByteFeed(PlanFeed):
    """Rows of bytes that lie on the device."""

    source: TextSource
    plan: Plan
    device: torch.device

    def __post_init__(self):
        self.stream = torch.from_numpy(self.source.tokens.copy()).to(self.device)

    def batches(self, start: int, steps: int) -> Iterator[Tokens]:
        """Return the batches of the steps `start`..`steps`."""
        inside = torch.arange(self.source.length, device=self.device)
        for step in range(start, steps):
            first = torch.from_numpy(self.plan.indices(step) * self.source.length)
            ids = self.stream[first.to(self.device)[:, None] + inside].long()
            yield Tokens(ids, torch.zeros_like(ids))

    def counts(self, step: int) -> Mapping[str, int]:
        """Return the bytes of a batch whose next one is learnt."""
        return defaultdict(lambda: self.plan.batch * (self.source.length - 1))
