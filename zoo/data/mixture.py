"""Several sources in one stream, each with its weight.

Positions are dealt out in blocks: a block holds of each source as many positions as its weight
says, in an order of its own, so every stretch of the stream is mixed as the whole is. How many
images of a source stand before a position follows from the block's number, so any step of a run, on
any rank, knows its images without a look at the others. Each source goes through its images in
passes of its own, each image once a pass, whatever the other sources' lengths are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zoo.data.names import Weighted
from zoo.data.plan import Plan, mix, shuffled
from zoo.data.sources import Source

BLOCK, PASS = 8, 9
"""Salts of `mix` for the order of a block, and of a source's images in a pass."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The images of several sources, one source behind another; `plan_of` mixes them.

    It has classes if all sources have the same ones.
    """

    parts: tuple[Source, ...]
    weighted: Weighted

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each source begins, and where the last ends."""
        return np.cumsum([0, *map(len, self.parts)])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Images of each source."""
        return tuple(map(len, self.parts))

    @property
    def classes(self) -> Sequence[str]:
        first, *others = (list(part.classes) for part in self.parts)
        return first if all(other == first for other in others) else ()

    def __len__(self) -> int:
        return int(self.begins[-1])

    def _at(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.begins, index, side="right")) - 1
        return part, index - int(self.begins[part])

    def key(self, index: int) -> str:
        part, inside = self._at(index)
        return f"{self.weighted.names[part]}/{self.parts[part].key(inside)}"

    def label(self, index: int) -> int | None:
        part, inside = self._at(index)
        return self.parts[part].label(inside) if self.classes else None

    def read(self, index: int) -> bytes:
        part, inside = self._at(index)
        return self.parts[part].read(inside)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A stream of several sources; `samples` is the sum of their lengths."""

    lengths: tuple[int, ...] = ()
    """Samples of each source. Their indices follow one another, as in `Mixture`."""
    shares: tuple[int, ...] = ()
    """Positions that each source has in a block."""

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        sources, numbers = self.dealt(positions)
        out = np.empty_like(numbers)
        begin = 0
        for source, length in enumerate(self.lengths):
            here = np.flatnonzero(sources == source)
            passes, within = np.divmod(numbers[here], length)
            for number in np.unique(passes):
                now = passes == number
                key = mix(self.seed, PASS, source, int(number))
                out[here[now]] = begin + shuffled(within[now], length, key)
            begin += length
        return out

    def dealt(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return whose each position is, and how many positions before it are that source's."""
        size = sum(self.shares)
        blocks, places = np.divmod(self.stored(positions), size)
        known, row = np.unique(blocks, return_inverse=True)
        hashes = mix(self.seed, BLOCK, known[:, None], np.arange(size)[None])
        owners = np.repeat(np.arange(len(self.shares)), self.shares)
        dealt = owners[np.argsort(hashes, axis=1, kind="stable")]
        sources = dealt[row, places]
        numbers = np.empty_like(sources)
        for source, share in enumerate(self.shares):
            here = sources == source
            before = np.cumsum(dealt == source, axis=1) - 1
            numbers[here] = blocks[here] * share + before[row[here], places[here]]
        return sources, numbers


def weights_of(source: Source) -> bytes:
    """Name the weights of a mixture, which its images' names do not tell; empty for one source."""
    return repr(source.weighted).encode() if isinstance(source, Mixture) else b""
